"""A run's progress and metrics: a live view on a terminal, lines elsewhere."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mpo_megatron.terminal.console import Console
from mpo_megatron.train.tracking.tracker import SampleTable, Tracker

CURVE = 32
"""Steps shown in the sparkline beside a number."""
PACE_STEPS = 50
"""Steps from which the remaining time is estimated, including evaluations and saves between them."""
BARS = "▁▂▃▄▅▆▇█"
SHOWN = {"loss": ".4f", "margin": "+.3f", "accuracy": ".3f", "kl": "+.3f", "grad_norm": ".3f"}
"""Metrics with a row of their own, and their format."""


def build_progress(run: Path, total_steps: int, start_step: int, seconds_between_lines: float) -> Tracker:
    """The live view on a terminal, otherwise lines."""
    console = Console(highlight=False)
    if console.is_terminal:
        return LiveProgress(console, run.name, total_steps, start_step)
    return PlainProgress(console, total_steps, start_step, seconds_between_lines)


class Pace:
    """Steps over time: elapsed time, and time left."""

    def __init__(self, total_steps: int, start_step: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total_steps, self.clock, self.started = total_steps, clock, clock()
        self.marks: deque[tuple[int, float]] = deque([(start_step, self.started)], maxlen=PACE_STEPS + 1)

    def mark(self, step: int) -> None:
        """Record a finished step."""
        self.marks.append((step, self.clock()))

    @property
    def step(self) -> int:
        """Steps done."""
        return self.marks[-1][0]

    @property
    def elapsed(self) -> float:
        """Seconds since this start of the run."""
        return self.clock() - self.started

    @property
    def remaining(self) -> float | None:
        """Seconds left at the speed of the last steps; None before the first one."""
        (first, began), (last, ended) = self.marks[0], self.marks[-1]
        return None if last == first else (self.total_steps - last) * (ended - began) / (last - first)


class PlainProgress:
    """Lines for a log file: one per step or every few seconds, and one per evaluation."""

    def __init__(
        self,
        console: Console,
        total_steps: int,
        start_step: int,
        seconds_between_lines: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console, self.total_steps = console, total_steps
        self.seconds_between_lines, self.clock = seconds_between_lines, clock
        self.pace = Pace(total_steps, start_step, clock)
        self.last_line = -math.inf

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if "eval/loss" in metrics:
            names = [name for name in ("loss", "accuracy", "margin") if f"eval/{name}" in metrics]
            shown = "  ".join(f"{name} {metrics[f'eval/{name}']:.4f}" for name in names)
            self._print(step, f"held-out: {shown}")
            return
        self.pace.mark(step)
        due = self.clock() - self.last_line >= self.seconds_between_lines
        if due or step == self.total_steps or "loss" not in metrics:
            self.last_line = self.clock()
            self._print(step, "  ".join([*_learning(metrics), *_speed(metrics), f"ETA {_duration(self.pace.remaining)}"]))

    def log_samples(self, step: int, samples: SampleTable) -> None:
        """Ignored: samples do not fit into a log."""

    def close(self) -> None:
        """Nothing to do: lines are flushed as written."""

    def _print(self, step: int, text: str) -> None:
        self.console.print(f"step {step}/{self.total_steps}  {text}", soft_wrap=True, markup=False)


class LiveProgress:
    """A panel at the bottom of the terminal, below the other output."""

    def __init__(
        self, console: Console, name: str, total_steps: int, start_step: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console, self.name = console, name
        self.pace = Pace(total_steps, start_step, clock)
        self.training: dict[str, float] = {}
        self.held_out: dict[str, float] = {}
        self.held_out_step = 0
        self.curves: dict[str, deque[float]] = {metric: deque(maxlen=CURVE) for metric in SHOWN}
        self.live = Live(get_renderable=self.render, console=console, refresh_per_second=2)
        self.live.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if "eval/loss" in metrics:
            self.held_out, self.held_out_step = dict(metrics), step
            return
        self.pace.mark(step)
        self.training = dict(metrics)
        for metric, curve in self.curves.items():
            value = metrics.get(metric, math.nan)
            if math.isfinite(value):
                curve.append(value)

    def log_samples(self, step: int, samples: SampleTable) -> None:
        """Ignored: samples do not fit on a terminal."""

    def close(self) -> None:
        self.live.stop()

    def render(self) -> RenderableType:
        """The panel's current content."""
        lines: list[RenderableType] = [self._head(), Text(), self._numbers()]
        if "loss" not in self.training and self.training:
            lines.append(Text("  ".join(_learning(self.training)), style="yellow"))
        if self.training:
            lines += [Text(), Text("  ·  ".join(_speed(self.training)), style="cyan")]
        return Panel(Group(*lines), title=Text(self.name, style="bold"), title_align="left", border_style="blue", padding=(0, 1))

    def _head(self) -> RenderableType:
        pace = self.pace
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        head.add_row(
            Text(f"step {pace.step}/{pace.total_steps}", style="bold"),
            ProgressBar(total=pace.total_steps, completed=pace.step),
            f"{_duration(pace.elapsed)}  ETA {_duration(pace.remaining)}",
        )
        return head

    def _numbers(self) -> RenderableType:
        table = Table(box=None, expand=True, header_style="dim", padding=(0, 1))
        table.add_column("")
        table.add_column("training", justify="right")
        table.add_column(f"last {CURVE} steps", no_wrap=True)
        table.add_column(f"held out, step {self.held_out_step}" if self.held_out else "held out", justify="right")
        for metric, form in SHOWN.items():
            if "loss" in self.training and metric not in self.training:  # without a reference there is no `kl`
                continue
            table.add_row(
                metric.replace("_", " "),
                Text(_number(self.training.get(metric), form), style="bold"),
                Text(sparkline(list(self.curves[metric])), style="green"),
                _number(self.held_out.get(f"eval/{metric}"), form),
            )
        return table


