"""Users' regular expressions: matches, and one that never ends."""

from __future__ import annotations

from mpo_megatron.config.score import MatchScorer, RegexScorer
from mpo_megatron.data.bounded import LimitError
from mpo_megatron.rollout.scorers import patterns
from mpo_megatron.rollout.scorers.patterns import TOO_SLOW, Pattern
from mpo_megatron.rollout.scorers.verifiable import Match, Regex

ENDLESS = "(a+)+$"
SLOW, FAST = "a" * 60 + "b", "aaa"
"""A text for which the expression needs about 2^60 steps, and one that matches at once."""


def test_what_an_expression_finds() -> None:
    assert Pattern(r"\d+").last(["1 and 2", "none", ""]) == ["2", None, None]
    assert Pattern(r"(\d+)|x").last(["1 x", "1"]) == ["", "1"]
    assert Pattern(r"b").matches(["abc", "b", "d"], full=False) == [True, True, False]
    assert Pattern(r"(?i)B").matches(["abc", "b", "d"], full=True) == [False, True, False]


def test_an_expression_that_never_ends_costs_only_the_text_it_does_not_end_on() -> None:
    first, second, third = Pattern(ENDLESS, 0.2).matches([FAST, SLOW, FAST], full=False)
    assert (first, third) == (True, True)
    assert isinstance(second, LimitError)


def test_its_score_is_missing_and_counted(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(patterns.Pattern.__init__, "__defaults__", (0.2,))
    group = {"group_id": "g", "responses": [{"text": FAST}, {"text": SLOW}], "reference_answer": "aaa"}
    regex = Regex("pattern", RegexScorer(pattern=ENDLESS))
    assert regex.score([group]) == [[1.0, None]]
    assert regex.notes["g"][TOO_SLOW] == 1
    match = Match("answer", MatchScorer(extract=ENDLESS.replace("(a+)", "(?:a+)")))
    assert match.score([group]) == [[1.0, None]]
    assert match.notes["g"][TOO_SLOW] == 1
