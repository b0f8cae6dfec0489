"""Progress of long work, its rates and the time left: a bar on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mpo_megatron.terminal.console import Console
from mpo_megatron.terminal.counts import count_of

SECONDS_BETWEEN_LINES = 10.0
"""Minimum seconds between two lines where there is no terminal."""


class Advance(Protocol):
    """Counts finished units, for example prompts, and their content, for example tokens."""

    def __call__(self, units: int, amounts: int = 0) -> None: ...


@contextlib.contextmanager
def show_progress(
    title: str,
    total: int | None,
    unit: str,
    amount: str | None = None,
    *,
    done: int = 0,
    console: Console | None = None,
) -> Iterator[Advance]:
    """Yield `advance(units, amounts)`; show both rates, and at the end how long the work took.

    Args:
        title: what the work is
        total: number of units, if known; raised if more are done
        unit: name of a unit, plural
        amount: name of the units' content, plural; its rate is shown
        done: number of units that were done before; the rates leave them out
        console: where to print; by default stderr
    """
    console = console or Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rates]}"))
    num_units = num_amounts = 0
    started = last = time.monotonic()

    def rates(now: float) -> str:
        seconds = max(now - started, 1e-9)
        found = f"{_rate(num_units / seconds)} {unit}/s"
        return found if amount is None else f"{found}, {_rate(num_amounts / seconds)} {amount}/s"

    def say(text: str) -> None:
        console.print(f"{title}: {text}", highlight=False, soft_wrap=True)

    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, completed=done, rates="")

        def advance(units: int, amounts: int = 0) -> None:
            nonlocal num_units, num_amounts, last
            num_units, num_amounts, now = num_units + units, num_amounts + amounts, time.monotonic()
            there = done + num_units
            known = None if total is None else max(total, there)
            bar.update(task, completed=there, total=known, rates=rates(now))
            if not console.is_terminal and num_units and now - last >= SECONDS_BETWEEN_LINES:
                last = now
                if known is None:
                    say(f"{there:,} {unit}, {rates(now)}")
                else:
                    left = _clock((known - there) * (now - started) / num_units)
                    say(f"{there:,} of {known:,} {unit}, {rates(now)}, {left} left")

        yield advance
    now = time.monotonic()
    say(f"{count_of(num_units, unit)} in {_clock(now - started)}, {rates(now)}")


def describe_speed(units: int, unit: str, seconds: float) -> str:
    """Finished work and its rate, as text."""
    return f"{count_of(units, unit)} in {_clock(seconds)}, {_rate(units / max(seconds, 1e-9))} {unit}/s"


def track[Item](title: str, items: Iterable[Item], total: int | None, unit: str, weigh: Callable[[Item], int]) -> Iterator[Item]:
    """Yield the items while showing progress.

    Args:
        total: number of units, if known
        unit: name of a unit, plural
        weigh: number of units in an item
    """
    with show_progress(title, total, unit) as advance:
        for item in items:
            yield item
            advance(weigh(item))


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
