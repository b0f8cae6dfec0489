"""Read and write safetensors files a few rows at a time.

The `safetensors` library maps whole files into memory and writes from a dictionary of tensors; both grow with the file. The
format is simple (8 bytes of header length, a JSON header, then the tensors back to back), so this module reads and writes any
range of rows directly, with one buffer in memory. The tests compare it with the library.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mpo_megatron.config import require
from mpo_megatron.hf.conversion import CheckpointError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Safetensors' names of the supported dtypes."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000
"""The safetensors library's own limit on the header size, in bytes."""


@dataclass(frozen=True)
class StoredTensor:
    """Location of one tensor's bytes."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (the tensor without its first axis)."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True)
class GrownTensor(StoredTensor):
    """A tensor with more rows than its file holds."""

    added: int
    """Number of last rows that are not in the file."""
    row: Tensor
    """Value of each of these rows."""


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


# --------------------------------------------------------------------------------------------------- reading


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a Hugging Face checkpoint, from its single file or else its index, as `transformers` loads them; reads only
    headers.

    Raises:
        CheckpointError: there are no safetensors, a file is missing or truncated, or an index contradicts its files.
    """
    index = _read_index(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(index.values())):
        path = folder / file
        if not path.is_file():
            names = [name for name, where in index.items() if where == file]
            raise CheckpointError(
                f"{path}: no such file, but {INDEX} puts {len(names)} tensors there ({names[0]}, …); copy or download it again."
            )
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise CheckpointError(f"{name} is in {tensors[name].file.name} and in {file}; keep one of them.")
            if index.get(name, file) != file:
                raise CheckpointError(f"{path} holds {name}, but {INDEX} puts it in {index[name]}; copy the checkpoint again.")
            tensors[name] = tensor
    for name, file in index.items():
        if name and name not in tensors:
            raise CheckpointError(f"{folder / INDEX} puts {name} in {file}, but that file lacks it; copy the checkpoint again.")
    return tensors


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name → file name; for a checkpoint without index, its one file under an empty name."""
    path = folder / INDEX
    if (folder / SINGLE).is_file():  # transformers ignores an index beside it
        return {"": SINGLE}
    if not path.is_file():
        raise CheckpointError(_why_no_weights(folder))
    try:
        index = json.loads(path.read_bytes())["weight_map"]
        complete = bool(index) and all(isinstance(item, str) for pair in index.items() for item in pair)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors index ({error!r}); copy or download it again.") from error
    require(complete, f"{path}: weight_map names no files; copy or download it again.")
    for file in set(index.values()):
        require(Path(file).name == file, f"{path}: {file!r} is not a file name in this folder; refusing to read it.")
    return dict(index)


def _why_no_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} has its weights only as pickles ({pickles[0]}), which can run code when read; "
            "save them as safetensors first, with transformers: "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype='auto').save_pretrained(NEW_FOLDER)."
        )
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if files and all(name.startswith("consolidated") for name in files):
        return f"{folder} has only {files[0]}, its author's own format; copy the files of transformers: {SINGLE}, or its shards."
    if len(files) == 1:
        return f"{folder} has {files[0]}, but neither {SINGLE} nor {INDEX}; rename it to {SINGLE} if it holds the whole model."
    if files:
        return f"{folder} has neither {SINGLE} nor {INDEX}; copy the index of its shards too."
    return f"{folder} has no weights: neither {SINGLE} nor {INDEX} is there."


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.

    Raises:
        CheckpointError: the file is incomplete, or a tensor has a dtype other than float32, float16, bfloat16.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise CheckpointError(f"{path}: a Git LFS pointer instead of the weights; fetch them with `git lfs pull`.")
        length = int.from_bytes(start, "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise CheckpointError(f"{path}: incomplete safetensors file ({size:,} bytes); copy or download it again.")
        try:
            entries = json.loads(file.read(length))
            _check_metadata(entries.get("__metadata__"))
            tensors = {
                name: _parse_entry(path, 8 + length, name, entry) for name, entry in entries.items() if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{path}: its safetensors header does not parse ({error!r}); copy or download it again."
            ) from error
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.num_bytes)):
        if tensor.start != end:
            raise CheckpointError(
                f"{path}: damaged: by its header, {tensor.name} does not start where the tensor before it ends; copy or download "
                "it again."
            )
        end += tensor.num_bytes
    if size != end:
        raise CheckpointError(
            f"{path}: truncated or damaged: {size:,} bytes, but its header describes {end:,}; copy or download it again."
        )
    return tensors


def _check_metadata(metadata: object) -> None:
    """Check a header's metadata as the safetensors library does: a mapping from texts to texts, or none.

    Raises:
        ValueError: it is something else.
    """
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        raise ValueError(f"__metadata__ = {metadata!r:.100} is not a mapping of texts")
    for name, value in metadata.items():
        if not isinstance(value, str):
            raise ValueError(f"__metadata__.{name} = {value!r:.100} is not a text")


def _parse_entry(path: Path, data_start: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{name} in {path} has dtype {entry['dtype']}; weights must be {', '.join(DTYPES)}. "
            "A quantized checkpoint cannot be trained: convert the original one."
        )
    start, end = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (start, end, *entry["shape"])):
        raise ValueError(f"{name} has the shape {entry['shape']} and the place {entry['data_offsets']}")
    tensor = StoredTensor(name, path, DTYPES[entry["dtype"]], tuple(entry["shape"]), data_start + start)
    if end - start != math.prod(tensor.shape) * tensor.dtype.itemsize:
        raise CheckpointError(
            f"{name} in {path}: {end - start:,} bytes for shape {list(tensor.shape)}; copy or download it again."
        )
    return tensor


class RowReader:
    """Reads rows into existing memory; keeps the last file open."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: BinaryIO | None = None

    def __enter__(self) -> RowReader:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def read(self, tensor: StoredTensor, first_row: int, into: Tensor) -> None:
        """Fill `into` ([n, …], contiguous, of the tensor's dtype) with the tensor's rows from `first_row`."""
        if isinstance(tensor, GrownTensor):
            held = max(0, tensor.shape[0] - tensor.added - first_row)
            into[held:] = tensor.row
            into = into[:held]
        if self._path != tensor.file or self._file is None:
            self.__exit__()
            self._path, self._file = tensor.file, tensor.file.open("rb", buffering=0)
        self._file.seek(tensor.start + first_row * tensor.row_bytes)
        buffer = byte_view(into)
        while buffer:
            count = self._file.readinto(buffer)  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(f"{tensor.file}: ends inside {tensor.name}; copy or download it again.")
            buffer = buffer[count:]


