"""Weights in a Hugging Face checkpoint outside the language model: a vision tower, or layers that predict further tokens.

They are not trained. A conversion stores them in a folder of the Megatron checkpoint, and export writes them back bit for bit
beside the trained ones; a run's checkpoints refer to that folder. With `others = drop`, a conversion removes them, and a
multimodal checkpoint becomes that of its text model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModel

from mpo_megatron.families import Family, model_name, read_family
from mpo_megatron.families.qwen_hybrid import PREDICTING_FIELDS
from mpo_megatron.hf.conversion import CheckpointError, Conversion
from mpo_megatron.model.odd_values import OddValues
from mpo_megatron.model.safetensors_io import (
    PlannedTensor,
    RowReader,
    StoredTensor,
    WeightsDigest,
    list_tensors,
    plan_shards,
    write_shards,
)
from mpo_megatron.terminal.visible import visible

FOLDER = "others"
"""Folder inside a Megatron checkpoint folder."""
VISION = "model.visual."
"""Prefix of the vision tower's weights."""
PREDICTING = "mtp."
"""Prefix of layers that predict further tokens."""
SHARD_BYTES = 4 * 2**30
"""Largest file in that folder."""


def split_others(tensors: Mapping[str, StoredTensor], family: Family) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Split a checkpoint's tensors into the language model's and all others."""
    others = {name: tensor for name, tensor in tensors.items() if name.startswith(family.other_weights)}
    return {name: tensor for name, tensor in tensors.items() if name not in others}, others


def check_vision(others: Mapping[str, StoredTensor], family: Family, source: Path) -> None:
    """Refuse a multimodal checkpoint with an incomplete vision tower: `transformers` would load random numbers for the rest.

    If its weights have other names than in this `transformers`, they cannot be compared.

    Raises:
        CheckpointError: names missing weights, or one of another shape.
    """
    if family.whole_config is None:
        return
    with torch.device("meta"):
        model = AutoModel.from_config(family.whole_config.vision_config)
    expected = {VISION + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in others.items() if name.startswith(VISION)}
    missing = [name for name in expected if name not in found]
    hint = "copy the checkpoint again, or convert its text model alone with --others drop"
    if missing and found.keys() <= expected.keys():
        raise CheckpointError(
            f"{source}: {len(missing)} of the vision tower's {len(expected)} weights are missing: "
            f"{', '.join(missing[:3])}; {hint}."
        )
    for name in found.keys() & expected.keys():
        if found[name] != expected[name]:
            raise CheckpointError(f"{source}: {name} is {list(found[name])}, but {list(expected[name])} by config.json; {hint}.")


def warn_of_missing_layers(others: Mapping[str, StoredTensor], family: Family, source: Path) -> None:
    """Report layers for multi-token prediction that config.json names and that have no weights.

    `transformers` drops these weights whenever it saves a model, and keeps the field. The language model is complete without
    them, so this is no error.
    """
    layers = range(family.predicting_layers)
    missing = [index for index in layers if not any(name.startswith(f"{PREDICTING}layers.{index}.") for name in others)]
    if missing:
        text = (
            f"{source}: {len(missing)} of the {len(layers)} layers for multi-token prediction that config.json names have no "
            f"weights ({PREDICTING}layers.{missing[0]}.*); training does not need them, but an engine cannot predict with the "
            "exported model. To keep them, convert the published checkpoint."
        )
        print(visible(f"WARNING: {text}"), file=sys.stderr)


def text_model(family: Family) -> Family:
    """The same language model as a standalone model: only its own config, and weights under its own names."""
    return family if family.whole_config is None else read_family(family.config)


def write_kept_config(path: Path, family: Family, *, multimodal: bool) -> None:
    """Change a config.json to what is left without other weights: a text model, without layers for multi-token prediction."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    if multimodal:
        inherited = {name: settings[name] for name in ("dtype", "torch_dtype", "transformers_version") if name in settings}
        settings = {
            **inherited,
            **settings["text_config"],
            "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING[type(family.config)].__name__],
            **model_name(family.config),
        }
    named = [name for name in PREDICTING_FIELDS if settings.get(name)]
    settings |= dict.fromkeys(named, 0)
    if multimodal or named:  # otherwise config.json stays byte-identical
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def describe(others: Mapping[str, StoredTensor]) -> str:
    """Their number, and the prefixes of their names."""
    kinds = sorted({name.split(".")[1 if name.startswith("model.") else 0] for name in others})
    return f"{len(others)} weights that are not the language model's ({', '.join(kinds)})"


def count_bytes(others: Mapping[str, StoredTensor]) -> int:
    """Size of their data in bytes."""
    return sum(_planned(tensor).num_bytes for tensor in others.values())


def keep_others(
    folder: Path, others: Mapping[str, StoredTensor], max_bytes: int, advance: Callable[[int], None], odd: OddValues
) -> str:
    """Write them to a Megatron checkpoint folder, and count their odd values; their digest."""
    digest = WeightsDigest()
    (folder / FOLDER).mkdir()
    with RowReader() as reader:

        def rows_of(planned: PlannedTensor) -> Iterator[Tensor]:
            for rows in read_rows(others[planned.name], reader, max_bytes):
                digest.update(others[planned.name], rows)
                odd.count(planned.name, rows)
                advance(rows.numel() * rows.dtype.itemsize)
                yield rows

        write_shards(folder / FOLDER, plan_shards([_planned(tensor) for tensor in others.values()], SHARD_BYTES), rows_of)
    print(f"{describe(others)} are kept unchanged", file=sys.stderr)
    return digest.hexdigest()


def find_others(source: Path, conversion: Conversion) -> dict[str, StoredTensor]:
    """The other weights of a Megatron checkpoint folder, from itself or from the checkpoint that its training started from.

    Raises:
        CheckpointError: they are no longer where they were.
    """
    if conversion.others is None:
        return {}
    for folder in (source / FOLDER, Path(conversion.others)):
        if folder.is_dir():
            return list_tensors(folder)
    raise CheckpointError(
        f"{conversion.others}: no such folder; it holds this model's untrained weights (a vision tower, for "
        f"example). Copy it to {source / FOLDER}, or convert the original checkpoint with --others drop and train from there."
    )


def read_rows(tensor: StoredTensor, reader: RowReader, max_bytes: int) -> Iterator[Tensor]:
    """A tensor's rows, in order, in pieces of at most `max_bytes`."""
    if not tensor.shape:
        raise CheckpointError(
            f"{tensor.name} in {tensor.file} is a single number; only tensors with rows can be kept: drop them all "
            "with --others drop."
        )
    step = max(1, max_bytes // max(1, tensor.row_bytes))
    for first in range(0, tensor.shape[0], step):
        rows = torch.empty((min(step, tensor.shape[0] - first), *tensor.shape[1:]), dtype=tensor.dtype)
        reader.read(tensor, first, rows)
        yield rows


def _planned(tensor: StoredTensor) -> PlannedTensor:
    return PlannedTensor(tensor.name, tensor.dtype, tensor.shape)
