"""The reference's expert choices, cached on disk beside its log-probs and read group by group.

    <prepared data>/reference/<key>/experts-00000000-00000127.<digest>.choices   the choices of these groups, concatenated
    <prepared data>/reference/<key>/experts-00000000-00000127.<digest>.parquet   index of each group in the data, and digest of
    its
                                                                                 choices

A group has [tokens, L, k] expert ids: for its prompt's tokens and its responses' without their last, in each of L layers with
experts, k ascending ids of one byte (two with more than 256 experts). So the size is known in advance, and a group can be read
without reading others. A group's bytes are compared with their digest at every read.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from torch.distributed import broadcast, get_world_size

from mpo_megatron import device
from mpo_megatron.config import require
from mpo_megatron.data.arrays import Int64
from mpo_megatron.data.loader import GroupTable
from mpo_megatron.data.store import PreparedGroups
from mpo_megatron.families.family import Experts
from mpo_megatron.files import DataError
from mpo_megatron.files.digests import DamagedError, name_digest, read_named
from mpo_megatron.files.partial import partial_file
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.terminal.visible import visible
from mpo_megatron.train.faults.agreement import on_main
from mpo_megatron.train.routing import Choices


def id_dtype(experts: Experts) -> npt.DTypeLike:
    """Dtype of an expert id on disk."""
    return f"<u{experts.id_bytes}"


def token_bytes(experts: Experts) -> int:
    """Bytes of one token's choices on disk."""
    return experts.choices * experts.id_bytes


def data_tokens(data: PreparedGroups) -> Int64:
    """[groups] input tokens of every group: its prompt, and its responses without their last."""
    inputs = data.all_response_lengths() - 1
    tokens: Int64 = data.prompt_lengths() + np.add.reduceat(inputs, data.response_offsets()[:-1])
    return tokens


