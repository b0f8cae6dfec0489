"""A step of `mpo train` against three loops written by hand with plain `transformers`: groups per second, and peak memory.

    python -m benchmarks.hand_written                          # prompt : response 4 : 1 and 1 : 1, eight responses
    python -m benchmarks.hand_written --data groups.jsonl      # and real data, in tokens of a small tokenizer

`benchmarks.hand_loops` has the loops: a padded batch, the prompt through the key/value cache, and a group in one row. All
sides start from one checkpoint and train on the same groups in the same order, with loss `mpo`, AdamW and clipped
gradients. Reference log-probs are computed beforehand. The sides take turns step by step, each in a process of its own.
Ours is all that `mpo train` does in a step: data from disk, metrics, the guard, the ranks' agreement, the line in
`metrics.jsonl`. Before the clock starts, every side's reference log-probs are compared with ours. Bare matrix products of
the linear layers' shapes take turns with them, for the share of the processor's peak that a step reaches.

The loops run a group at a time; so does ours: its rows have the longest group's length, unless --row-tokens says otherwise.
Peak memory of each side is measured in another process of its own, beyond its imports: weights, gradients, AdamW's states and
two steps.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
from transformers import AutoConfig

from benchmarks import timing
from benchmarks.hand_loops import LOOPS, Group
from benchmarks.hand_sides import OURS, PRODUCTS, Task, count_shared, peak_memory, product_shapes, running
from benchmarks.setup import SHAPES, make_groups, save_checkpoint
from mpo_megatron import device
from mpo_megatron.config import ConvertConfig, PrepareConfig
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.prepare import prepare
from mpo_megatron.data.store import load_groups
from mpo_megatron.data.store_writing import write_groups
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.families import read_family
from mpo_megatron.hf.flops import build_flop_model
from mpo_megatron.model.convert import convert

RESPONSES = 8
RATIOS = {"tiny": {"4:1": (32, 8)}, "small": {"4:1": (512, 128), "1:1": (256, 256)}}
"""Prompt and response tokens, by the name of their ratio."""
TOLERANCE = 1e-5
"""Relative difference of a response's log-prob between sides: float32 sums of hundreds of rounded terms."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every data set."""
    parser = timing.build_parser(__doc__, list(RATIOS), repeat=5)
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="additional files with prompts and K responses")
    parser.add_argument("--ratios", nargs="*", help="ratios of prompt to response, such as 4:1; by default all of the size")
    parser.add_argument("--groups-per-step", type=int, default=2)
    parser.add_argument("--row-tokens", type=int, help="data.row_tokens of our side; by default the longest group's length")
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
            "of the peak": timing.shown(row["share_of_peak"][side]) if side in row["share_of_peak"] else "",
            "difference of log π": "" if side == OURS else f"{row['difference'][side]:.0e}",
        }
        for row in rows
        for side in (OURS, *LOOPS)
    ]
    row_tokens = ", ".join(f"{row['row_tokens']:,}" for row in rows)
    peaks = ", ".join(f"{row['peak_flops_per_second']['median'] / 1e9:.0f}" for row in rows)
    note = (
        f"Whole steps in turn; ratio: median (min…max) over turns. Our rows: {row_tokens} tokens. Peak memory beyond imports. "
        f"Of the peak: operations per second over those of the linear layers' bare matrix products, {peaks} GFLOP/s."
    )
    settings = {
        "groups_per_step": options.groups_per_step,
        "responses": RESPONSES,
        **SHAPES[options.size],
    }
    timing.report("hand_written", options, settings, rows, table, note)


