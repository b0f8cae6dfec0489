"""Write a run's checkpoints: in the background, all or nothing, with digests of every byte.

    plan       all ranks agree on who writes what, and copy what training will change            (training waits)
    write      a thread of each rank writes its file, flushes it to disk and digests it         (training continues)
    finish     once all ranks have written: metadata, digests, `state.json`, rename, prune      (training waits, briefly)

Nothing counts until the rename, so a run killed at any moment keeps its older checkpoints. The writers are threads, not processes
as in Megatron's own asynchronous saves: they end with their rank, so none can write into a folder that the next start of the run
has taken over. For the same reason, each save has a unique folder name.

Only one save runs at a time: the next one waits for it.
"""

from __future__ import annotations

import json
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed import all_gather_object, broadcast_object_list, get_world_size
from torch.distributed.checkpoint.api import CheckpointException

from mpo_megatron import device
from mpo_megatron.config import CheckpointConfig, ConfigError
from mpo_megatron.files.atomic import sync
from mpo_megatron.files.digests import check_file, digest_file
from mpo_megatron.mcore.writer import Bucket, report, stage, write_bucket
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.terminal.visible import visible
from mpo_megatron.train.checkpoints.checkpoint import prepare_save
from mpo_megatron.train.checkpoints.step_folders import (
    RunState,
    SaveError,
    StepFiles,
    appear,
    remove_old,
    require_space,
    step_folder,
    write_state,
)
from mpo_megatron.train.faults.agreement import machines_without, on_main

SLOW_DISK = 2e8
"""Assumed bytes per second and rank of a save before any was measured."""

SIDE_FILES = ("hf", "conversion.json")
"""Files that a step's folder copies from the model's checkpoint."""


@dataclass
class Writing:
    """An unfinished save, as this rank sees it."""

    state: RunState
    partial: Path
    request: Any
    started: float
    files: StepFiles = field(default_factory=dict)
    """Files that this rank has written."""
    error: str | None = None
    thread: threading.Thread | None = None


class Saver:
    """Writes a run's checkpoints; all ranks call its methods at the same steps."""

    def __init__(
        self,
        run: Path,
        config: CheckpointConfig,
        ranks: Ranks,
        source: Path,
        size: int,
        end_token_ids: Sequence[int] = (),
        extra: Mapping[str, bytes] | None = None,
    ) -> None:
        """Prepare saves into a run's folder.

        Args:
            source: checkpoint folder of the model, whose side files are copied
            size: expected bytes of a checkpoint
            end_token_ids: tokens that end responses in the run's data
            extra: additional side files, by name
        Raises:
            DamagedError: a side file differs from what was written.
        """
        self.run, self.config, self.ranks, self.size = run, config, ranks, size
        self.side_files = add_end_tokens(read_side_files(source), end_token_ids) | dict(extra or {}) if ranks.is_main else {}
        self.writing: Writing | None = None
        self.seconds = size / (SLOW_DISK * get_world_size())
        """Seconds of the slowest save so far, from start to rename; before the first one, an estimate for a slow disk."""
        self.saved_step = -1
        """Step of the newest checkpoint written by this process."""

    @property
    def has_written(self) -> bool:
        """Whether this rank has written its part of the current save; True without one."""
        return self.writing is None or self.writing.thread is None or not self.writing.thread.is_alive()

    def start(self, state: RunState, model: list[torch.nn.Module], optimizer: MegatronOptimizer) -> None:
        """Start a save; the weights may change after this returns. Unless asynchronous, return when everything is written.

        Raises:
            SaveError: this save, or the previous one, could not be written.
        """
        self.finish()
        started = time.monotonic()
        final = step_folder(self.run, state.step)
        partial = self._open(final)
        device.synchronize()
        request = prepare_save(partial, model, optimizer, self.ranks)
        self.writing = Writing(state=state, partial=partial, request=request, started=started)
        buckets = stage(request)
        if self.config.asynchronous:
            self.writing.thread = threading.Thread(target=write, args=(self.writing, buckets), name="checkpoint", daemon=True)
            self.writing.thread.start()
        else:
            write(self.writing, buckets)
            self.finish()

    def finish(self) -> None:
        """Wait for the current save, if any, and rename it.

        Raises:
            SaveError: a rank could not write its part.
        """
        if self.writing is None:
            return
        writing, self.writing = self.writing, None
        if writing.thread is not None:
            writing.thread.join()
        files = self._gather(writing)
        try:
            for finalize in writing.request.finalize_fns:  # Megatron's own: write the metadata
                finalize()
        except (CheckpointException, OSError) as error:  # CheckpointException does not derive from Exception
            raise SaveError(_message(writing.partial, str(error))) from error
        self._on_main(lambda: self._complete(writing, files), writing.partial)
        seconds = time.monotonic() - writing.started
        self.seconds = seconds if self.saved_step < 0 else max(self.seconds, seconds)
        self.saved_step = writing.state.step

    def _open(self, final: Path) -> Path:
        """A new folder to write into, on all ranks."""
        names = [f"{final.name}.partial-{secrets.token_hex(4)}"]
        broadcast_object_list(names, src=0)
        partial = final.with_name(names[0])

        def create() -> None:
            require_space(final.parent, self.size, f"the checkpoint {final.name}")  # checkpoints/ may be a link to another disk
            (partial / "megatron").mkdir(parents=True)

        self._on_main(create, partial)
        if machines := machines_without((partial / "megatron").is_dir):
            raise SaveError(_message(partial, f"{', '.join(machines)} do not see the folder"))
        return partial

    def _gather(self, writing: Writing) -> StepFiles:
        """Entries of all ranks' files; raises on all ranks if one rank has failed."""
        parts: list[tuple[StepFiles, str | None]] = [({}, None)] * get_world_size()
        all_gather_object(parts, (writing.files, writing.error))
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(parts) if error is not None]
        if errors:
            if self.ranks.is_main:
                shutil.rmtree(writing.partial, ignore_errors=True)
            raise SaveError(_message(writing.partial, "; ".join(errors[:4])))
        return {name: entry for files, _ in parts for name, entry in files.items()}

    def _complete(self, writing: Writing, files: StepFiles) -> None:
        """The main rank's part: side files, digests, state, rename, and deletion of old checkpoints."""
        partial, final = writing.partial, step_folder(self.run, writing.state.step)
        for name, content in self.side_files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(content)
        for path in sorted(partial.rglob("*")):
            name = path.relative_to(partial).as_posix()
            if path.is_file() and name not in files:
                files[name] = digest_file(path)
                sync(path)
        write_state(partial, writing.state, files)
        for path in [*(path for path in partial.rglob("*") if path.is_dir()), partial]:
            sync(path)
        appear(partial, final)
        print(f"saved {final}", flush=True)
        try:
            remove_old(self.run, self.config)
        except OSError as error:  # a network file system may refuse while someone reads it; the new checkpoint is complete
            print(f"an old checkpoint could not be deleted ({visible(error)}); the next save tries again", flush=True)

    def _on_main(self, action: Callable[[], None], path: Path) -> None:
        """Change a save's folder on the main rank; on failure, delete the folder and raise on all ranks."""
        try:
            on_main(self.ranks, action)
        except (OSError, ConfigError) as error:
            if self.ranks.is_main:
                shutil.rmtree(path, ignore_errors=True)
            raise SaveError(_message(path, str(error))) from error


