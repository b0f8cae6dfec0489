"""Hold every layout over ranks against plain `transformers`, and print how far each is from it.

    python -m tools.parity                  # all layouts, on 1, 2, 4 and 8 processes of this machine (gloo); some minutes
    python -m tools.parity --ranks 1 2      # those on 1 and 2
    python -m tools.parity --core           # those that also run with the tests
    python -m tools.parity --markdown FILE  # write the table there, too
    python -m tools.parity --results FILE   # keep results there as they come; a run that was ended skips those it finds

Exit code 0 if all agree within the tolerance, 1 if not. What is compared, and why so closely: tests/distributed/parity.py.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from tests.distributed.parity import Result, World, run_cases
from tests.distributed.parity_cases import CASES, RATIO, TOLERANCE, Case

TOGETHER = 8
"""Layouts of one start of the ranks."""
COLUMNS = ("ranks", "model", "layout", "loss", "gradient norm", "gradients", "weights", "verdict")


def main() -> int:
    """Run the layouts asked for; 1 if one disagrees."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    choices = sorted({case.ranks for case in CASES})
    parser.add_argument("--ranks", type=int, nargs="+", choices=choices, help="only the layouts on so many ranks")
    parser.add_argument("--core", action="store_true", help="only the layouts that run with the tests")
    parser.add_argument("--markdown", type=Path, help="write the table to this file, too")
    parser.add_argument("--results", type=Path, help="keep each result in this file, and skip layouts that are in it")
    arguments = parser.parse_args()
    cases = [
        case for case in CASES if (case.core or not arguments.core) and (not arguments.ranks or case.ranks in arguments.ranks)
    ]
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    console = Console(width=None if sys.stdout.isatty() else 200)
    found = read_results(arguments.results, cases)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(sys.stderr):  # conversion tells of its progress
            world = World(Path(folder))
        for ranks in sorted({case.ranks for case in cases}):
            own = [case for case in cases if case.ranks == ranks and key(case) not in found]
            for start in range(0, len(own), TOGETHER):
                part = own[start : start + TOGETHER]
                layouts = f"layouts {start + 1} to {start + len(part)} of {len(own)}"
                console.print(f"{layouts} on {ranks} {'ranks' if ranks > 1 else 'rank'} …", highlight=False)
                with contextlib.redirect_stdout(sys.stderr):
                    new = run_cases(world, part, f"part{start}")
                found |= {key(result.case): result for result in new}
                if arguments.results:
                    with arguments.results.open("a", encoding="utf-8") as file:
                        file.writelines(json.dumps(record(result)) + "\n" for result in new)
    results = [found[key(case)] for case in cases]
    bounds = f"tolerance {TOLERANCE:g}, with Gated DeltaNets {1 + RATIO:g} × the rounding of transformers, if that is more"
    table = Table(*COLUMNS, title=f"Largest relative differences from transformers; {bounds}")
    for result in results:
        table.add_row(*cells(result), style=None if result.passed else "red")
    console.print(table)
    failed = sum(not result.passed for result in results)
    console.print(f"{len(results) - failed} of {len(results)} agree, in {time.monotonic() - started:.0f} s", highlight=False)
    if arguments.markdown:
        arguments.markdown.write_text(markdown(results), encoding="utf-8")
    return 1 if failed else 0


def key(case: Case) -> tuple[str, int]:
    """What tells a layout from all others."""
    return str(case), case.ranks


def record(result: Result) -> dict[str, Any]:
    """A result as a line of a file of results."""
    return {**dataclasses.asdict(result), "case": str(result.case), "ranks": result.case.ranks, "report": {}}


def read_results(path: Path | None, cases: list[Case]) -> dict[tuple[str, int], Result]:
    """What an earlier run has left of these cases."""
    by_key = {key(case): case for case in cases}
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else []:
        values = json.loads(line)
        case = by_key.get((values.pop("case"), values.pop("ranks")))
        if case is not None:
            found[key(case)] = Result(case=case, **values)
    return found


def cells(result: Result) -> list[str]:
    """A row of the table."""
    model, layout = str(result.case).split(": ")
    errors = (result.loss, result.norm, result.gradients, result.weights)
    verdict = "same" if result.passed else f"differs: {result.gradient_name}, {result.weight_name}"
    return [str(result.case.ranks), model, layout, *(f"{error:.0e}" for error in errors), verdict]


def markdown(results: list[Result]) -> str:
    """The table for documents."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS)]
    lines += [f"| {' | '.join(cells(result))} |" for result in results]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