class WeightsDigest:
    """SHA-256 of a checkpoint's weights, independent of their files: names, dtypes, shapes and bytes."""

    def __init__(self) -> None:
        self._tensors: dict[str, Any] = {}

    def update(self, tensor: StoredTensor, rows: Tensor) -> None:
        """Add the next rows of a tensor; rows arrive in order, tensors in any order."""
        if tensor.name not in self._tensors:
            header = f"{tensor.name} {DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)}\n"
            self._tensors[tensor.name] = hashlib.sha256(header.encode())
        self._tensors[tensor.name].update(byte_view(rows))

    def hexdigest(self) -> str:
        """The digest of all tensors so far, independent of their order."""
        lines = sorted(f"{name} {tensor.hexdigest()}\n" for name, tensor in self._tensors.items())
        return hashlib.sha256("".join(lines).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(tensors: Iterable[PlannedTensor], max_bytes: float) -> list[list[PlannedTensor]]:
    """Split tensors, in order, into files of at most `max_bytes`; a larger tensor gets its own file."""
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def write_shards(folder: Path, shards: list[list[PlannedTensor]], rows_of: Callable[[PlannedTensor], Iterator[Tensor]]) -> None:
    """Write the files and, for several, their index; `rows_of` yields a tensor's rows in order."""
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, shard, rows_of)
        index.update({tensor.name: file for tensor in shard})
    if len(shards) > 1:
        total = sum(tensor.num_bytes for shard in shards for tensor in shard)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2, sort_keys=True)
        (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file. The library's `save_file` raises its own error on a full disk, without an error number."""
    planned = [PlannedTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sorted(tensors.items())]
    _write_file(path, planned, lambda tensor: iter((tensors[tensor.name].contiguous(),)))


def _write_file(path: Path, shard: list[PlannedTensor], rows_of: Callable[[PlannedTensor], Iterator[Tensor]]) -> None:
    # Wider elements first, as the library does: every tensor then starts at a multiple of its element size.
    ordered = sorted(shard, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in ordered:
        offsets = [position, position + tensor.num_bytes]
        header[tensor.name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    with path.open("wb", buffering=0) as file:
        _write_all(file, memoryview(len(text).to_bytes(8, "little") + text))
        for tensor in ordered:
            for rows in rows_of(tensor):
                _write_all(file, byte_view(rows))
        os.fsync(file.fileno())
    written = path.stat().st_size
    if written != 8 + len(text) + position:
        raise RuntimeError(f"{path}: wrote {written:,} bytes, planned {8 + len(text) + position:,}")


def _write_all(file: Any, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]
