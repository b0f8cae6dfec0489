"""From a Megatron checkpoint to a Hugging Face one: stored boxes are read in the order of the rows to write."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from mpo_megatron.families import Family, load_family
from mpo_megatron.families.rules import OUTPUT
from mpo_megatron.files import digests
from mpo_megatron.hf.conversion import CheckpointError, load_conversion
from mpo_megatron.model.convert_folder import (
    MAX_CHUNK_BYTES,
    change_config,
    copy_side_files,
    first_names,
    main_dtype,
    progress,
    set_config_dtype,
    staged,
)
from mpo_megatron.model.convert_torch_dist import CheckpointReader
from mpo_megatron.model.odd_values import OddValues
from mpo_megatron.model.other_weights import find_others, read_rows
from mpo_megatron.model.resizing import warn_of_tokenizer
from mpo_megatron.model.safetensors_io import DTYPE_NAMES, PlannedTensor, RowReader, WeightsDigest, plan_shards, write_shards
from mpo_megatron.model.weight_map import Placement, Slice, build_weight_map


def export_to_hf(
    source: Path,
    output: Path,
    *,
    max_shard_bytes: float,
    change: Callable[[str, int, Tensor], Tensor] | None = None,
    untie: bool = False,
) -> None:
    """Write the Hugging Face checkpoint `output` from the Megatron checkpoint folder `source`.

    Args:
        source: folder with megatron/, hf/ and conversion.json; other keys of a training checkpoint are ignored
        output: folder to create; may exist empty
        max_shard_bytes: largest safetensors file, unless one tensor alone is larger
        change: replaces rows before writing; gets a weight's name, first row and rows
        untie: write the output layer separately from the embedding to which it is tied
    Raises:
        ConfigError: names the file or tensor that is missing, unknown, of another shape, or damaged.
    """
    conversion = load_conversion(source)
    family = load_family(source / "hf")
    digests.require_list(source)
    digests.check_folder(source, weights=False)  # each weight has its own checksum, compared while reading
    warn_of_tokenizer(source / "hf", family)
    slices = build_weight_map(family, conversion.padded_vocab_size)
    checkpoint = CheckpointReader(source / "megatron")
    _check_megatron_tensors(checkpoint, slices)
    homes: dict[str, tuple[Slice, Placement]] = {p.name: (item, p) for item in slices for p in item.placements}
    if conversion.tied_output_stored or untie:
        homes[OUTPUT] = homes[family.embedding_name]
    others = find_others(source, conversion)
    planned = [
        PlannedTensor(name, checkpoint.tensors[item.key].properties.dtype, placement.shape)
        for name, (item, placement) in homes.items()
    ]
    dtype = main_dtype((tensor.dtype, math.prod(tensor.shape)) for tensor in planned)
    planned += [PlannedTensor(name, tensor.dtype, tensor.shape) for name, tensor in others.items()]
    total = sum(tensor.num_bytes for tensor in planned)
    read_slice = _LastSlice(checkpoint)
    others_digest = WeightsDigest()
    odd = OddValues()

    with staged(output, total) as folder, RowReader() as reader, progress("Megatron → Hugging Face", total) as advance:

        def rows_of(tensor: PlannedTensor) -> Iterator[Tensor]:
            if tensor.name in others:
                for rows in read_rows(others[tensor.name], reader, MAX_CHUNK_BYTES):
                    others_digest.update(others[tensor.name], rows)
                    odd.count(tensor.name, rows)
                    advance(rows.numel() * rows.dtype.itemsize)
                    yield rows
                return
            item, placement = homes[tensor.name]
            first = 0
            for rows in _scatter_rows(checkpoint, read_slice, item, placement):
                written = rows if change is None else change(tensor.name, first, rows)
                odd.count(tensor.name, written)
                yield written
                first += len(rows)
                advance(rows.numel() * rows.dtype.itemsize)

        write_shards(folder, plan_shards(planned, max_shard_bytes), rows_of)
        odd.warn(source)
        if others and others_digest.hexdigest() != conversion.others_digest:
            raise CheckpointError(
                f"{next(iter(others.values())).file.parent}: these weights differ from the converted ones, or are damaged; "
                "copy the folder again."
            )
        copy_side_files(source / "hf", folder)
        if dtype != conversion.dtype:  # training used another precision; otherwise config.json stays byte-identical
            set_config_dtype(folder / "config.json", dtype)
        if untie:
            change_config(folder / "config.json", "tie_word_embeddings", False)
        digests.write_list(folder)


def read_weights(source: Path, family: Family) -> Iterator[tuple[str, Tensor]]:
    """The weights of a Megatron checkpoint folder under their Hugging Face names, in order."""
    checkpoint = CheckpointReader(source / "megatron")
    read_slice = _LastSlice(checkpoint)
    for item in build_weight_map(family, load_conversion(source).padded_vocab_size):
        for placement in item.placements:
            yield placement.name, torch.cat(list(_scatter_rows(checkpoint, read_slice, item, placement)))


def _check_megatron_tensors(checkpoint: CheckpointReader, slices: list[Slice]) -> None:
    expected = {item.key: item.global_shape for item in slices}
    folder = checkpoint.folder
    missing = [key for key in expected if key not in checkpoint.tensors]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(expected)} weights of the model are missing: {first_names(missing)}."
        )
    model_keys = ("embedding.", "decoder.", "output_layer.")
    unknown = [key for key in checkpoint.tensors if key.startswith(model_keys) and key not in expected]
    if unknown:
        raise CheckpointError(
            f"{folder}: {len(unknown)} weights are unknown to the Hugging Face model that hf/config.json "
            f"describes: {first_names(unknown)}."
        )
    for key, shape in expected.items():
        entry = checkpoint.tensors[key]
        if tuple(entry.size) != shape:
            raise CheckpointError(
                f"{key} is {list(entry.size)} in {folder}, but {list(shape)} according to hf/config.json and "
                "conversion.json; copy the checkpoint again."
            )
        if entry.properties.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{key} in {folder} is {entry.properties.dtype}; weights must be float32, float16 or bfloat16.")
    checkpoint.check_files(set(expected))


class _LastSlice:
    """Reads whole slices and keeps the last one: q, k and v, written consecutively, come from the same slice."""

    def __init__(self, checkpoint: CheckpointReader) -> None:
        self._checkpoint = checkpoint
        self._item: Slice | None = None
        self._rows = torch.empty(0)

    def __call__(self, item: Slice) -> Tensor:
        if item != self._item:
            self._rows = _read_rows(self._checkpoint, item, 0, item.shape[0])
            self._item = item
        return self._rows


def _scatter_rows(
    checkpoint: CheckpointReader, read_slice: Callable[[Slice], Tensor], item: Slice, placement: Placement
) -> Iterator[Tensor]:
    """The rows of one Hugging Face tensor, in order, in the pieces in which they are stored."""
    if len(placement.runs) > 1:
        slice_rows = read_slice(item)
        for run in placement.runs:
            yield slice_rows[run.megatron_row : run.megatron_row + run.num_rows]
        return
    [run] = placement.runs
    start, stop = run.megatron_row, run.megatron_row + run.num_rows
    cuts = [start, *(row for row in checkpoint.row_starts(item.key, item.index) if start < row < stop), stop]
    for first, last in itertools.pairwise(cuts):
        yield _read_rows(checkpoint, item, first, last)


def _read_rows(checkpoint: CheckpointReader, item: Slice, first: int, last: int) -> Tensor:
    offsets, sizes = [first, *(0 for _ in item.shape[1:])], [last - first, *item.shape[1:]]
    leading = [1] * len(item.index)
    return checkpoint.read(item.key, [*item.index, *offsets], [*leading, *sizes]).reshape(sizes)
