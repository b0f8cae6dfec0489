"""Kill a run at random points and resume it, repeatedly; compare the result with an undisturbed run.

    python tools/chaos.py --kills 100

A round is one small run: its ranks are killed at random moments (at any point of their life, and especially during saves) and
restarted until the run is complete. Rounds alternate. In one kind the layout stays, and weights and optimizer states must equal
the undisturbed run's bit for bit. In the other every resumption changes the layout (tensor, pipeline, interleaved, data parallel;
one rank), and weights must agree to rounding. Rounds continue until there were enough kills.

Ranks are forked from this process, which has imported everything, so a start costs no imports. Exit code 1: a run differed, did
not end when a rank was killed, lost a checkpoint, or ignored a request to stop.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from mpo_megatron.config import ConvertConfig  # noqa: E402
from mpo_megatron.model.convert import convert  # noqa: E402
from mpo_megatron.model.convert_torch_dist import CheckpointReader  # noqa: E402
from mpo_megatron.train import launched, loop  # noqa: E402, F401  (loop is imported for the ranks)
from mpo_megatron.train.__main__ import work  # noqa: E402
from mpo_megatron.train.checkpoints.step_folders import complete_steps, step_folder  # noqa: E402
from mpo_megatron.train.rank import run as run_rank  # noqa: E402
from tests.distributed.launch import free_port  # noqa: E402
from tests.tiny import random_groups, save_groups, save_model  # noqa: E402

STEPS = 10
REQUEUE = 75
LAYOUTS = {
    "tensor 2": (2, ("--parallel.tensor", "2")),
    "pipeline 2": (2, ("--parallel.pipeline", "2")),
    "pipeline 2, interleaved": (2, ("--parallel.pipeline", "2", "--parallel.virtual_pipeline", "2")),
    "data 2": (2, ()),
    "one rank": (1, ()),
}
"""Number of ranks and options of each layout; the first is the undisturbed run's."""
EXPERT_LAYOUTS = {"expert 2": (2, ("--parallel.expert", "2"))}
"""Additional layouts for a model with experts."""
HOME = next(iter(LAYOUTS))
COMES_DOWN = 60.0
"""Seconds within which the other ranks must end after one was killed, and all after a request to stop."""
EPS = 1e-4
"""Adam's ε. With the usual 1e-8, a gradient that is zero up to rounding still moves its weight by up to the learning rate, in a
direction that depends on the order of sums."""
TOLERANCE = 1e-5
"""Largest allowed difference of a weight after changes of layout. Gradients differ by float32's rounding, about 1e-8; a step
multiplies that by at most lr / ε = 10, so 10 steps give 1e-6."""

Tensors = dict[str, torch.Tensor]


@dataclass
class Tally:
    """Counts of events."""

    kills: Counter[str] = field(default_factory=Counter)
    during_saves: int = 0
    rounds: int = 0
    changed_layouts: int = 0
    resumptions: int = 0
    slowest_end: float = 0.0
    largest_difference: float = 0.0
    faults: list[str] = field(default_factory=list)

    def text(self) -> str:
        """One paragraph."""
        kinds = ", ".join(f"{number} × {kind}" for kind, number in sorted(self.kills.items()))
        return (
            f"{self.kills.total()} kills ({kinds}; {self.during_saves} during a save) in {self.rounds} runs, {self.resumptions} "
            f"resumptions ({self.changed_layouts} on another layout); the last rank ended at most {self.slowest_end:.1f} s "
            f"after a kill; same layout: bit for bit; other layouts: weights differ by at most {self.largest_difference:.1e}"
        )


