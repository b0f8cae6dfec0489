"""Options of `mpo prepare`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mpo_megatron.config.checks import check_seed, require


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """`mpo prepare`: prompts with K responses and rewards → tokenized groups in Arrow."""

    input: str
    """A .jsonl / .json / .parquet file, a folder of them, a folder written by `datasets`, or a dataset's hub name."""
    output: str
    """Folder to write the groups to; it must not exist yet, or be empty."""
    tokenizer: str
    """Folder with the tokenizer: a Hugging Face or Megatron checkpoint, or a SentencePiece .model file."""
    format: Literal["auto", "groups", "ultrafeedback", "nectar", "pairs", "ratings"] = "auto"
    """What a row looks like; `auto` decides from the columns. See docs/data.md."""
    split: str = "train"
    """Split to read when the input is a dataset with splits."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    rating: str | None = None
    """Field(s) that hold the reward, joined by `+` to average several (ratings, ultrafeedback); by default the format's own."""
    system_prompt: str | None = None
    """System message put before prompts that have none of their own; one that is there is never doubled."""
    chat_template: str | None = None
    """File with a Jinja chat template that replaces the tokenizer's."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Extra variables for the chat template, for example `enable_thinking: false` for Qwen3."""
    max_prompt_tokens: int = 2048
    """A group whose rendered prompt is longer is rejected: a truncated prompt would be another question."""
    max_response_tokens: int = 2048
    """Longest response, its end token included."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What happens to a longer response: it leaves its group, or is cut (and then has no end token). Either is counted."""
    max_rows: int | None = None
    """Read only this many rows, for a trial."""
    held_out: int = 0
    """This many groups, chosen by a hash of their prompt, go to a second folder `<output>-eval`; no prompt is in both."""
    fraction: float = 1.0
    """Share of the training groups kept, drawn by id: a larger share keeps all that a smaller one keeps."""
    responses_per_prompt: int | None = None
    """Keep this many responses of each training group, drawn at random; larger numbers keep what smaller ones keep."""
    reward_noise: float = 0.0
    """Standard deviation σ of Gaussian noise added to the training groups' rewards, before anything else is done to them."""
    reward_normalization: Literal["none", "zscore", "minmax", "dataset_zscore", "dataset_minmax"] = "none"
    """Shift and scale rewards by their group's mean and std (zscore) or range (minmax), or by the whole data set's."""
    seed: int = 1234
    """Seed of `held_out`, `fraction`, `responses_per_prompt` and `reward_noise`."""
    num_workers: int = 1
    """Processes that tokenize; the result does not depend on it."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
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
            0 <= self.reward_noise < float("inf"),
            f"reward_noise = {self.reward_noise}; it is a standard deviation: 0 (off) or positive.",
        )
