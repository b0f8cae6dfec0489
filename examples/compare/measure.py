"""What each checkpoint of a run learned: the same metrics for every method, whatever its loss reads.

The trainer's own `eval/*` cover the responses and sets of the run's loss (a pairwise loss scores two responses per group), and
without a reference they use log-probs per token: right for watching one run, but not for comparing two. So this module exports
every checkpoint and scores all responses with `transformers`, against the same start.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.quickstart import evaluate
from examples.quickstart.evaluate import HeldOutGroup, Scores


@dataclass(frozen=True)
class HeldOut:
    """The held-out groups with the start's scores."""

    groups: list[HeldOutGroup]
    rewards: list[list[float]]
    reference: Scores


def load_held_out(data: Path, max_response_tokens: int) -> HeldOut:
    """The held-out groups with contrast, scored by the initial model, which is the reference of all numbers."""
    from mpo_megatron.data.store import load_groups

    groups = evaluate.load_held_out(data / "groups-eval")
    prepared = load_groups(data / "groups-eval")
    rewards = {prepared.text(index): prepared.rewards(index) for index in range(len(prepared))}
    return HeldOut(
        groups=groups,
        rewards=[[float(value) for value in _required(rewards[group.prompt, group.responses])] for group in groups],
        reference=evaluate.score_groups(data / "start", groups, max_response_tokens),
    )


def _required(rewards: Any) -> Any:
    if rewards is None:
        raise ValueError("held-out groups have labels only; the comparison needs rewards.")
    return rewards


def measure_start(held_out: HeldOut) -> dict[str, float]:
    """Step 0: policy and reference are the same model."""
    return _summarize(held_out.reference, held_out)


def measure_checkpoint(checkpoint: Path, held_out: HeldOut, max_response_tokens: int) -> dict[str, float]:
    """Export a run's checkpoint to Hugging Face format, score the held-out groups, and delete the export."""
    from mpo_megatron.config import ConvertConfig
    from mpo_megatron.model.convert import convert

    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stderr(io.StringIO()):  # hide its progress, shown once per checkpoint
            convert(ConvertConfig(input=str(checkpoint), output=f"{folder}/hf"))
        return _summarize(evaluate.score_groups(Path(folder) / "hf", held_out.groups, max_response_tokens), held_out)


def _summarize(scores: Scores, held_out: HeldOut) -> dict[str, float]:
    """With s = log π/π_ref of a response in nats, and Y+, Y− the responses above their group's mean reward and the others:

    - `accuracy`: share of pairs Y+ × Y− with the larger s on the preferred side; `accuracy_error`: its standard error
    - `ranking_accuracy`: the same over all pairs of different reward
    - `plain_accuracy`: as `accuracy`, for log π per token, without a reference (the scores of SimPO and similar losses)
    - `chosen`, `rejected`: mean of s over Y+ and Y−, averaged over groups; `margin`: their difference
    - `kl`: mean of −s over all responses
    """
    groups, ratios = held_out.groups, evaluate.subtract(scores, held_out.reference)
    sets = [group.preferred for group in groups]
    chosen, rejected = (
        statistics.fmean(_mean_where(row, flags[side]) for row, flags in zip(ratios, sets, strict=True)) for side in (0, 1)
    )
    accuracy = evaluate.compute_accuracy(ratios, groups)
    return {
        "accuracy": accuracy,
        "accuracy_error": _standard_error(accuracy, ratios, groups),
        "ranking_accuracy": compute_ranking_accuracy(ratios, held_out.rewards),
        "plain_accuracy": evaluate.compute_accuracy(scores.per_token, groups),
        "margin": chosen - rejected,
        "chosen": chosen,
        "rejected": rejected,
        "kl": -statistics.fmean(value for row in ratios for value in row),
    }


def _mean_where(values: Sequence[float], flags: Sequence[bool]) -> float:
    return statistics.fmean(value for value, flag in zip(values, flags, strict=True) if flag)


def compute_ranking_accuracy(values: Sequence[Sequence[float]], rewards: Sequence[Sequence[float]]) -> float:
    """Share of a group's pairs with different rewards that `values` ranks correctly; a tie counts half."""
    outcomes = []
    for row, scores in zip(values, rewards, strict=True):
        for value, score in zip(row, scores, strict=True):
            worse = [other for other, lower in zip(row, scores, strict=True) if lower < score]
            outcomes += [1.0 if value > other else 0.5 if value == other else 0.0 for other in worse]
    return statistics.fmean(outcomes)


def _standard_error(accuracy: float, values: Sequence[Sequence[float]], groups: Sequence[HeldOutGroup]) -> float:
    """Standard error of a share of pairs over groups, because a group's pairs are not independent."""
    if len(groups) < 2:
        return math.nan
    num_pairs = [sum(group.preferred[0]) * sum(group.preferred[1]) for group in groups]
    shares = [evaluate.compute_accuracy([row], [group]) for row, group in zip(values, groups, strict=True)]
    squares = sum((pairs * (share - accuracy)) ** 2 for pairs, share in zip(num_pairs, shares, strict=True))
    return math.sqrt(squares * len(groups) / (len(groups) - 1)) / sum(num_pairs)


def measure_run(run: Path, held_out: HeldOut, max_response_tokens: int) -> dict[str, Any]:
    """A finished run: held-out numbers at step 0 and at each checkpoint, and the cost of its steps.

    Only the last checkpoint stays on disk.
    """
    checkpoints = sorted((run / "checkpoints").glob("step_*[0-9]"))
    curve = [{"step": 0, **measure_start(held_out)}]
    for checkpoint in checkpoints:
        step = int(checkpoint.name.removeprefix("step_"))
        curve.append({"step": step, **measure_checkpoint(checkpoint, held_out, max_response_tokens)})
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "seconds" in row]
    for checkpoint in checkpoints[:-1]:
        shutil.rmtree(checkpoint)
    return {
        "curve": curve,
        # The median excludes the first step, which allocates, and disturbances by other programs.
        "seconds_per_step": statistics.median(row["seconds"] for row in steps),
        "training_seconds": sum(row["seconds"] for row in steps),
        "tokens_per_step": statistics.fmean(row["tokens_per_second"] * row["seconds"] for row in steps),
        "backward_share": statistics.fmean(row.get("backward_share", 1.0) for row in steps),
        "skipped_groups": sum(row["skipped_groups"] for row in steps),
    }
