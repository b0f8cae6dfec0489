"""Forward and backward of the same groups in three layouts: shared prompt, unshared (packed), and padded.

    python -m benchmarks.layouts                 # two CPU cores, minutes
    python -m benchmarks.layouts --size hybrid   # Gated DeltaNets and attention
    python -m benchmarks.layouts --size 3b       # one GPU

`shared` computes a group's prompt once; `unshared` repeats it for every response and packs the sequences into rows; `padded`
gives every response a separate row, padded to the group's longest. All three run the same model code and score the same tokens;
the table also shows the ratio predicted by the FLOP model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks import timing
from benchmarks.setup import SHAPES, Bench, bench, make_groups
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.packing import Piece, PromptLayout, Row, build_row, plan_rows
from mpo_megatron.train.step import RowTensors, run_rows

CASES: dict[str, tuple[tuple[int, int, int, float], ...]] = {
    "tiny": ((32, 8, 4, 0.0),),
    "hybrid": ((512, 128, 4, 0.0),),
    "small": (
        (1024, 256, 8, 0.0),
        (1024, 256, 8, 0.5),
        (1024, 256, 4, 0.0),
        (256, 256, 8, 0.0),
        (512, 64, 16, 0.0),
    ),
}
"""Prompt tokens P, response tokens R, responses K, spread of the response lengths."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every case."""
    parser = timing.build_parser(__doc__, list(SHAPES))
    parser.add_argument("--groups", type=int, help="groups per measured pass; by default 1, or 5 for a GPU's sizes")
    options = timing.parse(parser, arguments)
    # A full row: fewer tokens would measure how fast the CPU launches the GPU's kernels.
    options.groups = options.groups or (1 if options.size in CASES else 5)
    with bench(options.size) as own:
        model = own.build_model()
        cases = CASES.get(options.size, CASES["small"])
        rows = timing.measure_each("layouts", options, cases, lambda case: measure(own, model, options, case))
    table = [
        {
            "P": row["prompt"],
            "R": f"{row['response']}" + (f" ± {row['spread']:.0%}" if row["spread"] else ""),
            "K": row["responses"],
            **{f"{name}, s": f"{row['seconds'][name]['median']:.2f}" for name in row["seconds"]},
            "unshared / shared": timing.shown(row["unshared_over_shared"]),
            "predicted": f"{row['predicted_unshared']:.2f}",
            "padded / shared": timing.shown(row["padded_over_shared"]),
            "predicted ": f"{row['predicted_padded']:.2f}",
        }
        for row in rows
    ]
    note = "Seconds of forward + backward, medians; ratios: median (min…max) over turns; predicted: ratio of the FLOP model."
    timing.report("layouts", options, {"shape": SHAPES[options.size], "groups": options.groups}, rows, table, note)


def measure(own: Bench, model: list[Any], options: argparse.Namespace, case: tuple[int, int, int, float]) -> timing.Row:
    """One case in the three layouts."""
    prompt, response, responses, spread = case
    groups = make_groups(
        options.groups,
        prompt=prompt,
        response=response,
        responses=responses,
        vocab_size=own.config.vocab_size,
        spread=spread,
    )
    row_tokens = max(8192 if options.size in CASES else 16384, prompt + 2 * response * responses)
    layouts = {
        "shared": packed(own, groups, row_tokens, "shared"),
        "unshared": packed(own, groups, row_tokens, "unshared"),
        "padded": padded(groups),
    }

    def run(rows: Sequence[Row]) -> None:
        model[0].zero_grad_buffer()
        run_rows(model, rows, own.ranks, sum_logps)

    seconds = timing.interleave({name: lambda rows=rows: run(rows) for name, rows in layouts.items()}, options.repeat)  # type: ignore[misc]
    operations = {name: own.count(rows) for name, rows in layouts.items()}
    return {
        "prompt": prompt,
        "response": response,
        "responses": responses,
        "spread": spread,
        "tokens": {name: sum(len(row.tokens) for row in rows) for name, rows in layouts.items()},
        "tflop": {name: count / 1e12 for name, count in operations.items()},
        "seconds": {name: timing.summarize(values) for name, values in seconds.items()},
        "unshared_over_shared": timing.compare(seconds["unshared"], seconds["shared"]),
        "padded_over_shared": timing.compare(seconds["padded"], seconds["shared"]),
        "predicted_unshared": operations["unshared"] / operations["shared"],
        "predicted_padded": operations["padded"] / operations["shared"],
    }


def sum_logps(row: RowTensors, token_logps: Tensor, *others: Any) -> Tensor:
    """A trivial loss that reaches every scored token."""
    return token_logps.sum()


def packed(own: Bench, groups: Sequence[TokenizedGroup], row_tokens: int, layout: PromptLayout) -> list[Row]:
    """The groups in rows, packed as in training."""
    lengths = [[len(tokens) for tokens in group.response_tokens] for group in groups]
    plan = plan_rows(
        [len(group.prompt_tokens) for group in groups],
        lengths,
        np.ones((len(groups), len(lengths[0])), dtype=bool),
        row_tokens=row_tokens,
        num_replicas=1,
        layout=layout,
    )
    multiple = own.shape(row_tokens).multiple
    return [build_row(pieces, groups, layout=layout, multiple=multiple) for pieces in plan.rows[0]]


def padded(groups: Sequence[TokenizedGroup]) -> list[Row]:
    """Every response in a separate row with its prompt, padded to its group's longest."""
    rows = []
    for slot, group in enumerate(groups):
        longest = len(group.prompt_tokens) + max(len(tokens) for tokens in group.response_tokens)
        multiple = -(-longest // 16) * 16
        rows += [
            build_row([Piece(slot, (k,), 0, 0)], groups, layout="unshared", multiple=multiple)
            for k in range(len(group.response_tokens))
        ]
    return rows


if __name__ == "__main__":
    main()
