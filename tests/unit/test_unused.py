"""Options of `mpo train` that would have no effect are refused."""

from __future__ import annotations

import pytest

from mpo_megatron.config import ConfigError, TrainConfig, parse, validate_unused

REQUIRED = ("--output", "run", "--model.checkpoint", "m", "--data.train", "d")


def check(*options: str) -> None:
    validate_unused(parse(TrainConfig, [*REQUIRED, *options], "mpo train"))


@pytest.mark.parametrize(
    ("option", "value", "without", "gives_effect"),
    [
        ("online.every", "4", "online.kl_weight", ("--online.kl_weight", "0.1")),
        ("online.engine", "vllm", "online.kl_weight", ("--online.kl_weight", "0.1")),
        ("checkpoint.best_metric", "eval/margin", "checkpoint.keep_best", ("--checkpoint.keep_best", "1")),
        ("checkpoint.best_is", "smallest", "checkpoint.keep_best", ("--checkpoint.keep_best", "1")),
        ("logging.wandb_run", "x", "logging.wandb_project", ("--logging.wandb_project", "p")),
        ("faults.max_skips", "9", "faults.on_nan = skip", ("--faults.on_spike", "skip")),
        ("eval_every", "10", "held-out groups", ("--data.eval", "e")),
        ("optimizer.min_lr", "1e-8", "", ("--optimizer.schedule", "linear")),
    ],
)
def test_an_option_without_effect_is_refused(option: str, value: str, without: str, gives_effect: tuple[str, str]) -> None:
    given = (f"--{option}", value)
    constant = ("--optimizer.schedule", "constant") if option == "optimizer.min_lr" else ()
    with pytest.raises(ConfigError, match=rf"{option} = \S+ has no effect with(out {without}| optimizer.schedule = constant)"):
        check(*given, *constant)
    check(*given, *gives_effect)


def test_the_worst_checkpoints_are_not_kept_as_the_best() -> None:
    loss = ("--checkpoint.keep_best", "1", "--checkpoint.best_metric", "eval/loss")
    with pytest.raises(ConfigError, match="best_is = largest would keep the worst checkpoints"):
        check(*loss)
    check(*loss, "--checkpoint.best_is", "smallest")


def test_what_turns_something_off_is_no_mistake() -> None:
    check("--eval_every", "0", "--optimizer.schedule", "constant", "--optimizer.min_lr", "5e-7")
