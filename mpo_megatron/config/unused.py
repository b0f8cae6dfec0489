"""Refuses options of `mpo train` that are set but have no effect with the other options."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from mpo_megatron.config.checks import require
from mpo_megatron.config.train import OptimizerConfig, TrainConfig


def validate_unused(config: TrainConfig) -> None:
    """Refuse options that have no effect.

    Raises:
        ConfigError: naming the option, and what would give it an effect.
    """
    for section, names, used, condition in _rules(config):
        values = getattr(config, section)
        for name in names:
            value, default = getattr(values, name), getattr(type(values)(), name)
            require(
                used or value == default,
                f"{section}.{name} = {value} has no effect without {condition}; set that as well, or remove {section}.{name}.",
            )
    evaluates = config.data.eval is not None
    require(
        evaluates or config.eval_every in (0, type(config).eval_every),
        f"eval_every = {config.eval_every} has no effect without held-out groups; set data.eval, or remove eval_every.",
    )
    low, lr = config.optimizer.min_lr, config.optimizer.lr
    require(
        config.optimizer.schedule != "constant" or low in (OptimizerConfig.min_lr, lr),
        f"optimizer.min_lr = {low} has no effect with optimizer.schedule = constant; set schedule to cosine or linear, or remove "
        "min_lr.",
    )
    best = config.checkpoint
    require(
        best.best_metric != "eval/loss" or best.best_is == "smallest",
        "checkpoint.best_metric = eval/loss with checkpoint.best_is = largest would keep the worst checkpoints; set best_is to "
        "smallest.",
    )


def _rules(config: TrainConfig) -> Iterator[tuple[str, tuple[str, ...], bool, str]]:
    """Section, options, whether they have an effect, and the condition for it."""
    online = tuple(field.name for field in fields(config.online) if field.name != "kl_weight")
    yield "online", online, config.online.kl_weight > 0, "online.kl_weight, which samples"
    yield "checkpoint", ("best_metric", "best_is"), config.checkpoint.keep_best > 0, "checkpoint.keep_best"
    yield "logging", ("wandb_run",), config.logging.wandb_project is not None, "logging.wandb_project"
    skips = "skip" in (config.faults.on_nan, config.faults.on_spike)
    yield "faults", ("max_skips",), skips, "faults.on_nan = skip or faults.on_spike = skip"
