"""A run's progress output: on a terminal, and in a log file."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mpo_megatron.train.tracking.progress import LiveProgress, Pace, PlainProgress, sparkline

LEARNED = {"loss": 0.5, "accuracy": 0.75, "margin": 1.0, "kl": 0.1, "lr": 1e-6, "grad_norm": 2.0, "tokens_per_second": 100.0}
SUPERVISED = {"slowest_rank": 3, "step_seconds_max_over_mean": 1.25, "data_wait": 0.4, "peak_memory_gib": 61.25, "mfu": 0.381}
HELD_OUT = {"eval/loss": 0.25, "eval/accuracy": 0.9, "eval/margin": 3.0, "eval/kl": -0.5}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def lines(seconds_between: float, steps: int, seconds_per_step: float) -> list[str]:
    out, clock = io.StringIO(), Clock()
    progress = PlainProgress(Console(file=out, highlight=False), steps, 0, seconds_between, clock)
    for step in range(1, steps + 1):
        clock.now += seconds_per_step
        progress.log(step, LEARNED)
    progress.close()
    return out.getvalue().splitlines()


def test_a_log_shows_steps_evaluations_and_skipped_steps() -> None:
    out = io.StringIO()
    progress = PlainProgress(Console(file=out, highlight=False), 3, 0, 0.0)
    progress.log(1, LEARNED | SUPERVISED | {"skipped_groups": 2})
    progress.log(2, {"lr": 1e-6, "grad_norm": 0.0, "tokens_per_second": 0.0, "skipped_groups": 8})
    progress.log(2, HELD_OUT)
    progress.close()
    first, second, third = out.getvalue().splitlines()
    assert first.startswith("step 1/3  loss 0.5000  accuracy 0.750  margin +1.000  lr 1.00e-06  grad 2.000  100 tok/s  MFU 38.1%")
    assert "61.2 GiB  slowest rank 3 (1.25x)  waited 0.4 s for data  ETA 0:00:00" in first
    assert second.startswith("step 2/3  skipped: none of its 8 groups has contrast")
    assert third == "step 2/3  held-out: loss 0.2500  accuracy 0.9000  margin 3.0000"


def test_quick_steps_do_not_flood_a_log_and_the_last_is_there() -> None:
    shown = lines(seconds_between=5, steps=100, seconds_per_step=0.25)
    assert [line.split()[1] for line in shown] == ["1/100", "21/100", "41/100", "61/100", "81/100", "100/100"]
    assert len(lines(seconds_between=0, steps=7, seconds_per_step=0.25)) == 7
    assert len(lines(seconds_between=5, steps=7, seconds_per_step=30)) == 7


def test_time_left_follows_the_last_steps() -> None:
    clock = Clock()
    pace = Pace(1100, 1000, clock)  # a resumed run: earlier steps took no time now
    assert pace.remaining is None
    clock.now = 3.0
    pace.mark(1001)
    assert pace.remaining == pytest.approx(297.0)
    for step in range(1002, 1062):
        clock.now += 2.0
        pace.mark(step)
    assert pace.remaining == pytest.approx(39 * 2.0)


def test_a_terminal_shows_everything_at_once() -> None:
    clock = Clock()
    console = Console(file=io.StringIO(), force_terminal=True, width=110, color_system=None)
    view = LiveProgress(console, "my-run", 400, 0, clock)
    for step, loss in enumerate([0.9, 0.7, 0.5], start=1):
        clock.now += 6.0
        view.log(step, LEARNED | SUPERVISED | {"loss": loss})
    view.log(3, HELD_OUT)
    with console.capture() as capture:
        console.print(view.render())
    view.close()
    shown = capture.get()
    for text in (
        *("my-run", "step 3/400", "0:00:18  ETA 0:39:42", "held out, step 3", "0.5000", "█▄▁", "0.2500", "+3.000", "0.900"),
        *("100 tok/s", "MFU 38.1%", "61.2 GiB", "slowest rank 3 (1.25x)", "waited 0.4 s for data"),
    ):
        assert text in shown, text
    assert all(len(line) <= 110 for line in shown.splitlines())


def test_a_terminal_shows_a_start_and_a_skipped_step() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=90, color_system=None)
    view = LiveProgress(console, "run", 4, 0, Clock())
    with console.capture() as capture:
        console.print(view.render())
        view.log(1, {"lr": 1e-6, "skipped_groups": 8})
        console.print(view.render())
    view.close()
    assert "step 0/4" in capture.get()
    assert "skipped: none of its 8 groups" in capture.get()


def test_curves_in_a_line() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([]) == ""
