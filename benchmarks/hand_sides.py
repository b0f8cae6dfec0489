"""The sides of `benchmarks.hand_written`, each in a process of its own: ours, the loops by hand, and bare matrix products.

So each side has the allocator, the caches and the patches that it has in a run of its own. All processes are forked from one
that has nothing but the imports.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import AutoConfig

from benchmarks import timing
from benchmarks.hand_loops import LOOPS, Group, HandLoop
from benchmarks.logprobs import PeakMemory
from mpo_megatron import device
from mpo_megatron.config import LossConfig, ModelConfig, TrainConfig
from mpo_megatron.config.train import CheckpointConfig, DataConfig, LoggingConfig, OptimizerConfig
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.store import load_groups
from mpo_megatron.families import Family, read_family
from mpo_megatron.train import loop, optimizer
from mpo_megatron.train.faults.incidents import Guard
from mpo_megatron.train.faults.supervisor import Supervisor
from mpo_megatron.train.run import Run, open_run
from mpo_megatron.train.session import session
from mpo_megatron.train.setup import build_setup

OURS = "ours"
PRODUCTS = "products"
"""The matrix products of a step's linear layers, forward and backward, and nothing else: the processor's peak at these shapes."""
ADAM = {"lr": 1e-6, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a side does."""

    folder: Path
    """The model in both formats (`hf`, `megatron`) and prepared `groups`."""
    groups_per_step: int
    row_tokens: int
    """Of our side."""
    num_steps: int
    threads: int

    def groups(self) -> list[Group]:
        """The groups of all steps."""
        data = load_groups(self.folder / "groups")
        return [to_tensors(data[index]) for index in range(self.groups_per_step * self.num_steps)]


class Side(NamedTuple):
    """A side that runs in a process of its own."""

    reference: list[float]
    """Log-probs of all groups' responses before training; none of `PRODUCTS`."""
    step: Callable[[], float]
    """Take the next step; its seconds, as the side's process counts them."""


@contextlib.contextmanager
def running(name: str, task: Task) -> Iterator[Side]:
    """A side in its process, ready to step; one that fails prints its traceback, and EOFError is raised here."""
    here, there = multiprocessing.Pipe()
    process = _context().Process(target=_serve, args=(there, name, task), daemon=True)
    process.start()
    there.close()

    def step() -> float:
        here.send(True)
        seconds: float = here.recv()
        return seconds

    try:
        yield Side(here.recv(), step)
        here.send(False)
        process.join()
    finally:
        process.terminate()


def peak_memory(name: str, task: Task) -> float:
    """MiB that a side's steps take in a process of its own, beyond what its imports take."""
    here, there = multiprocessing.Pipe()
    process = _context().Process(target=_measure, args=(there, name, task), daemon=True)
    process.start()
    there.close()
    mib: float = here.recv()
    process.join()
    return mib


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.hand_sides"])
    return context


def _serve(connection: Connection, name: str, task: Task) -> None:
    """Send the reference's log-probs, then the seconds of a step as often as asked to."""
    torch.set_num_threads(task.threads)
    steps = _SIDES[name](name, task)
    connection.send(next(steps))
    while connection.recv():
        connection.send(timing.clock(lambda: next(steps)))
    steps.close()


def _measure(connection: Connection, name: str, task: Task) -> None:
    torch.set_num_threads(task.threads)
    peak = PeakMemory()
    for _ in _SIDES[name](name, task):
        pass
    connection.send(peak.mib())


def hand_side(name: str, task: Task) -> Generator[list[float]]:
    """A loop with the optimizer's settings that ours has: yields the reference's log-probs, then nothing after each step."""
    groups, count = task.groups(), task.groups_per_step
    betas = (ADAM["beta1"], ADAM["beta2"])
    own = HandLoop(name, str(task.folder / "hf"), lr=ADAM["lr"], betas=betas, eps=ADAM["eps"], clip=OptimizerConfig().clip_grad)
    references = own.reference(groups)
    yield torch.cat(references).tolist()
    for start in range(0, len(groups), count):
        own.step(groups[start : start + count], references[start : start + count])
        yield []


def our_side(name: str, task: Task) -> Generator[list[float]]:
    """What the loop of `mpo train` does between two checkpoints; yields as `hand_side` does."""
    with _our_run(task) as run:
        yield run.references[run.setup.train.path].response.tolist()
        for _ in _our_steps(run):
            yield []