def sparkline(values: list[float]) -> str:
    """A curve as one line of text, scaled from its minimum to its maximum."""
    if not values:
        return ""
    least, spread = min(values), max(values) - min(values)
    return "".join(BARS[min(len(BARS) - 1, int((value - least) / spread * len(BARS))) if spread else 0] for value in values)


def _learning(metrics: Mapping[str, float]) -> list[str]:
    if "loss" not in metrics:
        return [f"skipped: none of its {metrics.get('skipped_groups', 0):.0f} groups has contrast"]
    forms = {"loss": "loss {:.4f}", "accuracy": "accuracy {:.3f}", "margin": "margin {:+.3f}"}
    forms |= {"lr": "lr {:.2e}", "grad_norm": "grad {:.3f}"}
    return [form.format(metrics[name]) for name, form in forms.items() if name in metrics]


def _speed(metrics: Mapping[str, float]) -> list[str]:
    """Throughput, memory, and slow ranks; unmeasured values are omitted."""
    parts = []
    if "tokens_per_second" in metrics:
        parts.append(f"{_rate(metrics['tokens_per_second'])} tok/s")
    if "mfu" in metrics:
        parts.append(f"MFU {100 * metrics['mfu']:.1f}%")
    if "peak_memory_gib" in metrics:
        parts.append(f"{metrics['peak_memory_gib']:.1f} GiB")
    if "slowest_rank" in metrics:
        ratio = metrics.get("step_seconds_max_over_mean")
        parts.append(f"slowest rank {metrics['slowest_rank']:.0f}" + ("" if ratio is None else f" ({ratio:.2f}x)"))
    if metrics.get("data_wait", 0.0) >= 0.05:
        parts.append(f"waited {metrics['data_wait']:.1f} s for data")
    return parts


def _rate(value: float) -> str:
    return f"{value:.0f}" if value < 10_000 else f"{value / 1000:.1f}k"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02d}:{minutes:02d}:{rest:02d}" if days else f"{hours}:{minutes:02d}:{rest:02d}"
