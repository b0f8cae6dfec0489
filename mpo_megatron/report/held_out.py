"""Held-out groups: the policy's ranking of each, the worst ones, and changes of their responses' log-probs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mpo_megatron.data.outcomes import GroupOutcome
from mpo_megatron.report.run_record import RunRecord

MOST_RESPONSES = 3000
"""Maximum responses in the plot of log-ratio against length."""
NUM_BINS = 48


class Limits(NamedTuple):
    """What the page holds at most."""

    groups: int
    """Held-out groups of a run."""
    responses: int
    """Responses of a group."""
    characters: int
    """Characters of a text."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One group at one evaluation."""

    margin: float | None
    """Mean log π/π_ref over Y+ minus the mean over Y−, in nats; None without both."""
    accuracy: float | None
    """Share of pairs Y+ × Y− in the right order; a tie counts half."""


def score(outcome: GroupOutcome) -> Score:
    """Margin and accuracy of a group."""
    ratios = [outcome.log_ratio(k) for k in range(len(outcome.sets))]
    chosen, rejected = (
        [ratio for ratio, own in zip(ratios, outcome.sets, strict=True) if own == which and ratio is not None] for which in (1, 0)
    )
    if not chosen or not rejected:
        return Score(margin=None, accuracy=None)
    ordered = np.sort(rejected)  # counted by binary search: K responses have up to K² / 4 pairs
    below, not_above = (np.searchsorted(ordered, chosen, side=side) for side in ("left", "right"))
    accuracy = float(np.mean(below + not_above)) / (2 * len(ordered))
    return Score(margin=float(np.mean(chosen) - np.mean(rejected)), accuracy=accuracy)


def shown_evaluations(run: RunRecord) -> list[int]:
    """Steps of the evaluations to show."""
    return sorted(run.outcomes)


def group_rows(run: RunRecord, limits: Limits) -> list[dict[str, Any]]:
    """The held-out groups on the page, worst margin first; empty if the run stored none."""
    steps = shown_evaluations(run)
    if not steps:
        return []
    first, last = run.outcomes[steps[0]], run.outcomes[steps[-1]]
    by_step = [{outcome.index: outcome for outcome in run.outcomes[step]} for step in steps]
    began = {outcome.index: score(outcome).margin for outcome in first}
    scored = [(outcome, score(outcome)) for outcome in last]
    scored.sort(key=lambda pair: math.inf if pair[1].margin is None else pair[1].margin)
    return [
        {
            "id": outcome.group_id,
            "margin": _short(result.margin),
            "began": _short(began.get(outcome.index)),
            "accuracy": _short(result.accuracy),
            **_texts(run, outcome, limits.characters),
            "k": len(outcome.sets),
            "responses": [
                _response(run, outcome, k, by_step, limits.characters) for k in _shown_responses(run, outcome, limits.responses)
            ],
        }
        for outcome, result in choose(scored, limits.groups)
    ]


def choose(ordered: Sequence[Any], most: int) -> list[Any]:
    """The first half of `most`, and as many spread evenly over the rest; all if there are no more."""
    if len(ordered) <= most:
        return list(ordered)
    worst = most // 2
    others = np.linspace(worst, len(ordered) - 1, most - worst).round().astype(int)
    return [*ordered[:worst], *(ordered[place] for place in others)]


def spread(ordered: Sequence[Any], most: int) -> list[Any]:
    """At most `most` items, spread evenly from the first to the last."""
    if len(ordered) <= most:
        return list(ordered)
    return [ordered[place] for place in np.linspace(0, len(ordered) - 1, most).round().astype(int)]


def _shown_responses(run: RunRecord, outcome: GroupOutcome, most: int) -> list[int]:
    """Indices of the responses on the page: of more than `most`, a selection spread over their rewards, or over their sets."""
    rewards = None if run.held_out_data is None else run.held_out_data.rewards(outcome.index)
    values = np.asarray(outcome.sets if rewards is None else rewards)
    return sorted(spread(np.argsort(-values, kind="stable").tolist(), most))


def _texts(run: RunRecord, outcome: GroupOutcome, most: int) -> dict[str, Any]:
    data = run.held_out_data
    if data is None:
        return {"prompt": None, "spread": None}
    rewards = data.rewards(outcome.index)
    spread = None if rewards is None else float(rewards.max() - rewards.min())
    return {"prompt": cut(data.text(outcome.index)[0], most), "spread": _short(spread)}


