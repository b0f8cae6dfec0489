"""`metrics.jsonl` and `samples.jsonl` in the run's folder, which all other tools here read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from mpo_megatron.files.atomic import replace_file
from mpo_megatron.files.digests import seal_line, unseal_line
from mpo_megatron.train.tracking.tracker import Cell, SampleTable


class JsonlTracker:
    """One JSON object per step, and one per sample. A resumed run drops lines that it will write again."""

    def __init__(self, folder: Path, start_step: int) -> None:
        self.metrics = _continue(folder / "metrics.jsonl", start_step)
        self.samples = _continue(folder / "samples.jsonl", start_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics.write(seal_line({"step": step, **{name: _finite(value) for name, value in metrics.items()}}))

    def log_samples(self, step: int, samples: SampleTable) -> None:
        for row in samples.rows:
            cells = {name: _finite(cell) for name, cell in zip(samples.columns, row, strict=True)}
            self.samples.write(seal_line({"step": step, **cells}))

    def close(self) -> None:
        self.metrics.close()
        self.samples.close()


def _continue(path: Path, start_step: int) -> BinaryIO:
    """The file opened after its lines of steps up to `start_step`; drops later lines and an incomplete last line."""
    kept, damaged = [], 0
    if start_step and path.is_file():
        with path.open("rb") as file:
            for line in file:
                try:
                    if not line.endswith(b"\n"):
                        raise ValueError("half a line")
                    if unseal_line(line)["step"] <= start_step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):  # after a machine crash; the run can continue
                    damaged += 1
    if damaged:
        print(f"{path}: {damaged} lines are damaged or incomplete, and were dropped.", flush=True)
    replace_file(path, kept)
    return path.open("ab", buffering=0)


def _finite(value: Cell) -> Cell:
    return None if isinstance(value, float) and not math.isfinite(value) else value
