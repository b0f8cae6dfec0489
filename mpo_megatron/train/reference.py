"""Reference log-probs: computed once per model and data, kept on disk beside the groups, resumed when killed.

    <prepared data>/reference/<key>/part-00000000.parquet   group index, log-probs of its responses (and of their tokens)

The key is a digest of everything the numbers depend on, so a stale cache is never read: it has another name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.progress import track
from torch.distributed import broadcast_object_list

from mpo_megatron.config import ModelConfig
from mpo_megatron.data.atomic import writing
from mpo_megatron.data.group import PreparedGroups
from mpo_megatron.data.loader import Bools, GroupTable, RowShape, build_step
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.train.objective import Logps
from mpo_megatron.train.step import collect_logps, run_rows

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ReferenceLogps:
    """log π_ref of every response of a dataset, in nats."""

    response: Sequence[Floats]
    """One [K] per group."""
    token: Sequence[npt.NDArray[np.float32]] | None
    """One array per group: the tokens of all its responses, one after the other; None unless asked for."""

    def select(self, table: GroupTable) -> Logps:
        """The reference log-probs of a step's groups, padded as its table is."""
        response = np.zeros(table.valid.shape)
        token = np.zeros((*table.valid.shape, int(table.lengths.max())), dtype=np.float32) if self.token is not None else None
        for slot, index in enumerate(table.indices):
            response[slot, table.valid[slot]] = self.response[index]
            if token is not None and self.token is not None:
                flat = self.token[index]
                token[slot][np.arange(token.shape[2]) < table.lengths[slot, :, None]] = flat
        return Logps(response=torch.from_numpy(response), token=None if token is None else torch.from_numpy(token))


def cache_key(model_digest: str, data: PreparedGroups, model: ModelConfig, *, transformer_engine: bool) -> str:
    """Name of the cache: a digest of model, tokenizer, data and numerics. The layout over ranks changes rounding only."""
    parts = {
        "model": model_digest,
        "data": data.info.data_digest,
        "tokenizer": data.info.tokenizer_digest,
        "precision": model.precision,
        "transformer_engine": transformer_engine,
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
) -> ReferenceLogps:
    """Read the cache in `folder`, computing and writing the parts it lacks; all ranks call it and get the same.

    Args:
        load_model: gives the reference model; called only if something is missing
        groups_per_part: groups computed between two writes
        tokens: per-token log-probs are needed, too
    """
    starts = range(0, len(data), groups_per_part)
    parts = [_read_part(_part_path(folder, start, tokens), ranks) for start in starts]
    missing = [index for index, part in enumerate(parts) if part is None]
    if missing:
        model = load_model()
        if ranks.is_main:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
        for index in track(missing, description="reference log-probs", disable=not ranks.is_main, transient=True):
            indices = np.arange(starts[index], min(starts[index] + groups_per_part, len(data)))
            parts[index] = _compute_part(data, indices, model, ranks, shape, tokens)
            if ranks.is_main:
                _write_part(parts[index], _part_path(folder, starts[index], tokens))
    table = pa.concat_tables(parts)
    return ReferenceLogps(
        response=[np.array(row) for row in table["logps"].to_pylist()],
        token=[np.array(row, dtype=np.float32) for row in table["token_logps"].to_pylist()] if tokens else None,
    )


def _compute_part(
    data: PreparedGroups,
    indices: npt.NDArray[np.int64],
    model: list[torch.nn.Module],
    ranks: Ranks,
    shape: RowShape,
    tokens: bool,
) -> pa.Table:
    batch = build_step(0, data, indices, select_all, shape)
    width = int(batch.table.lengths.max()) if tokens else None
    logps = collect_logps(run_rows(model, batch.rows, ranks, row_loss=None), batch.table.valid.shape, ranks, width)
    response = logps.response.cpu().numpy()
    columns: dict[str, Any] = {
        "group_id": list(batch.table.group_ids),
        "logps": [row[valid].tolist() for row, valid in zip(response, batch.table.valid, strict=True)],
    }
    if logps.token is not None:
        scored = np.arange(logps.token.shape[2]) < batch.table.lengths[:, :, None]
        columns["token_logps"] = [row[mask] for row, mask in zip(logps.token.cpu().numpy(), scored, strict=True)]
    return pa.table(columns)


def select_all(table: GroupTable) -> tuple[Bools, Bools]:
    """Every response of every group: the cache serves any loss."""
    return np.ones(len(table.valid), dtype=bool), table.valid


def _part_path(folder: Path, start: int, tokens: bool) -> Path:
    return folder / f"{'tokens' if tokens else 'part'}-{start:08d}.parquet"


def _read_part(path: Path, ranks: Ranks) -> pa.Table | None:
    """A written part, read by the main process for all: other nodes may not see its disk."""
    part = [pq.read_table(path) if ranks.is_main and path.is_file() else None]
    if torch.distributed.get_world_size() > 1:
        broadcast_object_list(part, src=0)
    return part[0]


def _write_part(part: pa.Table, path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    with writing(path.parent):
        pq.write_table(part, partial)
        os.replace(partial, path)
