"""The trials: each disturbs a command once, and says what is wrong with what came of it."""

from __future__ import annotations

import fcntl
import itertools
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from tools.trials.commands import Command, Result, build_inputs, commands
from tools.trials.endless import endless_trials
from tools.trials.launches import launch_trials
from tools.trials.processes import Child, Disturbance, Outcome

LEFTOVER = re.compile(r"\.partial-|\.tmp-|\.removing|\.partial$")
SENTENCE = re.compile(r"mpo [a-z]+: .+\.$")

Kind = Callable[["Bench", Command], Iterator[str | None]]
"""Yields, for every trial, what is wrong, or None."""


class Bench:
    """What trials share: inputs, undisturbed results, places."""

    def __init__(self, folder: Path, each: int, rng: random.Random) -> None:
        self.folder, self.each, self.rng = folder, each, rng
        self.inputs = folder / "inputs"
        self.expected: dict[str, Result] = {}
        self.operations: dict[str, int] = {}
        self.writes: dict[str, int] = {}
        self.number = 0

    def new_folder(self, command: Command) -> Path:
        """A folder for one trial, with what the command finds there."""
        self.number += 1
        folder = self.folder / f"trial-{self.number:04d}"
        folder.mkdir()
        command.prepare(folder)
        return folder

    def measure(self, command: Command) -> None:
        """Run a command undisturbed.

        Raises:
            SystemExit: it fails, so that nothing can be compared.
        """
        folder = self.new_folder(command)
        outcome = Child(lambda: command.run(folder), folder).outcome()
        if outcome.code:
            raise SystemExit(f"undisturbed, {command.name} ended with {outcome.code}:\n{outcome.output[-4000:]}")
        self.expected[command.name] = command.result(folder)
        self.operations[command.name], self.writes[command.name] = outcome.operations, outcome.writes

    def places(self, count: int) -> list[int]:
        """Numbers of operations from 1 to `count`, spread evenly, a random one in each part."""
        edges = [round(part * count / self.each) for part in range(self.each + 1)]
        return [self.rng.randint(low + 1, high) for low, high in itertools.pairwise(edges) if high > low]

    def finish(self, command: Command, folder: Path, where: str) -> str | None:
        """Run the command again, undisturbed, and compare; what is wrong."""
        outcome = Child(lambda: command.run(folder), folder).outcome()
        there = command.refuses_what_is_there and outcome.code == 2 and re.search("exists|is not empty", outcome.output)
        if outcome.code and not there:
            return f"{where}: run again, it ended with {outcome.code}:\n{outcome.output[-3000:]}"
        return self.compare(command, folder, where)

    def compare(self, command: Command, folder: Path, where: str) -> str | None:
        """What is wrong with a complete result; the folder goes if nothing is."""
        found, expected = command.result(folder), self.expected[command.name]
        if found != expected:
            names = [name for name in {*found, *expected} if found.get(name) != expected.get(name)]
            return f"{where}: another result, in {sorted(names)[:4]}"
        left = [str(path.relative_to(folder)) for path in folder.rglob("*") if LEFTOVER.search(path.name)]
        if left:
            return f"{where}: left behind: {left[:4]}"
        shutil.rmtree(folder)
        return None


def badly_said(outcome: Outcome, codes: Sequence[int]) -> str | None:
    """What is wrong with how a command refused: it must leave with one of these codes, and a sentence last."""
    if outcome.code not in codes:
        return f"ended with {outcome.code}:\n{outcome.output[-3000:]}"
    if outcome.code == 0:
        return None
    if "Traceback" in outcome.output or not SENTENCE.search(outcome.output.strip()):
        return f"not a sentence:\n{outcome.output[-3000:]}"
    return None


def disk_full(bench: Bench, command: Command) -> Iterator[str | None]:
    """From a write on, the disk is full."""
    for at in bench.places(bench.writes[command.name]):
        folder = bench.new_folder(command)
        where = f"{command.name}, disk full at write {at} of {bench.writes[command.name]} ({folder})"
        outcome = Child(lambda: command.run(folder), folder, disturbance=Disturbance.FULL, at=at).outcome()  # noqa: B023
        wrong = badly_said(outcome, (0, 2))
        yield f"{where}: {wrong}" if wrong else bench.finish(command, folder, where)


def killed(bench: Bench, command: Command) -> Iterator[str | None]:
    """SIGKILL before a file operation."""
    for at in bench.places(bench.operations[command.name]):
        folder = bench.new_folder(command)
        where = f"{command.name}, killed at operation {at} of {bench.operations[command.name]} ({folder})"
        outcome = Child(lambda: command.run(folder), folder, disturbance=Disturbance.KILL, at=at).outcome()  # noqa: B023
        if outcome.code not in (-9, 0):  # threads: the number of operations may vary by a few
            yield f"{where}: ended with {outcome.code}:\n{outcome.output[-3000:]}"
        else:
            yield bench.finish(command, folder, where)


