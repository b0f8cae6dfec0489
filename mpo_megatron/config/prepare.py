"""Options of `mpo prepare`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mpo_megatron.config.checks import check_seed, check_template_options, require
from mpo_megatron.config.values import Section


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Section):
    """`mpo prepare`: tokenize prompts with K responses and rewards into groups."""

    MAIN_OPTIONS: ClassVar[tuple[str, ...]] = (
        "input",
        "output",
        "tokenizer",
        "format",
        "columns",
        "held_out",
        "max_prompt_tokens",
        "max_response_tokens",
        "system_prompt",
        "num_workers",
    )

    input: str | list[str]
    """A .jsonl / .json / .csv / .tsv / .parquet file (text also .gz, .zst, .bz2, .xz), a pattern such as 'data/*.jsonl', a
    folder, a folder written by `datasets`, a dataset's hub name, or `-` for standard input (JSONL); or several of them."""
    output: str
    """Output folder for the groups; it must be missing or empty."""
    tokenizer: str
    """Folder with the tokenizer: a Hugging Face or Megatron checkpoint, or a SentencePiece .model file; or a model's hub name."""
    weights: list[float] = field(default_factory=list)
    """Shares of several inputs in the training groups, for example 0.7 0.3: groups are dropped at random, none is repeated."""
    format: Literal["auto", "groups", "ultrafeedback", "nectar", "pairs", "comparison", "unpaired", "ratings"] = "auto"
    """Format of a row; `auto` detects it from the columns. See docs/data.md."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column names, ours=yours, for example prompt=question responses=answers rewards=scores."""
    split: str = "train"
    """Split to read if the input is a dataset with splits."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    rating: str | None = None
    """Field(s) with the reward, joined by `+` to average several (ratings, ultrafeedback); by default the format's own."""
    drop_ranks: list[int] = field(default_factory=list)
    """Ranks whose answers are dropped (nectar), for example 2 as in the MC-PO paper."""
    prompt_format: Literal["auto", "chat", "templated"] = "auto"
    """`templated`: prompts are already templated, and used unchanged. `chat`: always apply the template. `auto`: like `chat`, but
    stops if most prompts look templated."""
    system_prompt: str | None = None
    """System message for prompts without one; an existing one is never duplicated."""
    chat_template: str | None = None
    """File with a Jinja chat template that replaces the tokenizer's."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Extra variables for the chat template, for example `enable_thinking: false` for Qwen3."""
    other_prompts: Literal["refuse", "allow"] = "refuse"
    """Responses of `mpo generate` whose prompt was sampled with other options than these: refuse them, or train on them
    with this prompt (for example, to learn a system prompt's effect without it)."""
    max_prompt_tokens: int = 2048
    """Reject groups with a longer rendered prompt: a truncated prompt would be another question."""
    max_response_tokens: int = 2048
    """Maximum tokens of a response, including its end token."""
    overlong: Literal["drop", "truncate"] = "drop"
    """Treatment of a longer response: drop it from its group, or truncate it (without an end token). Both are counted."""
    max_rows: int | None = None
    """Read only this many rows of each input, for a trial."""
    held_out: int = 0
    """Move this many groups, chosen by a hash of their prompt, to `<output>-eval`; no prompt is in both."""
    fraction: float = 1.0
    """Share of the training groups to keep, drawn by id: a larger share contains every smaller one."""
    responses_per_prompt: int | None = None
    """Keep this many responses of each training group, drawn at random; larger numbers contain smaller ones."""
    keep_best: bool = False
    """With `responses_per_prompt`: always keep a group's best response (MC-PO)."""
    swapped_negatives: int = 0
    """Negatives added to each training group: copies of its best response with two tokens swapped, with the group's lowest reward
    (MC-PO's noise samples)."""
    reward_noise: float = 0.0
    """Standard deviation σ of Gaussian noise that is added to the training groups' rewards first."""
    reward_normalization: Literal["none", "zscore", "minmax", "dataset_zscore", "dataset_minmax"] = "none"
    """Shift and scale rewards by their group's mean and std (zscore) or range (minmax), or by the whole data set's."""
    check_every: int = 100
    """Compare every n-th group with plain `apply_chat_template`, and stop on a difference; 0: never."""
    seed: int = 1234
    """Seed of `weights`, `held_out`, `fraction`, `responses_per_prompt`, `swapped_negatives` and `reward_noise`."""
    num_workers: int = 1
    """Number of tokenizing processes; the result does not depend on it."""

    @property
    def inputs(self) -> list[str]:
        """The inputs, one or several."""
        return [self.input] if isinstance(self.input, str) else self.input

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.inputs), "input is an empty list; name at least one.")
        require(len(set(self.inputs)) == len(self.inputs), f"input = {self.input}; an input is named twice; name each only once.")
        require(
            not self.weights or len(self.weights) == len(self.inputs),
            f"weights = {self.weights}; there are {len(self.inputs)} inputs; give one weight for each.",
        )
        for weight in self.weights:
            require(0 < weight < float("inf"), f"weights = {self.weights}; each must be positive and finite.")
        require(self.check_every >= 0, f"check_every = {self.check_every}; it must be 0 (never) or more.")
        for ours, theirs in self.columns.items():
            require(bool(ours and theirs), f"columns = {self.columns}; write ours=yours, for example prompt=question.")
        require(
            len(set(self.columns.values())) == len(self.columns),
            f"columns = {self.columns}; one column of the input is mapped twice; name each only once.",
        )
        check_seed(self.seed)
        check_template_options(self.chat_template_kwargs, prompt_format=self.prompt_format, system_prompt=self.system_prompt)
        require(self.max_prompt_tokens >= 1, f"max_prompt_tokens = {self.max_prompt_tokens}; it must be at least 1.")
        require(self.max_response_tokens >= 1, f"max_response_tokens = {self.max_response_tokens}; it must be at least 1.")
        require(self.num_workers >= 1, f"num_workers = {self.num_workers}; it must be at least 1.")
        require(self.held_out >= 0, f"held_out = {self.held_out}; it must be 0 or more.")
        require(self.max_rows is None or self.max_rows >= 1, f"max_rows = {self.max_rows}; it must be at least 1, or absent.")
        require(0 < self.fraction <= 1, f"fraction = {self.fraction}; it must be above 0 and at most 1.")
        require(
            self.responses_per_prompt is None or self.responses_per_prompt >= 2,
            f"responses_per_prompt = {self.responses_per_prompt}; a group needs at least 2 responses.",
        )
        require(
            not self.keep_best or self.responses_per_prompt is not None,
            "keep_best = true; it has an effect only with responses_per_prompt; set that, or remove it.",
        )
        require(self.swapped_negatives >= 0, f"swapped_negatives = {self.swapped_negatives}; it must be 0 or more.")
        require(
            0 <= self.reward_noise < float("inf"),
            f"reward_noise = {self.reward_noise}; it is a standard deviation: 0 (off) or positive.",
        )
