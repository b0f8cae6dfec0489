"""Options of `mpo report`."""

from __future__ import annotations

from dataclasses import dataclass

from mpo_megatron.config.checks import require
from mpo_megatron.config.values import Section


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Section):
    """`mpo report RUN [RUN2 …]`: a page that shows finished or running runs."""

    runs: list[str]
    """Folders of the runs, the most interesting first; `mpo report RUN RUN2` sets it."""
    output: str = "report.html"
    """The page: one self-contained file."""
    png: str | None = None
    """Also write the curves and distributions as PNG files to this folder."""
    max_groups: int = 300
    """Number of held-out groups with responses in the page, per run: half of them the worst, the others evenly from the rest."""
    max_responses: int = 16
    """Number of a group's responses in the page: of more, a selection spread evenly over their rewards."""
    max_characters: int = 2000
    """Truncate longer prompts and responses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.runs) >= 1, "runs is empty; name a run's folder: mpo report RUN")
        require(self.max_groups >= 2, f"max_groups = {self.max_groups}; it must be at least 2.")
        require(self.max_responses >= 2, f"max_responses = {self.max_responses}; it must be at least 2.")
        require(self.max_characters >= 1, f"max_characters = {self.max_characters}; it must be at least 1.")