class Life:
    """The forked ranks of one start of the run."""

    def __init__(self, layout: str, options: list[str], log: Path) -> None:
        ranks, own = (LAYOUTS | EXPERT_LAYOUTS)[layout]
        port = free_port()
        self.codes: dict[int, int | None] = {}
        shared = Path(tempfile.mkdtemp(dir=log.parent))  # ranks pass requests on through it, as under `mpo train`
        self.exit_file = shared / launched.EXIT_CODE
        for rank in range(ranks):
            environment: dict[str, object] = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": ranks,
                "LOCAL_WORLD_SIZE": ranks,
                "MASTER_PORT": port,
            }
            environment |= {"TORCHELASTIC_RUN_ID": "chaos"}  # ranks identify their launcher by it
            environment |= {launched.FOLDER: shared, launched.EXIT_FILE: self.exit_file}
            pid = os.fork()
            if pid == 0:
                be_rank({**environment, "MASTER_ADDR": "127.0.0.1"}, [*options, *own], log)
            self.codes[pid] = None

    def ended(self) -> bool:
        """Whether all ranks have ended; collects their exit codes."""
        for pid in [pid for pid, code in self.codes.items() if code is None]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                if code == 0 and self.exit_file.exists():  # a clean exit, whose code is there
                    code = int(self.exit_file.read_text())
                self.codes[pid] = code
        return None not in self.codes.values()

    def wait(self, seconds: float) -> float:
        """Wait for all ranks to end, as torchrun does, and kill the rest after that; the seconds it took."""
        started, told = time.monotonic(), False
        while not self.ended() and time.monotonic() - started < seconds:
            if not told and any(code not in (None, 0, REQUEUE) for code in self.codes.values()):
                self.send(signal.SIGTERM, self.alive())  # a rank has failed
                told = True
            time.sleep(0.01)
        taken = time.monotonic() - started
        self.send(signal.SIGKILL, self.alive())
        while not self.ended():
            time.sleep(0.01)
        return taken

    def alive(self) -> list[int]:
        """Ranks that are still running."""
        return [pid for pid, code in self.codes.items() if code is None]

    def send(self, number: signal.Signals, pids: list[int]) -> None:
        """Send a signal to some ranks, all of them children not yet waited for."""
        for pid in pids:
            os.kill(pid, number)


def be_rank(environment: dict[str, object], options: list[str], log: Path) -> None:
    """In a forked process: train, and end."""
    code = 1
    try:
        os.environ.update({name: str(value) for name, value in environment.items()})
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.argv = ["mpo train", *options]
        code = run_rank("mpo train", work)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def prepare(folder: Path, model_type: str) -> list[str]:
    """Create a small model and data; the options of a run on them."""
    folder.mkdir(parents=True, exist_ok=True)
    convert(ConvertConfig(input=str(save_model(folder / "hf", model_type=model_type)), output=str(folder / "model")))
    save_groups(folder / "train", random_groups(24, seed=1), folder / "hf")
    save_groups(folder / "eval", random_groups(4, seed=2), folder / "hf")
    return [
        *(
            "--model.checkpoint",
            str(folder / "model"),
            "--data.train",
            str(folder / "train"),
            "--data.eval",
            str(folder / "eval"),
        ),
        *("--data.groups_per_step", "4", "--data.row_tokens", "256", "--max_steps", str(STEPS), "--eval_every", "4"),
        *("--optimizer.lr", "1e-3", "--optimizer.eps", str(EPS), "--loss.params.beta", "0.1", "--model.precision", "fp32"),
        *("--checkpoint.every", "1", "--checkpoint.keep", "2", "--checkpoint.keep_best", "1"),
    ]


def final_tensors(run: Path) -> Tensors:
    """Weights and optimizer states of a complete run's last checkpoint."""
    reader = CheckpointReader(step_folder(run, STEPS) / "megatron")
    return {key: reader.read(key, [0] * len(entry.size), list(entry.size)) for key, entry in reader.tensors.items()}


