"""Suspicious steps: a loss or gradient norm that is not finite, or far above earlier ones; a reaction and a record.

The decision is made between the backward pass and the update, from numbers that all ranks have, so all ranks decide alike. A
skipped step leaves weights and optimizer unchanged; data and learning rate advance.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from mpo_megatron.config import FaultConfig
from mpo_megatron.data.loader import StepBatch
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.files.digests import seal_lines
from mpo_megatron.train.objective import Logps

NORMAL_MAD = 1.4826
"""Ratio of a normal distribution's standard deviation to its median absolute deviation."""

UPPER, NORMAL_UPPER = 0.8, 0.8416
"""A quantile above the median, and its distance from the median in standard deviations of a normal distribution."""

LEAST_SPREAD = 0.02
"""Minimum spread, as a share of the median: after equal steps, a small change is no spike."""

MOST_GROUPS = 32
"""Groups written per incident: those with the highest loss."""


class TrainingError(RuntimeError):
    """Training cannot continue; the message names the step and what to check."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Whether to apply a step's update, and what is wrong with the step, if anything."""

    apply: bool
    stop: bool
    wrong: str | None


class Guard:
    """Judges steps by earlier ones; its memory is part of the run's state."""

    def __init__(self, config: FaultConfig, losses: Sequence[float], norms: Sequence[float], skipped: int) -> None:
        self.config = config
        self.losses = deque(losses, maxlen=config.spike_window)
        self.norms = deque(norms, maxlen=config.spike_window)
        self.skipped = skipped
        """Number of skipped steps in the run."""
        self.in_a_row = 0

    def judge(self, loss: float, norm: float) -> Judgement:
        """Judge a step by its mean loss and its gradient norm before clipping, and remember it if it is applied."""
        wrong, policy = self._look(loss, norm)
        if policy == "log":
            self.losses.append(loss)
            self.norms.append(norm)
            self.in_a_row = 0
            return Judgement(apply=True, stop=False, wrong=wrong)
        if policy == "skip":
            self.skipped += 1
            self.in_a_row += 1
            if self.in_a_row > self.config.max_skips:
                wrong = f"{wrong}; {self.config.max_skips} steps were skipped before (faults.max_skips)"
        return Judgement(apply=False, stop=policy == "stop" or self.in_a_row > self.config.max_skips, wrong=wrong)

    def _look(self, loss: float, norm: float) -> tuple[str | None, Literal["log", "skip", "stop"]]:
        """What is wrong with a step, and the reaction."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss}, gradient norm {norm}: not finite", self.config.on_nan
        for name, window, value in (("loss", self.losses, loss), ("gradient norm", self.norms, norm)):
            if self._is_spike(window, value):
                return f"{name} {value:.4g} far above the last steps' {statistics.median(window):.4g}", self.config.on_spike
        return None, "log"

    def _is_spike(self, window: deque[float], value: float) -> bool:
        """Whether a value is more than `spike_threshold` robust standard deviations above the window's median.

        Gradient norms have a long upper tail, which the median absolute deviation does not capture. So the spread of the upper
        half is used, if it is larger.
        """
        if len(window) * 2 < self.config.spike_window:
            return False
        median = statistics.median(window)
        around = NORMAL_MAD * statistics.median(abs(past - median) for past in window)
        above = (float(np.quantile(window, UPPER)) - median) / NORMAL_UPPER
        return value > median + self.config.spike_threshold * max(around, above, LEAST_SPREAD * abs(median))


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A step's values at judgement."""

    batch: StepBatch
    losses: Tensor
    """[G]"""
    policy: Logps
    reference: Logps | None
    norm: float
    """Norm of the gradients, before clipping."""


def report(judgement: Judgement, evidence: Evidence, run: Path, tokenizer: Path, *, is_main: bool) -> None:
    """Record a suspicious step, and end the run if configured; all ranks call it.

    Args:
        run: the run's folder
        tokenizer: folder of the tokenizer, to write texts
        is_main: whether this rank writes
    Raises:
        TrainingError: the run must end.
    """
    step, folder = evidence.batch.step + 1, run / "incidents"
    message = f"step {step}: {judgement.wrong}{broken_groups(evidence.batch, evidence.losses)}"
    if is_main:
        path = record(folder, judgement.wrong or "", evidence, tokenizer)
        print(f"{message}; {'applied' if judgement.apply else 'not applied'}; its groups: {path}", flush=True)
    if judgement.stop:
        raise TrainingError(
            f"{message}; the weights are those before this step. Check its groups in {folder}, fix the data, lower "
            "optimizer.lr, or skip such steps (faults.on_nan, faults.on_spike: skip)."
        )


def broken_groups(batch: StepBatch, losses: Tensor) -> str:
    """The first groups whose loss is not finite, as text; empty if all are finite."""
    broken = (~losses.isfinite()).nonzero().flatten().tolist()
    names = ", ".join(batch.table.group_ids[slot] for slot in broken[:8])
    return f" (groups {names})" if names else ""


def record(folder: Path, wrong: str, evidence: Evidence, tokenizer: Path) -> Path:
    """Write a step's groups to `step_….jsonl`, one per line, worst first, and their number; the path of the file."""
    batch, values = evidence.batch, evidence.losses.tolist()
    order = sorted(range(len(values)), key=lambda slot: -values[slot] if math.isfinite(values[slot]) else -math.inf)
    contributing = [slot for slot in order if batch.contributes[slot]][:MOST_GROUPS]
    decode, reference = load_tokenizer(tokenizer).decode, evidence.reference
    lines = []
    for slot in contributing:
        group = batch.groups[slot]
        responses = [
            {
                "text": decode(tokens.tolist()),
                "num_tokens": len(tokens),
                **({} if group.rewards is None else {"reward": _number(group.rewards[k])}),
                **({} if group.labels is None else {"label": int(group.labels[k])}),
                "logp": _number(evidence.policy.response[slot, k]),
                **({} if reference is None else {"reference_logp": _number(reference.response[slot, k])}),
            }
            for k, tokens in enumerate(group.response_tokens)
        ]
        head = {"step": batch.step + 1, "wrong": wrong, "grad_norm": _number(evidence.norm), "group_id": group.group_id}
        body = {"loss": _number(values[slot]), "prompt": decode(group.prompt_tokens.tolist()), "responses": responses}
        lines.append({**head, **body})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{batch.step + 1:08d}.jsonl"
    path.write_bytes(b"".join(seal_lines(lines)))
    return path


def _number(value: Any) -> float | str:
    """A number in a form that JSON can represent."""
    number = float(value)
    return number if math.isfinite(number) else str(number)
