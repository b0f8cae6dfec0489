"""Progress of a long pass: a bar with rate and remaining time on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from mpo_megatron.terminal.console import Console

SECONDS_BETWEEN_LINES = 10.0


class _Rate(ProgressColumn):
    """Groups per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} groups/s" if speed else "", style="progress.data.speed")


def track[Item](
    title: str, items: Iterable[Item], total: int | None, *, weigh: Callable[[Item], int] = lambda item: 1
) -> Iterator[Item]:
    """Yield the items while showing progress.

    Args:
        total: number of groups, if known
        weigh: number of groups in an item
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    done, started = 0, time.monotonic()
    last_line = started
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        for item in items:
            yield item
            done += weigh(item)
            bar.update(task, completed=done, total=None if total is None else max(total, done))
            now = time.monotonic()
            if not console.is_terminal and now - last_line > SECONDS_BETWEEN_LINES:
                last_line = now
                console.print(_line(title, done, total, now - started), highlight=False, soft_wrap=True)


def _line(title: str, done: int, total: int | None, seconds: float) -> str:
    rate = done / seconds
    if total is None or total < done:
        return f"{title}: {done:,} groups  {rate:,.0f} groups/s"
    left = time.strftime("%H:%M:%S", time.gmtime((total - done) / max(rate, 1e-9)))
    return f"{title}: {done:,}/{total:,} groups  {rate:,.0f} groups/s  {left} left"
