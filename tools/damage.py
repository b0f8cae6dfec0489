"""Damage small files of every kind that the package writes, read them as the package does, and count the outcomes.

    python -m tools.damage --trials 3000

A trial flips a bit, truncates a file, or overwrites a block with zeros. Three outcomes are right: the result does not differ; the
reader refuses with one sentence that names the file and the fix; or damaged data is computed again, with a message. Wrong
outcomes are other values, a crash, a traceback, a hanging reader, and one that takes much memory. Exit code 1 if there was a
wrong outcome.

Readers run in forked processes, so that a crash ends only one of them and is counted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpo_megatron.config import ConfigError
from mpo_megatron.files import DataError
from tools.damage_kinds import LAYERS, Kind, kinds, write_inputs

RIGHT = ("no difference", "refused", "computed again", "as after a kill")
"""Right outcomes; the last is a file of lines without those after the damage, or with an incomplete last line."""
SECONDS = 120
"""Seconds after which a reader counts as hanging."""
MEMORY = 256
"""MiB that reading a small file may add to a process's peak."""
REMEDY = re.compile(r"\b(again|remove|copy|older|fix|write|convert)\b")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One damage."""

    file: Path
    kind: str
    """`flip`, `cut` or `zeros`."""
    seed: int

    def damage(self, whole: bytes) -> bytes:
        """The file's content with this damage, different from the original."""
        rng = random.Random(self.seed)
        while True:
            place = rng.randrange(len(whole))
            changed = bytearray(whole)
            if self.kind == "flip":
                changed[place] ^= 1 << rng.randrange(8)
            elif self.kind == "cut":
                del changed[place:]
            else:
                size = min(rng.choice([1, 16, 64, 512, 4096]), len(whole) - place)
                changed[place : place + size] = bytes(size)
            if changed != whole:
                return bytes(changed)


@dataclasses.dataclass
class Tally:
    """Outcomes of the trials."""

    results: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)
    """By name of the kind."""
    damages: Counter[str] = dataclasses.field(default_factory=Counter)
    faults: list[str] = dataclasses.field(default_factory=list)

    def total(self) -> Counter[str]:
        """Outcomes over all kinds."""
        return sum(self.results.values(), Counter())


