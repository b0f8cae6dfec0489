"""Adapters against training all weights: accuracy on held-out groups.

    python -m benchmarks.adapters --seeds 0 1 2      # SmolLM2-135M-Instruct; ten minutes of one core for each seed
    python -m benchmarks.adapters --size tiny        # a random model: shows that it runs

Both sides train on the same groups of the quickstart's task, each group once, with MPO and the same cached reference; then both
are evaluated on the same held-out groups. A seed draws groups and their order. Results differ by a side's rounding and by chance,
so the table has the mean difference over seeds with its standard error.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import timing
from examples.instructions.model import write_model as write_pretrained
from examples.quickstart.model import write_model as write_random
from examples.quickstart.task import build_groups, write_groups
from mpo_megatron.config import ConvertConfig, PrepareConfig, TrainConfig, from_dict
from mpo_megatron.data.prepare import prepare
from mpo_megatron.model.convert import convert
from mpo_megatron.rollout.round_report import read_metrics
from mpo_megatron.train.loop import train
from mpo_megatron.train.setup import build_setup

SIDES: dict[str, dict[str, Any]] = {
    "adapters": {"lora": {"rank": 16}, "optimizer": {"lr": 4e-4}},
    "all weights": {"optimizer": {"lr": 2e-5}},
}
"""Options of `mpo train` that differ."""
METRICS = ("accuracy", "margin", "loss")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of groups."""

    train: int
    held_out: int
    per_step: int


SIZES = {"tiny": Sizes(train=8, held_out=4, per_step=4), "135m": Sizes(train=48, held_out=40, per_step=8)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and evaluate both sides with every seed."""
    parser = timing.build_parser(__doc__, list(SIZES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of groups and order (0)")
    parser.set_defaults(size="135m")
    options = timing.parse(parser, arguments)
    sizes = SIZES[options.size]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_model(folder / "hf", options.size)
        convert(ConvertConfig(input=str(folder / "hf"), output=str(folder / "model")))
        rows = timing.measure_each("adapters", options, options.seeds, lambda seed: measure(folder, sizes, seed))
    table = [
        {"seed": str(row["seed"]), **{f"{name}, {side}": f"{row[side][name]:.3f}" for name in METRICS for side in SIDES}}
        for row in rows
    ]
    table.append({"seed": "difference", **{column: shown_difference(rows, column) for column in table[0] if column != "seed"}})
    note = "Accuracy: share of pairs of held-out responses in the right order by log π/π_ref. Last row: adapters − all weights."
    timing.report("adapters", options, {"sides": SIDES, "groups": vars(sizes)}, rows, table, note)


def write_model(folder: Path, size: str) -> None:
    """The Hugging Face checkpoint to train."""
    if size == "tiny":
        texts = [response["text"] for group in build_groups(50) for response in group["responses"]]
        write_random(folder, texts, vocab_size=400)
    else:
        write_pretrained(folder)


def measure(folder: Path, sizes: Sizes, seed: int) -> dict[str, Any]:
    """Held-out metrics of both sides after training, for one seed."""
    source, groups = folder / f"groups-{seed}.jsonl", folder / f"groups-{seed}"
    write_groups(source, build_groups(sizes.train + sizes.held_out, seed))
    options = {"input": str(source), "tokenizer": str(folder / "hf"), "output": str(groups), "held_out": sizes.held_out}
    prepare(from_dict(PrepareConfig, options, "prepare"))
    found: dict[str, Any] = {"seed": seed}
    for side, own in SIDES.items():
        run = folder / f"{side}-{seed}"
        settings: dict[str, Any] = {
            "output": str(run),
            "model": {"checkpoint": str(folder / "model"), "precision": "fp32"},
            "data": {
                **{"train": str(groups), "eval": f"{groups}-eval"},
                **{"groups_per_step": sizes.per_step, "row_tokens": 1024},
            },
            "loss": {"name": "mpo", "params": {"beta": 0.1}},
            "eval_every": 0,
            "checkpoint": {"every": 0, "asynchronous": False},
            "seed": seed,
        }
        train(build_setup(from_dict(TrainConfig, settings | own, "train"), 1))
        (last,) = [row for row in read_metrics(run / "metrics.jsonl") if "eval/accuracy" in row][-1:]
        found[side] = {name: last[f"eval/{name}"] for name in METRICS}
    return found


def shown_difference(rows: Sequence[dict[str, Any]], column: str) -> str:
    """Mean and standard error over seeds of a metric's difference, in the column of the adapters; nothing in the other."""
    name, _, side = column.partition(", ")
    if side != next(iter(SIDES)):
        return ""
    first, second = SIDES
    values = [row[first][name] - row[second][name] for row in rows]
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.3f}{error}"


if __name__ == "__main__":
    main()
