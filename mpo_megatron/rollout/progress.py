"""Progress of long work, its speed and remaining time: a bar on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mpo_megatron.terminal.console import Console

_SECONDS = 10.0
"""Seconds between two lines where there is no terminal."""


@contextlib.contextmanager
def show_progress(title: str, total: int, unit: str, amount: str) -> Iterator[Callable[[int, int], None]]:
    """Yield `advance(units, amounts)`, for example prompts and tokens; show both rates on stderr.

    Args:
        title: what the work is
        total: number of units
        unit: name of a unit, plural
        amount: name of the units' content, plural; its rate is shown
    """
    console = Console(stderr=True)
    say = functools.partial(console.print, highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    started = last = time.monotonic()
    done = amounts = 0

    def rate(now: float) -> str:
        seconds = max(now - started, 1e-9)
        return f"{amounts / seconds:,.0f} {amount}/s, {done / seconds:,.2f} {unit}/s"

    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, rate="")

        def advance(units: int, more: int) -> None:
            nonlocal done, amounts, last
            done, amounts, now = done + units, amounts + more, time.monotonic()
            bar.update(task, advance=units, rate=rate(now))
            if not console.is_terminal and now - last >= _SECONDS and done:
                last, left = now, (total - done) * (now - started) / done
                say(f"{title}: {done:,} of {total:,} {unit}, {rate(now)}, {_clock(left)} left")

        yield advance
    now = time.monotonic()
    say(f"{title}: {done:,} {unit} in {_clock(now - started)}, {rate(now)}")


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def describe_answers(number: int, seconds: float) -> str | None:
    """A server's answers and their rate, as text; None without an answer."""
    return f"{number:,} answers in {seconds:.1f} s, {number / max(seconds, 1e-9):,.1f} per second" if number else None
