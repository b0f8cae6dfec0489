"""How far long work is, how fast, and how long it will take: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mpo_megatron.terminal.console import Console

_SECONDS = 10.0
"""Between two lines where there is no terminal."""


@contextlib.contextmanager
def show_progress(title: str, total: int, unit: str, amount: str) -> Iterator[Callable[[int, int], None]]:
    """Yields `advance(units, amounts)`, for example prompts and tokens; both rates are shown, to stderr.

    Args:
        title: what is being done
        total: units there are to do
        unit: what is counted, in the plural
        amount: what a unit is made of, in the plural; its rate is shown
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
    """How fast a server answered; None without an answer."""
    return f"{number:,} answers in {seconds:.1f} s, {number / max(seconds, 1e-9):,.1f} a second" if number else None