@dataclass(kw_only=True)
class ReferenceChoices:
    """The choices of a dataset's groups in a cache folder; the main rank reads and writes them."""

    folder: Path
    experts: Experts
    tokens: Int64
    """[groups] input tokens of every group."""
    there: npt.NDArray[np.bool_]
    """[groups] whether a group's choices are recorded; the same on every rank."""
    where: dict[int, tuple[Path, int, str]] = field(default_factory=dict)
    """On the main rank: file, first byte and digest of each recorded group."""
    maps: dict[Path, npt.NDArray[np.uint8]] = field(default_factory=dict)
    damaged: list[Path] = field(default_factory=list)
    """On the main rank: lists that differ from what was written."""

    @classmethod
    def open(cls, folder: Path, data: PreparedGroups, experts: Experts, ranks: Ranks) -> ReferenceChoices:
        """The recorded choices; the main rank reads them. All ranks call it."""
        tokens = data_tokens(data)
        choices = cls(folder=folder, experts=experts, tokens=tokens, there=np.zeros(len(tokens), dtype=bool))
        if ranks.is_main:
            for path in sorted(folder.glob("experts-*-*.parquet")):
                try:
                    choices._take(path, pq.read_table(pa.BufferReader(read_named(path))))
                except DamagedError as error:
                    choices.damaged.append(path)
                    print(f"{visible(error)} Its groups are computed again when needed.", flush=True)
                except OSError as error:
                    print(f"{visible(error)} Its groups are computed again when needed.", flush=True)
        if get_world_size() > 1:
            there = torch.from_numpy(choices.there.astype(np.uint8)).to(device.device())
            broadcast(there, src=0)
            choices.there = there.cpu().numpy().astype(bool)
        return choices

    def missing(self, wanted: Int64 | None = None) -> Int64:
        """Indices of the groups without recorded choices, in order.

        Args:
            wanted: consider only these groups
        """
        indices = np.arange(len(self.there)) if wanted is None else wanted
        return indices[~self.there[indices]]

    def require_room(self, missing: Int64) -> None:
        """Refuse choices that exceed the free disk space.

        Args:
            missing: the groups whose choices are to be recorded
        Raises:
            ConfigError: names the missing bytes.
        """
        size, free = int(self.tokens[missing].sum()) * token_bytes(self.experts), shutil.disk_usage(self.folder).free
        require(
            free >= size,
            f"{self.folder}: the reference's expert choices take {size / 1e9:,.3f} GB, but only {free / 1e9:,.3f} GB are free; "
            "free some space, or set experts.routing to free and remove experts.measure_drift.",
        )

    def write(self, indices: Int64, ids: npt.NDArray[Any]) -> None:
        """Record the choices [Σ tokens, L, k] of these groups, on the main rank."""
        parts = np.split(ids.astype(id_dtype(self.experts)), np.cumsum(self.tokens[indices])[:-1])
        contents = [part.tobytes() for part in parts]
        stem = f"experts-{indices[0]:08d}-{indices[-1]:08d}"
        table = pa.table({"index": indices, "digest": [xxhash.xxh3_128_hexdigest(content) for content in contents]})
        stream = pa.BufferOutputStream()
        pq.write_table(table, stream)
        listing = stream.getvalue().to_pybytes()
        path = self.folder / name_digest(stem, listing, ".parquet")
        _replace(path.with_suffix(".choices"), contents)
        _replace(path, [listing])
        while self.damaged:
            other = self.damaged.pop()
            if other.stem != path.stem:
                other.with_suffix(".choices").unlink(missing_ok=True)
                other.unlink(missing_ok=True)
        self._take(path, table)

    def select(self, table: GroupTable, ranks: Ranks) -> Choices:
        """The choices of a step's groups, on this rank's device; all ranks call it.

        Raises:
            DataError: a group's choices are damaged; on all ranks.
        """
        tokens = self.tokens[table.indices]
        shape = (int(tokens.sum()), sum(self.experts.layers), self.experts.per_token)
        content = np.zeros(shape, dtype=np.uint8 if self.experts.num <= 256 else np.int32)
        starts = np.cumsum(tokens) - tokens

        def read() -> None:
            for start, number, index in zip(starts, tokens, table.indices, strict=True):
                content[start : start + number] = self._read(int(index))

        on_main(ranks, read)
        ids = torch.from_numpy(content).to(device.device())
        if get_world_size() > 1:
            broadcast(ids, src=0)
        return Choices(ids=ids, starts=starts)

    def _take(self, path: Path, table: pa.Table) -> None:
        """Add the groups listed in a part.

        Raises:
            DamagedError: the file with the choices is missing, or has another size.
        """
        file, start, found = path.with_suffix(".choices"), 0, {}
        for index, digest in zip(table["index"].to_pylist(), table["digest"].to_pylist(), strict=True):
            found[index] = (file, start, digest)
            start += int(self.tokens[index]) * token_bytes(self.experts)
        size = file.stat().st_size if file.is_file() else None
        if size != start:
            raise DamagedError(
                f"{file}: {'missing' if size is None else f'{size} bytes'}, but its list says {start} bytes; remove "
                "it and run the same command again."
            )
        self.where |= found
        self.there[list(found)] = True

    def _read(self, index: int) -> npt.NDArray[Any]:
        """[tokens, L, k] of one group."""
        file, start, digest = self.where[index]
        if file not in self.maps:
            self.maps[file] = np.memmap(file, mode="r")
        number = int(self.tokens[index])
        content = self.maps[file][start : start + number * token_bytes(self.experts)]
        if xxhash.xxh3_128_hexdigest(content) != digest:
            raise DataError(
                f"{file}: damaged: the choices of group {index} differ from what was written (digest mismatch); remove the "
                "file, and run the same command again: it recomputes the groups."
            )
        return content.view(id_dtype(self.experts)).reshape(number, sum(self.experts.layers), self.experts.per_token)


def _replace(path: Path, contents: Sequence[bytes]) -> None:
    """Write a file in one step."""
    with partial_file(path) as (partial, file):
        for content in contents:
            file.write(content)
        file.flush()
        os.replace(partial, path)
