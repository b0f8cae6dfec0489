"""Faults on two ranks: one scenario after another in one process group, results for test_faults.py."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed

from mpo_megatron.mcore.preparation import prepare

prepare()

from mpo_megatron.config import ConfigError, TrainConfig, parse  # noqa: E402
from mpo_megatron.files import DataError  # noqa: E402
from mpo_megatron.files.lock import hold  # noqa: E402
from mpo_megatron.train import evaluation, loop, optimizer  # noqa: E402
from mpo_megatron.train.checkpoints import resumption, saving, step_folders  # noqa: E402
from mpo_megatron.train.checkpoints.step_folders import SaveError, complete_steps, step_folder  # noqa: E402
from mpo_megatron.train.faults import agreement, signals, supervisor  # noqa: E402
from mpo_megatron.train.faults.incidents import TrainingError  # noqa: E402
from mpo_megatron.train.setup import build_setup  # noqa: E402

INPUTS = Path(sys.argv[1])
STEPS = 6


def options(output: Path) -> list[str]:
    return [
        *("--output", str(output), "--model.checkpoint", str(INPUTS / "model"), "--data.train", str(INPUTS / "train")),
        *("--data.eval", str(INPUTS / "eval"), "--data.groups_per_step", "8", "--data.row_tokens", "256"),
        *("--max_steps", str(STEPS), "--eval_every", "3", "--optimizer.lr", "1e-3", "--loss.params.beta", "0.1"),
        *("--model.precision", "fp32", "--checkpoint.every", "1", "--checkpoint.keep", "10"),
    ]


def run(name: str, *more: str, patches: tuple[Any, ...] = ()) -> dict[str, Any]:
    """Train in INPUTS/runs/name with these options and patches; returns the outcome."""
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        result: dict[str, Any] = {"stopped": None, "error": None}
        try:
            config = parse(TrainConfig, [*options(INPUTS / "runs" / name), *more], "mpo train")
            result["stopped"] = loop.train(build_setup(config, 2))
        except (ConfigError, DataError, OSError, SaveError, TrainingError) as error:
            result["error"] = f"{type(error).__name__}: {error}"
    signals._received.clear()
    everyone: list[Any] = [None, None]
    torch.distributed.all_gather_object(everyone, result)
    assert everyone[0] == everyone[1], everyone  # all ranks stop at the same place, for the same reason
    return result


def at_step(step: int, action: Callable[[], None], rank: int | None = None) -> Any:
    """A patch: run a function at the start of a step, on one rank or all."""
    original = loop.take_step

    def patched(run: Any, batch: Any, *arguments: Any) -> Any:
        if batch.step + 1 == step and rank in (None, torch.distributed.get_rank()):
            action()
        return original(run, batch, *arguments)

    return mock.patch.object(loop, "take_step", patched)


def asked_in_evaluation(step: int) -> Any:
    """A patch: rank 0 is asked to stop while the held-out groups are evaluated after a step."""
    original, evaluated = loop.evaluate, evaluation.forward_step

    def patched(run: Any, done: int, *arguments: Any) -> Any:
        def forward(*inner: Any) -> Any:
            if done == step and torch.distributed.get_rank() == 0:
                signals._received.append(signal.SIGTERM)
            return evaluated(*inner)

        with mock.patch.object(evaluation, "forward_step", forward):
            return original(run, done, *arguments)

    return mock.patch.object(loop, "evaluate", patched)


def bad_norm(*steps: int) -> Any:
    """A patch: gradients of these steps are not finite."""
    step, original, seen = loop.take_step, optimizer.gradient_norm, {"step": 0}

    def patched(adam: Any) -> float:
        return float("nan") if seen["step"] in steps else original(adam)

    def count(run: Any, batch: Any, *arguments: Any) -> Any:
        seen["step"] = batch.step + 1
        return step(run, batch, *arguments)

    @contextlib.contextmanager
    def both() -> Iterator[None]:
        with mock.patch.object(loop, "take_step", count), mock.patch.object(optimizer, "gradient_norm", patched):
            yield

    return both()


class Clock:
    """The clock for step times, which tests can advance, so that machine load does not affect them."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def perf_counter(self) -> float:
        return time.perf_counter() + self.ahead

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@contextlib.contextmanager
def slow(name: str, rank: int) -> Iterator[None]:
    """A patch: one of the loop's functions takes 1,000 seconds longer on one rank."""
    original, clock = getattr(loop, name), Clock()

    def patched(*arguments: Any, **named: Any) -> Any:
        if torch.distributed.get_rank() == rank:
            clock.ahead += 1000
        return original(*arguments, **named)

    with mock.patch.object(loop, name, patched), mock.patch.object(supervisor, "time", clock):
        yield


