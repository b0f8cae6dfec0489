"""The precision of training: chosen by the processor once, because a run cannot resume with another one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpo_megatron import device
from mpo_megatron.config import ModelConfig, TrainConfig, load_yaml
from mpo_megatron.config.sections import has_option
from mpo_megatron.rollout.iterate import TRAIN_FILE
from mpo_megatron.rollout.records import read_summary
from mpo_megatron.rollout.rounds import STATE_FILE

ROUNDS_FOLDER = "rounds"
"""Folder of the on-policy rounds in the command's folder."""


def choose_precision(output: Path) -> str:
    """`model.precision`, unless the user set it: that of the training that was started in this folder, or the faster one here.

    Raises:
        ConfigError: what the started training left is damaged.
    """
    return started_precision(output) or faster_precision()


def faster_precision() -> str:
    """The precision that this machine's processor computes faster."""
    return "bf16" if device.computes_bf16() else "fp32"


def started_precision(output: Path) -> str | None:
    """The precision of unfinished training, or of the rounds, in this folder; None if neither was started."""
    run, rounds = output / "run" / "config.yaml", output / ROUNDS_FOLDER / STATE_FILE
    if run.is_file() and not (output / TRAIN_FILE).is_file():
        return load_yaml(TrainConfig, run).model.precision
    if rounds.is_file():
        train = read_summary(rounds)["config"]["train"]
        return str(train.get("model", {}).get("precision", ModelConfig.precision))
    return None


def describe_precision(train: Mapping[str, Any], output: Path) -> str | None:
    """That a repeated command keeps a precision which is not the faster one here; None if it does not.

    Args:
        train: the options of training that the user set
    """
    started, faster = started_precision(output), faster_precision()
    if started in (None, faster) or has_option(train, "model.precision"):
        return None
    return (
        f"train.model.precision = {started}: kept, because {output} was started with it; {faster} would be faster on this "
        "machine, but a run cannot change its precision."
    )
