"""Folders of a run's checkpoints: which are complete, which to resume from, which to keep. Needs no model and no ranks.

    <run>/checkpoints/step_00000100/
        megatron/         weights and optimizer states (torch_dist)
        hf/               config, tokenizer, generation config of the model, for `mpo convert`
        conversion.json   as written by `mpo convert`
        state.json        the run's state, size and digest of every other file, and its own digest

`state.json` is written last, and the folder is renamed after that, so a folder with this name was complete once. Folders with
other names are not checkpoints: `.partial-…` is being written or was killed, `.removing` is being deleted, and `.damaged` differs
from its digests.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mpo_megatron.config import CheckpointConfig, ConfigError
from mpo_megatron.files.atomic import sync
from mpo_megatron.files.digests import STATE, DamagedError, check_pieces, entries_of, seal_sorted, unseal
from mpo_megatron.files.objects import build_record

FORMAT = 1
"""Format of `state.json`; others are refused."""
STEP = re.compile(r"step_\d{8,}")
RECORDS = (
    *("config.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "groups/step_*.parquet", "incidents/*"),
    *("tensorboard/events.*", "wandb_run_id", "mlflow_run_id"),
)
"""A run's records beside its checkpoints; other files there are not its own."""


class SaveError(RuntimeError):
    """A checkpoint could not be written; older ones are intact. The message names the path and the reason."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A run's progress, and what must not change when it continues.

    Everything else needs no saving: the learning rate, the data's order, and all random draws are functions of
    the step and the seed.
    """

    step: int
    """Completed optimizer steps."""
    fixed: dict[str, Any]
    """Options and digests that must not change when the run resumes, as JSON values."""
    held_out: dict[str, float] = field(default_factory=dict)
    """Held-out metrics after this step; empty without evaluation."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the last steps, to detect spikes."""
    recent_norms: list[float] = field(default_factory=list)
    """Gradient norms of the last steps."""
    skipped_steps: int = 0
    """Number of steps whose update was not applied."""


StepFiles = dict[str, tuple[int, str]]
"""Size in bytes and digest of files, by relative path in the checkpoint folder."""


def write_state(folder: Path, state: RunState, files: StepFiles) -> None:
    """Write `state.json`, which lists the folder's files."""
    with (folder / STATE).open("wb") as file:
        file.write(seal_sorted({"format": FORMAT, "state": asdict(state), "files": files}))
        file.flush()
        os.fsync(file.fileno())


def read_state(folder: Path) -> tuple[RunState, StepFiles]:
    """The run's state and the list of files in a step's folder.

    Raises:
        DamagedError: `state.json` is missing, or differs in any byte from what was written.
        ConfigError: it is intact, but another version of this package wrote it.
    """
    path = folder / STATE
    try:
        content = unseal(path, "copy the checkpoint again, or use an older one")
    except FileNotFoundError as error:
        raise DamagedError(f"{path}: no such file, but it was written with this checkpoint; copy all of it again.") from error
    found = content.get("format")
    if found != FORMAT:
        raise ConfigError(
            f"{path}: has format {found}, but this version of mpo_megatron reads format {FORMAT}; use the version that wrote it."
        )
    remedy = "copy the checkpoint again, or use an older one"
    state = build_record(RunState, content.get("state"), path, remedy, measured=("held_out", "recent_losses", "recent_norms"))
    return state, {name: (size, str(digest)) for name, (size, digest) in entries_of(content, path).items()}


def check_files(folder: Path, *, part: int = 0, parts: int = 1) -> None:
    """Check `state.json` and the sizes of a step's files, and the digest of every `parts`-th file, from file `part` on.

    Raises:
        DamagedError: names the first file that is missing, or has another size or content.
    """
    _, files = read_state(folder)
    check_pieces(folder, files, part=part, parts=parts)


def complete_steps(run: Path) -> list[Path]:
    """Folders of a run's checkpoints that were completed, oldest first."""
    folders = [folder for folder in (run / "checkpoints").glob("step_*") if STEP.fullmatch(folder.name) and folder.is_dir()]
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step_")))


def damaged_steps(run: Path) -> list[str]:
    """Names of damaged checkpoints that were set aside."""
    return sorted(folder.name for folder in (run / "checkpoints").glob("*.damaged*"))


def is_step(folder: Path) -> bool:
    """Whether a checkpoint was written by a run, with digests."""
    return (folder / STATE).is_file()


def step_folder(run: Path, step: int) -> Path:
    """Folder of a step's checkpoint."""
    return run / "checkpoints" / f"step_{step:08d}"


def appear(partial: Path, final: Path) -> None:
    """Rename a complete folder to its final name, then delete the folder that had it before."""
    if final.exists():
        _set_aside(final, ".removing")
    partial.rename(final)
    sync(final.parent)


def mark_damaged(folder: Path) -> Path:
    """Rename a damaged checkpoint without deleting it; return its new name."""
    return _set_aside(folder, ".damaged")


def remove_old(run: Path, config: CheckpointConfig) -> None:
    """Delete all checkpoints except the newest `keep` and the best `keep_best`. Call it when no save is in progress."""
    steps = complete_steps(run)
    kept = {*steps[-config.keep :], *best_steps(steps, config)}
    for folder in steps:
        if folder not in kept:
            _set_aside(folder, ".removing")
    remove_leftovers(run)


def remove_leftovers(run: Path) -> None:
    """Delete what killed saves and removals left. Call it when no save is in progress."""
    for pattern in ("*.partial-*", "*.removing*"):
        for folder in (run / "checkpoints").glob(pattern):
            shutil.rmtree(folder)


def best_steps(steps: list[Path], config: CheckpointConfig) -> list[Path]:
    """The `keep_best` best checkpoints by the held-out metric, best first; ties go to the newer one."""
    scored = []
    for folder in steps if config.keep_best else []:
        try:
            state, _ = read_state(folder)
        except DamagedError:
            continue
        value = state.held_out.get(config.best_metric, math.nan)
        if math.isfinite(value):
            scored.append((value if config.best_is == "largest" else -value, state.step, folder))
    return [folder for *_, folder in sorted(scored, reverse=True)[: config.keep_best]]


def set_run_aside(run: Path) -> Path | None:
    """Set aside an earlier run's checkpoints in the same folder, together with its records.

    So the new run never resumes from them, overwrites no metrics, and gets its own id at tracking services.
    """
    old = run / "checkpoints"
    if not old.is_dir() or not any(old.iterdir()):
        return None
    aside = _set_aside(old, ".before")
    for record in [path for pattern in RECORDS for path in run.glob(pattern)]:
        target = aside / record.relative_to(run)
        target.parent.mkdir(exist_ok=True)
        record.rename(target)
    return aside


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Check that the disk of `folder` (or its nearest existing parent) has `needed` bytes free.

    Raises:
        ConfigError: too little space.
    """
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ConfigError(
            f"{folder}: {purpose} needs {needed / 1e9:,.3f} GB, but only {free / 1e9:,.3f} GB are free; free some space, lower "
            "checkpoint.keep or checkpoint.keep_best, or choose another output."
        )


def _set_aside(folder: Path, suffix: str) -> Path:
    """Rename a folder to the first free `<name><suffix>[-n]`."""
    names = itertools.chain([suffix], (f"{suffix}-{number}" for number in itertools.count(2)))
    target = next(target for end in names if not (target := folder.with_name(folder.name + end)).exists())
    folder.rename(target)
    return target
