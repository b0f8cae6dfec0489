from __future__ import annotations

import itertools
import re

import pytest

from mpo_megatron.terminal import progress
from mpo_megatron.terminal.progress import describe_speed, show_progress, track


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> pytest.CaptureFixture[str]:
    """Output with a line after every unit; a clock that gains a second per call."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(progress.time, "monotonic", itertools.count().__next__)
    return capsys


def test_lines_count_what_was_done_before_and_leave_it_out_of_the_rate(said: pytest.CaptureFixture[str]) -> None:
    with show_progress("reference", 10, "groups", "tokens", done=4) as advance:
        advance(3, 300)
        advance(3, 600)
    assert said.readouterr().err.splitlines() == [
        "reference: 7 of 10 groups, 3.00 groups/s, 300 tokens/s, 0:00:01 left",
        "reference: 10 of 10 groups, 3.00 groups/s, 450 tokens/s, 0:00:00 left",
        "reference: 6 groups in 0:00:03, 2.00 groups/s, 300 tokens/s",
    ]


@pytest.mark.parametrize("total", [None, 2])
def test_a_total_may_be_unknown_or_too_low(said: pytest.CaptureFixture[str], total: int | None) -> None:
    assert list(track("reading", ["ab", "cde"], total, "rows", len)) == ["ab", "cde"]
    known = " of 5" if total else ""
    assert re.search(rf"^reading: 5{known} rows, 2\.50 rows/s", said.readouterr().err, re.MULTILINE)


def test_work_that_failed_is_not_said_to_be_done(said: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), show_progress("scoring", 2, "groups") as advance:
        advance(1 // 0)
    assert "scoring:" not in said.readouterr().err


def test_speed_of_no_time() -> None:
    assert describe_speed(0, "answers", 0.0) == "0 answers in 0:00:00, 0.00 answers/s"
