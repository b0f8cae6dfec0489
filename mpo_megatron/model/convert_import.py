"""From a Hugging Face checkpoint to a Megatron one: rows of safetensors files are read directly into the boxes to store."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from mpo_megatron.families import load_family
from mpo_megatron.families.rules import OUTPUT
from mpo_megatron.files import digests
from mpo_megatron.hf.conversion import CheckpointError, Conversion, padded_vocab_size
from mpo_megatron.model.convert_folder import (
    MAX_CHUNK_BYTES,
    change_config,
    copy_side_files,
    first_names,
    main_dtype,
    progress,
    staged,
)
from mpo_megatron.model.convert_torch_dist import StoredChunk, write_checkpoint
from mpo_megatron.model.hf_names import check_kind, read_names, text_names
from mpo_megatron.model.odd_values import OddValues
from mpo_megatron.model.other_weights import FOLDER as OTHERS
from mpo_megatron.model.other_weights import (
    check_vision,
    count_bytes,
    describe,
    keep_others,
    split_others,
    text_model,
    warn_of_missing_layers,
    write_kept_config,
)
from mpo_megatron.model.resizing import check_padding, grow_vocabulary, resize_family, vocabulary_needed
from mpo_megatron.model.safetensors_io import DTYPE_NAMES, RowReader, StoredTensor, WeightsDigest, list_tensors
from mpo_megatron.model.weight_map import Slice, build_weight_map, extra_state_keys


def import_from_hf(
    source: Path,
    output: Path,
    *,
    vocab_multiple: int,
    resize_vocabulary: bool = False,
    drop_others: bool = False,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
) -> None:
    """Write the Megatron checkpoint folder `output` from the Hugging Face checkpoint `source`.

    Args:
        source: folder with config.json and safetensors
        output: folder to create; may exist empty
        vocab_multiple: pad the vocabulary with zero rows to a multiple of this
        resize_vocabulary: add rows for tokens of the tokenizer without a row
        drop_others: drop weights that are not the language model's
        max_chunk_bytes: largest box that is stored, and held in memory, as a whole
    Raises:
        ConfigError: names the file or tensor that is missing, unknown, of another shape, or damaged.
    """
    digests.check_folder(source, weights=True)
    family = load_family(source)
    check_kind(source, family)
    stored, others = split_others(read_names(list_tensors(source), family, source), family)
    multimodal = family.whole_config is not None
    if drop_others:
        family = text_model(family)
        stored, dropped, others = read_names(text_names(stored), family, source), others, {}
        print(f"{source}: {describe(dropped)} are dropped", file=sys.stderr)
    else:
        warn_of_missing_layers(others, family, source)
    check_vision(others, family, source)  # of a multimodal model
    tied_output = stored.pop(OUTPUT, None) if family.tie_word_embeddings else None
    _check_hf_tensors(stored, build_weight_map(family, family.vocab_size), source)
    vocab_size = vocabulary_needed(source, family, resize=resize_vocabulary)
    family = resize_family(family, vocab_size)
    check_padding(source, family)
    padded_vocab = padded_vocab_size(vocab_size, vocab_multiple)
    slices = build_weight_map(family, padded_vocab)
    with RowReader() as reader:
        tensors = grow_vocabulary(stored, family, reader, max_chunk_bytes)
    dtypes = _dtype_of_keys(tensors, slices)
    homes = {chunk: item for item in slices for chunk in _chunks(item, dtypes[item.key], max_chunk_bytes)}
    total = sum(chunk.num_bytes for chunk in homes) + count_bytes(others)
    digest = WeightsDigest()
    odd = OddValues()

    with staged(output, total) as folder, RowReader() as reader, progress("Hugging Face → Megatron", total) as advance:
        if tied_output is not None:
            _check_tied_output(reader, stored[family.embedding_name], tied_output, max_chunk_bytes)

        def resolve(chunk: StoredChunk) -> Tensor:
            advance(chunk.num_bytes)
            return _gather_rows(chunk, homes[chunk], tensors, reader, digest, odd)

        write_checkpoint(folder / "megatron", list(homes), extra_state_keys(family), resolve)
        copy_side_files(source, folder / "hf")
        if drop_others:
            write_kept_config(folder / "hf" / "config.json", family, multimodal=multimodal)
        others_digest = keep_others(folder, others, max_chunk_bytes, advance, odd) if others else None
        odd.warn(source)
        if vocab_size != stored[family.embedding_name].shape[0]:
            change_config(folder / "hf" / "config.json", "vocab_size", vocab_size)
        conversion = Conversion(
            architecture=(family.outer_config.architectures or [""])[0],
            vocab_size=family.vocab_size,
            padded_vocab_size=padded_vocab,
            dtype=main_dtype((tensor.dtype, math.prod(tensor.shape)) for tensor in tensors.values()),
            digest=digest.hexdigest(),
            tied_output_stored=tied_output is not None,
            others=str(output.resolve() / OTHERS) if others else None,
            others_digest=others_digest,
            versions={name: version(name) for name in ("megatron-core", "torch", "transformers")},
        )
        (folder / "conversion.json").write_text(json.dumps(dataclasses.asdict(conversion), indent=2) + "\n", encoding="utf-8")
        digests.write_list(folder)


def _check_hf_tensors(tensors: dict[str, StoredTensor], slices: list[Slice], source: Path) -> None:
    expected = {placement.name: placement for item in slices for placement in item.placements}
    missing = [name for name in expected if name not in tensors]
    if missing:
        hint = "use the config.json of these weights"
        if missing == [OUTPUT]:
            hint = "set tie_word_embeddings to true if it is the embedding"
        raise CheckpointError(
            f"{source}: {len(missing)} of {len(expected)} weights that config.json implies are missing: {first_names(missing)}; "
            f"copy the checkpoint again, or {hint}."
        )
    unknown = [name for name in tensors if name not in expected]
    if unknown:
        raise CheckpointError(
            f"{source}: {len(unknown)} weights are unknown to the Megatron model that config.json describes: "
            f"{first_names(unknown)}. Check that config.json belongs to these weights."
        )
    for name, placement in expected.items():
        if tensors[name].shape != placement.shape:
            raise CheckpointError(
                f"{name} is {list(tensors[name].shape)} in {tensors[name].file}, but {list(placement.shape)} by "
                "config.json. Check that config.json belongs to these weights."
            )


def _dtype_of_keys(tensors: dict[str, StoredTensor], slices: list[Slice]) -> dict[str, torch.dtype]:
    """The dtype of every Megatron tensor; Hugging Face tensors that form one tensor (over all layers) must agree."""
    first: dict[str, StoredTensor] = {}
    for item in slices:
        for placement in item.placements:
            tensor = tensors[placement.name]
            other = first.setdefault(item.key, tensor)
            if other.dtype != tensor.dtype:
                raise CheckpointError(
                    f"{tensor.name} is {DTYPE_NAMES[tensor.dtype]}, {other.name} is {DTYPE_NAMES[other.dtype]}; "
                    f"in Megatron they are one tensor, {item.key}: save the checkpoint with one dtype for both."
                )
    return {key: tensor.dtype for key, tensor in first.items()}


def _chunks(item: Slice, dtype: torch.dtype, max_bytes: int) -> Iterator[StoredChunk]:
    """Boxes of at most `max_bytes` that cover the slice, split between rows and at the starts of contiguous parts."""
    starts = [0]
    if all(len(placement.runs) == 1 for placement in item.placements):
        starts = [placement.runs[0].megatron_row for placement in item.placements]
    row_shape = item.shape[1:]
    max_rows = max(1, max_bytes // (math.prod(row_shape) * dtype.itemsize))
    for start, stop in zip(starts, [*starts[1:], item.shape[0]], strict=True):
        number = -(-(stop - start) // max_rows)
        rows = -(-(stop - start) // number)
        for first in range(start, stop, rows):
            box = (min(rows, stop - first), *row_shape)
            offsets = (first, *(0 for _ in row_shape))
            leading = (1,) * len(item.index)
            yield StoredChunk(item.key, dtype, item.global_shape, (*item.index, *offsets), (*leading, *box))


def _gather_rows(
    chunk: StoredChunk,
    item: Slice,
    tensors: dict[str, StoredTensor],
    reader: RowReader,
    digest: WeightsDigest,
    odd: OddValues,
) -> Tensor:
    """The chunk's data: rows of Hugging Face tensors, read directly into place, and zeros for padding."""
    data = torch.zeros(chunk.sizes, dtype=chunk.dtype)
    axis = len(item.index)
    rows = data.flatten(0, axis) if axis else data  # a view: the axes for layers and experts have one entry
    chunk_start, chunk_stop = chunk.offsets[axis], chunk.offsets[axis] + chunk.sizes[axis]
    for placement in item.placements:
        tensor = tensors[placement.name]
        for run in placement.runs:
            start, stop = max(run.megatron_row, chunk_start), min(run.megatron_row + run.num_rows, chunk_stop)
            if start < stop:
                into = rows[start - chunk_start : stop - chunk_start]
                reader.read(tensor, run.hf_row + start - run.megatron_row, into)
                digest.update(tensor, into)
                odd.count(tensor.name, into)
    return data


def _check_tied_output(reader: RowReader, embedding: StoredTensor, output: StoredTensor, max_bytes: int) -> None:
    """Raise `CheckpointError` unless a stored lm_head.weight equals the embedding that config.json ties to it."""
    same = (embedding.dtype, embedding.shape) == (output.dtype, output.shape)
    if same:
        step = max(1, max_bytes // (2 * embedding.row_bytes))
        for first in range(0, embedding.shape[0], step):
            rows = [
                torch.empty((min(step, embedding.shape[0] - first), *embedding.shape[1:]), dtype=embedding.dtype) for _ in "ab"
            ]
            reader.read(embedding, first, rows[0])
            reader.read(output, first, rows[1])
            same = same and torch.equal(rows[0].view(torch.uint8), rows[1].view(torch.uint8))
    if not same:
        raise CheckpointError(
            f"{output.file} holds an {OUTPUT} that differs from {embedding.name}, but config.json ties them; set "
            "tie_word_embeddings to false to keep both, or remove it."
        )
