"""Findings to look at first: a few rules over a run's metrics, each with the numbers it uses."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from mpo_megatron.data.overlap import describe_overlap
from mpo_megatron.report.run_record import RunRecord

RISE = 1.05
"""Factor over its best value from which held-out loss counts as rising again."""
DISPLACED = 1.0
"""Preferred responses whose log π/π_ref fell by more nats than this count as less likely: by a factor e over a whole response."""
HOLD_UP = (
    "To keep preferred responses likely: raise loss.params.beta, lower optimizer.lr, use loss.name = nca, or a loss with a "
    "likelihood term (loss.name = rpo; dpo with loss.params.sft_weight)."
)
"""Advice if preferred responses get less likely."""
SPIKE = 10.0
"""Factor over the median from which a gradient norm counts as a spike."""
SLOWER = 0.8
"""Share of the run's median below which throughput counts as a drop."""
SKIPPED = 0.2
"""Share of groups without contrast from which there are "many"."""
UNEVEN = 1.15
"""Factor over the mean from which the slowest replica counts as a straggler."""
WAITING = 0.05
"""Share of the time spent waiting for data from which it is reported."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One finding about a run."""

    level: Literal["good", "note", "warn", "bad"]
    title: str
    text: str


def findings(run: RunRecord) -> list[Finding]:
    """All findings: problems first, then successes, then notes."""
    checks: tuple[Callable[[RunRecord], Iterator[Finding]], ...] = (
        *(_missing_data, _trained_on, _no_reference, _progress, _finite, _incidents, _held_out_loss, _accuracy, _displacement),
        *(_gradients, _skipped, _speed, _stragglers, _data_wait),
    )
    order = {"bad": 0, "warn": 1, "good": 2, "note": 3}
    return sorted((finding for check in checks for finding in check(run)), key=lambda finding: order[finding.level])


