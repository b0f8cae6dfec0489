"""Compute reference log-probs of the needed groups that the cache lacks.

reference_cache.py stores the results.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mpo_megatron.data.arrays import Bools, Int64
from mpo_megatron.data.loader import GroupTable, RowShape, StepBatch, build_ahead, build_step
from mpo_megatron.data.store import PreparedGroups
from mpo_megatron.files import DataError
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.terminal.console import Console
from mpo_megatron.train.choices import ReferenceChoices
from mpo_megatron.train.faults import signals
from mpo_megatron.train.faults.stopping import Deadline, Pauses, Stopped
from mpo_megatron.train.reference_cache import PartWriter, ReferenceLogps, read_cache
from mpo_megatron.train.routing import gather_choices, record_rows
from mpo_megatron.train.step import collect_logps, run_rows

SECONDS_BETWEEN_LINES = 10.0
"""Minimum seconds between progress lines where output is not a terminal."""


def reference_logps(
    data: PreparedGroups,
    folder: Path,
    load_model: Callable[[], list[torch.nn.Module]],
    ranks: Ranks,
    shape: RowShape,
    *,
    groups_per_pass: int,
    tokens: bool,
    deadline: Deadline,
    wanted: Int64 | None = None,
    choices: ReferenceChoices | None = None,
) -> ReferenceLogps:
    """Read the cache in `folder`, compute and write missing groups; all ranks call it and get the same result.

    Args:
        load_model: returns the reference model; called only if something is missing
        groups_per_pass: number of groups computed at a time
        tokens: also compute per-token log-probs
        deadline: checked between passes
        wanted: indices of the needed groups, in order; by default all
        choices: also records the reference's expert choices
    Raises:
        Stopped: a stop was requested; results so far are on disk. On all ranks.
        DataError: the cache cannot be written, or a log-prob is not finite; on all ranks.
    """
    logps = read_cache(folder, data, ranks, tokens=tokens)
    missing = logps.missing(wanted)
    if choices is not None:
        missing = np.union1d(missing, choices.missing(wanted))
    if not len(missing):
        return logps
    writer = PartWriter(folder, ranks, logps.damaged, choices, tokens=tokens)
    writer.require_room(missing)
    model = load_model()
    chunks = [missing[start : start + groups_per_pass] for start in range(0, len(missing), groups_per_pass)]
    batches = build_ahead(lambda indices: build_step(0, data, indices, select_all, shape), chunks)
    pauses = Pauses(deadline)
    num_wanted = len(data) if wanted is None else len(wanted)
    with signals.deferred(), _Progress(data, num_wanted, num_wanted - len(missing), enabled=ranks.is_main) as progress:
        try:
            for indices, batch in zip(chunks, batches, strict=True):
                part, ids = _compute_part(data, indices, batch, model, ranks, tokens, choices)
                logps.fill(part)
                writer.add(part, ids)
                if choices is not None:
                    choices.there[indices] = True
                progress.add(len(indices), batch.plan.num_tokens)
                pauses.stop_if_asked()
        except Stopped:  # raised on all ranks
            writer.finish()
            raise
        writer.finish()
    return logps


def _compute_part(
    data: PreparedGroups,
    indices: Int64,
    batch: StepBatch,
    model: list[torch.nn.Module],
    ranks: Ranks,
    tokens: bool,
    choices: ReferenceChoices | None,
) -> tuple[pa.Table, npt.NDArray[Any] | None]:
    """Log-probs of these groups, and the expert choices [Σ tokens, L, k] if they are recorded."""
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
            "model fails there; check its checkpoint, or set another model.precision."
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
    """Every response of every group, because the cache serves any loss."""
    return np.ones(len(table.valid), dtype=bool), table.valid


class _Progress:
    """Groups done, rate and time left: a live bar on a terminal, occasional lines elsewhere."""

    def __init__(self, data: PreparedGroups, total: int, done: int, *, enabled: bool) -> None:
        self.name, self.total, self.done, self.enabled = data.path.name, total, done, enabled
        self.others = len(data) - total
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
            self.console.print(f"reference log-probs of {self.name}: {self.done:,} of {self.total:,} groups are cached")
        if self.enabled and self.others:
            text = f"{self.total:,} groups are computed; the run does not use the other {self.others:,}"
            self.console.print(f"reference log-probs of {self.name}: {text}", soft_wrap=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def add(self, groups: int, tokens: int) -> None:
        """Count a finished part, with its tokens over all ranks, without padding."""
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
