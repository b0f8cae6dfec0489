"""Options of `mpo iterate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mpo_megatron.config.checks import check_seed, require
from mpo_megatron.config.generate import GenerateConfig
from mpo_megatron.config.prepare import PrepareConfig
from mpo_megatron.config.score import ScoreConfig
from mpo_megatron.config.select import SelectConfig
from mpo_megatron.config.train import TrainConfig
from mpo_megatron.config.values import Section

STAGES = {
    "generate": GenerateConfig,
    "score": ScoreConfig,
    "select": SelectConfig,
    "prepare": PrepareConfig,
    "train": TrainConfig,
}
"""Sections of the configuration; each holds the options of the command with that name."""


@dataclass(frozen=True, kw_only=True)
class IterateConfig(Section):
    """`mpo iterate`: rounds of generate → score → select → prepare → train over a split prompt set; resumable anywhere."""

    MAIN_OPTIONS: ClassVar[tuple[str, ...]] = (
        "output",
        "model",
        "prompts",
        "rounds",
        "held_out",
        "reference",
        "nproc",
        "measure_kl",
    )

    STAGE_TYPES: ClassVar = STAGES

    output: str
    """Folder of all rounds; repeat the command to resume."""
    model: str
    """The policy at the start of the first round: a Hugging Face folder, or an output of `mpo convert` or a run."""
    prompts: str
    """.jsonl file with one object per line, with `prompt` (text or messages); other fields, such as a reference answer, reach
    scorers."""
    rounds: int = 3
    """Number of rounds; each prompt is used in one round, and rounds have equal sizes."""
    held_out: int = 100
    """Number of prompts excluded from training; every policy answers them, and the reports compare the answers."""
    held_out_responses: int = 2
    """Answers per held-out prompt."""
    reference: Literal["previous", "initial"] = "previous"
    """The reference policy of a round: the policy at the round's start, or at the first round's start."""
    optimizer: Literal["fresh", "continued"] = "fresh"
    """`fresh`: each round is a separate training run. `continued`: rounds are segments of one run, whose optimizer state and
    learning-rate schedule continue while each segment draws new groups from the current policy (OnMC-PO); needs reference =
    initial."""
    generate: dict[str, Any] = field(default_factory=dict)
    """Options of `mpo generate`, except input, output and model."""
    score: dict[str, Any] = field(default_factory=dict)
    """Options of `mpo score`, except input and output."""
    select: dict[str, Any] = field(default_factory=dict)
    """Options of `mpo select`, except input and output."""
    prepare: dict[str, Any] = field(default_factory=dict)
    """Options of `mpo prepare`, except input, output and tokenizer."""
    train: dict[str, Any] = field(default_factory=dict)
    """Options of `mpo train`, except output, model.checkpoint, model.reference and data.train."""
    per_round: dict[str, list[Any]] = field(default_factory=dict)
    """Options that change by round: `train.optimizer.lr: [1e-6, 5e-7, 2.5e-7]`, one value per round."""
    measure_kl: bool = True
    """Measure KL(π ‖ π_ref) after each round, on the new policy's answers to the held-out prompts; starts the ranks again for
    it."""
    nproc: int | None = None
    """Ranks of training; by default one per GPU, or what the layout needs."""
    seed: int = 1234
    """Seed of the prompt split; a stage without its own seed uses this plus the round's number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        require(self.rounds >= 1, f"rounds = {self.rounds}; it must be at least 1.")
        require(self.held_out >= 2, f"held_out = {self.held_out}; the reports need at least 2 held-out prompts.")
        require(
            self.held_out_responses >= 2,
            f"held_out_responses = {self.held_out_responses}; at least 2 answers make a group.",
        )
        require(self.nproc is None or self.nproc >= 1, f"nproc = {self.nproc}; it must be at least 1, or absent.")
        if self.optimizer == "continued":
            require(
                self.reference == "initial",
                "optimizer = continued with reference = previous; one run can have only one reference: set reference to initial.",
            )
            changed = next((name for name in self.per_round if name.startswith("train.")), None)
            require(changed is None, f"per_round.{changed}: optimizer = continued is one training run; remove it.")
        for name, values in self.per_round.items():
            require(
                name.split(".")[0] in STAGES and "." in name,
                f"per_round.{name}; it must name an option of a stage, for example train.optimizer.lr; stages are "
                f"{', '.join(STAGES)}.",
            )
            require(
                isinstance(values, list) and len(values) == self.rounds,
                f"per_round.{name} = {values}; it needs one value for each of rounds = {self.rounds}.",
            )
