"""Hold every layout over ranks against plain `transformers`, and print how far each is from it.

    python -m tools.parity                  # all layouts, on 1, 2, 4 and 8 processes of this machine (gloo); some minutes
    python -m tools.parity --ranks 1 2      # those on 1 and 2
    python -m tools.parity --core           # those that also run with the tests
    python -m tools.parity --markdown FILE  # write the table there, too

Exit code 0 if all agree within the tolerance, 1 if not. What is compared, and why so closely: tests/distributed/parity.py.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from tests.distributed.parity import CASES, TOLERANCE, Result, World, run_cases

COLUMNS = ("ranks", "model", "layout", "loss", "gradient norm", "gradients", "weights", "verdict")


def main() -> int:
    """Run the layouts asked for; 1 if one disagrees."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    choices = sorted({case.ranks for case in CASES})
    parser.add_argument("--ranks", type=int, nargs="+", choices=choices, help="only the layouts on so many ranks")
    parser.add_argument("--core", action="store_true", help="only the layouts that run with the tests")
    parser.add_argument("--markdown", type=Path, help="write the table to this file, too")
    arguments = parser.parse_args()
    cases = [
        case for case in CASES if (case.core or not arguments.core) and (not arguments.ranks or case.ranks in arguments.ranks)
    ]
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    console = Console(width=None if sys.stdout.isatty() else 200)
    results: list[Result] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(sys.stderr):  # conversion tells of its progress
            world = World(Path(folder))
        for ranks in sorted({case.ranks for case in cases}):
            own = [case for case in cases if case.ranks == ranks]
            console.print(f"{len(own)} layouts on {ranks} {'ranks' if ranks > 1 else 'rank'} …", highlight=False)
            with contextlib.redirect_stdout(sys.stderr):
                results += run_cases(world, own, "all")
    table = Table(*COLUMNS, title=f"Largest relative differences from transformers; tolerance {TOLERANCE:g}")
    for result in results:
        table.add_row(*cells(result), style=None if result.passed else "red")
    console.print(table)
    failed = sum(not result.passed for result in results)
    console.print(f"{len(results) - failed} of {len(results)} agree, in {time.monotonic() - started:.0f} s", highlight=False)
    if arguments.markdown:
        arguments.markdown.write_text(markdown(results), encoding="utf-8")
    return 1 if failed else 0


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
