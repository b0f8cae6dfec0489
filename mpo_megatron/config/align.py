"""Options of `mpo align` and `mpo chat`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mpo_megatron.config.checks import check_seed, check_template_options, require
from mpo_megatron.config.iterate import STAGES, IterateConfig
from mpo_megatron.config.names import check_options
from mpo_megatron.config.values import Section

ROUND_STAGES = ("iterate", "score", "select")
"""Sections for on-policy rounds only."""
ROUNDS = 3
"""Default number of rounds."""


@dataclass(frozen=True, kw_only=True)
class AlignConfig(Section):
    """`mpo align`: align a Hugging Face model with groups or prompts, with one resumable command."""

    MAIN_OPTIONS: ClassVar[tuple[str, ...]] = ("model", "data", "prompts", "output", "rounds", "held_out", "plan")

    STAGE_TYPES: ClassVar = {"iterate": IterateConfig, **STAGES}

    model: str
    """Hugging Face folder, or name on the hub."""
    output: str
    """Folder for all results; the model is in `<output>/aligned`. Repeat the command to resume."""
    data: list[str] = field(default_factory=list)
    """Groups to train on: anything `mpo prepare` reads."""
    prompts: str | None = None
    """Prompts for on-policy rounds, instead of data, as for `mpo iterate`; `score` defines the reward of an answer."""
    rounds: int = ROUNDS
    """Number of rounds of sampling and training, with prompts."""
    held_out: int | None = None
    """Number of groups (or prompts) for measuring, excluded from training; by default 100, or a tenth of all if that is less."""
    answers: int = 4
    """Number of held-out prompts answered by the models before and after, shown side by side; 0: none."""
    plan: bool = False
    """Show the stages (with data, also an estimated time) and write nothing."""
    nproc: int | None = None
    """Ranks of training; by default one per GPU, or what the layout needs."""
    prepare: dict[str, Any] = field(default_factory=dict)
    """Options of `mpo prepare`: --prepare.max_prompt_tokens 512."""
    train: dict[str, Any] = field(default_factory=dict)
    """Options of `mpo train`: --train.loss.name dpo --train.optimizer.lr 1e-6. Unset options are chosen by the model's size
    (optimizer.lr), the data (data.groups_per_step) and, on GPUs, `mpo plan` (parallel, model.recompute, data.row_tokens)."""
    generate: dict[str, Any] = field(default_factory=dict)
    """Options of `mpo generate`, for the answers and the rounds: --generate.max_tokens 256."""
    iterate: dict[str, Any] = field(default_factory=dict)
    """With prompts: options of `mpo iterate` itself: --iterate.reference initial --iterate.held_out_responses 4."""
    score: dict[str, Any] = field(default_factory=dict)
    """With prompts: options of `mpo score`."""
    select: dict[str, Any] = field(default_factory=dict)
    """With prompts: options of `mpo select`."""
    seed: int = 1234
    """Seed of every stage without its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        for stage, kind in self.STAGE_TYPES.items():
            check_options(kind, getattr(self, stage), stage)
        require(
            bool(self.data) != (self.prompts is not None),
            "data, prompts: give exactly one of them: groups with responses and rewards (--data FILE), or prompts to sample from "
            "(--prompts FILE).",
        )
        require(
            "-" not in self.data,
            "data = -; a resumed run could not read standard input again; write it to a file, and name that.",
        )
        require(self.rounds >= 1, f"rounds = {self.rounds}; it must be at least 1.")
        require(
            self.held_out is None or self.held_out >= 2,
            f"held_out = {self.held_out}; at least 2 are needed to measure an improvement.",
        )
        require(self.answers >= 0, f"answers = {self.answers}; it must be 0 (none) or more.")
        require(self.nproc is None or self.nproc >= 1, f"nproc = {self.nproc}; it must be at least 1, or absent.")
        if self.prompts is None:
            for name in ROUND_STAGES:
                require(not getattr(self, name), f"{name} is a stage of on-policy rounds; it has no effect without prompts.")
            require(
                self.rounds == ROUNDS,
                f"rounds = {self.rounds}; it has an effect only with prompts; remove it (train.epochs repeats data).",
            )
        else:
            require(bool(self.score), "score is missing; configure the reward of an answer (docs/on_policy.md).")


@dataclass(frozen=True, kw_only=True)
class ChatConfig(Section):
    """`mpo chat MODEL [--beside BASE]`: talk to a model in the terminal, or to two side by side."""

    model: str
    """Output of `mpo align`, a Hugging Face folder, a run, or one of its checkpoints; `mpo chat MODEL` sets it."""
    beside: str | None = None
    """A second model that receives the same messages and keeps its own answers."""
    prompt: str | None = None
    """Send this message, print the answer, and exit."""
    system_prompt: str | None = None
    """System message of the conversation."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Extra variables for the chat template, for example `enable_thinking: false`."""
    max_tokens: int = 512
    """Maximum tokens of an answer, including its end token."""
    temperature: float = 0.7
    """Sampling temperature; 0 selects the likeliest token."""
    top_p: float = 0.95
    """Sample from the fewest tokens whose probabilities reach this sum."""
    device: str = "auto"
    """`auto`: a GPU if available, otherwise the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights; `auto` is the checkpoint's own, or float32 on a CPU without instructions for bfloat16."""
    seed: int = 1234
    """Seed for sampling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        check_template_options(self.chat_template_kwargs)
        require(self.max_tokens >= 1, f"max_tokens = {self.max_tokens}; it must be at least 1.")
        require(0 <= self.temperature < float("inf"), f"temperature = {self.temperature}; it must be 0 or positive.")
        require(0 < self.top_p <= 1, f"top_p = {self.top_p}; it must be above 0 and at most 1.")
        require(
            self.prompt is None or bool(self.prompt.strip()), "prompt is empty; write a message, or remove the option to chat."
        )
