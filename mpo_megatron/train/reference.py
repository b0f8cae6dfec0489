"""Reference log-probs: computed once per model and data, kept on disk beside the groups, resumed when killed.

    <prepared data>/reference/<key>/part-00000000-00000127.<digest>.parquet     index of each group in the data, log-probs of
                                                                                its responses
    <prepared data>/reference/<key>/tokens-00000000-00000127.<digest>.parquet   the same, and the log-probs of their tokens

With `experts.routing: replay` or `experts.measure_drift` the choices of experts lie beside them (choices.py).

The key is a digest of everything the numbers depend on, so a stale cache is never read: it has another name. Parts say
which groups they hold, so any later run can use them, whatever its batch size and its layout over ranks. A part is read only
if its bytes have the digest in its name; its groups are computed again otherwise.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch.distributed import broadcast

from mpo_megatron import device
from mpo_megatron.config import ModelConfig
from mpo_megatron.data.arrays import Bools, Float64, Int64
from mpo_megatron.data.loader import GroupTable, RowShape, StepBatch, build_ahead, build_step
from mpo_megatron.data.store import PreparedGroups
from mpo_megatron.files import DataError
from mpo_megatron.files.digests import DamagedError, name_digest, read_named
from mpo_megatron.files.partial import partial_file
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.precision import numerics
from mpo_megatron.terminal.console import Console
from mpo_megatron.terminal.visible import visible
from mpo_megatron.train.choices import ReferenceChoices
from mpo_megatron.train.faults import signals
from mpo_megatron.train.faults.agreement import on_main
from mpo_megatron.train.faults.stopping import Deadline, Pauses
from mpo_megatron.train.objective import Logps
from mpo_megatron.train.routing import gather_choices, record_rows
from mpo_megatron.train.step import collect_logps, run_rows

SECONDS_BETWEEN_LINES = 10.0
"""Where output is no terminal, progress is a line at most this often."""


@dataclass(frozen=True, kw_only=True)
class ReferenceLogps:
    """log π_ref of every response of a dataset, in nats."""

    response: Float64
    """[ΣK] group by group."""
    token: npt.NDArray[np.float32] | None
    """[ΣR] the tokens of every response, one after the other; None unless asked for."""
    groups: Int64
    """[groups + 1] where each group begins in `response`."""
    responses: Int64
    """[ΣK + 1] where each response begins in `token`."""

    @classmethod
    def empty(cls, data: PreparedGroups, *, tokens: bool) -> ReferenceLogps:
        """Nothing computed yet: NaN everywhere."""
        responses = np.concatenate([np.zeros(1, np.int64), np.cumsum(data.all_response_lengths())])
        return cls(
            response=np.full(len(responses) - 1, np.nan),
            token=np.full(responses[-1], np.nan, dtype=np.float32) if tokens else None,
            groups=data.response_offsets(),
            responses=responses,
        )

    def of_group(self, index: int) -> slice:
        """Where a group lies in `response`."""
        return slice(self.groups[index], self.groups[index + 1])

    def tokens_of_group(self, index: int) -> slice:
        """Where a group lies in `token`."""
        return slice(self.responses[self.groups[index]], self.responses[self.groups[index + 1]])

    def missing(self) -> Int64:
        """Indices of the groups that are not computed."""
        return np.flatnonzero(np.isnan(self.response[self.groups[:-1]]))

    def fill(self, part: pa.Table) -> None:
        """Take over what a part holds."""
        for index, logps in zip(part["index"].to_pylist(), _split(part["logps"]), strict=True):
            self.response[self.of_group(index)] = logps
        if self.token is not None:
            for index, logps in zip(part["index"].to_pylist(), _split(part["token_logps"]), strict=True):
                self.token[self.tokens_of_group(index)] = logps

    def select(self, table: GroupTable) -> Logps:
        """The reference log-probs of a step's groups, padded as its table is."""
        response = np.zeros(table.valid.shape)
        token = np.zeros((*table.valid.shape, int(table.lengths.max())), dtype=np.float32) if self.token is not None else None
        for slot, index in enumerate(table.indices):
            response[slot, table.valid[slot]] = self.response[self.of_group(index)]
            if token is not None and self.token is not None:
                scored = np.arange(token.shape[2]) < table.lengths[slot, :, None]
                token[slot][scored] = self.token[self.tokens_of_group(index)]
        return Logps(response=torch.from_numpy(response), token=None if token is None else torch.from_numpy(token))