@contextlib.contextmanager
def _our_run(task: Task) -> Iterator[Run]:
    """A run as `mpo train` opens it; its reference log-probs are computed."""
    folder = task.folder
    config = TrainConfig(
        output=tempfile.mkdtemp(dir=folder),
        model=ModelConfig(checkpoint=str(folder / "megatron"), precision="fp32"),
        data=DataConfig(
            train=str(folder / "groups"), groups_per_step=task.groups_per_step, row_tokens=task.row_tokens, shuffle=False
        ),
        loss=LossConfig(name="mpo"),
        optimizer=OptimizerConfig(schedule="constant", warmup_fraction=0.0, **ADAM),  # type: ignore[arg-type]
        checkpoint=CheckpointConfig(every=0),
        logging=LoggingConfig(num_samples=0),
        max_steps=task.num_steps,
    )
    device.keep_freed_memory()  # as a rank of `mpo train`
    with session(build_setup(config, 1)) as place, contextlib.redirect_stdout(io.StringIO()):
        yield open_run(place)


def _our_steps(run: Run) -> Iterator[None]:
    config = run.config
    adam = optimizer.build_optimizer(config.optimizer, run.model, run.ranks)
    scheduler = optimizer.build_scheduler(config.optimizer, adam, total_steps=run.setup.total_steps, start_step=0)
    guard = Guard(config.faults, [], [], 0)
    supervisor = Supervisor(config.faults, run.folder)
    supervisor.watch_reduction(run.model)
    trackers = loop.start_tracking(run, 0)
    try:
        for batch in supervisor.watch_data(loop.batches(run, range(run.setup.total_steps))):
            metrics = loop.take_step(run, batch, adam, None, guard)
            scheduler.step(1)
            agreement = supervisor.after_step(has_written=True, save_seconds=0.0)
            for tracker in trackers:
                tracker.log(batch.step + 1, {**metrics, **agreement.metrics})
            yield
    finally:
        supervisor.close()
        for tracker in trackers:
            tracker.close()


def products_side(name: str, task: Task) -> Generator[list[float]]:
    """Products only, into memory that is there already; yields as `hand_side` does, an empty list at first."""
    family, groups = read_family(AutoConfig.from_pretrained(task.folder / "hf")), task.groups()
    products = [
        [torch.randn(shape) for shape in ((rows, inputs), (outputs, inputs), (rows, outputs)) * 2]
        for rows, inputs, outputs in product_shapes(family, groups, task.groups_per_step)
    ]
    while True:
        yield []
        for x, weight, grad, grad_x, grad_weight, y in products:
            torch.mm(x, weight.T, out=y)
            torch.mm(grad, weight, out=grad_x)
            torch.mm(grad.T, x, out=grad_weight)


def product_shapes(family: Family, groups: Sequence[Group], groups_per_step: int) -> list[tuple[int, int, int]]:
    """(rows, inputs, outputs) of the products of a mean step's linear layers."""
    tokens, scored = (round(groups_per_step * float(np.mean(each))) for each in zip(*map(count_shared, groups), strict=True))
    hidden, inner, queries = family.hidden_size, family.intermediate_size, family.queries
    layer = [
        (tokens, hidden, queries + 2 * family.keys),
        (tokens, queries, hidden),
        (tokens, hidden, 2 * inner),
        (tokens, inner, hidden),
    ]
    return [*layer * family.num_hidden_layers, (scored, hidden, family.vocab_size)]


def count_shared(group: Group) -> tuple[int, int]:
    """Tokens of a group whose prompt is computed once, and scored tokens."""
    prompt, responses, _ = group
    scored = sum(len(response) for response in responses)
    return len(prompt) + scored - len(responses), scored


_SIDES: dict[str, Callable[[str, Task], Generator[list[float]]]] = {
    OURS: our_side,
    PRODUCTS: products_side,
    **dict.fromkeys(LOOPS, hand_side),
}


def to_tensors(group: TokenizedGroup) -> Group:
    """What the loops read of a group."""
    responses = [torch.from_numpy(tokens.astype(np.int64)) for tokens in group.response_tokens]
    return torch.from_numpy(group.prompt_tokens.astype(np.int64)), responses, torch.tensor(group.rewards)
