"""Options of `mpo evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mpo_megatron.config.checks import check_length, check_seed, check_writable, require
from mpo_megatron.config.model import ModelConfig
from mpo_megatron.config.parallel import ParallelConfig
from mpo_megatron.config.values import Section


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig(Section, prefix="held_out."):
    """Implicit reward log π − log π_ref on held-out groups: accuracy and margin of preferred over other responses."""

    groups: str
    """Folder with held-out prepared groups."""
    model: ModelConfig
    """`checkpoint`: the policy, as a Hugging Face folder, an output of `mpo convert`, a run or one of its steps; `reference`: the
    checkpoint it started from."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Partition of both models over ranks."""
    row_tokens: int = 8192
    """Token budget of a packed row."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Section):
    """`mpo evaluate`: held-out groups, sampled reward and win rate, answers for the judges of public benchmarks."""

    MAIN_OPTIONS: ClassVar[tuple[str, ...]] = (
        "output",
        "held_out.groups",
        "held_out.model.checkpoint",
        "candidate",
        "baseline",
        "prompts",
        "alpaca_eval",
        "arena_hard",
        "mt_bench",
    )

    output: str
    """Folder for evaluation.json, evaluation.png and intermediate results; repeat the command to resume."""
    held_out: HeldOutConfig | None = None
    """Measure the implicit reward on held-out groups."""
    candidate: str | None = None
    """Samples to evaluate: scored samples (`mpo score`, or a .jsonl of groups whose responses have a reward), samples without
    rewards (`mpo generate`, or a .jsonl), or a model to sample from: any checkpoint that `mpo generate` accepts."""
    baseline: str | None = None
    """Samples or model to compare the candidate with, prompt by prompt; forms as for `candidate`."""
    prompts: str | None = None
    """Prompts for models to answer; as in `mpo generate`."""
    generate: dict[str, Any] = field(default_factory=dict)
    """Options of `mpo generate` for models, except prompts, model, output and shard."""
    score: dict[str, Any] = field(default_factory=dict)
    """Options of `mpo score` for samples without rewards, except input, output and shard."""
    alpaca_eval: str | None = None
    """AlpacaEval's question file; the candidate's answers go to `alpaca_eval/model_outputs.json`."""
    arena_hard: str | None = None
    """Arena-Hard's question.jsonl; the answers go to `arena_hard/model_answer/<name>.jsonl`."""
    mt_bench: str | None = None
    """MT-Bench's question.jsonl; the answers to both turns go to `mt_bench/model_answer/<name>.jsonl`."""
    name: str = "candidate"
    """The candidate's name in plots and in benchmark files."""
    baseline_name: str = "baseline"
    """The baseline's name in plots."""
    num_resamples: int = 1000
    """Bootstrap resamples for the 95 % intervals."""
    seed: int = 1234
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        require(self.num_resamples >= 2, f"num_resamples = {self.num_resamples}; it must be at least 2.")
        for section, reserved in (("generate", ("prompts", "model", "output", "shard")), ("score", ("input", "output", "shard"))):
            for name in reserved:
                require(name not in getattr(self, section), f"{section}.{name}: `mpo evaluate` sets it; remove it.")

    @property
    def benchmarks(self) -> dict[str, str]:
        """The question files given, by benchmark."""
        files = {"alpaca_eval": self.alpaca_eval, "arena_hard": self.arena_hard, "mt_bench": self.mt_bench}
        return {name: path for name, path in files.items() if path is not None}


def validate_evaluate(config: EvaluateConfig) -> None:
    """Check across fields and against the file system, before anything loads.

    Raises:
        ConfigError: names the field, the rule and the fix.
    """
    check_writable(Path(config.output), "output")
    if config.benchmarks:
        check_length(Path(config.output) / "model_answer" / f"{config.name.replace('/', '--')}.jsonl", "name")
    require(
        config.candidate is not None or config.baseline is None,
        f"baseline = {config.baseline}, but there is no candidate to compare with it; set candidate.",
    )
    require(
        config.candidate is not None or not config.benchmarks,
        f"{', '.join(config.benchmarks)}: there is no model to answer; set candidate to a model.",
    )
    for name in ("prompts", "generate", "score"):
        require(
            config.candidate is not None or not getattr(config, name),
            f"{name} is set, but there is no candidate to sample or score; set candidate, or remove {name}.",
        )
    require(
        config.held_out is not None or config.candidate is not None,
        "nothing to evaluate: set held_out (groups with model.checkpoint and model.reference), or candidate.",
    )
    for name in ("candidate", "baseline"):
        path = getattr(config, name)
        require(path is None or Path(path).exists(), f"{name} = {path}; no such file or folder.")
