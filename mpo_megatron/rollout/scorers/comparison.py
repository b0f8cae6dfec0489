"""Turn comparisons of two responses into scores: a response's score is the share of its comparisons that it wins.

`all` compares every pair. `tournament` runs ⌈log₂ K⌉ rounds like a Swiss tournament: responses with similar shares meet, never
twice. About K·log₂(K)/2 comparisons separate the best from the worst, and the middle less well.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from mpo_megatron.rollout.records import Record
from mpo_megatron.rollout.scorers import Scores


class Pair(NamedTuple):
    """Is response `a` of group `group` (an index) better than its response `b`?"""

    group: int
    a: int
    b: int


Compare = Callable[[Sequence[Pair]], list[float | None]]
"""Probability that a is better, or None without a verdict, for each pair."""


@dataclass(kw_only=True)
class _Table:
    """Wins of one group's responses so far."""

    size: int
    won: list[float] = field(default_factory=list)
    met: list[set[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.won = [0.0] * self.size
        self.met = [set() for _ in range(self.size)]

    def share(self, index: int) -> float | None:
        """The share of comparisons that this response has won; None without any."""
        return self.won[index] / len(self.met[index]) if self.met[index] else None

    def pairs(self) -> list[tuple[int, int]]:
        """The next round: neighbours by share won that have not met yet."""
        order = sorted(range(self.size), key=lambda index: (-(self.share(index) or 0.0), index))
        chosen: list[tuple[int, int]] = []
        while order:
            first = order.pop(0)
            rival = next((index for index in order if index not in self.met[first]), None)
            if rival is not None:
                order.remove(rival)
                chosen.append((first, rival))
        return chosen


def score_by_comparison(
    groups: Sequence[Record],
    compare: Compare,
    *,
    tournament: bool,
    both_orders: bool,
    notes: dict[str, Counter[str]] | None = None,
    contradictions: Literal["tie", "missing", "group_missing"] = "tie",
) -> Scores:
    """Share of comparisons won, in [0, 1], for each response; 0.5 for a single response, None for one without any verdict.

    Args:
        groups: group lines
        compare: judges pairs, all of a round at once
        tournament: rounds between responses of similar share, instead of every pair
        both_orders: ask (a, b) and (b, a), and take the mean of P(a > b) and 1 − P(b > a)
        notes: by group id, counts of ties, of wins of either position, and of (dis)agreements of the orders
        contradictions: treatment of a pair whose orders disagree; `group_missing`: its group gets no scores
    """
    tables = [_Table(size=len(group["responses"])) for group in groups]
    void: set[int] = set()
    for number in range(max((_num_rounds(table.size) for table in tables), default=0) if tournament else 1):
        pairs: list[Pair] = []
        for index, table in enumerate(tables):
            if not tournament:
                chosen = list(itertools.combinations(range(table.size), 2))
            else:
                chosen = table.pairs() if number < _num_rounds(table.size) and index not in void else []
            pairs += [Pair(index, *pair) for pair in chosen]
        for pair, (ahead, behind) in zip(pairs, _judge(pairs, compare, both_orders), strict=True):
            noted = Counter[str]() if notes is None else notes.setdefault(groups[pair.group]["group_id"], Counter())
            value = _settle(ahead, behind, both_orders, contradictions, noted)
            if value is not None:
                table = tables[pair.group]
                table.met[pair.a].add(pair.b)
                table.met[pair.b].add(pair.a)
                table.won[pair.a] += value
                table.won[pair.b] += 1.0 - value
            elif contradictions == "group_missing" and ahead is not None and behind is not None:
                void.add(pair.group)
    return [
        [None] * table.size
        if index in void
        else [0.5]
        if table.size == 1
        else [table.share(place) for place in range(table.size)]
        for index, table in enumerate(tables)
    ]


def _num_rounds(size: int) -> int:
    return math.ceil(math.log2(size)) if size > 1 else 0


def _judge(pairs: Sequence[Pair], compare: Compare, both_orders: bool) -> list[tuple[float | None, float | None]]:
    """P(a > b) of each pair as asked, and P(b > a) asked in reverse; None without a verdict, or if not asked."""
    if not both_orders:
        return [(value, None) for value in compare(pairs)]
    values = compare([*pairs, *(Pair(pair.group, pair.b, pair.a) for pair in pairs)])
    return list(zip(values[: len(pairs)], values[len(pairs) :], strict=True))


def _settle(
    ahead: float | None, behind: float | None, both_orders: bool, contradictions: str, noted: Counter[str]
) -> float | None:
    """P(a > b) from the verdicts in either order; None without them, or if contradictions count as missing and they differ."""
    for value in (ahead, behind):
        if value is not None and value != 0.5:
            noted["first_place_won" if value > 0.5 else "second_place_won"] += 1
    if not both_orders:
        if ahead == 0.5:
            noted["ties"] += 1
        return ahead
    if ahead is None or behind is None:
        return None
    agree = _sign(ahead) == -_sign(behind)
    noted["orders_agree" if agree else "orders_differ"] += 1
    if not agree and contradictions != "tie":
        return None
    value = (ahead + 1.0 - behind) / 2
    if value == 0.5:
        noted["ties"] += 1
    return value


def _sign(value: float) -> int:
    """1 for the first, −1 for the second, 0 for neither."""
    return (value > 0.5) - (value < 0.5)
