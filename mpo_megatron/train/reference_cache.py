"""Reference log-probs on disk, beside their groups.

    <prepared data>/reference/<key>/part-00000000-00000127.<digest>.parquet     index of each group in the data, log-probs of
                                                                                its responses
    <prepared data>/reference/<key>/tokens-00000000-00000127.<digest>.parquet   the same, plus log-probs of their tokens

With `experts.routing: replay` or `experts.measure_drift`, expert choices are stored beside them (choices.py).

The key is a digest of everything that the numbers depend on, so a stale cache, which has another name, is never read. Parts list
their groups, so any later run can use and extend them, with any batch size and layout. A part is used only if its bytes match the
digest in its name; otherwise its groups are computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pyarrow.compute import list_flatten
from torch.distributed import broadcast

from mpo_megatron import device
from mpo_megatron.config import ModelConfig
from mpo_megatron.data.arrays import Float64, Int64, as_numpy
from mpo_megatron.data.loader import GroupTable
from mpo_megatron.data.store import PreparedGroups
from mpo_megatron.files import DataError
from mpo_megatron.files.digests import DamagedError, name_digest, read_named
from mpo_megatron.files.partial import partial_file
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.precision import numerics
from mpo_megatron.terminal.visible import visible
from mpo_megatron.train.choices import ReferenceChoices
from mpo_megatron.train.faults.agreement import on_main
from mpo_megatron.train.objective import Logps

SECONDS_BETWEEN_PARTS = 30.0
"""A part is written once its work took as long as all earlier parts, and at least this often: few files, little loss by a
kill."""

PART_BYTES = 256 * 2**20
"""Maximum amount of unwritten results."""


@dataclass(frozen=True, kw_only=True)
class ReferenceLogps:
    """log π_ref of every response of a dataset, in nats; NaN where not computed."""

    response: Float64
    """[ΣK] responses, group by group."""
    token: npt.NDArray[np.float32] | None
    """[ΣR] tokens of all responses, concatenated; None unless requested."""
    groups: Int64
    """[groups + 1] start of each group in `response`."""
    responses: Int64
    """[ΣK + 1] start of each response in `token`."""
    damaged: list[Path] = field(default_factory=list)
    """On the main rank: parts of the cache that differ from what was written."""

    @classmethod
    def empty(cls, data: PreparedGroups, *, tokens: bool) -> ReferenceLogps:
        """No results: NaN everywhere."""
        responses = np.concatenate([np.zeros(1, np.int64), np.cumsum(data.all_response_lengths())])
        return cls(
            response=np.full(len(responses) - 1, np.nan),
            token=np.full(responses[-1], np.nan, dtype=np.float32) if tokens else None,
            groups=data.response_offsets(),
            responses=responses,
        )

    def of_group(self, index: int) -> slice:
        """A group's range in `response`."""
        return slice(self.groups[index], self.groups[index + 1])

    def tokens_of_group(self, index: int) -> slice:
        """A group's range in `token`."""
        return slice(self.responses[self.groups[index]], self.responses[self.groups[index + 1]])

    def missing(self, wanted: Int64 | None = None) -> Int64:
        """Indices of the groups without results, in order.

        Args:
            wanted: consider only these groups
        """
        indices = np.arange(len(self.groups) - 1) if wanted is None else wanted
        return indices[np.isnan(self.response[self.groups[indices]])]

    def fill(self, part: pa.Table) -> None:
        """Add a part's content."""
        index = as_numpy(part["index"])
        begin, end = self.groups[index], self.groups[index + 1]
        self.response[_places(begin, end)] = as_numpy(list_flatten(part["logps"]))
        if self.token is not None:
            self.token[_places(self.responses[begin], self.responses[end])] = as_numpy(list_flatten(part["token_logps"]))

    def select(self, table: GroupTable) -> Logps:
        """The reference log-probs of a step's groups, padded like its table."""
        response = np.zeros(table.valid.shape)
        token = np.zeros((*table.valid.shape, int(table.lengths.max())), dtype=np.float32) if self.token is not None else None
        for slot, index in enumerate(table.indices):
            response[slot, table.valid[slot]] = self.response[self.of_group(index)]
            if token is not None and self.token is not None:
                scored = np.arange(token.shape[2]) < table.lengths[slot, :, None]
                token[slot][scored] = self.token[self.tokens_of_group(index)]
        return Logps(response=torch.from_numpy(response), token=None if token is None else torch.from_numpy(token))