def _response(
    run: RunRecord, outcome: GroupOutcome, k: int, by_step: Sequence[dict[int, GroupOutcome]], most: int
) -> dict[str, Any]:
    data, index = run.held_out_data, outcome.index
    ratios = [_short(there[index].log_ratio(k)) if index in there else None for there in by_step]
    row: dict[str, Any] = {
        "set": outcome.sets[k],
        "ratios": ratios,
        "policy": _short(outcome.policy_logps[k]),
        "reference": _short(outcome.reference_logps[k]),
    }
    if data is None:
        return row | {"text": None, "reward": None, "tokens": None}
    rewards, texts = data.rewards(index), data.text(index)[1]
    return row | {
        "text": cut(texts[k], most) if texts else None,
        "reward": None if rewards is None else _short(float(rewards[k])),
        "tokens": int(data.response_lengths(index)[k]),
    }


def drift(run: RunRecord) -> dict[str, Any] | None:
    """Histograms of log π/π_ref at every shown evaluation, for preferred and other responses; None without any."""
    steps = shown_evaluations(run)
    values = [_ratios(run.outcomes[step]) for step in steps]
    together = np.concatenate([part for parts in values for part in parts]) if values else np.zeros(0)
    if not len(together):
        return None
    low, high = np.quantile(together, [0.002, 0.998])
    edges = np.linspace(low - 0.5, high + 0.5, NUM_BINS + 1)
    counts = [[histogram(part, edges) for part in parts] for parts in values]
    return {"steps": steps, "edges": [_short(edge) for edge in edges], "counts": counts}


def lengths_and_ratios(run: RunRecord) -> list[dict[str, Any]]:
    """[{set, tokens, ratios}] of the last evaluation, to show a length bias. Empty if the data is missing."""
    data, steps = run.held_out_data, shown_evaluations(run)
    if data is None or not steps:
        return []
    found: dict[int, list[tuple[int, float]]] = {1: [], 0: []}
    for outcome in run.outcomes[steps[-1]]:
        tokens = data.response_lengths(outcome.index)
        for k, own in enumerate(outcome.sets):
            ratio = outcome.log_ratio(k)
            if own in found and ratio is not None:
                found[own].append((int(tokens[k]), round(ratio, 3)))
    each = MOST_RESPONSES // 2
    thinned = {own: pairs[:: max(1, -(-len(pairs) // each))] for own, pairs in found.items()}
    return [
        {"set": own, "tokens": [pair[0] for pair in pairs], "ratios": [pair[1] for pair in pairs]}
        for own, pairs in thinned.items()
    ]


def data_histograms(run: RunRecord) -> list[dict[str, Any]]:
    """Rewards, response lengths, prompt lengths and K of the training and held-out groups, as shares of each.

    Quantities with a single value are omitted.
    """
    sources = {"training": run.train_data, "held out": run.held_out_data}
    present = {name: data for name, data in sources.items() if data is not None}
    charts = []
    for title, unit, read in (
        ("Rewards", "reward", lambda data: data.all_rewards()),
        ("Response lengths", "tokens", lambda data: data.all_response_lengths()),
        ("Prompt lengths", "tokens", lambda data: data.prompt_lengths()),
        ("Responses per group", "K", lambda data: data.num_responses()),
    ):
        values = {name: read(data) for name, data in present.items()}
        known = {name: np.asarray(value, dtype=np.float64) for name, value in values.items() if value is not None and len(value)}
        if known and len(np.unique(np.concatenate(list(known.values())))) > 1:
            edges = bin_edges(np.concatenate(list(known.values())))
            series = {name: [_short(count / len(value)) for count in histogram(value, edges)] for name, value in known.items()}
            charts.append({"title": title, "unit": unit, "edges": [_short(edge) for edge in edges], "series": series})
    return charts


def bin_edges(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Bins for two or more different values: one per value if there are few, otherwise equal bins up to the 99.5th percentile."""
    different = np.unique(values)
    if len(different) <= NUM_BINS:
        middles = (different[1:] + different[:-1]) / 2
        return np.concatenate([[2 * different[0] - middles[0]], middles, [2 * different[-1] - middles[-1]]])
    return np.linspace(different[0], np.quantile(values, 0.995), NUM_BINS + 1)


def histogram(values: npt.NDArray[np.float64], edges: npt.NDArray[np.float64]) -> list[int]:
    """Counts per bin; values beyond the outer edges count in the outer bins."""
    if not len(values):
        return [0] * (len(edges) - 1)
    places = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    return np.bincount(places, minlength=len(edges) - 1).tolist()


def cut(text: str, most: int) -> str:
    """A text of at most `most` characters, with a note on the omitted rest."""
    return text if len(text) <= most else f"{text[:most]} … [{len(text) - most} more characters]"


def _ratios(outcomes: Sequence[GroupOutcome]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """log π/π_ref of preferred and of other responses."""
    found: dict[int, list[float]] = {1: [], 0: [], -1: []}
    for outcome in outcomes:
        for k, own in enumerate(outcome.sets):
            ratio = outcome.log_ratio(k)
            if ratio is not None:
                found[own].append(ratio)
    return np.array(found[1], dtype=np.float64), np.array(found[0], dtype=np.float64)


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