def two_at_a_time(bench: Bench, command: Command) -> Iterator[str | None]:
    """A second run on the same output while the first one is stopped."""
    for at in bench.places(bench.operations[command.name])[:: max(1, bench.each // 4)]:
        folder = bench.new_folder(command)
        where = f"{command.name}, twice, the first stopped at operation {at} ({folder})"
        first = Child(lambda: command.run(folder), folder, disturbance=Disturbance.STOP, at=at)  # noqa: B023
        stopped = first.wait_stopped()
        log, first_counts = first.log.rename(first.log.with_suffix(".first")), first.counts
        second = Child(lambda: command.run(folder), folder).outcome()  # noqa: B023
        first_counts.unlink(missing_ok=True)
        if stopped:
            first.go_on()
        outcome = first.outcome(ended=not stopped)
        outcome = Outcome(outcome.code, log.read_text(errors="replace"), 0, 0)
        wrong = badly_said(second, (0, 2)) or badly_said(outcome, (0, 2))
        if wrong is None and 0 not in (second.code, outcome.code):
            wrong = f"neither ended well:\n{outcome.output[-1500:]}\n{second.output[-1500:]}"
        yield f"{where}: {wrong}" if wrong else bench.compare(command, folder, where)


def few_open_files(bench: Bench, command: Command) -> Iterator[str | None]:
    """No more than 128 open files."""
    folder = bench.new_folder(command)
    where = f"{command.name}, 128 open files ({folder})"
    outcome = Child(lambda: command.run(folder), folder, open_files=128).outcome()
    yield (
        f"{where}: ended with {outcome.code}:\n{outcome.output[-3000:]}"
        if outcome.code
        else bench.compare(command, folder, where)
    )


LOCKS = {
    **{"train": "run/.lock", "iterate": "out/.lock", "align": "out/.lock"},
    **{"generate": "out/.samples.jsonl.lock", "score": "out/.scored.jsonl.lock"},
}
"""Lock files of commands."""


def foreign_lock(bench: Bench, command: Command) -> Iterator[str | None]:
    """A lock file that another machine has left, which nobody holds; and one that is held."""
    if command.name not in LOCKS:
        return
    for held in (False, True):
        folder = bench.new_folder(command)
        where = f"{command.name}, a lock of another host, held: {held} ({folder})"
        lock = folder / LOCKS[command.name]
        lock.parent.mkdir(parents=True)
        with lock.open("w") as file:
            file.write("process 1 on elsewhere")
            file.flush()
            if held:
                fcntl.flock(file, fcntl.LOCK_EX)
            outcome = Child(lambda: command.run(folder), folder).outcome()  # noqa: B023
            # The forked process has this file, too; it never unlocks it.
        wrong = badly_said(outcome, (2,) if held else (0,))
        if wrong is None and held and "elsewhere" not in outcome.output:
            wrong = f"the holder is not named:\n{outcome.output[-3000:]}"
        yield f"{where}: {wrong}" if wrong else bench.finish(command, folder, where)


def moved(bench: Bench, command: Command) -> Iterator[str | None]:
    """Killed, moved with all it has, and resumed."""
    if command.name not in ("train", "iterate", "align", "generate", "score", "reference"):
        return
    for at in bench.places(bench.operations[command.name])[:: max(1, bench.each // 4)]:
        folder = bench.new_folder(command)
        where = f"{command.name}, moved after a kill at operation {at} ({folder})"
        Child(lambda: command.run(folder), folder, disturbance=Disturbance.KILL, at=at).outcome()  # noqa: B023
        home = folder.rename(folder.with_name(f"{folder.name}-moved"))
        yield bench.finish(command, home, where)


KINDS: dict[str, Kind] = {
    "disk full": disk_full,
    "killed": killed,
    "two at a time": two_at_a_time,
    "128 open files": few_open_files,
    "foreign lock": foreign_lock,
    "moved": moved,
}


LAUNCHES, ENDLESS = "launched ranks", "endless"


def run_trials(folder: Path, each: int, rng: random.Random, only: Sequence[str] | None) -> list[str]:
    """All trials; what was wrong."""
    torch.set_num_threads(1)
    os.environ.pop("LD_PRELOAD", None)  # of this process and those forked from it, no longer of those it starts
    bench = Bench(folder, each, rng)
    if not bench.inputs.exists():
        build_inputs(bench.inputs)
    faults: list[str] = []
    total: Counter[str] = Counter()
    for command in commands(bench.inputs).values():
        names = [name for name in KINDS if only is None or {name, command.name, f"{command.name}/{name}"} & set(only)]
        if not names:
            continue
        bench.measure(command)
        for name in names:
            outcomes = list(KINDS[name](bench, command))
            wrong = [outcome for outcome in outcomes if outcome is not None]
            faults += wrong
            total[name] += len(outcomes)
            if outcomes:
                print(f"{command.name}: {len(outcomes)} × {name}, {len(wrong)} wrong", flush=True)
            for outcome in wrong:
                print(f"WRONG {outcome}", flush=True)
    others = {
        LAUNCHES: lambda: launch_trials(folder / "launches", max(1, each // 4), rng),
        ENDLESS: lambda: endless_trials(folder / "endless", bench.inputs),
    }
    for name, trials in others.items():
        if only is None or name in only:
            outcomes = list(trials())
            wrong = [outcome for outcome in outcomes if outcome is not None]
            faults += wrong
            total[name] += len(outcomes)
            print(
                "\n".join([f"{len(outcomes)} × {name}, {len(wrong)} wrong", *(f"WRONG {outcome}" for outcome in wrong)]),
                flush=True,
            )
    print(f"{total.total()} trials ({', '.join(f'{count} × {name}' for name, count in total.items())}), {len(faults)} wrong")
    return faults
