"""Held-out groups, by the policy's implicit reward: does log π − log π_ref rank preferred responses above others?

held_out_main.py runs it on one rank; `mpo evaluate` starts the ranks. It writes `held_out.jsonl`, one line per group, to the
output folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpo_megatron.config import ConfigError, DataConfig, EvaluateConfig, HeldOutConfig, LossConfig, TrainConfig, require
from mpo_megatron.config.model import ADAPTER_OFF
from mpo_megatron.data.arrays import Float64
from mpo_megatron.data.loader import build_step
from mpo_megatron.data.store import load_groups
from mpo_megatron.evaluate.statistics import Estimate, bootstrap
from mpo_megatron.files import DataError
from mpo_megatron.files.atomic import replace_file
from mpo_megatron.files.digests import seal_lines, unseal_lines
from mpo_megatron.hf.layout import read_model
from mpo_megatron.model.checkpoint_folder import with_megatron_checkpoints
from mpo_megatron.model.convert_folder import find_megatron_checkpoint
from mpo_megatron.train.metrics import compute_metrics
from mpo_megatron.train.objective import Logps, group_batch, take_groups
from mpo_megatron.train.reference import select_all
from mpo_megatron.train.session import session
from mpo_megatron.train.setup import Setup
from mpo_megatron.train.step import forward_step
from mpo_megatron.train.tracking.facts import RUN_FILE, earlier_starts

GROUPS_FILE = "held_out.jsonl"

METRICS = ("accuracy", "margin", "chosen_log_ratio", "rejected_log_ratio", "kl")
"""The trainer's metrics that need no loss, with the same definitions (`train/metrics.py`)."""


@dataclass(frozen=True, kw_only=True)
class GroupMetrics:
    """One group's contribution to each of `METRICS`: a sum and its divisor."""

    group_id: str
    totals: dict[str, float]
    counts: dict[str, float]


def evaluate_held_out(setup: Setup) -> list[GroupMetrics]:
    """Evaluate policy and reference on all groups; every rank calls it and gets all metrics, the main one writes
    `held_out.jsonl`.

    The reference's log-probs are read from, or added to, the cache that `mpo train` and `mpo reference` keep beside the groups.

    Args:
        setup: built from `as_training`
    Raises:
        ConfigError: models, groups and layout do not fit together.
        DataError: groups or cache are damaged.
        Stopped: a stop was requested during the reference pass; results so far are on disk.
    """
    data, size = setup.train, setup.config.data.groups_per_step
    results = []
    with session(setup) as place:
        reference = place.references(whole=True)[data.path]
        policy = place.load(setup.model_folder)
        for start in range(0, len(data), size):
            indices = np.arange(start, min(start + size, len(data)))
            batch = build_step(0, data, indices, select_all, place.shape)
            logps = forward_step(policy, batch, None, place.ranks)
            results += measure_groups(batch.table, logps, reference.select(batch.table), setup.objective.params)
        if place.ranks.is_main:
            write_groups(setup.folder / GROUPS_FILE, results)
    return results


def as_training(evaluation: EvaluateConfig, groups_per_step: int = 128) -> TrainConfig:
    """The training run whose evaluation at step 0 measures the groups, so that checks and cache key are the trainer's.

    Raises:
        ConfigError: held_out is not configured, a checkpoint is missing, or no reference is set.
    """
    config = evaluation.held_out
    if config is None:
        raise ConfigError("held_out is not configured.")
    reference = config.model.reference
    require(
        reference is not None,
        "held_out.model.reference = None; the implicit reward is log π − log π_ref: set it to the checkpoint that "
        "training started from.",
    )
    newest = replace(
        config.model,
        checkpoint=_newest(config.model.checkpoint),
        reference=reference if reference == ADAPTER_OFF else _newest(str(reference)),
    )
    read_model(Path(newest.checkpoint), config.parallel)  # before the conversion, which takes time and space
    data = load_groups(config.groups)
    labels_only = data.info.reward_kind == "labels"
    return TrainConfig(
        output=evaluation.output,
        model=with_megatron_checkpoints(newest, Path(evaluation.output), "held_out."),
        data=DataConfig(train=config.groups, groups_per_step=groups_per_step, row_tokens=config.row_tokens),
        parallel=config.parallel,
        loss=LossConfig(name="mpo", params={"partition": "labels"} if labels_only else {}),
    )


def describe_training(config: HeldOutConfig) -> str | None:
    """A sentence if the policy's run was trained on these groups; None if it was not, or its run is unknown."""
    folder = Path(config.model.checkpoint)
    runs = (folder, folder.parent.parent)  # a run, or `<run>/checkpoints/step_*`
    trained = {start["digests"]["train"] for run in runs for start in earlier_starts(run / RUN_FILE)}
    if load_groups(config.groups).info.data_digest not in trained:
        return None
    return (
        f"held_out.groups = {config.groups} are the groups that {folder} was trained on: accuracy and margin measure "
        "training, not new prompts. Name groups that `mpo prepare --held_out` split off."
    )


def measure_groups(table: Any, policy: Logps, reference: Logps, params: object) -> list[GroupMetrics]:
    """The metrics of each group."""
    everything, zero = group_batch(table, policy, reference), torch.zeros(1, dtype=torch.float64)
    results = []
    for slot, group_id in enumerate(table.group_ids):
        batch = take_groups(everything, torch.tensor([slot]))
        means = compute_metrics(batch, zero, zero == 0, batch.valid, params)
        totals = {name: means[name].total for name in METRICS}
        results.append(
            GroupMetrics(group_id=group_id, totals=totals, counts={name: float(means[name].count) for name in METRICS})
        )
    return results


def summarize(groups: list[GroupMetrics], *, num_resamples: int, seed: int) -> dict[str, Any]:
    """Every metric with its interval over groups, and the number of groups without contrast.

    Raises:
        DataError: no group has contrast.
    """
    contrast = [group for group in groups if group.counts["margin"]]
    if not contrast:
        raise DataError(f"none of {len(groups)} held-out groups has both a preferred and another response.")
    summary: dict[str, Any] = {"groups": len(groups), "without_contrast": len(groups) - len(contrast)}
    for name in METRICS:
        totals = np.array([group.totals[name] for group in contrast])
        counts = np.array([group.counts[name] for group in contrast])
        estimate: Estimate = bootstrap(_ratio(totals, counts), len(contrast), num_resamples=num_resamples, seed=seed)
        summary[name] = vars(estimate)
    return summary


def write_groups(path: Path, groups: list[GroupMetrics]) -> None:
    """Write one line per group: its contribution to each metric."""
    replace_file(path, seal_lines(map(vars, groups)))


def read_groups(path: Path) -> list[GroupMetrics]:
    """The metrics written by `write_groups`.

    Raises:
        DamagedError: the file is damaged.
    """
    return [GroupMetrics(**record) for record in unseal_lines(path, "run the same command again")]


def _ratio(totals: Float64, counts: Float64) -> Callable[[Float64], float]:
    return lambda weights: float(weights @ totals / (weights @ counts))


def _newest(folder: str) -> str:
    return str(find_megatron_checkpoint(Path(folder)) or folder)
