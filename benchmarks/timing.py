"""Shared by all benchmarks: command line, interleaved timing, and results as a table and JSON."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mpo_megatron import device
from mpo_megatron.files.atomic import replace_file

PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine", "trl")
"""Packages whose versions are recorded with the numbers."""

Row = dict[str, Any]


def build_parser(description: str | None, sizes: Sequence[str], *, repeat: int = 3) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sizes, default="small", help="tiny: a check that it runs; small: CPU; others: one GPU")
    parser.add_argument("--output", type=Path, default=Path("benchmarks-out"), help="folder for <name>.json")
    parser.add_argument("--repeat", type=int, default=repeat, help="measurements of each side")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on a CPU (default 1)")
    parser.set_defaults(complete=True)
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options, and set the number of threads."""
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    return options


def interleave(
    sides: Mapping[str, Callable[[], object]],
    repeat: int,
    *,
    warmup: int = 1,
    measure: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every run of every side. The sides take turns, so that other load on the machine affects all of them.

    Args:
        measure: seconds of one run; by default `clock`
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-warmup, repeat):
        order = list(sides)
        for name in order if turn % 2 else reversed(order):
            elapsed = (measure or clock)(sides[name])
            if turn >= 0:
                seconds[name].append(elapsed)
    return seconds


def clock(action: Callable[[], object]) -> float:
    """Seconds of an action by `now`, including queued kernels."""
    started = now()
    action()
    return now() - started


def measure_each[Case, Result](
    name: str, options: argparse.Namespace, cases: Sequence[Case], measure: Callable[[Case], Result]
) -> list[Result]:
    """The measurements of each case; after an interruption (Ctrl-C, or out of time), those of completed cases, if any.

    After each case, `<output>/<name>.json` contains all measurements so far, so that a killed process leaves them.
    """
    results: list[Result] = []
    try:
        for case in cases:
            results.append(measure(case))
            _write(name, options, {"complete": False, "rows": results})
    except KeyboardInterrupt:
        if not results:
            raise
        options.complete = False
        Console().print(f"interrupted: {len(results)} of {len(cases)} measured")
    return results


def now() -> float:
    """A clock: wall time with a GPU; on a CPU this process's CPU seconds, which other load on the machine does not lengthen."""
    device.synchronize()
    return time.perf_counter() if device.has_gpu() else time.process_time()


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """Median and spread of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": list(values)}


def compare(slow: Sequence[float], fast: Sequence[float]) -> dict[str, Any]:
    """How many times faster `fast` is: the ratio within each turn, because both sides of a turn saw the same load."""
    return summarize([a / b for a, b in zip(slow, fast, strict=True)])


def shown(summary: Mapping[str, Any], digits: int = 2, unit: str = "") -> str:
    """A summary as text: median (min … max)."""
    return f"{summary['median']:.{digits}f}{unit} ({summary['min']:.{digits}f}…{summary['max']:.{digits}f})"


def describe_machine() -> dict[str, Any]:
    """Facts that the numbers depend on, besides the code."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if device.has_gpu() else _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "wall" if device.has_gpu() else "CPU seconds of the process",
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU: {names[0] if names else platform.processor() or platform.machine()}"


def report(
    name: str, options: argparse.Namespace, settings: Mapping[str, Any], rows: Sequence[Row], table: Sequence[Row], note: str
) -> Path:
    """Print the table, and write everything to `<output>/<name>.json`; its `complete` tells whether all cases were measured.

    Args:
        settings: options of the benchmark
        rows: the measurements, for the file
        table: the same for readers: one dictionary of columns per line
        note: how to read the table
    """
    console = Console(width=160, highlight=False)
    printed = Table(title=f"{name} ({options.size})")
    for column in table[0]:
        printed.add_column(column.strip(), justify="right", no_wrap=True)
    for line in table:
        printed.add_row(*(str(value) for value in line.values()))
    console.print(printed)
    console.print(note)
    content = {"complete": options.complete, "settings": dict(settings), "note": note, "table": list(table), "rows": list(rows)}
    path = _write(name, options, content)
    console.print(f"written: {path}", soft_wrap=True)
    return path


def _write(name: str, options: argparse.Namespace, content: Mapping[str, Any]) -> Path:
    """Replace the benchmark's file, on one rank only."""
    path: Path = options.output / f"{name}.json"
    if os.environ.get("RANK", "0") == "0":
        everything = {"benchmark": name, "size": options.size, "machine": describe_machine(), **content}
        replace_file(path, [json.dumps(everything, indent=1, ensure_ascii=False).encode(), b"\n"])
    return path
