"""A step of `mpo train` against three loops written by hand with plain `transformers`: groups per second, and peak memory.

    python -m benchmarks.hand_written                          # prompt : response 4 : 1 and 1 : 1, eight responses
    python -m benchmarks.hand_written --data groups.jsonl      # and real data, in tokens of a small tokenizer

`benchmarks.hand_loops` has the loops: a padded batch, the prompt through the key/value cache, and a group in one row. All sides
start from one checkpoint and train on the same groups in the same order, with loss `mpo`, AdamW and clipped gradients. Reference
log-probs are computed beforehand. The sides take turns step by step in one process. Ours includes everything that `mpo train`
does in a step: data from disk, metrics, the guard, the ranks' agreement, the line in `metrics.jsonl`. Before timing, every side's
reference log-probs are compared with ours.

Peak memory of each side is measured in a separate process, beyond its imports: weights, gradients, AdamW's states and two steps.
The loops process a group at a time; ours runs the same rows (a group each), and rows of --row-tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import torch

from benchmarks import timing
from benchmarks.hand_loops import LOOPS, Group, HandLoop
from benchmarks.logprobs import PeakMemory
from benchmarks.setup import SHAPES, make_groups, save_checkpoint
from mpo_megatron import device
from mpo_megatron.config import ConvertConfig, LossConfig, ModelConfig, PrepareConfig, TrainConfig
from mpo_megatron.config.train import CheckpointConfig, DataConfig, LoggingConfig, OptimizerConfig
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.prepare import prepare
from mpo_megatron.data.store import load_groups, write_groups
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.model.convert import convert
from mpo_megatron.train import loop, optimizer
from mpo_megatron.train.faults.incidents import Guard
from mpo_megatron.train.faults.supervisor import Supervisor
from mpo_megatron.train.run import Run, open_run
from mpo_megatron.train.session import session
from mpo_megatron.train.setup import build_setup

RESPONSES = 8
RATIOS = {"tiny": {"4:1": (32, 8)}, "small": {"4:1": (512, 128), "1:1": (256, 256)}}
"""Prompt and response tokens, by the name of their ratio."""
OURS = "ours"
TOLERANCE = 1e-5
"""Relative difference of a response's log-prob between sides: float32 sums of hundreds of rounded terms."""
ADAM = {"lr": 1e-6, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}


