"""Going on with a run: where it stands, and what must not have changed since."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpo_megatron.config import ConfigError, TrainConfig, require
from mpo_megatron.config.checks import find_change
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.train import checkpoint
from mpo_megatron.train.faults import was_restarted
from mpo_megatron.train.inputs import Inputs
from mpo_megatron.train.saving import choose_checkpoint
from mpo_megatron.train.step_folders import RunState, read_state

FREE = {"optimizer": ("overlap", "cpu_offload"), "online": ("engine", "vllm_memory_fraction")}
"""Options of these sections that change no numbers but by rounding; of all others of them a run depends."""


def fixed_options(config: TrainConfig, inputs: Inputs) -> dict[str, Any]:
    """What must stay as it is for a run to take the course it would have taken, as JSON holds it, named as in the configuration.

    Not in it: what changes rounding only (layout, rows, fused or two-phase steps), and what is watched, kept and logged.
    """
    model = config.model
    fixed: dict[str, Any] = {
        "seed": config.seed,
        "number of steps": inputs.total_steps,
        "groups of data.train": inputs.train.info.data_digest,
        "data": {"groups_per_step": config.data.groups_per_step, "shuffle": config.data.shuffle},
        "reference model": inputs.reference_digest,
        "model": {"precision": model.precision, "fp8": model.fp8, "fp8_bf16_layers": model.fp8_bf16_layers},
        "loss": {"name": inputs.objective.loss.name, "params": asdict(inputs.objective.params)},
        "optimizer": asdict(config.optimizer),
        "online": asdict(config.online) if config.online.kl_weight else {"kl_weight": 0.0},
    }
    for section, names in FREE.items():
        for name in names:
            fixed[section].pop(name, None)
    as_read: dict[str, Any] = json.loads(json.dumps(fixed))
    return as_read


def check_same_run(saved: RunState, fixed: dict[str, Any], folder: Path) -> None:
    """Refuse to continue a run that would take another course.

    Raises:
        ConfigError: naming the first thing that changed.
    """
    changed = find_change(saved.fixed, fixed)
    if changed is not None:
        name, before, now = changed
        raise ConfigError(
            f"cannot resume from {folder}: it was trained with {name} = {before}, now it is {now}; use the old value, or begin "
            f"a new run: another output (from these weights: model.checkpoint = {folder}), or checkpoint.resume = false."
        )


def check_first_step(first_step: int, done: int, folder: Path) -> None:
    """Refuse data that begins at a step which the run has not reached.

    Raises:
        ConfigError: naming both steps.
    """
    require(
        first_step <= done,
        f"data.first_step = {first_step}, but {folder} stands at step {done}; train the steps before with their own data first.",
    )


def resume(config: TrainConfig, inputs: Inputs, model: list[Any], adam: Any, ranks: Ranks) -> RunState:
    """Restore the newest whole checkpoint, if there is one and it is wanted; where the run stands.

    Raises:
        ConfigError: what it was trained with is not what it would go on with.
    """
    run, fixed, first_step = Path(config.output), fixed_options(config, inputs), config.data.first_step
    folder = choose_checkpoint(run, ranks, resume=config.checkpoint.resume or was_restarted())
    if folder is None:
        check_first_step(first_step, 0, run)
        return RunState(step=0, fixed=fixed)
    saved, _ = read_state(folder)
    check_first_step(first_step, saved.step, folder)
    before = saved
    if saved.step == first_step:  # other groups may have led up to here
        before = RunState(step=saved.step, fixed={**saved.fixed, "groups of data.train": fixed["groups of data.train"]})
    check_same_run(before, fixed, folder)
    checkpoint.load(folder, model, adam, ranks)
    return saved
