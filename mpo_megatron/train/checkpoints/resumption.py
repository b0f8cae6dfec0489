"""Going on with a run: from which checkpoint, after checking every byte of it, and only as it was begun."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpo_megatron.config import ConfigError, TrainConfig, require
from mpo_megatron.config.checks import find_change
from mpo_megatron.files import DataError
from mpo_megatron.files.digests import DamagedError
from mpo_megatron.files.lock import hold
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.terminal.visible import visible
from mpo_megatron.train.checkpoints import checkpoint
from mpo_megatron.train.checkpoints.step_folders import (
    RunState,
    complete_steps,
    damaged_steps,
    mark_damaged,
    read_state,
    remove_leftovers,
    set_run_aside,
)
from mpo_megatron.train.checkpoints.verification import damage_of
from mpo_megatron.train.faults.agreement import machines_without, on_main
from mpo_megatron.train.faults.supervisor import was_restarted
from mpo_megatron.train.inputs import Inputs

FREE = {"optimizer": ("overlap", "cpu_offload"), "online": ("engine", "vllm_memory_fraction")}
"""Options of these sections that change no numbers but by rounding; of all others of them a run depends."""


LOCK_SECONDS = 100.0
"""How long another run in the same folder is waited for: a file server takes 90 to learn that a machine with a lock has died."""


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
        f"data.first_step = {first_step}, but {folder} stands at step {done}; train the steps before with their own data first "
        "(mpo iterate does, if train.json of the round before is removed).",
    )


@contextlib.contextmanager
def only_run(run: Path, ranks: Ranks) -> Iterator[None]:
    """Within it this is the only run in its folder: another one would take its save under way for a killed one's.

    Raises:
        DataError: another one is at work there, or not all machines see the same folder; on all ranks.
    """
    lock = run / ".lock"

    def take() -> str:
        stack.enter_context(hold(lock, run, LOCK_SECONDS))
        return lock.read_text()

    with contextlib.ExitStack() as stack:
        holder = on_main(ranks, take)
        if machines := machines_without(lambda: lock.is_file() and lock.read_text() == holder):
            raise DataError(
                f"output = {run}: {', '.join(machines)} do not see what the main rank writes there, and every rank writes its "
                "part of a checkpoint; name a folder on a file system that all machines share."
            )
        yield


def check_resumption(config: TrainConfig, inputs: Inputs) -> None:
    """Refuse a run that could not resume, as far as its newest checkpoint's state tells, before ranks are started for it.

    Raises:
        ConfigError: what it was trained with is not what it would resume with, or no checkpoint is whole.
    """
    run = Path(config.output)
    steps = complete_steps(run) if config.checkpoint.resume else []
    if not steps:
        require_whole([], damaged_steps(run) if config.checkpoint.resume else [], run)
        return
    try:
        saved, _ = read_state(steps[-1])
    except DamagedError:  # the ranks look for an older one, and say so
        return
    check_start(config, inputs, saved, steps[-1])


def require_whole(steps: list[Path], damaged: list[str], run: Path) -> None:
    """Refuse to start over where every checkpoint is damaged.

    Raises:
        DamagedError: there are checkpoints, and none is whole.
    """
    if not steps and damaged:
        raise DamagedError(
            f"{run / 'checkpoints'}: no checkpoint is whole; damaged are {', '.join(damaged)}. Copy a whole one there, "
            "or start anew with checkpoint.resume = false or another output."
        )


def check_start(config: TrainConfig, inputs: Inputs, saved: RunState, folder: Path) -> None:
    """Refuse to resume from a step's folder what would take another course.

    Raises:
        ConfigError: naming the first thing that changed.
    """
    fixed, first_step = fixed_options(config, inputs), config.data.first_step
    check_first_step(first_step, saved.step, folder)
    before = saved
    if saved.step == first_step:  # other groups may have led up to here
        before = RunState(step=saved.step, fixed={**saved.fixed, "groups of data.train": fixed["groups of data.train"]})
    check_same_run(before, fixed, folder)


def choose_checkpoint(run: Path, ranks: Ranks, *, resume: bool) -> Path | None:
    """The checkpoint to resume from: the newest that is whole to the byte, all ranks checking their share of its files.

    Damaged ones are renamed, not deleted, and an older whole one is taken: from there the run takes the same course. If
    checkpoints are not to be resumed from they are moved aside.

    Raises:
        DamagedError: there are checkpoints, and none is whole.
        ConfigError: the newest was written by another version of this package.
    """
    if not resume and (aside := on_main(ranks, lambda: set_run_aside(run))) and ranks.is_main:
        print(f"checkpoint.resume = false: earlier checkpoints and metrics are now in {aside}", flush=True)
    while True:
        steps, damaged = on_main(ranks, lambda: (complete_steps(run), damaged_steps(run)))
        require_whole(steps, damaged, run)
        folder = steps[-1] if steps else None
        problem = None if folder is None else damage_of(folder)
        if folder is None or problem is None:
            on_main(ranks, lambda: remove_leftovers(run))
            if folder is not None and ranks.is_main:
                print(f"resuming from {folder}", flush=True)
            return folder
        new_name = on_main(ranks, functools.partial(mark_damaged, folder))
        if ranks.is_main:
            print(f"DAMAGED checkpoint: {visible(problem)} It is now {new_name}; looking for an older one.", flush=True)


def resume(config: TrainConfig, inputs: Inputs, model: list[Any], adam: Any, ranks: Ranks) -> RunState:
    """Restore the newest whole checkpoint, if there is one and it is wanted; where the run stands.

    Raises:
        ConfigError: what it was trained with is not what it would go on with.
    """
    run = Path(config.output)
    folder = choose_checkpoint(run, ranks, resume=config.checkpoint.resume or was_restarted())
    if folder is None:
        check_first_step(config.data.first_step, 0, run)
        return RunState(step=0, fixed=fixed_options(config, inputs))
    saved, _ = read_state(folder)
    check_start(config, inputs, saved, folder)
    checkpoint.load(folder, model, adam, ranks)
    return saved