def steps_logged(run: Path) -> list[int]:
    """The steps in metrics.jsonl, without evaluations."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "lr" in line]


def saves(run: Path) -> set[Path]:
    """Folders of checkpoints being written, and of killed saves not yet removed."""
    return set((run / "checkpoints").glob("*.partial-*"))


def newest_step(run: Path) -> int:
    """Step of the newest complete checkpoint; 0 without one."""
    steps = complete_steps(run)
    return int(steps[-1].name.removeprefix("step_")) if steps else 0


def run_round(run: Path, options: list[str], rng: random.Random, life_seconds: float, layouts: list[str], tally: Tally) -> None:
    """One run, killed until it is complete; each resumption uses another of the layouts."""
    layout, log = HOME, run.with_suffix(".log")
    while True:
        life = Life(layout, [*options, "--output", str(run)], log)
        if not kill(life, run, rng, life_seconds, tally):
            break
        tally.resumptions += 1
        others = [name for name in layouts if name != layout]
        if others:
            layout = rng.choice(others)
            tally.changed_layouts += 1
    tally.rounds += 1
    if set(life.codes.values()) != {0}:
        tally.faults.append(f"{run}: an undisturbed start ended with {life.codes}; see {log}")


def kill(life: Life, run: Path, rng: random.Random, life_seconds: float, tally: Tally) -> bool:
    """Kill a start at a random moment; False if it completed before."""
    moment = time.monotonic() + rng.uniform(0, 0.7 * life_seconds)  # most starts resume another one
    in_save, wanted, left = rng.random() < 0.5, rng.randint(1, 3), saves(run)
    seen: set[Path] = set()
    while True:
        now = saves(run) - left
        seen |= now
        if (now and len(seen) >= wanted) if in_save else time.monotonic() >= moment:
            break
        if life.ended():
            return False
        time.sleep(0.005)
    if in_save:
        time.sleep(rng.uniform(0, 0.03))
    if life.ended():
        return False
    before, hit_save = newest_step(run), bool(saves(run) - left)
    kind = rng.choice(["SIGKILL of one rank", "SIGKILL of one rank", "SIGKILL of all", "SIGTERM", "SIGUSR1"])
    victims = life.alive() if kind == "SIGKILL of all" else [rng.choice(life.alive())]
    life.send(signal.Signals[kind.split()[0]], victims)
    taken = life.wait(COMES_DOWN)
    if kind.startswith("SIGKILL") or set(life.codes.values()) != {0}:
        tally.kills[kind] += 1
        tally.during_saves += hit_save
    tally.slowest_end = max(tally.slowest_end, taken)
    if taken >= COMES_DOWN:
        tally.faults.append(f"{run}: after {kind} ranks continued for {taken:.0f} s")
    if newest_step(run) < before:
        tally.faults.append(f"{run}: {kind} lost the checkpoint of step {before}")
    if kind in ("SIGTERM", "SIGUSR1") and set(life.codes.values()) not in ({REQUEUE}, {0}):
        tally.faults.append(f"{run}: after {kind} the exit codes were {life.codes}")
    return set(life.codes.values()) != {0}


def compare(run: Path, expected: Tensors, *, exact: bool, tally: Tally) -> None:
    """Compare a complete run with the undisturbed one."""
    if steps_logged(run) != list(range(1, STEPS + 1)):
        tally.faults.append(f"{run}: metrics.jsonl has the steps {steps_logged(run)}")
    found = final_tensors(run)
    if exact:
        different = [key for key in expected if not torch.equal(found[key], expected[key])]
        tally.faults += [f"{run}: {len(different)} tensors differ, such as {different[0]}"] if different else []
        return
    weights = [key for key in expected if not key.startswith("optimizer.")]
    difference = max(float((found[key] - expected[key]).abs().max()) for key in weights)
    tally.largest_difference = max(tally.largest_difference, difference)
    if difference > TOLERANCE:
        tally.faults.append(f"{run}: weights differ by {difference:.1e}, more than {TOLERANCE:.0e}")


def chaos(folder: Path, model_type: str, kills: int, seed: int, tell: Callable[[str], None]) -> Tally:
    """Rounds of both kinds until there were `kills` kills; the counts of events."""
    options, rng, tally = prepare(folder, model_type), random.Random(seed), Tally()
    layouts = [*LAYOUTS, *(EXPERT_LAYOUTS if model_type.endswith("_moe") else ())]
    undisturbed = folder / "undisturbed"
    started = time.monotonic()
    life = Life(HOME, [*options, "--output", str(undisturbed)], undisturbed.with_suffix(".log"))
    while not life.ended():
        time.sleep(0.01)
    life_seconds = time.monotonic() - started
    if set(life.codes.values()) != {0}:
        raise SystemExit(f"the undisturbed run failed: {undisturbed.with_suffix('.log').read_text()[-4000:]}")
    expected = final_tensors(undisturbed)
    tell(f"undisturbed run: {STEPS} steps and saves in {life_seconds:.1f} s")
    while (tally.kills.total() < kills or tally.rounds < 2) and not tally.faults:
        change = tally.rounds % 2 == 1
        run = folder / f"run{tally.rounds}"
        before = tally.kills.total()
        run_round(run, options, rng, life_seconds, layouts if change else [HOME], tally)
        if not tally.faults:
            compare(run, expected, exact=not change, tally=tally)
        if not tally.faults:
            shutil.rmtree(run)
        kind = "changing layouts" if change else "same layout"
        tell(f"run {tally.rounds}: {tally.kills.total() - before} kills, {kind}. So far: {tally.text()}")
    return tally


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Kill a small run at random points, resume it, and compare its result.")
    parser.add_argument("--model", choices=["qwen3", "qwen3_moe", "qwen3_5_text"], default="qwen3", help="Kind of model.")
    parser.add_argument("--kills", type=int, default=100, help="Stop after this many.")
    parser.add_argument(
        "--seed", type=int, default=random.SystemRandom().randrange(10**6), help="Seed for the choice of moments and ranks."
    )
    parser.add_argument("--folder", type=Path, help="Working folder; kept if something is wrong. Default: a temporary folder.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="mpo-chaos-"))
    started = time.monotonic()
    tally = chaos(folder, arguments.model, arguments.kills, arguments.seed, lambda text: print(text, flush=True))
    print(f"{tally.text()}; {time.monotonic() - started:.0f} s, seed {arguments.seed}")
    if tally.faults:
        print("\n".join(["FAILED", *tally.faults]), file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