class Data(NamedTuple):
    """One data set, written for all sides."""

    name: str
    folder: Path
    """The checkpoint is in both formats (`hf`, `megatron`), with prepared `groups`."""
    num_groups: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every data set."""
    parser = timing.build_parser(__doc__, list(RATIOS), repeat=5)
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="additional files with prompts and K responses")
    parser.add_argument("--ratios", nargs="*", help="ratios of prompt to response, such as 4:1; by default all of the size")
    parser.add_argument("--groups-per-step", type=int, default=2)
    parser.add_argument("--row-tokens", type=int, default=8192, help="data.row_tokens of our side")
    options = timing.parse(parser, arguments)
    if device.has_gpu():
        raise SystemExit("benchmarks.hand_written: the loops run on a CPU only; hide the GPU (CUDA_VISIBLE_DEVICES=)")
    ratios = {name: sizes for name, sizes in RATIOS[options.size].items() if options.ratios is None or name in options.ratios}
    with tempfile.TemporaryDirectory() as folder:
        rows = timing.measure_each(
            "hand_written", options, [*ratios.items(), *((path.stem, path) for path in options.data)],
            lambda case: measure(options, Path(folder) / case[0].replace(":", "-"), *case),
        )  # fmt: skip
    table = [
        {
            "data": row["data"],
            "side": side,
            "tokens a group": f"{row['tokens'][side]:,.0f}",
            "groups/s": f"{row['groups_per_second'][side]:.3f}",
            "ours / side": "" if side == OURS else timing.shown(row["ratio"][side]),
            "peak, MiB": f"{row['peak_mib'][side]:,.0f}",
            "ours / side, memory": "" if side == OURS else f"{row['peak_mib'][OURS] / row['peak_mib'][side]:.2f}",
            "difference of log π": "" if side == OURS else f"{row['difference'][side]:.0e}",
        }
        for row in rows
        for side in (OURS, *LOOPS)
    ]
    full = ", ".join(f"{row['peak_mib']['full rows']:,.0f}" for row in rows)
    note = (
        "Whole steps in turn; ratio: median (min…max) over turns. Peak memory beyond imports, a group a row on all sides; "
        f"ours with rows of {options.row_tokens} tokens: {full} MiB."
    )
    settings = {
        "groups_per_step": options.groups_per_step,
        "row_tokens": options.row_tokens,
        "responses": RESPONSES,
        **SHAPES[options.size],
    }
    timing.report("hand_written", options, settings, rows, table, note)


def measure(options: argparse.Namespace, folder: Path, name: str, source: tuple[int, int] | Path) -> timing.Row:
    """All sides on one data set: seconds per step, tokens, agreement, peak memory."""
    data = write_data(options, folder, name, source)
    groups = load_groups(folder / "groups")
    chosen = [to_tensors(groups[index]) for index in range(data.num_groups)]
    sides = {side: build_loop(side, folder) for side in LOOPS}
    references = {side: hand.reference(chosen) for side, hand in sides.items()}
    count = options.groups_per_step
    with our_run(folder, count, options.row_tokens, data.num_groups // count) as run:
        ours = torch.from_numpy(run.references[run.setup.train.path].response)
        difference = {side: float((torch.cat(values) / ours - 1).abs().max()) for side, values in references.items()}
        if max(difference.values()) > TOLERANCE:
            raise SystemExit(f"benchmarks.hand_written: log-probs differ by {difference}: not the same computation")
        steps = our_steps(run)
        positions = {side: itertools.count() for side in sides}

        def by_hand(side: str) -> float:
            start = next(positions[side]) * count
            return sides[side].step(chosen[start : start + count], references[side][start : start + count])

        runs = {OURS: lambda: next(steps), **{side: lambda side=side: by_hand(side) for side in sides}}
        seconds = timing.interleave(runs, options.repeat)  # type: ignore[arg-type]
        steps.close()
    return {
        "data": name,
        "seconds": {side: timing.summarize(values) for side, values in seconds.items()},
        "groups_per_second": {side: count / timing.summarize(values)["median"] for side, values in seconds.items()},
        "ratio": {side: timing.compare(seconds[side], seconds[OURS]) for side in sides},
        "tokens": count_tokens(chosen),
        "difference": difference,
        "peak_mib": measure_memory(options, folder, chosen),
    }


def write_data(options: argparse.Namespace, folder: Path, name: str, source: tuple[int, int] | Path) -> Data:
    """Write the data set's groups, all with contrast, and the model in both formats with a matching tokenizer."""
    num_groups = options.groups_per_step * (options.repeat + 1)
    config = save_checkpoint(folder / "hf", options.size)
    groups: Sequence[TokenizedGroup]
    if isinstance(source, Path):
        groups = read_groups(source, folder, num_groups, config.vocab_size)
    else:
        shutil.copytree(folder / "tokenizer", folder / "hf", dirs_exist_ok=True)
        (folder / "hf" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")  # the command requires one
        prompt, response = source
        sizes = {"prompt": prompt, "response": response, "responses": RESPONSES}
        groups = make_groups(num_groups, **sizes, vocab_size=config.vocab_size)
    convert(ConvertConfig(input=str(folder / "hf"), output=str(folder / "megatron")))
    write_groups(
        folder / "groups",
        groups,
        tokenizer_digest=load_tokenizer(folder / "megatron").digest(),
        vocab_size=config.vocab_size,
        end_token_ids=[],
        reward_kind="scores",
    )
    return Data(name, folder, num_groups)


def read_groups(path: Path, folder: Path, num_groups: int, vocab_size: int) -> list[TokenizedGroup]:
    """The first groups with contrast of a data file, in tokens of a small tokenizer trained on it."""
    from examples.quickstart.model import write_model
    from examples.quickstart.run import read_texts

    write_model(folder / "words", read_texts(path, 10_000), vocab_size=vocab_size)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / "words" / name, folder / "hf" / name)
    prepare(PrepareConfig(input=str(path), tokenizer=str(folder / "hf"), output=str(folder / "all")))
    data = load_groups(folder / "all")
    chosen = itertools.islice((group for group in data if np.ptp(group.rewards) > 0), num_groups)
    groups = [dataclasses.replace(group, scored=None) for group in chosen]
    if len(groups) < num_groups:
        raise SystemExit(f"benchmarks.hand_written: {path} has {len(groups)} groups with contrast; {num_groups} are needed")
    return groups


def to_tensors(group: TokenizedGroup) -> Group:
    """The part of a group that the loops read."""
    responses = [torch.from_numpy(tokens.astype(np.int64)) for tokens in group.response_tokens]
    return torch.from_numpy(group.prompt_tokens.astype(np.int64)), responses, torch.tensor(group.rewards)


