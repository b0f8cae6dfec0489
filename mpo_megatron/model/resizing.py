"""Add rows for tokens that a model's tokenizer has and its embedding lacks (`mpo convert --resize_vocabulary true`)."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path

import torch

from mpo_megatron.config import ConfigError, require
from mpo_megatron.data.tokenizer import count_tokens
from mpo_megatron.families import Family, read_family
from mpo_megatron.hf.conversion import CheckpointError
from mpo_megatron.model.safetensors_io import GrownTensor, RowReader, StoredTensor
from mpo_megatron.terminal.visible import visible


def check_padding(source: Path, family: Family) -> None:
    """Refuse a padding token without an embedding row: `transformers` cannot build such a model.

    Raises:
        CheckpointError: names the token.
    """
    pad = family.config.pad_token_id
    if pad is not None and not 0 <= pad < family.vocab_size:
        raise CheckpointError(
            f"{source}: pad_token_id = {pad} in config.json is outside the embedding's {family.vocab_size:,} rows; set it "
            "to another token, or to null."
        )


def vocabulary_needed(source: Path, family: Family, *, resize: bool) -> int:
    """The number of embedding rows: the model's own, or with `resize` what its tokenizer needs.

    Raises:
        ConfigError: the tokenizer has more tokens than the embedding has rows, and `resize` is off; or `resize` is on without a
            tokenizer.
    """
    tokens = count_tokens(source) if resize else count_or_warn(source)
    require(tokens is not None or not resize, f"resize_vocabulary = true, but {source} has no tokenizer to resize to.")
    if tokens is None or tokens <= family.vocab_size:
        return family.vocab_size
    if not resize:
        raise CheckpointError(
            f"{source}: its tokenizer has {tokens:,} tokens, its embedding only {family.vocab_size:,} rows (vocab_size in "
            "config.json); add the rows with `mpo convert --resize_vocabulary true`, or take the tokenizer that the model was "
            "trained with."
        )
    print(f"{source}: {tokens - family.vocab_size:,} rows are added to the vocabulary of {family.vocab_size:,}", flush=True)
    return tokens


def count_or_warn(folder: Path) -> int | None:
    """Embedding rows needed for a folder's tokenizer; None without one, or after a warning that it cannot be loaded: conversions
    copy it unchanged."""
    try:
        return count_tokens(folder)
    except ConfigError as error:
        print(f"warning: {visible(error)}", file=sys.stderr)
        return None


def warn_of_tokenizer(folder: Path, family: Family) -> None:
    """Print a warning if a folder's tokenizer cannot be loaded, or has tokens without an embedding row."""
    tokens = count_or_warn(folder)
    if tokens is not None and tokens > family.vocab_size:
        text = (
            f"warning: {folder}: its tokenizer has {tokens:,} tokens, its embedding only {family.vocab_size:,} rows; take the "
            "tokenizer that the model was trained with."
        )
        print(visible(text), file=sys.stderr)


def resize_family(family: Family, vocab_size: int) -> Family:
    """The same model with another vocabulary size."""
    config = copy.deepcopy(family.outer_config)
    (config if family.whole_config is None else config.text_config).vocab_size = vocab_size
    return read_family(config)


def grow_vocabulary(
    tensors: dict[str, StoredTensor], family: Family, reader: RowReader, max_bytes: int
) -> dict[str, StoredTensor]:
    """The tensors; those with one row per token grow to `family.vocab_size` rows.

    A new row is the mean of the others, as in `resize_token_embeddings` of transformers, but without its noise, whose variance is
    10⁻⁹ of theirs. New tokens start as likely as an average one (Hewitt, 2021), and two conversions give the same model.
    """
    grown = dict(tensors)
    for name in (name for rule in family.rules if rule.padded for name in rule.parts):
        tensor = tensors[name]
        added = family.vocab_size - tensor.shape[0]
        if added > 0:
            shape = (family.vocab_size, *tensor.shape[1:])
            plain = {item.name: getattr(tensor, item.name) for item in dataclasses.fields(tensor)}
            grown[name] = GrownTensor(**{**plain, "shape": shape}, added=added, row=_mean_row(tensor, reader, max_bytes))
    return grown


def _mean_row(tensor: StoredTensor, reader: RowReader, max_bytes: int) -> torch.Tensor:
    rows = tensor.shape[0]
    total = torch.zeros(tensor.shape[1:], dtype=torch.float64)
    step = max(1, max_bytes // (4 * tensor.row_bytes))  # a row in float64 takes up to four times the space
    for first in range(0, rows, step):
        block = torch.empty((min(step, rows - first), *tensor.shape[1:]), dtype=tensor.dtype)
        reader.read(tensor, first, block)
        total += block.double().sum(dim=0)
    return (total / rows).to(tensor.dtype)
