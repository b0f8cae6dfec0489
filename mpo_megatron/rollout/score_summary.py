"""Statistics of scores, and warnings about suspicious ones: `score.json`, and the printed lines.

Legend: K responses of a group; r is a correlation within groups, over all groups together.
"""

from __future__ import annotations

import functools
import math
import statistics
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from mpo_megatron.config import ScoreConfig, to_dict
from mpo_megatron.config.score import JudgeScorer, build_scorer_config
from mpo_megatron.config.values import LARGEST_REWARD
from mpo_megatron.rollout.records import Record
from mpo_megatron.terminal.console import Console
from mpo_megatron.terminal.counts import count_of

_LENGTH_ALONE = 0.98
"""From this correlation of score and length, a score says little beyond the length."""
_LENGTH_BIAS = 0.6
"""From this correlation, report a length bias."""
_PLACE_BIAS = 0.6
"""Report a position bias if one position wins this share of decided comparisons."""
_MIN_DECIDED = 30
"""Fewer decided comparisons do not show a position bias: 0.6 of 30 is one standard error above a half."""
_MANY = 0.1
"""Report missing scores from this share."""


TOLD = {
    *("first_place_won", "second_place_won", "orders_agree", "orders_differ"),
    *("answers", "prompt_tokens", "completion_tokens"),
}
"""Notes that only count successes; `print_summary` prints them in other words."""


UNUSABLE = {"not_finite": "NaN or infinite", "too_large": f"beyond ±{LARGEST_REWARD:g}"}
"""Notes about scores that cannot be used."""


@dataclass(kw_only=True)
class _Tally:
    """Statistics of one score over all responses."""

    values: array[float] = field(default_factory=lambda: array("d"))
    num_varied: int = 0
    """Groups of several responses whose scores differ."""
    num_groups: int = 0
    """Groups of several responses."""
    products: array[float] = field(default_factory=lambda: array("d"))
    """For each group, sums of products of deviations from its mean: score · length, score², length²."""

    def add(self, values: Sequence[float], lengths: Sequence[int]) -> None:
        """Add one group's scores, with the number of characters of each response."""
        self.values.extend(values)
        if len(values) < 2:
            return
        self.num_groups += 1
        self.num_varied += min(values) < max(values)
        scale = max(map(abs, values)) or 1.0  # 1e200 squared overflows
        mean, length = statistics.fmean(value / scale for value in values), statistics.fmean(lengths)
        pairs = [(value / scale - mean, characters - length) for value, characters in zip(values, lengths, strict=True)]
        self.products.extend((sum(x * y for x, y in pairs), sum(x * x for x, _ in pairs), sum(y * y for _, y in pairs)))

    def describe(self) -> dict[str, Any]:
        """Spread, and correlation with length; null where either is constant."""
        covariance, variance, length_variance = (math.fsum(self.products[place::3]) for place in range(3))
        product = variance * length_variance  # fsum: exact whatever the order, which shards change
        return {
            "mean": statistics.fmean(self.values),
            "std": statistics.pstdev(self.values),
            "min": min(self.values),
            "max": max(self.values),
            "length_correlation": covariance / math.sqrt(product) if product > 0 else None,
            "varied_groups": self.num_varied / self.num_groups if self.num_groups else None,
        }


def summarize(records: Iterable[Record], config: ScoreConfig) -> dict[str, Any]:
    """Counts and statistics, computed from the lines, so they do not depend on the number of resumptions."""
    tallies = {name: _Tally() for name in (*config.scorers, "reward")}
    spreads, best = array("d"), array("d")  # of numbers, for a million groups
    notes, missing = dict[str, Counter[str]](), Counter[str]()
    counts = Counter[str]()
    for record in records:
        responses = record["responses"]
        rewards = [response["reward"] for response in responses]
        counts["groups"] += bool(rewards)
        counts["groups_dropped"] += not rewards
        counts["responses"] += len(rewards)
        counts["groups_of_equal_rewards"] += len(rewards) > 1 and min(rewards) == max(rewards)
        missing.update(record.get("missing", {}))
        for name, found in record.get("notes", {}).items():
            notes.setdefault(name, Counter()).update(found)
        if rewards:
            lengths = [len(response["text"]) for response in responses]
            for name in config.scorers:
                tallies[name].add([response["scores"][name] for response in responses], lengths)
            tallies["reward"].add(rewards, lengths)
            spreads.append(max(rewards) - min(rewards))
            best.append(max(rewards))
    summary = {
        "counts": dict(counts),
        "missing_scores": dict(missing),
        "notes": {name: dict(item) for name, item in notes.items()},
    }
    if best:
        summary |= {
            "statistics": {name: tally.describe() for name, tally in tallies.items()},
            "best_reward": statistics.fmean(best),
            "reward_spread": statistics.fmean(spreads),
        }
        summary |= {"judges": _describe_judges(notes, config)}
        summary |= {"warnings": _find_faults(summary)}
    return summary | {"config": to_dict(config)}


