"""The interface of trackers, and the table of samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

Cell = str | float | int | None


@dataclass(frozen=True, kw_only=True)
class SampleTable:
    """A few held-out groups at an evaluation: one row per response."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


class Tracker(Protocol):
    """Records metrics."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step; names of evaluation metrics start with `eval/`."""

    def log_samples(self, step: int, samples: SampleTable) -> None:
        """Record the samples of an evaluation after a step."""

    def close(self) -> None:
        """Write what is still buffered."""