def measure(options: argparse.Namespace, folder: Path, name: str, source: tuple[int, int] | Path) -> timing.Row:
    """All sides on one data set: seconds of a step, tokens, agreement, peak memory."""
    write_data(options, folder, source)
    count, num_steps = options.groups_per_step, options.repeat + 1
    row_tokens = options.row_tokens or longest_group(folder)
    task = Task(folder=folder, groups_per_step=count, row_tokens=row_tokens, num_steps=num_steps, threads=options.threads)
    groups = task.groups()
    with contextlib.ExitStack() as stack:
        sides = {side: stack.enter_context(running(side, task)) for side in (OURS, *LOOPS, PRODUCTS)}
        logps = {name: np.array(side.reference) for name, side in sides.items()}
        difference = {side: float(np.abs(logps[side] / logps[OURS] - 1).max()) for side in LOOPS}
        if max(difference.values()) > TOLERANCE:
            raise SystemExit(f"benchmarks.hand_written: log-probs differ, {difference}: not the same computation")
        steps = {side: running_side.step for side, running_side in sides.items()}
        seconds = timing.interleave(steps, options.repeat, measure=lambda step: cast(float, step()))
    products, work = count_operations(folder, groups, count)
    peaks = [products / bare for bare in seconds[PRODUCTS]]
    return {
        "data": name,
        "row_tokens": row_tokens,
        "seconds": {side: timing.summarize(values) for side, values in seconds.items()},
        "groups_per_second": {side: count / timing.summarize(seconds[side])["median"] for side in (OURS, *LOOPS)},
        "ratio": {side: timing.compare(seconds[side], seconds[OURS]) for side in LOOPS},
        "share_of_peak": {
            side: timing.summarize([work / own / peak for own, peak in zip(seconds[side], peaks, strict=True)])
            for side in (OURS, "one row")
        },
        "peak_flops_per_second": timing.summarize(peaks),
        "tokens": count_tokens(groups),
        "difference": difference,
        "peak_mib": measure_memory(task),
    }


def count_operations(folder: Path, groups: Sequence[Group], groups_per_step: int) -> tuple[int, float]:
    """Operations of `PRODUCTS`, and of a mean step: the same products and attention, each attending pair counted once."""
    family = read_family(AutoConfig.from_pretrained(folder / "hf"))
    products = sum(6 * rows * inputs * outputs for rows, inputs, outputs in product_shapes(family, groups, groups_per_step))
    pairs = 0.0
    for prompt, responses, _ in groups:
        lengths = [len(response) - 1 for response in responses]
        pairs += len(prompt) * (len(prompt) + 1) / 2 + sum(size * len(prompt) + size * (size + 1) / 2 for size in lengths)
    attention = 3 * build_flop_model(family).per_pair * pairs / len(groups) * groups_per_step
    return products, products + attention


def write_data(options: argparse.Namespace, folder: Path, source: tuple[int, int] | Path) -> None:
    """Write the data set's groups, all with a contrast, and the model in both formats with a tokenizer that fits."""
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


def read_groups(path: Path, folder: Path, num_groups: int, vocab_size: int) -> list[TokenizedGroup]:
    """The first groups with contrast of a data file, in tokens of a small tokenizer trained on it."""
    from examples.quickstart.model import write_model
    from examples.quickstart.run import read_texts

    write_model(folder / "words", read_texts(path, 10_000), vocab_size=vocab_size)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / "words" / name, folder / "hf" / name)
    prepare(PrepareConfig(input=str(path), tokenizer=str(folder / "hf"), output=str(folder / "all")))
    data = load_groups(folder / "all")
    chosen = itertools.islice((group for group in data if group.rewards is not None and np.ptp(group.rewards) > 0), num_groups)
    groups = [dataclasses.replace(group, scored=None) for group in chosen]
    if len(groups) < num_groups:
        raise SystemExit(f"benchmarks.hand_written: {path} has {len(groups)} groups with contrast; {num_groups} are needed")
    return groups


def count_tokens(groups: Sequence[Group]) -> dict[str, float]:
    """Mean number of tokens that each side computes per group, padding included."""
    shapes = [(len(prompt), [len(response) for response in responses]) for prompt, responses, _ in groups]
    shared = [count_shared(group)[0] for group in groups]
    counts = {
        OURS: shared,
        "padded": [len(lengths) * (prompt + max(lengths) - 1) for prompt, lengths in shapes],
        "cached prompt": [prompt + len(lengths) * (max(lengths) - 1) for prompt, lengths in shapes],
        "one row": shared,
        "unshared": [len(lengths) * prompt + sum(lengths) - len(lengths) for prompt, lengths in shapes],
    }
    return {side: float(np.mean(values)) for side, values in counts.items()}


def longest_group(folder: Path) -> int:
    """Tokens of the longest group with its prompt once, as a multiple of 16."""
    longest = max(len(group.prompt_tokens) + sum(map(len, group.response_tokens)) for group in load_groups(folder / "groups"))
    return -(-longest // 16) * 16


def measure_memory(task: Task) -> dict[str, float]:
    """MiB of each side's first two steps."""
    short = dataclasses.replace(task, num_steps=2)
    return {side: peak_memory(side, short) for side in (OURS, *LOOPS)}


if __name__ == "__main__":
    main()
