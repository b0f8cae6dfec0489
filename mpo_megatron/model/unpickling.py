"""Read the pickles of a checkpoint folder without running what they name.

A pickle names the functions that build its objects, and reading it calls them: a crafted pickle runs any command. torch's
distributed checkpoints hold pickles in two places. Each is read with an allow-list of harmless classes:

    .metadata     read by `read_metadata`, also where torch and Megatron-Core open it (`reading_safely`)
    *.distcp,     objects and tensors of torch.save: `weights_only=True`, even where torch asks for the opposite
       common.pt     (`reading_safely`)

Every reader parses the same bytes that it checked.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pathlib
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any
from unittest import mock

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from mpo_megatron.hf.conversion import CheckpointError
from mpo_megatron.terminal.visible import visible

_CHECKPOINT = "torch.distributed.checkpoint"
_ALLOWED = {
    *((f"{_CHECKPOINT}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((f"{_CHECKPOINT}.metadata", name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata")),
    *((f"{_CHECKPOINT}.metadata", name) for name in ("TensorProperties",)),
    *((f"{_CHECKPOINT}.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
    *((f"{_CHECKPOINT}.planner", name) for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # a layout by its name
    ("collections", "OrderedDict"),
}
"""Classes in a distributed checkpoint's metadata, besides dtypes and paths."""

_PATHS = {(module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath", "PurePosixPath")}
"""Types of the path where a checkpoint was written: unused, so a plain path can replace any."""

PICKLES = (".metadata", "common.pt")
"""Files of a checkpoint that are single pickles, in its folder `megatron`."""

DAMAGE = (
    *(pickle.UnpicklingError, EOFError, AttributeError, ImportError, LookupError, TypeError, ValueError),
    *(OverflowError, RecursionError, MemoryError, RuntimeError, zipfile.BadZipFile),
)
"""Errors raised while reading a damaged pickle."""


class UnsafePickleError(pickle.UnpicklingError):
    """A pickle names something that its format does not need."""


class _MetadataUnpickler(pickle.Unpickler):
    """Builds only the classes of a checkpoint's metadata."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return getattr(importlib.import_module(module), name)
        if (module, name) in _PATHS:
            return pathlib.PurePosixPath
        if module == "torch" and isinstance(torch.__dict__.get(name), torch.dtype):
            return torch.__dict__[name]
        raise UnsafePickleError(visible(f"it names {module}.{name}"))


def read_metadata(folder: Path) -> Metadata:
    """The metadata of a torch_dist checkpoint; runs nothing that its pickle names.

    Raises:
        CheckpointError: the file is missing or damaged, names a foreign class or function, or points outside the folder.
    """
    path = folder / ".metadata"
    try:
        content = path.read_bytes()
        _check_indices(content)
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
        problem = _find_problem(metadata)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error
    except UnsafePickleError as error:
        raise CheckpointError(refusal(path, error)) from error
    except DAMAGE as error:
        raise CheckpointError(f"{path}: damaged ({error!r}); copy the checkpoint again.") from error
    if problem is not None:
        raise CheckpointError(f"{path}: damaged ({problem}); copy the checkpoint again.")
    return metadata


def check_pickles(folder: Path) -> None:
    """Read a torch_dist checkpoint's small pickles to detect unsafe ones; runs nothing that they name.

    Raises:
        CheckpointError: one is damaged, or names something that could run commands.
    """
    read_metadata(folder)
    path = folder / "common.pt"
    try:
        if path.is_file():
            torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(common_refusal(path, error)) from error
    except DAMAGE as error:
        raise CheckpointError(f"{path}: damaged ({error!r}); copy the checkpoint again.") from error


def common_refusal(path: Path, error: pickle.UnpicklingError) -> str:
    """Why torch does not read a `common.pt`, in one sentence; torch's own message advises trusting the file."""
    first = str(error).splitlines()[0]
    return f"{path}: refused ({first}); it could run commands: get the checkpoint from a source that you trust."


def refusal(path: Path, error: UnsafePickleError) -> str:
    """Why a file is not read, in one sentence."""
    return (
        f"{path}: refused without running it: {error}, which no checkpoint needs and which could run commands; "
        "someone has changed this file: get the checkpoint from a source that you trust."
    )


def _check_indices(content: bytes) -> None:
    """Most versions of Python fill a list up to any index at which a pickle keeps an object: one flipped bit, all memory.

    Raises:
        UnpicklingError: an index is larger than any that pickling writes.
        ValueError: the content is no pickle.
    """
    for opcode, argument, position in pickletools.genops(content):
        if opcode.name in ("PUT", "LONG_BINPUT") and isinstance(argument, int) and argument > len(content):
            raise pickle.UnpicklingError(f"at byte {position:,}, index {argument:,} in {len(content):,} bytes")


def _find_problem(metadata: Any) -> str | None:
    """What makes a checkpoint's metadata unusable; None if nothing does."""
    if not isinstance(metadata, Metadata):
        return f"it holds {type(metadata).__name__}, not the metadata of a checkpoint"
    entries, storage = metadata.state_dict_metadata, metadata.storage_data
    if not isinstance(entries, dict) or not isinstance(storage, dict):
        return "it lists no tensors"
    for key, entry in entries.items():
        if not isinstance(key, str) or not (isinstance(entry, BytesStorageMetadata) or _is_tensor(entry)):
            return f"its entry {key!r} is no tensor"
    for index, where in storage.items():
        name = getattr(where, "relative_path", None)
        if not isinstance(index, MetadataIndex) or not isinstance(name, str) or PurePath(name).name != name:
            return f"{getattr(index, 'fqn', index)!r} refers to {name!r}, which is no file in this folder"
        if not all(isinstance(number, int) and number >= 0 for number in (where.offset, where.length)):
            return f"{index.fqn!r} has no place in {name}"
    return None


def _is_tensor(entry: Any) -> bool:
    """Whether an entry has a tensor's properties: dtype, size and chunks."""
    return (
        isinstance(entry, TensorStorageMetadata)
        and isinstance(entry.properties.dtype, torch.dtype)
        and isinstance(entry.size, torch.Size)
        and all(isinstance(size, torch.Size) for chunk in entry.chunks for size in (chunk.offsets, chunk.sizes))
    )


def _read_metadata(reader: FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
    """`FileSystemReader.read_metadata`, without its unrestricted pickle."""
    metadata = read_metadata(Path(reader.path))
    metadata.storage_meta = metadata.storage_meta if isinstance(metadata.storage_meta, StorageMeta) else StorageMeta()
    metadata.storage_meta.load_id = reader.load_id
    return metadata


class SafeReader(FileSystemReader):
    """torch's checkpoint reader with metadata reading that runs nothing."""

    read_metadata = _read_metadata


@contextlib.contextmanager
def reading_safely() -> Iterator[None]:
    """Within this context, torch and Megatron-Core, too, read a checkpoint's pickles only with the allow-list.

    For example, torch's planner asks for objects with `weights_only=False`.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"}
    with (
        mock.patch.object(FileSystemReader, "read_metadata", _read_metadata),
        mock.patch.dict(os.environ, environment | {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}, clear=True),
    ):
        yield