def _split(column: pa.ChunkedArray) -> list[npt.NDArray[Any]]:
    """The lists of an Arrow column as arrays, without a Python object per number."""
    lists = column.combine_chunks()
    return [values.values.to_numpy() for values in lists]


def cache_key(model_digest: str, data: PreparedGroups, model: ModelConfig, *, adapted: bool = False) -> str:
    """Name of the cache: a digest of model, tokenizer, data and numerics. The layout over ranks changes rounding only.

    Args:
        adapted: the model has adapters; in FP8 its norms are rounded to bf16 then, before they are quantized
    """
    fp8 = numerics(model)
    parts = {
        "model": model_digest,
        "data": data.info.data_digest,
        "tokenizer": data.info.tokenizer_digest,
        "precision": model.precision,
        "transformer_engine": model.from_engine,
        "attention": model.attention,
        **({} if fp8 is None else {"fp8": fp8} | ({"adapted": True} if adapted else {})),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def reference_logps(
    data: PreparedGroups,
    folder: Path,
    load_model: Callable[[], list[torch.nn.Module]],
    ranks: Ranks,
    shape: RowShape,
    *,
    groups_per_part: int,
    tokens: bool,
    deadline: Deadline,
    choices: ReferenceChoices | None = None,
) -> ReferenceLogps:
    """Read the cache in `folder`, computing and writing the groups it lacks; all ranks call it and get the same.

    Args:
        load_model: gives the reference model; called only if something is missing
        groups_per_part: groups computed between two writes
        tokens: per-token log-probs are needed, too
        deadline: when to stop between two writes
        choices: records the reference's choices of experts, too
    Raises:
        Stopped: asked to stop; what is computed is written. On all ranks.
        DataError: the cache cannot be written, or a log-prob is not finite; on all ranks.
    """
    logps = read_cache(folder, data, ranks, tokens=tokens)
    missing = logps.missing() if choices is None else np.union1d(logps.missing(), choices.missing())
    if not len(missing):
        return logps
    _write_on_main(ranks, folder, lambda: _prepare_folder(folder))
    if choices is not None:
        _write_on_main(ranks, folder, choices.require_room)
    model = load_model()
    chunks = [missing[start : start + groups_per_part] for start in range(0, len(missing), groups_per_part)]
    batches = build_ahead(lambda indices: build_step(0, data, indices, select_all, shape), chunks)
    pauses = Pauses(deadline)
    with signals.deferred(), _Progress(data, len(data) - len(missing), enabled=ranks.is_main) as progress:
        for indices, batch in zip(chunks, batches, strict=True):
            part, ids = _compute_part(data, indices, batch, model, ranks, tokens, choices)
            if choices is not None:
                _write_on_main(ranks, folder, lambda indices=indices, ids=ids: choices.write(indices, ids))  # type: ignore[misc]
                choices.there[indices] = True
            path = folder / f"{_prefix(tokens)}-{indices[0]:08d}-{indices[-1]:08d}"
            _write_on_main(ranks, folder, lambda part=part, path=path: _write_part(part, path))  # type: ignore[misc]
            logps.fill(part)
            progress.add(len(indices), batch.plan.num_tokens)
            pauses.stop_if_asked()
    return logps


def read_cache(folder: Path, data: PreparedGroups, ranks: Ranks, *, tokens: bool) -> ReferenceLogps:
    """What is in a cache, NaN where nothing is; read by the main process for all, since other nodes may not see its disk."""
    logps = ReferenceLogps.empty(data, tokens=tokens)
    if ranks.is_main:
        kinds = [_prefix(True)] if tokens else [_prefix(False), _prefix(True)]
        for path in sorted(path for kind in kinds for path in folder.glob(f"{kind}-*-*.parquet")):
            try:
                logps.fill(pq.read_table(pa.BufferReader(read_named(path))))
            except (DamagedError, OSError) as error:
                print(f"{visible(error)} Its groups are computed again.", flush=True)
    for array in (logps.response, logps.token):
        if array is not None and torch.distributed.get_world_size() > 1:
            tensor = torch.from_numpy(array).to(device.device())  # on a CPU the same memory
            broadcast(tensor, src=0)
            array[:] = tensor.cpu().numpy()
    return logps


def _prefix(tokens: bool) -> str:
    return "tokens" if tokens else "part"


def _prepare_folder(folder: Path) -> None:
    """Make the folder, and find out before anything is computed whether it can be written."""
    folder.mkdir(parents=True, exist_ok=True)
    with partial_file(folder / "probe"):
        pass


def _write_on_main(ranks: Ranks, folder: Path, action: Callable[[], None]) -> None:
    """Let the main process touch the disk; a failure is raised on all ranks.

    Raises:
        DataError: the disk is full, or must not be written.
    """
    try:
        on_main(ranks, action)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot write reference log-probs: {error.strerror or error}; parts that were finished are kept; make the "
            "folder writable or free some space, and start again."
        ) from error


