"""`mpo convert`: convert a Hugging Face checkpoint to a Megatron one or back, a few rows at a time.

A Megatron checkpoint folder contains
    megatron/          torch_dist checkpoint: the names of Megatron-Core's GPTModel, loadable at any TP × PP
    hf/                all files of the Hugging Face folder except the weights
    conversion.json    what export and training need (`Conversion`)
    mpo_digests.json   size and digests of all these files
Everything is checked before anything is written; the output gets its name only when complete.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from mpo_megatron.config import ConvertConfig, is_hub_name, require, validate_convert
from mpo_megatron.data.hub import download_model
from mpo_megatron.families import Family, load_family
from mpo_megatron.families.adapters import Adapter
from mpo_megatron.families.rules import OUTPUT
from mpo_megatron.files import digests
from mpo_megatron.hf.adapter import find_base
from mpo_megatron.hf.conversion import CheckpointError, Conversion, load_conversion, padded_vocab_size
from mpo_megatron.hf.identity import is_adapter_folder
from mpo_megatron.hf.quantization import require_package
from mpo_megatron.model.convert_adapter import export_adapter, import_adapter, read_matrices, read_peft, require_base
from mpo_megatron.model.convert_folder import (
    change_config,
    copy_side_files,
    find_megatron_checkpoint,
    progress,
    set_config_dtype,
    staged,
)
from mpo_megatron.model.convert_torch_dist import CheckpointReader, StoredChunk, write_checkpoint
from mpo_megatron.model.hf_names import check_kind, is_adapter, read_names, text_names
from mpo_megatron.model.merge_report import describe_change, read_tokens
from mpo_megatron.model.merging import Rounding, trained_merger
from mpo_megatron.model.odd_values import OddValues
from mpo_megatron.model.other_weights import FOLDER as OTHERS
from mpo_megatron.model.other_weights import (
    check_vision,
    count_bytes,
    describe,
    find_others,
    keep_others,
    read_rows,
    split_others,
    text_model,
    warn_of_missing_layers,
    write_kept_config,
)
from mpo_megatron.model.resizing import check_padding, grow_vocabulary, resize_family, vocabulary_needed
from mpo_megatron.model.safetensors_io import (
    DTYPE_NAMES,
    PlannedTensor,
    RowReader,
    StoredTensor,
    WeightsDigest,
    list_tensors,
    plan_shards,
    write_shards,
)
from mpo_megatron.model.weight_map import Placement, Slice, build_weight_map, extra_state_keys

__all__ = ["convert", "export_to_hf", "find_megatron_checkpoint", "import_from_hf"]

MAX_CHUNK_BYTES = 128 * 2**20
"""Largest piece of a tensor read, written or stored at once; memory use is a small multiple of it."""


def convert(config: ConvertConfig) -> None:
    """Convert `config.input` to `config.output`; the input folder's content determines the direction.

    Raises:
        ConfigError: the input cannot be converted, or the output cannot be written; no partial output remains.
    """
    validate_convert(config)
    source, output = Path(config.input), Path(config.output)
    if is_hub_name(config.input):
        source = download_model(config.input, "input", config.revision)
    megatron = find_megatron_checkpoint(source)
    if is_adapter(source) or (megatron is not None and is_adapter_folder(megatron)):
        _convert_adapter(config, megatron, output)
        return
    for name, value in (("base", config.base), ("merge", config.merge)):
        require(not value, f"{name} = {value}, but input = {source} is a whole model, not an adapter; remove it.")
    if megatron is not None:
        require(
            config.others == "keep",
            f"others = {config.others}, but input = {source} is a Megatron checkpoint; it applies to conversions to "
            "Megatron only: remove it.",
        )
        require(
            not config.resize_vocabulary,
            f"resize_vocabulary = true, but input = {source} is a Megatron checkpoint; only conversions to Megatron add rows: "
            "remove it.",
        )
        export_to_hf(megatron, output, max_shard_bytes=config.max_shard_gib * 2**30)
        return
    require(
        (source / "config.json").is_file(),
        f"input = {source} is neither a Hugging Face checkpoint (no config.json) nor a Megatron one (no megatron/, no "
        "checkpoints/step_*).",
    )
    import_from_hf(
        *(source, output),
        vocab_multiple=config.vocab_multiple,
        resize_vocabulary=config.resize_vocabulary,
        drop_others=config.others == "drop",
    )


def _convert_adapter(config: ConvertConfig, megatron: Path | None, output: Path) -> None:
    """Convert an adapter from PEFT's form to Megatron's or back, or merge it into its base model.

    Args:
        megatron: the Megatron checkpoint folder; None if the input is a PEFT folder
    """
    source = Path(config.input)
    if not config.merge:
        if megatron is None:
            import_adapter(source, output, require_base(config.base, source))
        else:
            export_adapter(megatron, output, config.base)
        return
    if megatron is None:
        base = require_base(config.base, source)
        adapter, matrices = read_peft(source, load_family(base / "hf"))
    else:
        record, matrices = read_matrices(megatron)
        adapter, base = record.adapter, find_base(megatron, record, config.base, "base")
    family = load_family(base / "hf")
    tokens = None if config.compare_text is None else read_tokens(Path(config.compare_text), base)
    if adapter.quantize != "none":
        require_package(adapter.quantize)
        print(
            f"merged into the base weights as {adapter.quantize} rounds them: the adapter was trained on these",
            file=sys.stderr,
        )
    merge_to_hf(base, adapter, matrices, output, max_shard_bytes=config.max_shard_gib * 2**30)
    if tokens is not None:
        merge = trained_merger(family, adapter, matrices, None)

        def exact() -> Iterator[tuple[str, Tensor]]:  # float32 weights are summed in float64 and rounded to float32
            return ((name, merge(name, 0, weight.float())) for name, weight in read_weights(base, family))

        def rounded() -> Iterator[tuple[str, Tensor]]:
            return ((name, merge(name, 0, weight)) for name, weight in read_weights(base, family))

        print(describe_change(family, tokens, exact, rounded), file=sys.stderr)


def read_weights(source: Path, family: Family) -> Iterator[tuple[str, Tensor]]:
    """The weights of a Megatron checkpoint folder under their Hugging Face names, in order."""
    checkpoint = CheckpointReader(source / "megatron")
    read_slice = _LastSlice(checkpoint)
    for item in build_weight_map(family, load_conversion(source).padded_vocab_size):
        for placement in item.placements:
            yield placement.name, torch.cat(list(_scatter_rows(checkpoint, read_slice, item, placement)))


def merge_to_hf(base: Path, adapter: Adapter, matrices: dict[str, Tensor], output: Path, *, max_shard_bytes: float) -> None:
    """Write the Hugging Face checkpoint `output` of a Megatron checkpoint with an adapter merged into its weights."""
    rounding = Rounding()
    change = trained_merger(load_family(base / "hf"), adapter, matrices, rounding)
    export_to_hf(base, output, max_shard_bytes=max_shard_bytes, change=change)
    print(rounding.describe(), file=sys.stderr)


# --------------------------------------------------------------------------------------------------- in


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
            dtype=_main_dtype((tensor.dtype, math.prod(tensor.shape)) for tensor in tensors.values()),
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
            f"{source}: {len(missing)} of {len(expected)} weights that config.json implies are missing: {_some(missing)}; copy "
            f"the checkpoint again, or {hint}."
        )
    unknown = [name for name in tensors if name not in expected]
    if unknown:
        raise CheckpointError(
            f"{source}: {len(unknown)} weights are unknown to the Megatron model that config.json describes: "
            f"{_some(unknown)}. Check that config.json belongs to these weights."
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


# --------------------------------------------------------------------------------------------------- out


def export_to_hf(
    source: Path, output: Path, *, max_shard_bytes: float, change: Callable[[str, int, Tensor], Tensor] | None = None
) -> None:
    """Write the Hugging Face checkpoint `output` from the Megatron checkpoint folder `source`.

    Args:
        source: folder with megatron/, hf/ and conversion.json; other keys of a training checkpoint are ignored
        output: folder to create; may exist empty
        max_shard_bytes: largest safetensors file, unless one tensor alone is larger
        change: replaces rows before writing; gets a weight's name, first row and rows
    Raises:
        ConfigError: names the file or tensor that is missing, unknown, of another shape, or damaged.
    """
    conversion = load_conversion(source)
    family = load_family(source / "hf")
    digests.require_list(source)
    digests.check_folder(source, weights=False)  # each weight has its own checksum, compared while reading
    slices = build_weight_map(family, conversion.padded_vocab_size)
    checkpoint = CheckpointReader(source / "megatron")
    _check_megatron_tensors(checkpoint, slices)
    homes: dict[str, tuple[Slice, Placement]] = {p.name: (item, p) for item in slices for p in item.placements}
    if conversion.tied_output_stored:
        homes[OUTPUT] = homes[family.embedding_name]
    others = find_others(source, conversion)
    planned = [
        PlannedTensor(name, checkpoint.tensors[item.key].properties.dtype, placement.shape)
        for name, (item, placement) in homes.items()
    ]
    dtype = _main_dtype((tensor.dtype, math.prod(tensor.shape)) for tensor in planned)
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
        digests.write_list(folder)


def _check_megatron_tensors(checkpoint: CheckpointReader, slices: list[Slice]) -> None:
    expected = {item.key: item.global_shape for item in slices}
    folder = checkpoint.folder
    missing = [key for key in expected if key not in checkpoint.tensors]
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} of {len(expected)} weights of the model are missing: {_some(missing)}.")
    model_keys = ("embedding.", "decoder.", "output_layer.")
    unknown = [key for key in checkpoint.tensors if key.startswith(model_keys) and key not in expected]
    if unknown:
        raise CheckpointError(
            f"{folder}: {len(unknown)} weights are unknown to the Hugging Face model that hf/config.json "
            f"describes: {_some(unknown)}."
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


# --------------------------------------------------------------------------------------------------- both ways


def _main_dtype(tensors: Iterator[tuple[torch.dtype, int]]) -> str:
    count: Counter[torch.dtype] = Counter()
    for dtype, elements in tensors:
        count[dtype] += elements
    return str(count.most_common(1)[0][0]).removeprefix("torch.")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
