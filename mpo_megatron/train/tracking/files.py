"""`metrics.jsonl` and `samples.jsonl` in the run's folder: what every other tool here reads."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from mpo_megatron.train.tracking.tracker import Cell, SampleTable


class JsonlTracker:
    """One JSON object per step, and one per sample. A resumed run drops the lines it is about to write again."""

    def __init__(self, folder: Path, start_step: int) -> None:
        self.metrics = _continue(folder / "metrics.jsonl", start_step)
        self.samples = _continue(folder / "samples.jsonl", start_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics.write(json.dumps({"step": step, **{name: _finite(value) for name, value in metrics.items()}}) + "\n")

    def log_samples(self, step: int, samples: SampleTable) -> None:
        for row in samples.rows:
            cells = {name: _finite(cell) for name, cell in zip(samples.columns, row, strict=True)}
            self.samples.write(json.dumps({"step": step, **cells}, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self.metrics.close()
        self.samples.close()


def _continue(path: Path, start_step: int) -> IO[str]:
    """The file opened behind its lines of steps up to `start_step`; the later ones, and half a line at the end, are gone."""
    kept = []
    if start_step and path.is_file():
        whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= start_step]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)
    return path.open("a", buffering=1, encoding="utf-8")


def _finite(value: Cell) -> Cell:
    return None if isinstance(value, float) and not math.isfinite(value) else value
