"""Resuming a run: choose a checkpoint, check every byte of it, and refuse changed options."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpo_megatron.files import DataError
from mpo_megatron.files.digests import DamagedError, check_pieces
from mpo_megatron.files.lock import hold
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.unpickling import PICKLES, check_pickles
from mpo_megatron.terminal.visible import visible
from mpo_megatron.train.checkpoints import checkpoint
from mpo_megatron.train.checkpoints.course import (
    check_first_step,
    check_start,
    fixed_options,
    loss_options,
    newest_state,
    require_whole,
)
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
from mpo_megatron.train.setup import Setup

LOCK_SECONDS = 100.0
"""Seconds to wait for another run in the same folder: a file server needs 90 to notice that a machine with a lock has died."""


def run_options(setup: Setup) -> dict[str, Any]:
    """What must not change when a run resumes (course.py)."""
    objective = setup.objective
    return fixed_options(
        setup.config,
        total_steps=setup.total_steps,
        data_digest=setup.train.info.data_digest,
        reference_digest=setup.reference_digest,
        loss=loss_options(setup.config.loss, asdict(objective.params)),
        lora=None if setup.record is None else asdict(setup.record.adapter),
        base_digest=None if setup.record is None else setup.record.base_digest,
    )


@contextlib.contextmanager
def only_run(run: Path, ranks: Ranks) -> Iterator[None]:
    """Within it, this is the only run in its folder: a second run would mistake an unfinished save for an abandoned one.

    Raises:
        DataError: another run writes there, or not all machines see the same folder; on all ranks.
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


def check_resumption(setup: Setup) -> None:
    """Refuse a run that cannot resume, from its newest checkpoint's small files, before its ranks start.

    Raises:
        ConfigError: options differ from the checkpoint's, no checkpoint is intact, or a file of the newest one could run
            commands.
    """
    newest = newest_state(setup.config)
    if newest is None:
        return
    saved, folder = newest
    check_start(run_options(setup), setup.config.data.first_step, saved, folder)
    check_step_pickles(folder)


def check_step_pickles(folder: Path) -> None:
    """Refuse a step whose pickles could run commands although their digests match; otherwise ranks would use an older step.

    Raises:
        ConfigError: names the file.
    """
    _, files = read_state(folder)
    pickles = {name: entry for name, entry in files.items() if Path(name).name in PICKLES}
    with contextlib.suppress(DamagedError):
        check_pieces(folder, pickles)
        if pickles:
            check_pickles(folder / "megatron")


def choose_checkpoint(run: Path, ranks: Ranks, *, resume: bool) -> Path | None:
    """The checkpoint to resume from: the newest one with every byte intact; each rank checks a share of its files.

    Damaged checkpoints are renamed, not deleted, and the run resumes from an older complete one, with the same result. Without
    `resume`, existing checkpoints are moved aside.

    Raises:
        DamagedError: checkpoints exist, but none is intact.
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


def resume(setup: Setup, model: list[Any], adam: Any, ranks: Ranks) -> RunState:
    """Restore the newest complete checkpoint, if any and if resuming is on; return the run's state.

    Raises:
        ConfigError: it was trained with other options.
    """
    run, config = setup.folder, setup.config
    folder = choose_checkpoint(run, ranks, resume=config.checkpoint.resume or was_restarted())
    if folder is None:
        check_first_step(config.data.first_step, 0, run)
        return RunState(step=0, fixed=run_options(setup))
    saved, _ = read_state(folder)
    check_start(run_options(setup), config.data.first_step, saved, folder)
    check_step_pickles(folder)  # before torch opens them and prints its own traceback
    checkpoint.load(folder, model, adam, ranks)
    return saved
