"""Options of `mpo inspect`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mpo_megatron.config.checks import require
from mpo_megatron.config.values import Section


@dataclass(frozen=True, kw_only=True)
class InspectConfig(Section):
    """`mpo inspect`: a group (`data`, `group`), or a packed row of a run (`run`, `step`, `row`), as the model sees it."""

    data: str | None = None
    """Folder with prepared groups (`mpo prepare`)."""
    group: str = "0"
    """Id of the group to show, or its index in the data, counted from 0."""
    layout: Literal["shared", "unshared"] = "shared"
    """Layout of the group in a row; see data.layout of `mpo train`."""
    tokenizer: str | None = None
    """Path of the tokenizer, if it has moved since `mpo prepare`."""
    run: str | None = None
    """A run's folder, to show a row of its training batches instead of a group."""
    step: int = 1
    """The step, counted from 1 as in metrics.jsonl."""
    row: int = 0
    """Index of the step's packed row, counted from 0."""
    replica: int = 0
    """Index of the data-parallel replica."""
    html: str | None = None
    """Also write an HTML page to this file."""
    png: str | None = None
    """Also draw the attention mask to this file."""
    max_tokens: int = 4000
    """Maximum tokens shown on the terminal; the page shows all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            (self.data is None) != (self.run is None),
            "name one thing to show: --data FOLDER with --group ID, or --run FOLDER with --step N and --row R.",
        )
        require(self.step >= 1, f"step = {self.step}; the first step is 1.")
        for name in ("row", "replica"):
            require(getattr(self, name) >= 0, f"{name} = {getattr(self, name)}; it must be 0 or more.")
        require(self.max_tokens >= 1, f"max_tokens = {self.max_tokens}; it must be at least 1.")
        for name, changed in (
            ("group", self.group != "0"),
            ("layout", self.layout != "shared"),
            ("tokenizer", self.tokenizer is not None),
        ):
            require(
                self.run is None or not changed,
                f"{name} has no effect on a run's rows: the run's configuration sets it; remove it.",
            )
        for name, changed in (("step", self.step != 1), ("row", self.row != 0), ("replica", self.replica != 0)):
            require(
                self.data is None or not changed,
                f"{name} applies to a run's rows only; name the run with --run instead of --data.",
            )