def count(number: int, thing: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _missing_data(run: RunRecord) -> Iterator[Finding]:
    if run.missing:
        yield Finding(level="warn", title="Data is missing from this page", text=missing_data(run))


def _trained_on(run: RunRecord) -> Iterator[Finding]:
    if run.train_data is None or run.held_out_data is None:
        return
    overlap = describe_overlap(run.train_data, run.held_out_data)
    if overlap is not None:
        yield Finding(level="warn", title="Held-out prompts were trained on", text=overlap)


def _no_reference(run: RunRecord) -> Iterator[Finding]:
    lines = [line for line in run.training if "loss" in line]
    if lines and not any("margin" in line for line in lines):
        text = (
            "The loss reads no reference log-probs, so margin, accuracy, log-ratios and KL were not measured. "
            "logging.reference_metrics = true measures them, with one more forward pass over the groups."
        )
        yield Finding(level="note", title="Not compared with a reference", text=text)


def missing_data(run: RunRecord) -> str:
    """The missing data, and what to do."""
    return (
        f"{'; '.join(run.missing)}. The page lacks prompts, responses and rewards of these groups, and the charts of rewards and "
        f"lengths. If they were moved, write the new path to {run.folder / 'config.yaml'}, remove its first line (the "
        "digest), and run mpo report again."
    )


def _progress(run: RunRecord) -> Iterator[Finding]:
    total = "?" if run.total_steps is None else run.total_steps
    if run.status == "stopped":
        text = f"No output for {run.age / 60:.0f} minutes, at step {run.step} of {total}. Run the same command again to resume."
        yield Finding(level="warn", title="The run has stalled", text=text)
    starts = len(run.facts.get("starts", []))
    if starts > 1:
        at = ", ".join(str(start["step"]) for start in run.facts["starts"][1:])
        yield Finding(level="note", title=f"Started {starts} times", text=f"Resumed after step {at}.")


def _finite(run: RunRecord) -> Iterator[Finding]:
    broken = [line["step"] for line in run.training if "loss" in line and line["loss"] is None]
    if broken:
        text = f"At {count(len(broken), 'step')}, first at step {broken[0]}; see the incidents below."
        yield Finding(level="bad", title="The loss was not finite", text=text)


def _incidents(run: RunRecord) -> Iterator[Finding]:
    if run.hangs:
        yield Finding(level="bad", title="Ranks hung", text=f"Stack traces: {', '.join(run.hangs[:4])} in incidents/.")
    steps = sorted({line["step"] for line in run.incidents if "step" in line})
    if steps:
        shown = ", ".join(map(str, steps[:6])) + (" …" if len(steps) > 6 else "")
        yield Finding(
            level="warn", title=f"{count(len(steps), 'step')} looked suspicious", text=f"Step {shown}; their groups are below."
        )


def _held_out_loss(run: RunRecord) -> Iterator[Finding]:
    steps, losses = run.values("loss", held_out=True)
    if len(losses) < 2:
        return
    best = min(range(len(losses)), key=lambda place: losses[place])
    if losses[-1] > losses[best] * RISE and best < len(losses) - 1:
        text = f"{losses[best]:.4g} at step {steps[best]}, {losses[-1]:.4g} now: use the earlier checkpoint, or fewer steps."
        yield Finding(level="warn", title="Held-out loss rises again", text=text)
    elif losses[-1] < losses[0]:
        text = f"From {losses[0]:.4g} to {losses[-1]:.4g}."
        yield Finding(level="good", title="Held-out loss fell", text=text)
    else:
        text = f"{losses[0]:.4g} at step {steps[0]}, {losses[-1]:.4g} now."
        yield Finding(level="warn", title="Held-out loss did not fall", text=text)


def _accuracy(run: RunRecord) -> Iterator[Finding]:
    _, values = run.values("accuracy", held_out=True)
    if len(values) < 2:
        return
    level: Literal["good", "warn"] = "good" if values[-1] > 0.55 else "warn"
    text = f"{100 * values[-1]:.1f} % of held-out pairs are in the right order; without learning, it is 50 %."
    yield Finding(level=level, title="Preferences learned" if level == "good" else "Preferences hardly learned", text=text)


def _displacement(run: RunRecord) -> Iterator[Finding]:
    _, chosen = run.values("chosen_log_ratio", held_out=True)
    if len(chosen) < 2:
        return
    _, rejected = run.values("rejected_log_ratio", held_out=True)
    text = f"Their log π/π_ref is {chosen[-1]:+.3g} nats on held-out groups"
    if chosen[-1] < -DISPLACED and rejected and rejected[-1] < chosen[-1]:
        text += (
            f", below −{DISPLACED:g}, and that of the others {rejected[-1]:+.3g}: the policy ranks them better, but moves "
            "probability to responses in neither set (likelihood displacement). Contrastive losses often do this. It is harmless "
            f"while samples stay good; compare some with `mpo chat` or `mpo evaluate`. {HOLD_UP}"
        )
        yield Finding(level="note", title="Preferred responses got less likely, the others even less", text=text)
    elif chosen[-1] < -DISPLACED:
        text += f", below −{DISPLACED:g}, and the others fell less: the policy ranks them in the wrong order. {HOLD_UP}"
        yield Finding(level="warn", title="Preferred responses got less likely", text=text)
    elif chosen[-1] < 0:
        text += f"; they count as less likely only below −{DISPLACED:g}."
        yield Finding(level="note", title="Preferred responses are about as likely as before", text=text)
    else:
        yield Finding(level="good", title="Preferred responses got more likely", text=f"{text}.")


def _gradients(run: RunRecord) -> Iterator[Finding]:
    steps, norms = run.values("grad_norm")
    if len(norms) < 8:
        return
    median = statistics.median(norms)
    spikes = [step for step, norm in zip(steps, norms, strict=True) if norm > SPIKE * median]
    if median and spikes:
        text = f"{count(len(spikes), 'step')} above {SPIKE:.0f} times the median of {median:.3g}; first at step {spikes[0]}."
        yield Finding(level="note", title="Gradient norm has spikes", text=text)


def _skipped(run: RunRecord) -> Iterator[Finding]:
    _, skipped = run.values("skipped_groups")
    per_step = run.config.get("data", {}).get("groups_per_step")
    if skipped and per_step and sum(skipped) / len(skipped) > SKIPPED * per_step:
        share = 100 * sum(skipped) / len(skipped) / per_step
        text = f"{share:.0f} % of all groups have equal rewards, or an empty set; they are skipped."
        yield Finding(level="note", title="Many groups without contrast", text=text)


def _speed(run: RunRecord) -> Iterator[Finding]:
    _, rates = run.values("tokens_per_second")
    if len(rates) < 20:
        return
    median, late = statistics.median(rates), statistics.median(rates[-max(5, len(rates) // 10) :])
    if late < SLOWER * median:
        text = f"{late:,.0f} tokens/s in the last steps, but {median:,.0f} over the run."
        yield Finding(level="warn", title="Throughput dropped", text=text)


def _stragglers(run: RunRecord) -> Iterator[Finding]:
    _, ratios = run.values("step_seconds_max_over_mean")
    _, ranks = run.values("slowest_rank")
    if len(ratios) >= 8 and ranks and statistics.median(ratios) > UNEVEN:
        rank, times = Counter(ranks).most_common(1)[0]
        text = (
            f"The slowest rank takes {statistics.median(ratios):.2f} times the mean; in {100 * times / len(ranks):.0f} % of the "
            f"steps it is rank {rank:.0f}."
        )
        yield Finding(level="warn", title="Ranks wait for a slow one", text=text)


def _data_wait(run: RunRecord) -> Iterator[Finding]:
    _, waits = run.values("data_wait")
    total = sum(waits) + sum(run.values("seconds")[1])
    if sum(waits) > WAITING * total:
        text = f"{100 * sum(waits) / total:.0f} % of the time; check for a slow disk."
        yield Finding(level="warn", title="Steps wait for data", text=text)
