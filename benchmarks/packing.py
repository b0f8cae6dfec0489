"""How full packed rows are, and how balanced the replicas' work: on real data, or on similar lengths.

    python -m benchmarks.packing --data groups.jsonl …        # anything `mpo prepare` reads; a small tokenizer is trained on it
    python -m benchmarks.packing                              # log-normal lengths

Plans every step of an epoch as training does. `fill` is tokens over rows × row_tokens: the used budget. `padding` is wasted
computation: rows end where their tokens do, rounded up to a multiple of 16. `imbalance` is the largest replica's work over the
mean (linear layers and attention): how long the others wait.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import timing
from benchmarks.setup import hf_config
from mpo_megatron.data.packing import Piece, plan_rows
from mpo_megatron.families import read_family
from mpo_megatron.hf.flops import build_flop_model

ROW_TOKENS = (4096, 8192, 16384)
REPLICAS = (1, 2, 4, 8)
MULTIPLE = 16
"""Rows are padded to a multiple of this (train/run.py)."""

Lengths = tuple[list[int], list[list[int]]]
"""Number of tokens of every prompt, and of every prompt's responses."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Plan every data set over rows and replicas."""
    parser = timing.build_parser(__doc__, ("tiny", "small", "1.5b", "3b", "7b"))
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="data files with prompts and K responses")
    parser.add_argument("--groups-per-step", type=int, default=128)
    options = timing.parse(parser, arguments)
    sets = {path.stem: read_lengths(path) for path in options.data}
    sets = sets or {"log-normal": random_lengths(64 if options.size == "tiny" else 1024)}
    # The weight of attention relative to linear layers is a real model's, whatever size runs here.
    pair_weight = build_flop_model(read_family(hf_config(options.size if options.size.endswith("b") else "1.5b"))).pair_weight
    cases = list(itertools.product(sets.items(), ROW_TOKENS, REPLICAS))

    def measure(case: tuple[tuple[str, Lengths], int, int]) -> timing.Row:
        (name, lengths), row_tokens, replicas = case
        return plan_epoch(name, lengths, row_tokens, replicas, options.groups_per_step, pair_weight)

    rows = timing.measure_each("packing", options, cases, measure)
    table = [
        {
            "data": row["data"],
            "row_tokens": row["row_tokens"],
            "replicas": row["replicas"],
            "fill": f"{row['fill']:.1%}",
            "padding": f"{row['padding']:.2%}",
            "imbalance, mean": f"{row['imbalance_mean'] - 1:.2%}",
            "imbalance, max": f"{row['imbalance_max'] - 1:.2%}",
            "ms to plan a step": f"{1000 * row['seconds_per_step']:.1f}",
        }
        for row in rows
    ]
    note = f"{options.groups_per_step} groups per step, shared layout; an epoch's full steps."
    timing.report("packing", options, {"groups_per_step": options.groups_per_step}, rows, table, note)


def plan_epoch(
    name: str, lengths: Lengths, row_tokens: int, replicas: int, groups_per_step: int, pair_weight: float
) -> timing.Row:
    """Fill and balance over the steps of an epoch."""
    prompts, responses = lengths
    order = np.random.default_rng(0).permutation(len(prompts))
    size = min(groups_per_step, len(prompts))
    tokens = budget = padded = 0
    imbalances, seconds = [], []
    for start in range(0, len(prompts) - size + 1, size):
        chosen = order[start : start + size]
        started = timing.now()
        plan = plan_rows(
            [prompts[index] for index in chosen],
            [responses[index] for index in chosen],
            np.ones((size, max(len(responses[index]) for index in chosen)), dtype=bool),
            row_tokens=row_tokens,
            num_replicas=replicas,
            layout="shared",
            pair_weight=pair_weight,
        )
        seconds.append(timing.now() - started)
        loads = [sum(_work(piece, pair_weight) for row in own for piece in row) for own in plan.rows]
        imbalances.append(max(loads) / (sum(loads) / len(loads)))
        used = [sum(piece.num_tokens for piece in row) for own in plan.rows for row in own]
        tokens += sum(used)
        padded += sum(max(MULTIPLE, -(-count // MULTIPLE) * MULTIPLE) for count in used)
        budget += len(used) * row_tokens
    return {
        "data": name,
        "groups": len(prompts),
        "row_tokens": row_tokens,
        "replicas": replicas,
        "fill": tokens / budget,
        "padding": padded / tokens - 1,
        "imbalance_mean": float(np.mean(imbalances)),
        "imbalance_max": max(imbalances),
        "seconds_per_step": float(np.median(seconds)),
    }


def _work(piece: Piece, pair_weight: float) -> float:
    return piece.num_tokens + pair_weight * piece.num_pairs


def read_lengths(path: Path) -> Lengths:
    """Number of tokens of a data file's prompts and responses, with the quickstart's tokenizer trained on it."""
    from examples.quickstart.model import write_model
    from examples.quickstart.run import read_texts
    from mpo_megatron.config import PrepareConfig
    from mpo_megatron.data.prepare import prepare
    from mpo_megatron.data.store import load_groups

    with tempfile.TemporaryDirectory() as folder:
        model, groups = Path(folder) / "model", Path(folder) / "groups"
        write_model(model, read_texts(path, 100_000), vocab_size=8192)
        prepare(PrepareConfig(input=str(path), tokenizer=str(model), output=str(groups)))
        data = load_groups(groups)
        offsets, flat = data.response_offsets(), data.all_response_lengths().tolist()
        responses = [flat[start:end] for start, end in itertools.pairwise(offsets)]
        return data.prompt_lengths().tolist(), responses


def random_lengths(num_groups: int) -> Lengths:
    """Lengths similar to chat data: prompts around 60 tokens, 8 responses around 250, both with long tails."""
    rng = np.random.default_rng(0)
    prompts = np.rint(rng.lognormal(4, 0.8, num_groups)).clip(4, 2000).astype(int)
    responses = np.rint(rng.lognormal(5.4, 0.6, (num_groups, 8))).clip(2, 2000).astype(int)
    return prompts.tolist(), responses.tolist()


if __name__ == "__main__":
    main()
