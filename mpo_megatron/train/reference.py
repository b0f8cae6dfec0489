"""Compute reference log-probs of the needed groups that the cache lacks.

reference_cache.py stores the results.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from mpo_megatron.data.arrays import Bools, Int64
from mpo_megatron.data.loader import GroupTable, RowShape, StepBatch, build_ahead, build_step
from mpo_megatron.data.store import PreparedGroups
from mpo_megatron.files import DataError
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.terminal.console import Console
from mpo_megatron.terminal.progress import Advance, show_progress
from mpo_megatron.train.choices import ReferenceChoices
from mpo_megatron.train.faults import signals
from mpo_megatron.train.faults.stopping import Deadline, Pauses, Stopped
from mpo_megatron.train.reference_cache import PartWriter, ReferenceLogps, read_cache
from mpo_megatron.train.routing import gather_choices, record_rows
from mpo_megatron.train.step import collect_logps, run_rows


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
    with signals.deferred(), _progress(data, num_wanted, num_wanted - len(missing), ranks) as advance:
        try:
            for indices, batch in zip(chunks, batches, strict=True):
                part, ids = _compute_part(data, indices, batch, model, ranks, tokens, choices)
                logps.fill(part)
                writer.add(part, ids)
                if choices is not None:
                    choices.there[indices] = True
                advance(len(indices), batch.plan.num_tokens)
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


@contextlib.contextmanager
def _progress(data: PreparedGroups, total: int, cached: int, ranks: Ranks) -> Iterator[Advance]:
    """Groups done and their tokens over all ranks, without padding; the first rank shows it."""
    if not ranks.is_main:
        yield lambda units, amounts=0: None
        return
    title, console = f"reference log-probs of {data.path.name}", Console(highlight=False)
    if cached:
        console.print(f"{title}: {cached:,} of {total:,} groups are cached")
    if others := len(data) - total:
        console.print(f"{title}: {total:,} groups are computed; the run does not use the other {others:,}", soft_wrap=True)
    with show_progress(title, total, "groups", "tokens", done=cached, console=console) as advance:
        yield advance