def _compute_part(
    data: PreparedGroups,
    indices: Int64,
    batch: StepBatch,
    model: list[torch.nn.Module],
    ranks: Ranks,
    tokens: bool,
    choices: ReferenceChoices | None,
) -> tuple[pa.Table, npt.NDArray[Any] | None]:
    """Log-probs of these groups, and the choices of experts [Σ tokens, L, k] if they are to be recorded."""
    width = int(batch.table.lengths.max()) if tokens else None
    routings = None if choices is None else record_rows(batch.rows, ranks)
    outputs = run_rows(model, batch.rows, ranks, row_loss=None, routings=routings)
    logps = collect_logps(outputs, batch.table.valid.shape, ranks, width)
    ids = None
    if choices is not None and routings is not None:
        ids = gather_choices(routings, batch.rows, batch.table, choices.experts, ranks).ids.cpu().numpy()
    response = logps.response.numpy()
    broken = np.flatnonzero(~np.isfinite(response).all(axis=1))
    if len(broken):
        raise DataError(
            f"{data.path}: the reference log-prob of group {batch.table.group_ids[broken[0]]} is not finite; the reference "
            "model computes nonsense there; look at its checkpoint, or train in another model.precision."
        )
    columns: dict[str, Any] = {
        "index": indices,
        "group_id": list(batch.table.group_ids),
        "logps": [row[valid] for row, valid in zip(response, batch.table.valid, strict=True)],
    }
    if logps.token is not None:
        scored = np.arange(logps.token.shape[2]) < batch.table.lengths[:, :, None]
        columns["token_logps"] = [row[mask] for row, mask in zip(logps.token.numpy(), scored, strict=True)]
    return pa.table(columns), ids


def select_all(table: GroupTable) -> tuple[Bools, Bools]:
    """Every response of every group: the cache serves any loss."""
    return np.ones(len(table.valid), dtype=bool), table.valid


def _write_part(part: pa.Table, path: Path) -> None:
    """Write a part; its digest and suffix are added to the name. Damaged parts of the same groups are removed."""
    stream = pa.BufferOutputStream()
    pq.write_table(part, stream)
    content = stream.getvalue().to_pybytes()
    final = path.with_name(name_digest(path.name, content, ".parquet"))
    with partial_file(final) as (partial, file):  # another run may be computing the same part
        file.write(content)
        file.flush()
        os.replace(partial, final)
    for other in path.parent.glob(f"{path.name}.*.parquet"):
        if other != final:
            other.unlink(missing_ok=True)


class _Progress:
    """Groups done, rate and time left: a live bar on a terminal, a line now and then elsewhere."""

    def __init__(self, data: PreparedGroups, done: int, *, enabled: bool) -> None:
        self.name, self.total, self.done, self.enabled = data.path.name, len(data), done, enabled
        self.groups = self.tokens = 0
        self.started = self.last_line = time.monotonic()
        self.console = Console(highlight=False, stderr=False)
        columns = (TextColumn("reference log-probs"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[text]}"))
        live = enabled and self.console.is_terminal
        self.bar = Progress(*columns, console=self.console, disable=not live, transient=True)
        self.task = self.bar.add_task("reference", total=self.total, completed=done, text="")

    def __enter__(self) -> _Progress:
        self.bar.start()
        if self.enabled and self.done:
            self.console.print(f"reference log-probs of {self.name}: {self.done:,} of {self.total:,} groups are there")
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def add(self, groups: int, tokens: int) -> None:
        """Count a finished part; tokens of all ranks, without padding."""
        self.groups += groups
        self.tokens += tokens
        now = time.monotonic()
        rate = self.groups / (now - self.started)
        done = self.done + self.groups
        left = time.strftime("%H:%M:%S", time.gmtime((self.total - done) / rate))
        text = f"{rate:.2f} groups/s  {self.tokens / (now - self.started):,.0f} tok/s  {left} left"
        self.bar.update(self.task, completed=done, text=text)
        if self.enabled and not self.console.is_terminal and (done == self.total or now - self.last_line > SECONDS_BETWEEN_LINES):
            self.last_line = now
            line = f"reference log-probs of {self.name}: {done:,}/{self.total:,} groups  {text}"
            self.console.print(line, soft_wrap=True)
