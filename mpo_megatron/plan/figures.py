"""A plan as plain numbers: figures of a run, and everything that `mpo plan --output` writes."""

from __future__ import annotations

import dataclasses
from typing import Any

from mpo_megatron.config import PlanConfig
from mpo_megatron.plan.memory import StageMemory
from mpo_megatron.plan.parameters import count_parameters
from mpo_megatron.plan.search import Candidate, Workload


def summarize(problem: Workload, candidate: Candidate, groups: int) -> dict[str, float]:
    """Figures of a whole run with this many groups; the reference processes each group once, if needed."""
    time, step = candidate.time, problem.data.groups_per_step
    tokens = [
        sums.tokens / len(rows)
        for counts, sampled in zip(candidate.packed.sums, candidate.packed.rows, strict=True)
        for sums, rows in zip(counts, sampled, strict=True)
    ]
    hours = groups / step * time.seconds / 3600
    seen = cached_groups(problem, groups)
    reference_hours = seen / step * time.forward_seconds / 3600
    return {
        "seconds_per_step": time.seconds,
        "groups_per_second": step / time.seconds,
        "mfu": time.model_flops / time.seconds / problem.gpus / problem.hardware.bf16_tflops / 1e12,
        "rows_per_replica": candidate.packed.rows_per_replica,
        "fill": sum(tokens) / len(tokens) / candidate.row_tokens,
        "hours": hours,
        "reference_hours": reference_hours,
        "days": (hours + reference_hours) / 24,
        **choices_on_disk(problem, seen),
    }


def cached_groups(problem: Workload, groups: int) -> int:
    """Number of groups whose reference log-probs are computed before the first step, in a run with this many groups."""
    return min(groups, problem.sequences.num_groups) if problem.caches_reference else 0


def choices_on_disk(problem: Workload, groups: int) -> dict[str, float]:
    """GB of the reference's expert choices for this many groups; empty if they are not recorded."""
    experts = problem.family.experts
    if experts is None or not problem.records_choices or not problem.caches_reference:
        return {}
    means = [(t.prompt_lengths + ((t.lengths - 1) * t.valid).sum(axis=1)).mean() for t, _ in problem.sequences.steps]
    tokens = float(sum(means) / len(means)) * groups
    return {"choices_gb": tokens * experts.choices * experts.id_bytes / 1e9}


def describe(config: PlanConfig, problem: Workload, groups: int, own: Candidate | None, found: list[Candidate]) -> dict[str, Any]:
    """The whole plan as plain values: bytes, seconds, GB.

    Args:
        groups: number that the run processes
        own: the configured layout
        found: the suggested layouts
    """

    def one(candidate: Candidate) -> dict[str, Any]:
        return {
            "parallel": dataclasses.asdict(candidate.parallel),
            "recompute": candidate.model.recompute,
            "row_tokens": candidate.row_tokens,
            "data_parallel": candidate.replicas,
            "fits": problem.fits(candidate),
            "stages": [describe_stage(stage) for stage in candidate.stages],
            "time": dataclasses.asdict(candidate.time) | {"bubble_share": candidate.time.bubble_share},
            "run": summarize(problem, candidate, groups),
        }

    return {
        "config": dataclasses.asdict(config),
        "parameters": count_parameters(problem.family),
        "hardware": dataclasses.asdict(problem.hardware),
        "limit_bytes": problem.limit,
        "groups": groups,
        "sequences": problem.sequences.where,
        "run": one(own) if own else None,
        "suggestions": [one(candidate) for candidate in found],
    }


def describe_stage(stage: StageMemory) -> dict[str, Any]:
    """A stage's memory with its sums."""
    return dataclasses.asdict(stage) | {"static": stage.static, "dynamic": stage.dynamic, "total": stage.total}