def _describe_judges(notes: Mapping[str, Mapping[str, int]], config: ScoreConfig) -> dict[str, Any]:
    """For each scorer that compares or asks: position bias, agreement of the two orders, tokens and their cost."""
    judges: dict[str, Any] = {}
    for name, found in notes.items():
        first, second = found.get("first_place_won", 0), found.get("second_place_won", 0)
        agree, differ = found.get("orders_agree", 0), found.get("orders_differ", 0)
        described: dict[str, Any] = {}
        if first + second:
            described |= {"decided": first + second, "first_place_share": first / (first + second)}
        if agree + differ:
            described["orders_agree_share"] = agree / (agree + differ)
        if found.get("answers"):
            described |= {key: found.get(key, 0) for key in ("answers", "prompt_tokens", "completion_tokens")}
            scorer = build_scorer_config(name, config.scorers[name])
            if isinstance(scorer, JudgeScorer) and (scorer.prompt_price or scorer.completion_price):
                prices = (
                    scorer.prompt_price * described["prompt_tokens"] + scorer.completion_price * described["completion_tokens"]
                )
                described["cost"] = prices / 1e6
        if described:
            judges[name] = described
    return judges


def _find_faults(summary: Mapping[str, Any]) -> list[str]:
    """Problems to look at before training on these scores."""
    faults = []
    for name, values in summary["statistics"].items():
        correlation = values["length_correlation"]
        if values["min"] == values["max"]:
            faults.append(f"{name} is {values['min']:g} for every response: nothing can be learned from it.")
        elif values["varied_groups"] == 0:
            faults.append(f"{name} is the same for all responses of a group, in every group: nothing can be learned from it.")
        elif correlation is not None and abs(correlation) >= _LENGTH_ALONE:
            faults.append(f"{name} says little beyond the length of the response: r = {correlation:.2f} within groups.")
        elif correlation is not None and abs(correlation) >= _LENGTH_BIAS:
            faults.append(f"{name} correlates with the length of the response: r = {correlation:.2f} within groups.")
    num_responses = summary["counts"]["responses"]
    for name, count in summary["missing_scores"].items():
        if count >= _MANY * (num_responses + count):
            notes = summary["notes"].get(name, {})
            parts = [f"{notes[what]:,} of them {words}" for what, words in UNUSABLE.items() if notes.get(what)]
            faults.append(f"{', '.join([f'{name} is missing for {count_of(count, "responses")}', *parts])}.")
    for name, judge in summary["judges"].items():
        share = judge.get("first_place_share", 0.5)
        if judge.get("decided", 0) >= _MIN_DECIDED and max(share, 1 - share) >= _PLACE_BIAS:
            place, wins = ("first", share) if share > 0.5 else ("second", 1 - share)
            faults.append(f"{name} favours the {place} position: it wins {wins:.0%} of {judge['decided']:,} decided comparisons.")
    return faults


def print_summary(console: Console, scored: Path, summary: Mapping[str, Any]) -> None:
    """Print the summary as a table and lines, warnings last."""
    counts = summary["counts"]
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    title = escape(f"{scored}: {count_of(counts['groups'], 'groups')}, {count_of(counts['responses'], 'responses')}")
    table = Table(title=title, title_justify="left")
    for column in ("", "mean", "std", "min", "max", "r(length)", "missing"):
        table.add_column(column, justify="left" if not column else "right")
    for name, values in summary["statistics"].items():
        cells = [f"{values[key]:.4g}" for key in ("mean", "std", "min", "max")]
        correlation = values["length_correlation"]
        cells.append("" if correlation is None else f"{correlation:.2f}")
        table.add_row(name, *cells, f"{summary['missing_scores'].get(name, 0):,}" if name != "reward" else "")
    console.print(table)
    say(
        f"best of a group {summary['best_reward']:.4g}, spread in a group {summary['reward_spread']:.4g}, "
        f"{counts['groups_of_equal_rewards']:,} groups of equal rewards, {counts['groups_dropped']:,} groups dropped."
    )
    for name, judge in summary["judges"].items():
        say(f"{name}: {', '.join(_tell_judge(judge))}.")
    for name, notes in summary["notes"].items():
        told = {what: count for what, count in notes.items() if what not in TOLD}
        if told:
            say(f"{name}: {', '.join(f'{count:,} × {what}' for what, count in told.items())}")
    for fault in summary["warnings"]:
        console.print(f"Warning: {escape(fault)}", style="yellow", highlight=False, soft_wrap=True)


def _tell_judge(judge: Mapping[str, Any]) -> Iterable[str]:
    if "first_place_share" in judge:
        yield f"the first position wins {judge['first_place_share']:.0%} of {judge['decided']:,} decided comparisons"
    if "orders_agree_share" in judge:
        yield f"both orders agree in {judge['orders_agree_share']:.0%}"
    if "answers" in judge:
        yield f"{judge['answers']:,} answers, {judge['prompt_tokens']:,} tokens read, {judge['completion_tokens']:,} written"
    if "cost" in judge:
        yield f"cost {judge['cost']:,.2f}"