def _places(begin: Int64, end: Int64) -> Int64:
    """The integers of every range begin … end − 1, concatenated."""
    sizes = end - begin
    places: Int64 = np.repeat(begin - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
    return places


def cache_key(
    model_digest: str, data: PreparedGroups, model: ModelConfig, *, adapted: bool = False, quantize: str = "none"
) -> str:
    """Name of the cache: a digest of model, tokenizer, data and numerics. The layout is excluded: it affects only rounding.

    Args:
        adapted: whether the model has adapters; in FP8, its norms are then rounded to bf16 before quantization
        quantize: format of its frozen weights
    """
    fp8 = numerics(model)
    parts = {
        "model": model_digest,
        "data": data.info.data_digest,
        "tokenizer": data.info.tokenizer_digest,
        "precision": model.precision,
        "transformer_engine": model.from_engine,
        "attention": model.attention,
        **({} if model.delta_rule == "auto" else {"delta_rule": model.delta_rule}),  # resolved if any layer uses it
        **({} if model.delta_chunk == ModelConfig.delta_chunk else {"delta_chunk": model.delta_chunk}),
        **({} if quantize == "none" else {"quantize": quantize}),
        **({} if fp8 is None else {"fp8": fp8} | ({"adapted": True} if adapted else {})),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def read_cache(folder: Path, data: PreparedGroups, ranks: Ranks, *, tokens: bool) -> ReferenceLogps:
    """A cache's content, NaN where missing; the main process reads it for all, because other nodes may not see its disk."""
    logps = ReferenceLogps.empty(data, tokens=tokens)
    if ranks.is_main:
        kinds = [_prefix(True)] if tokens else [_prefix(False), _prefix(True)]
        columns = ["index", "logps", *(["token_logps"] if tokens else [])]
        for path in sorted(path for kind in kinds for path in folder.glob(f"{kind}-*-*.parquet")):
            try:
                logps.fill(pq.ParquetFile(pa.BufferReader(read_named(path))).read(columns=columns))
            except DamagedError as error:
                logps.damaged.append(path)
                print(f"{visible(error)} Its groups are computed again when needed.", flush=True)
            except OSError as error:
                print(f"{visible(error)} Its groups are computed again when needed.", flush=True)
    for array in (logps.response, logps.token):
        if array is not None and torch.distributed.get_world_size() > 1:
            tensor = torch.from_numpy(array).to(device.device())  # shares memory on a CPU
            broadcast(tensor, src=0)
            array[:] = tensor.cpu().numpy()
    return logps


class PartWriter:
    """Writes results in few parts; all ranks call its methods, only the main one accesses the disk."""

    def __init__(
        self, folder: Path, ranks: Ranks, damaged: Sequence[Path], choices: ReferenceChoices | None, *, tokens: bool
    ) -> None:
        """Check that the folder is writable before anything is computed.

        Args:
            damaged: parts to remove once their replacements are written
            choices: stores the expert choices
            tokens: also store per-token log-probs
        """
        self.folder, self.ranks, self.damaged, self.choices = folder, ranks, list(damaged), choices
        self.prefix = _prefix(tokens)
        self.tables: list[pa.Table] = []
        self.ids: list[npt.NDArray[Any]] = []
        self.began: float | None = None
        self.written = 0.0
        self._on_main(lambda: _prepare_folder(folder))

    def require_room(self, missing: Int64) -> None:
        """Refuse log-probs that exceed the free disk space.

        Raises:
            ConfigError: names the missing bytes.
        """
        if self.choices is not None:
            choices = self.choices
            self._on_main(lambda: choices.require_room(missing))

    def add(self, table: pa.Table, ids: npt.NDArray[Any] | None) -> None:
        """Add groups with their log-probs, and expert choices [Σ tokens, L, k] if recorded.

        Raises:
            DataError: a write was due, and the disk is full or not writable; on all ranks.
        """
        self._on_main(lambda: self._add(table, ids))

    def finish(self) -> None:
        """Write the remaining groups.

        Raises:
            DataError: the disk is full or not writable; on all ranks.
        """
        self._on_main(self._write)

    def _add(self, table: pa.Table, ids: npt.NDArray[Any] | None) -> None:
        self.tables.append(table)
        if ids is not None:
            self.ids.append(ids)
        now = time.monotonic()
        if self.began is None:
            self.began = self.written = now
        size = sum(table.nbytes for table in self.tables) + sum(ids.nbytes for ids in self.ids)
        if now - self.written >= min(SECONDS_BETWEEN_PARTS, self.written - self.began) or size >= PART_BYTES:
            self._write()
            self.written = now

    def _write(self) -> None:
        if not self.tables:
            return
        table = pa.concat_tables(self.tables)
        indices = as_numpy(table["index"])
        if self.choices is not None:
            self.choices.write(indices, np.concatenate(self.ids))
        path = _write_part(table, self.folder / f"{self.prefix}-{indices[0]:08d}-{indices[-1]:08d}")
        self.tables, self.ids = [], []
        while self.damaged:
            other = self.damaged.pop()
            if other != path:  # same name: the same groups with the same numbers
                other.unlink(missing_ok=True)

    def _on_main(self, action: Callable[[], None]) -> None:
        """Run an action on the main process, which accesses the disk; a failure is raised on all ranks."""
        try:
            on_main(self.ranks, action)
        except OSError as error:
            raise DataError(
                f"{self.folder}: cannot write reference log-probs: {error.strerror or error}; finished parts are "
                "kept; make the folder writable or free some space, then run the same command again."
            ) from error


def _prefix(tokens: bool) -> str:
    return "tokens" if tokens else "part"


def _prepare_folder(folder: Path) -> None:
    """Create the folder, and check that it is writable."""
    folder.mkdir(parents=True, exist_ok=True)
    with partial_file(folder / "probe"):
        pass


def _write_part(part: pa.Table, path: Path) -> Path:
    """Write a part; its path, with digest and suffix."""
    stream = pa.BufferOutputStream()
    pq.write_table(part, stream)
    content = stream.getvalue().to_pybytes()
    final = path.with_name(name_digest(path.name, content, ".parquet"))
    with partial_file(final) as (partial, file):  # another run may be computing the same part
        file.write(content)
        file.flush()
        os.replace(partial, final)
    return final
