"""Options of `mpo select`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mpo_megatron.config.checks import check_seed, require
from mpo_megatron.config.values import Section


@dataclass(frozen=True, kw_only=True)
class SelectConfig(Section):
    """`mpo select`: select the groups, responses and sets to train on."""

    MAIN_OPTIONS: ClassVar[tuple[str, ...]] = (
        "input",
        "output",
        "sets",
        "num_top",
        "num_bottom",
        "min_spread",
        "max_responses",
        "max_length_ratio",
        "truncated",
    )

    input: str
    """Scored groups: the folder that `mpo score` wrote, or a .jsonl file of groups whose responses have a reward."""
    output: str
    """Output folder for groups.jsonl, select.json and reward_spacing.png; it must be missing or empty."""
    sets: Literal["all", "mean", "median", "trimmed_mean", "top_bottom", "one_vs_rest", "best_worst"] = "all"
    """`all` keeps every response and leaves the split to the loss. Other values split a group like the loss's `partition` of that
    name (`best_worst` is top_bottom with one of each), write the sets as labels, and drop responses in neither: train with
    `partition: labels`."""
    num_top: int = 2
    """Size of Y+ with sets = top_bottom."""
    num_bottom: int = 2
    """Size of Y− with sets = top_bottom."""
    min_spread: float = 0.0
    """Drop a group whose best and worst rewards differ by less."""
    min_responses: int = 2
    """Drop a group with fewer remaining responses."""
    max_responses: int | None = None
    """Largest K: keep the best, the worst, and others evenly spaced between them by rank."""
    length_unit: Literal["tokens", "characters"] = "tokens"
    """Unit of `min_length`, `max_length` and `max_length_ratio`; tokens are those counted by `mpo generate`."""
    min_length: int = 0
    """Drop shorter responses."""
    max_length: int | None = None
    """Drop longer responses."""
    max_length_ratio: float | None = None
    """Drop a response this many times longer, or shorter, than its group's median."""
    truncated: Literal["drop", "keep"] = "drop"
    """Treatment of responses that ended at the token limit, or because the engine detected repetition: training on their text
    would teach the policy to end there. Aborted and filtered responses are always dropped."""
    duplicates: Literal["drop", "drop_normalized", "keep"] = "drop"
    """Keep the first of equal responses to a prompt; `drop_normalized` ignores case and white space."""
    reward_noise: float = 0.0
    """Standard deviation σ of Gaussian noise added to the rewards before any choice (MPO, A.4)."""
    seed: int = 1234
    """Seed of `reward_noise`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        for name in ("num_top", "num_bottom"):
            value = getattr(self, name)
            require(value >= 1, f"{name} = {value}; it must be at least 1.")
            require(
                value == 2 or self.sets == "top_bottom",
                f"{name} = {value}; it has an effect only with sets = top_bottom; set that, or remove {name}.",
            )
        require(0 <= self.min_spread < float("inf"), f"min_spread = {self.min_spread}; it must be 0 or positive.")
        require(self.min_responses >= 2, f"min_responses = {self.min_responses}; a group needs at least 2 responses.")
        require(
            self.max_responses is None or self.max_responses >= self.min_responses,
            f"max_responses = {self.max_responses}; it must be at least min_responses = {self.min_responses}.",
        )
        require(self.min_length >= 0, f"min_length = {self.min_length}; it must be 0 or more.")
        require(
            self.max_length is None or self.max_length >= max(1, self.min_length),
            f"max_length = {self.max_length}; it must be at least 1 and at least min_length = {self.min_length}.",
        )
        require(
            self.max_length_ratio is None or self.max_length_ratio >= 1,
            f"max_length_ratio = {self.max_length_ratio}; it must be at least 1.",
        )
        require(
            0 <= self.reward_noise < float("inf"),
            f"reward_noise = {self.reward_noise}; it is a standard deviation: 0 (off) or positive.",
        )
