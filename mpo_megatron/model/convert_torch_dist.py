"""Read and write Megatron's torch_dist checkpoints chunk by chunk, in one process and without a process group.

Reads and writes use torch.distributed.checkpoint's own file reader and writer, so the files are what
`megatron.core.dist_checkpointing` expects. Only the source of tensors differs: the planner requests one chunk when it is about to
be written, and a read touches only the stored chunks that overlap the requested rows.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from mpo_megatron.hf.conversion import CheckpointError
from mpo_megatron.model.unpickling import SafeReader


@dataclass(frozen=True)
class StoredChunk:
    """A box of one checkpoint tensor that is written and read as a whole."""

    key: str
    dtype: torch.dtype
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.sizes) * self.dtype.itemsize


# --------------------------------------------------------------------------------------------------- writing


def write_checkpoint(
    folder: Path, chunks: Sequence[StoredChunk], extra_states: Sequence[str], resolve: Callable[[StoredChunk], Tensor]
) -> None:
    """Write a torch_dist checkpoint that `megatron.core.dist_checkpointing.load` reads at any layout.

    Args:
        folder: created here
        chunks: boxes that cover every tensor exactly once, in writing order
        extra_states: keys of empty `_extra_state` objects
        resolve: returns the data of one chunk, shaped like its `sizes`; called once for each, just before it is written
    """
    folder.mkdir(parents=True)
    planner = _LazySavePlanner(chunks, extra_states, resolve)
    # One thread, no copying ahead: one chunk in memory, and chunks in order, also with a GPU.
    writer = FileSystemWriter(folder, thread_count=1, per_thread_copy_ahead=0)
    # Like torch.distributed.checkpoint.save with one process, whose wrapper would hide the exceptions of `resolve`.
    writer.set_up_storage_writer(is_coordinator=True)
    plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    [plan] = writer.prepare_global_plan(plans)
    try:
        results = writer.write_data(planner.finish_plan(plan), planner).value()
    except RuntimeError as error:
        # On a full disk, torch.save fails again while closing its archive, and hides the first error.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    writer.finish(metadata, [results])
    common = io.BytesIO()  # for non-tensors: a converted checkpoint has none
    torch.save({}, common)
    (folder / "common.pt").write_bytes(common.getvalue())  # on a full disk, torch.save raises no OSError
    save_config(CheckpointingConfig(sharded_backend="torch_dist", sharded_backend_version=1), str(folder))


class _LazySavePlanner(DefaultSavePlanner):
    def __init__(
        self, chunks: Sequence[StoredChunk], extra_states: Sequence[str], resolve: Callable[[StoredChunk], Tensor]
    ) -> None:
        super().__init__(flatten_state_dict=False)
        self._resolve = resolve
        self._chunks = {MetadataIndex(chunk.key, torch.Size(chunk.offsets)): chunk for chunk in chunks}
        self._extra_states = extra_states

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(index, WriteItemType.SHARD, tensor_data=_write_data(chunk)) for index, chunk in self._chunks.items()]
        items += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._extra_states]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            torch.save([None], stream)  # Megatron-Core's content for a module without FP8 state
            return stream
        return self._resolve(self._chunks[write_item.index])


def _write_data(chunk: StoredChunk) -> TensorWriteData:
    return TensorWriteData(
        chunk=ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)),
        properties=TensorProperties(dtype=chunk.dtype),
        size=torch.Size(chunk.global_shape),
    )


# --------------------------------------------------------------------------------------------------- reading


class CheckpointReader:
    """Random access to the tensors of a torch_dist checkpoint."""

    def __init__(self, folder: Path) -> None:
        """Open the checkpoint; reads its metadata only.

        Raises:
            CheckpointError: it is not a complete torch_dist checkpoint, or its metadata could run commands.
        """
        self.folder = folder
        for name in ("metadata.json", ".metadata"):
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"{folder / name}: no such file; the checkpoint is incomplete: copy it again, or use an older one."
                )
        self._reader = _CheckingReader(folder)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        entries = self._metadata.state_dict_metadata
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)
        }

    def check_files(self, keys: set[str]) -> None:
        """Raise `CheckpointError` if a file that holds any of these tensors is missing or too short."""
        needed: dict[str, int] = {}
        for index, where in self._metadata.storage_data.items():
            if index.fqn in keys:
                needed[where.relative_path] = max(needed.get(where.relative_path, 0), where.offset + where.length)
        for name, size in sorted(needed.items()):
            path = self.folder / name
            if not path.is_file():
                raise CheckpointError(
                    f"{path}: no such file, but the checkpoint stores weights in it; copy the checkpoint again."
                )
            if path.stat().st_size < size:
                raise CheckpointError(
                    f"{path}: truncated: {path.stat().st_size:,} bytes, but its weights need {size:,}; copy the checkpoint again."
                )

    def row_starts(self, key: str, index: tuple[int, ...]) -> list[int]:
        """Rows at which stored chunks of this tensor, at `index` of its first axes, start: reads split there read no chunk
        twice."""
        return sorted(
            {
                chunk.offsets[len(index)]
                for chunk in self.tensors[key].chunks
                if all(
                    start <= wanted < start + size
                    for wanted, start, size in zip(index, chunk.offsets, chunk.sizes, strict=False)  # the first axes only
                )
            }
        )

    def read(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The box of tensor `key` at `offsets`, of the stored dtype.

        Raises:
            CheckpointError: the stored data is damaged, or does not cover the box.
        """
        entry = self.tensors[key]
        box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [box])
        covered = sum(math.prod(item.lengths) for item in items)
        if covered != math.prod(sizes):
            raise CheckpointError(
                f"{self.folder}: stores {covered:,} of {math.prod(sizes):,} elements of {key} at {list(offsets)}; "
                "copy the checkpoint again."
            )
        target = torch.empty(torch.Size(sizes), dtype=entry.properties.dtype)
        try:
            self._reader.read_data(LoadPlan(items), _BoxLoadPlanner(target))
        except DAMAGE as error:
            raise CheckpointError(f"{self.folder}: the data of {key} is damaged ({error}); copy the checkpoint again.") from error
        return target


DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError, RuntimeError, ValueError, EOFError)
"""Errors raised while reading a damaged archive of torch.save."""


class _CheckingReader(SafeReader):
    """Checks what it reads against the CRC-32 that torch.save stores beside a tensor's bytes, and torch.load ignores.

    The digests of a training checkpoint cover whole files with optimizer states: several times what an export reads.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._checked: set[tuple[str, int]] = set()

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        """The part of the file with the stored tensor, checked at its first read."""
        part = cast(IO[bytes], _Part(file, sinfo.offset, sinfo.length))
        if (sinfo.relative_path, sinfo.offset) not in self._checked:
            try:
                with zipfile.ZipFile(part) as archive:
                    damaged = archive.testzip()
            except DAMAGE as error:
                damaged = str(error)
            if damaged is not None:
                raise zipfile.BadZipFile(f"{sinfo.relative_path}, from byte {sinfo.offset:,}: {damaged} fails its checksum")
            part.seek(0)
            self._checked.add((sinfo.relative_path, sinfo.offset))
        return part


class _Part(io.RawIOBase):
    """A part of an open file, presented as a separate file."""

    def __init__(self, file: Any, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if self._position < 0:
            raise ValueError(f"a position {-self._position} bytes before the file")
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._position)
        count: int = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._position)])
        self._position += count
        return count


class _BoxLoadPlanner(DefaultLoadPlanner):
    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        box = tuple(slice(start, start + length) for start, length in zip(read_item.dest_offsets, read_item.lengths, strict=True))
        return self._target[box]

    def commit_tensor(self, read_item: ReadItem, tensor: Any) -> None:
        pass  # resolve_tensor returned a view of the target, so the data is in place