def write(writing: Writing, buckets: Sequence[Bucket]) -> None:
    """Write this rank's files, and record their digests, or the error."""
    results = {}
    try:
        for index, bucket in enumerate(buckets):
            results[index] = write_bucket(writing.request, index, bucket)
            path = Path(bucket[0])
            writing.files[path.relative_to(writing.partial).as_posix()] = digest_file(path)
    except (OSError, RuntimeError) as error:
        writing.error = _reason(error)
    report(writing.request, results)


def read_side_files(source: Path) -> dict[str, bytes]:
    """Config, tokenizer and conversion record of a checkpoint folder, by relative path; read once, so that later damage does not
    spread to checkpoints.

    Raises:
        DamagedError: one differs from what was written.
    """
    roots = [source / name for name in SIDE_FILES]
    paths = [path for root in roots for path in ([root] if root.is_file() else sorted(root.rglob("*"))) if path.is_file()]
    for path in paths:
        check_file(path)
    return {path.relative_to(source).as_posix(): path.read_bytes() for path in paths}


def add_end_tokens(files: dict[str, bytes], end_token_ids: Sequence[int]) -> dict[str, bytes]:
    """The side files, with generation settings that make engines stop at these tokens.

    A base model's own settings name the token that ends a text, but a chat template may end responses with another.
    """
    path = "hf/generation_config.json"
    settings: dict[str, Any] = json.loads(files.get(path, b"{}"))
    named = settings.get("eos_token_id", json.loads(files.get("hf/config.json", b"{}")).get("eos_token_id"))
    known = [] if named is None else named if isinstance(named, list) else [named]
    missing = [int(token) for token in end_token_ids if token not in known]
    if not missing:
        return files
    settings["eos_token_id"] = [*missing, *known]
    return files | {path: json.dumps(settings, indent=2).encode() + b"\n"}


def _reason(error: BaseException) -> str:
    """The first error: on a full disk, torch fails again while closing its archive, and hides it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return str(cause or error)


def _message(path: Path, reason: str) -> str:
    return (
        f"{path}: this checkpoint could not be written ({reason}); the older ones are intact. Free some space, or fix the "
        "disk, and run the same command again: it resumes."
    )