def plan(all_kinds: Sequence[Kind], number: int, seed: int) -> list[tuple[Kind, list[Trial]]]:
    """At least `number` trials, equally many for each file of each kind that is not slow to read; 6 in 10 flip a bit."""
    rng = random.Random(seed)
    places = [(kind, path) for kind in all_kinds for path in kind.files if path.stat().st_size]
    each = -(-5 * number // sum(1 if kind.slow else 5 for kind, _ in places))
    trials: dict[str, list[Trial]] = {kind.name: [] for kind in all_kinds}
    for kind, path in places:
        for _ in range(-(-each // 5) if kind.slow else each):
            damage = rng.choices(["flip", "cut", "zeros"], [6, 2, 2])[0]
            trials[kind.name].append(Trial(path, damage, rng.randrange(2**32)))
    return [(kind, trials[kind.name]) for kind in all_kinds]


def run_kind(kind: Kind, trials: Sequence[Trial], tally: Tally) -> None:
    """Run all trials of a kind, in as many processes as crashes require."""
    results: list[str] = []
    while len(results) < len(trials):
        rest = trials[len(results) :]
        wholes = {trial.file: trial.file.read_bytes() for trial in rest}
        found, code = run_child(kind, rest)
        for path, whole in wholes.items():  # the process that died did not restore it
            path.write_bytes(whole)
        results += found
        if len(found) < len(rest):
            results.append(f"crash: the reader ended with {code}")
    counter = tally.results.setdefault(kind.name, Counter())
    for trial, result in zip(trials, results, strict=True):
        name = result.partition(":")[0]
        counter[name] += 1
        tally.damages[trial.kind] += 1
        if name not in RIGHT:
            tally.faults.append(f"{kind.name}, {trial.file.name}, {trial.kind} (seed {trial.seed}): {result}")


def run_child(kind: Kind, trials: Sequence[Trial]) -> tuple[list[str], int]:
    """Outcomes of the trials that a forked process completed, and its exit code."""
    receiving, sending = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(receiving)
        code = 1
        try:
            with os.fdopen(sending, "w", buffering=1) as pipe, open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
                for result in run_trials(kind, trials):
                    pipe.write(json.dumps(result) + "\n")
            code = 0
        finally:
            os._exit(code)
    os.close(sending)
    with os.fdopen(receiving) as pipe:
        results = [json.loads(line) for line in pipe if line.endswith("\n")]
    _, status = os.waitpid(pid, 0)
    return results, os.waitstatus_to_exitcode(status)


def run_trials(kind: Kind, trials: Sequence[Trial]) -> Iterator[str]:
    """The outcome of each trial."""
    with kind.open() as read:
        expected, again = read(), read()
        if fingerprint(expected) != fingerprint(again):
            raise SystemExit(f"{kind.name}: the reader's result differs each time")
        for trial in trials:
            whole = trial.file.read_bytes()
            changed = trial.damage(whole)
            trial.file.write_bytes(changed)
            first = next(
                (place for place, (old, new) in enumerate(zip(whole, changed, strict=False)) if old != new), len(changed)
            )
            try:
                before = peak_memory()
                outcome = judge(kind, trial, read, expected, whole[:first].count(b"\n"))
                taken = peak_memory() - before
                yield outcome if taken <= MEMORY else f"much memory: {taken:,} MiB, {outcome}"
            finally:
                trial.file.write_bytes(whole)


def judge(kind: Kind, trial: Trial, read: Any, expected: Any, lines_before: int) -> str:
    """The outcome of reading a damaged file.

    Args:
        lines_before: number of lines in the file before the damage
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), time_limit():
            found = read()
    except (ConfigError, DataError) as error:
        return judge_message(trial, str(error))
    except TimeoutError:
        return "hangs"
    except BaseException as error:  # noqa: BLE001  (each is a fault to be counted)
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"traceback: {type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})"
    if fingerprint(found) == fingerprint(expected):
        return "no difference"
    if kind.lines and same(found, expected[:lines_before]):
        return "as after a kill"
    if kind.again and len(found) <= len(expected):
        kept = [one is None or same(one, other) for one, other in zip(found, expected[: len(found)], strict=True)]
        if all(kept) and trial.file.name in said.getvalue():
            return "computed again"
        if all(kept) and trial.kind == "cut":
            return "as after a kill"
    return "silently wrong"


def judge_message(trial: Trial, message: str) -> str:
    """Whether a refusal is one sentence that names the file and the fix."""
    named = any(part in message for part in (trial.file.name, trial.file.parent.name))
    if "\n" in message or not named or not REMEDY.search(message):
        return f"unclear message: {message[:300]}"
    return "refused"


def peak_memory() -> int:
    """Peak of this process's resident memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raise `TimeoutError` after `SECONDS`."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def same(one: Any, other: Any) -> bool:
    """Whether two results are bitwise equal."""
    return fingerprint(one) == fingerprint(other)


def fingerprint(value: Any) -> str:
    """A digest of a nested result."""
    digest = hashlib.sha256()
    feed(digest, value)
    return digest.hexdigest()


def feed(digest: Any, value: Any) -> None:
    """Add a nested result, with the types of its parts, to a digest."""
    digest.update(f"{type(value).__name__}(".encode())
    if isinstance(value, torch.Tensor):
        value = value.detach().contiguous().view(-1).view(torch.uint8).numpy()
    if isinstance(value, np.ndarray):
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, dict):
        for name, inner in value.items():
            digest.update(repr(name).encode())
            feed(digest, inner)
    elif isinstance(value, list | tuple | set | frozenset):
        for inner in sorted(value, key=repr) if isinstance(value, set | frozenset) else value:
            feed(digest, inner)
    elif dataclasses.is_dataclass(value):
        feed(digest, vars(value))
    else:
        digest.update(value if isinstance(value, bytes) else repr(value).encode())
    digest.update(b")")


def damage(root: Path, number: int, seed: int, only: str | None = None, model_type: str = "qwen3") -> Tally:
    """Write the files in `root`, run the trials; their outcomes.

    Args:
        only: run only kinds whose name contains this
    """
    pid = os.fork()  # training's helpers end with this process; readers are forked from a clean one
    if pid == 0:
        code = 1
        try:
            write_inputs(root, model_type)
            code = 0
        except BaseException:  # noqa: BLE001  (the process ends with it)
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if status:
        raise SystemExit("the files could not be written")
    tally = Tally()
    chosen = [kind for kind in kinds(root) if only is None or only in kind.name]
    for kind, trials in plan(chosen, number, seed):
        started = time.monotonic()
        run_kind(kind, trials, tally)
        counts = ", ".join(f"{count} {name}" for name, count in sorted(tally.results[kind.name].items()))
        print(f"{kind.name}: {len(trials)} trials in {time.monotonic() - started:.0f} s: {counts}", flush=True)
    return tally


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Damage files of every kind and read them; none may be silently wrong.")
    parser.add_argument("--trials", type=int, default=3000, help="Minimum number of trials.")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="Seed of the damage.")
    parser.add_argument("--only", help="Only kinds whose name contains this.")
    parser.add_argument("--model", choices=list(LAYERS), default="qwen3", help="Kind of model.")
    parser.add_argument("--folder", type=Path, help="Working folder, which is kept. Default: a temporary folder.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="mpo-damage-"))
    started = time.monotonic()
    try:
        tally = damage(folder, arguments.trials, arguments.seed, arguments.only, arguments.model)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    total = tally.total()
    kinds_of_damage = ", ".join(f"{count} × {name}" for name, count in sorted(tally.damages.items()))
    wrong = sum(count for name, count in total.items() if name not in RIGHT)
    print(
        f"{total.total()} trials ({kinds_of_damage}): {', '.join(f'{total[name]} {name}' for name in RIGHT)}; {wrong} wrong; "
        f"{time.monotonic() - started:.0f} s, seed {arguments.seed}"
    )
    if tally.faults:
        print("\n".join(["FAILED", *tally.faults]), file=sys.stderr)
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
