"""Evaluation of the policy on the held-out groups."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mpo_megatron.config import ConfigError, require
from mpo_megatron.data.loader import build_ahead, build_step
from mpo_megatron.train.faults.incidents import TrainingError, broken_groups
from mpo_megatron.train.metrics import combine
from mpo_megatron.train.run import Run
from mpo_megatron.train.step import forward_step
from mpo_megatron.train.tracking import Tracker
from mpo_megatron.train.tracking.outcomes import group_outcomes, log_outcomes


def evaluate(run: Run, step: int, trackers: list[Tracker], pause: Callable[[], None]) -> dict[str, float]:
    """Compute and record metrics over all held-out groups; all ranks call it. Empty without held-out groups.

    Args:
        pause: called between batches; raises `Stopped` if the run must stop
    Raises:
        ConfigError: no held-out group has contrast, or the metric `checkpoint.best_metric` does not exist.
        TrainingError: a group's loss is not finite.
        Stopped: a stop was requested; then nothing is recorded.
    """
    data, best = run.setup.held_out, run.config.checkpoint
    if data is None:
        return {}
    parts, outcomes = [], []
    size = run.config.data.groups_per_step
    chunks = [np.arange(start, min(start + size, len(data))) for start in range(0, len(data), size)]
    batches = build_ahead(lambda indices: build_step(0, data, indices, run.setup.objective.select, run.shape), chunks)
    for number, batch in enumerate(batches):
        if number:
            pause()
        if batch.contributes.any():
            routing = run.routing(data, batch)
            reference = run.reference(data, batch, routing)
            policy = forward_step(run.model, batch, run.setup.objective, run.ranks, run.resident, routing)
            losses = run.losses(batch, policy, reference)
            if not losses.isfinite().all():
                raise TrainingError(f"step {step}: held out, the loss is not finite{broken_groups(batch, losses)}.")
            learned = run.measure(batch, policy, reference, losses)
            parts.append(learned if routing is None else learned | routing.measured)
            outcomes += group_outcomes(batch, policy, reference, run.setup.objective.params)
    if not parts:
        raise ConfigError(f"data.eval = {data.path}: no group has contrast; choose other held-out groups.")
    metrics = {f"eval/{name}": value for name, value in combine(parts).items()}
    require(
        best.keep_best == 0 or best.best_metric in metrics,
        f"checkpoint.best_metric = {best.best_metric}; there is no such metric; choose one of {', '.join(metrics)}.",
    )
    for tracker in trackers:
        tracker.log(step, metrics)
    if run.ranks.is_main:
        log_outcomes(run.folder, step, outcomes, data, run.config.logging.num_samples, trackers)
    return metrics