def build_loop(side: str, folder: Path) -> HandLoop:
    """A loop with the same optimizer settings as ours."""
    betas = (ADAM["beta1"], ADAM["beta2"])
    return HandLoop(side, str(folder / "hf"), lr=ADAM["lr"], betas=betas, eps=ADAM["eps"], clip=OptimizerConfig().clip_grad)


@contextlib.contextmanager
def our_run(folder: Path, groups_per_step: int, row_tokens: int, num_steps: int) -> Iterator[Run]:
    """A run as `mpo train` opens it, with reference log-probs computed."""
    output = Path(tempfile.mkdtemp(dir=folder))
    config = TrainConfig(
        output=str(output),
        model=ModelConfig(checkpoint=str(folder / "megatron"), precision="fp32"),
        data=DataConfig(train=str(folder / "groups"), groups_per_step=groups_per_step, row_tokens=row_tokens, shuffle=False),
        loss=LossConfig(name="mpo"),
        optimizer=OptimizerConfig(**ADAM, schedule="constant", warmup_fraction=0.0),
        checkpoint=CheckpointConfig(every=0),
        logging=LoggingConfig(num_samples=0),
        max_steps=num_steps,
    )
    with session(build_setup(config, 1)) as place:
        yield open_run(place)


def our_steps(run: Run) -> Iterator[dict[str, float]]:
    """The run's steps, one at a time: the loop of `mpo train` between two checkpoints."""
    config = run.config
    adam = optimizer.build_optimizer(config.optimizer, run.model, run.ranks)
    scheduler = optimizer.build_scheduler(config.optimizer, adam, total_steps=run.setup.total_steps, start_step=0)
    guard = Guard(config.faults, [], [], 0)
    supervisor = Supervisor(config.faults, run.folder)
    supervisor.watch_reduction(run.model)
    with contextlib.redirect_stdout(io.StringIO()):
        trackers = loop.start_tracking(run, 0)
    try:
        for batch in supervisor.watch_data(loop.batches(run, range(run.setup.total_steps))):
            metrics = loop.take_step(run, batch, adam, None, guard)
            scheduler.step(1)
            agreement = supervisor.after_step(has_written=True, save_seconds=0.0)
            for tracker in trackers:
                tracker.log(batch.step + 1, {**metrics, **agreement.metrics})
            yield metrics
    finally:
        supervisor.close()
        for tracker in trackers:
            tracker.close()


def count_tokens(groups: Sequence[Group]) -> dict[str, float]:
    """Mean number of tokens that each side computes per group, padding included."""
    shapes = [(len(prompt), [len(response) for response in responses]) for prompt, responses, _ in groups]
    shared = [prompt + sum(lengths) - len(lengths) for prompt, lengths in shapes]
    counts = {
        OURS: shared,
        "padded": [len(lengths) * (prompt + max(lengths) - 1) for prompt, lengths in shapes],
        "cached prompt": [prompt + len(lengths) * (max(lengths) - 1) for prompt, lengths in shapes],
        "one row": shared,
        "unshared": [len(lengths) * prompt + sum(lengths) - len(lengths) for prompt, lengths in shapes],
    }
    return {side: float(np.mean(values)) for side, values in counts.items()}


def measure_memory(options: argparse.Namespace, folder: Path, groups: Sequence[Group]) -> dict[str, float]:
    """Peak memory of each side in a separate process, MiB. Each is forked from a process that has only imported."""
    longest = max(len(prompt) + sum(len(response) for response in responses) for prompt, responses, _ in groups)
    one_group = -(-longest // 16) * 16
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.hand_written"])
    sides = {OURS: (OURS, one_group), "full rows": (OURS, options.row_tokens), **{side: (side, 0) for side in LOOPS}}
    with ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1) as processes:
        return {
            name: processes.submit(peak_memory, side, folder, options.groups_per_step, row_tokens, options.threads).result()
            for name, (side, row_tokens) in sides.items()
        }


def peak_memory(side: str, folder: Path, groups_per_step: int, row_tokens: int, threads: int) -> float:
    """MiB that a side's first two steps need beyond its imports."""
    torch.set_num_threads(threads)
    groups = load_groups(folder / "groups")
    batches = [[to_tensors(groups[step * groups_per_step + slot]) for slot in range(groups_per_step)] for step in range(2)]
    peak = PeakMemory()
    if side == OURS:
        with our_run(folder, groups_per_step, row_tokens, 2) as run:
            for _ in our_steps(run):
                pass
            return peak.mib()
    hand = build_loop(side, folder)
    for batch in batches:
        hand.step(batch, hand.reference(batch))
    return peak.mib()


if __name__ == "__main__":
    main()