@contextlib.contextmanager
def slow_data(rank: int) -> Iterator[None]:
    """A patch: one rank waits 1,000 seconds for every batch."""
    original, clock = loop.iterate_steps, Clock()

    def patched(*arguments: Any, **named: Any) -> Iterator[Any]:
        for batch in original(*arguments, **named):
            if torch.distributed.get_rank() == rank:
                clock.ahead += 1000
            yield batch

    with mock.patch.object(loop, "iterate_steps", patched), mock.patch.object(supervisor, "time", clock):
        yield


@contextlib.contextmanager
def late(looks: int, seconds: float = 60.0) -> Iterator[None]:
    """A patch: another machine than the main rank's checks this many times in vain for a file of the main rank."""
    original = agreement.machines_without

    def patched(is_there: Callable[[], bool]) -> list[str]:
        before = iter(range(looks))
        other = torch.distributed.get_rank() == 1
        return original(lambda: not (other and next(before, None) is not None) and is_there())

    with contextlib.ExitStack() as stack:
        for module in (saving, resumption):
            stack.enter_context(mock.patch.object(module, "machines_without", patched))
        stack.enter_context(mock.patch.object(agreement, "LATE_SECONDS", seconds))
        yield


def on_main(action: Callable[[], Any]) -> None:
    """Run a function on one rank while the other waits."""
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        action()
    torch.distributed.barrier()


def copy_run(source: str, target: str, last_step: int) -> Path:
    """A copy of a run after a step."""
    folder = INPUTS / "runs" / target

    def copy() -> None:
        shutil.copytree(INPUTS / "runs" / source, folder)
        for path in complete_steps(folder):
            if int(path.name.removeprefix("step_")) > last_step:
                shutil.rmtree(path)

    on_main(copy)
    return folder


def damage(folder: Path, step: int) -> None:
    """Change one byte in the middle of the largest file of a checkpoint."""

    def change() -> None:
        path = max(step_folder(folder, step).glob("megatron/*.distcp"), key=lambda path: path.stat().st_size)
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 0x10]))

    on_main(change)


CHANGES = (
    *(("--loss.name", "dpo"), ("--loss.params.beta", "0.2"), ("--seed", "5"), ("--max_steps", "7")),
    *(("--data.groups_per_step", "4"), ("--data.shuffle", "false"), ("--data.train", str(INPUTS / "eval"))),
    *(("--optimizer.lr", "2e-3"), ("--optimizer.schedule", "linear"), ("--optimizer.warmup_fraction", "0.5")),
    *(("--optimizer.weight_decay", "0.1"), ("--optimizer.clip_grad", "0"), ("--model.precision", "bf16")),
    ("--model.reference", str(INPUTS / "other")),
)
"""Options that a resumed run must not have, since they change the result."""


