"""What `mpo generate` and `mpo score` refuse from their options alone; longer commands ask it before their first stage."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from mpo_megatron.config import GenerateConfig, ScoreConfig, require, validate_generate, validate_score
from mpo_megatron.config.score import (
    FunctionScorer,
    JudgeScorer,
    ModelScorer,
    ServedRewardModelScorer,
    build_scorer_config,
)
from mpo_megatron.files.functions import check_source
from mpo_megatron.rollout.models import read_model_settings
from mpo_megatron.rollout.scorers import build_scorer


def check_generate(config: GenerateConfig) -> None:
    """Check the options and this machine's packages.

    Raises:
        ConfigError: names the option, the rule and the fix.
    """
    validate_generate(config)
    require_package(config.engine, f"engine = {config.engine}")


def check_score(config: ScoreConfig) -> None:
    """Check the options, the packages, and every scorer as far as possible without its model's weights or running its code.

    Raises:
        ConfigError: names the option, the rule and the fix.
    """
    from mpo_megatron.rollout.scorers.classifier import BALANCED, check_head  # imports torch: seconds

    validate_score(config)
    for name, options in config.scorers.items():
        scorer = build_scorer_config(name, options)
        if isinstance(scorer, JudgeScorer | ServedRewardModelScorer):
            require_package("openai", f"scorers.{name}, which asks a server,")
            build_scorer(name, scorer).close()  # compiles the template, or loads the tokenizer
        elif isinstance(scorer, FunctionScorer):
            check_source(f"scorers.{name}.function", scorer.function)
        elif isinstance(scorer, ModelScorer):
            check_head(name, read_model_settings(Path(scorer.model)), scorer)
            if scorer.device == BALANCED:
                require_package("accelerate", f"scorers.{name}.device = {BALANCED}")


def require_package(name: str, why: str) -> None:
    """Raise `ConfigError` unless a package is installed; does not import it."""
    extra = f"pip install 'mpo-megatron[rollout]', or pip install {name}" if name in ("vllm", "openai") else f"pip install {name}"
    require(
        importlib.util.find_spec(name) is not None,
        f"{why} needs the package {name}, which is not installed: {extra}.",
    )