def limit_files(size: int) -> Callable[[], None]:
    """Limit files to `size` bytes from now on, as on a full disk."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    return limit


def stay_away_from_the_collective() -> None:
    """Work of one rank that the others wait for."""
    time.sleep(1000)


def hang() -> None:
    """Rank 1 skips the collectives of step 3; before that, a busy machine has enough time."""
    torch.distributed.init_process_group("gloo")
    original = supervisor.Watchdog.beat

    def beat(watchdog: supervisor.Watchdog, doing: str) -> None:
        original(watchdog, doing)
        watchdog.seconds = 8 if doing == "step 3" else 600

    patches = (at_step(3, stay_away_from_the_collective, rank=1), mock.patch.object(supervisor.Watchdog, "beat", beat))
    run("hang", "--faults.hang_minutes", "10", patches=patches)


def main() -> None:
    torch.distributed.init_process_group("gloo")
    results: dict[str, Any] = {"whole": run("whole")}

    skip = ("--faults.on_nan", "skip")
    results["skip"] = run("skip", *skip, patches=(bad_norm(3),))
    results["skip first"] = run("skip_first", *skip, patches=(bad_norm(1, 2),))
    copy_run("skip_first", "skip_first_resumed", 1)
    results["skip first, resumed"] = run("skip_first_resumed", *skip, patches=(bad_norm(1, 2),))
    results["stop"] = run("stop", patches=(bad_norm(3),))
    results["too many skips"] = run("too_many", *skip, "--faults.max_skips", "2", patches=(bad_norm(2, 3, 4, 5, 6),))

    requested = at_step(3, lambda: signals._received.append(signal.SIGUSR1), rank=1)
    results["request"] = run("request", patches=(requested,))
    results["request, resumed"] = run("request")
    results["asked in evaluation"] = run("evaluating", "--data.groups_per_step", "4", patches=(asked_in_evaluation(3),))
    results["asked in evaluation, resumed"] = run("evaluating", "--data.groups_per_step", "4")
    results["time over"] = run("time_over", "--faults.walltime_minutes", "0.5")

    folder = copy_run("whole", "damaged", 5)
    for step in (4, 5):
        damage(folder, step)
    results["damaged"] = run("damaged")
    copy_run("whole", "changed", 3)
    for name, value in CHANGES:
        results[f"changed {name} {value}"] = run("changed", name, value)
    free = ("--data.row_tokens", "240", "--loss.step", "two_phase", "--eval_every", "2", "--faults.on_spike", "skip")
    results["changed freely"] = run("changed", *free)

    folder = copy_run("whole", "headless", 3)
    on_main((step_folder(folder, 3) / "state.json").unlink)
    results["headless"] = run("headless")
    folder = copy_run("whole", "headless_alone", 1)
    on_main((step_folder(folder, 1) / "state.json").unlink)
    results["headless alone"] = run("headless_alone")
    folder = copy_run("whole", "newer", 3)
    newer = mock.patch.object(step_folders, "FORMAT", step_folders.FORMAT - 1)
    results["newer format"] = run("newer", patches=(newer,))

    copy_run("whole", "in_use", 3)
    with contextlib.ExitStack() as stack:
        if torch.distributed.get_rank() == 0:
            stack.enter_context(hold(INPUTS / "runs" / "in_use" / ".lock", Path("other")))
        results["in use"] = run("in_use", patches=(mock.patch.object(resumption, "LOCK_SECONDS", 0.0),))
    results["no longer in use"] = run("in_use")
    results["late"] = run("late", "--checkpoint.every", "0", patches=(late(3),))
    results["never"] = run("late", patches=(late(1000, seconds=0.3),))
    denied = mock.Mock(side_effect=PermissionError(13, "Permission denied"))
    three = ("--max_steps", "3")
    results["removal fails"] = run(
        "removal", *three, "--checkpoint.keep", "1", patches=(mock.patch.object(saving, "remove_old", denied),)
    )
    results["read only"] = run("removal", *three, patches=(mock.patch.object(resumption, "remove_leftovers", denied),))

    folder = copy_run("whole", "hopeless", 2)
    for step in (1, 2):
        damage(folder, step)
    results["hopeless"] = run("hopeless")
    results["hopeless again"] = run("hopeless")
    results["hopeless, anew"] = run("hopeless", "--checkpoint.resume", "false", "--max_steps", "1")

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for kind in ("true", "false"):
        full = at_step(3, limit_files(30_000), rank=1)
        results[f"disk full {kind}"] = run(f"disk_full_{kind}", "--checkpoint.asynchronous", kind, patches=(full,))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    usage = shutil.disk_usage(INPUTS)
    few = mock.patch.object(step_folders.shutil, "disk_usage", return_value=usage._replace(free=1000))
    results["no room at the start"] = run("no_room", patches=(few,))
    results["no room later"] = run("no_room_later", patches=(at_step(3, few.start),))
    few.stop()

    unsaved = (*three, "--checkpoint.every", "0")
    results["slow rank"] = run("slow", *unsaved, patches=(slow("fused_step", rank=1),))
    results["slow data"] = run("slow_data", *unsaved, patches=(slow_data(rank=1),))
    results["best"] = run("best", "--eval_every", "1", "--checkpoint.keep", "1", "--checkpoint.keep_best", "2")
    results["no such metric"] = run("no_metric", "--checkpoint.keep_best", "1", "--checkpoint.best_metric", "eval/nothing")
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    hang() if sys.argv[2] == "hang" else main()
