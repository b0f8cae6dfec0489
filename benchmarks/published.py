"""The planner's step times compared with published throughput (`benchmarks/published.yaml`).

    python -m benchmarks.published          # residuals with the planner's efficiencies
    python -m benchmarks.published --fit    # calibrate them again, and predict each model from a fit to all others
    python -m benchmarks.published --markdown

A run is pre-training on plain sequences: groups of one response to a prompt of one token, loss `sft`. Its time comes from the
functions that `mpo plan` uses. A residual is the planned time of a step divided by the published one, minus 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from rich.console import Console
from rich.table import Table

from mpo_megatron.config import DataConfig, LoraConfig, LossConfig, ModelConfig, ParallelConfig, PlanConfig, TrainConfig
from mpo_megatron.families.published import MODELS
from mpo_megatron.plan.plan import build_problem
from mpo_megatron.plan.search import Placed, Workload
from mpo_megatron.plan.step_time import StepTime

TABLE = Path(__file__).with_suffix(".yaml")
EFFICIENCIES = ("efficiency", "fp8_efficiency", "memory_efficiency", "network_efficiency")
"""Calibrated quantities: options of `mpo plan`."""
BOUNDS = {"dense": 0.15, "experts": 0.25}
"""Target size of a residual, which weights it in the fit."""
COMMON = {"tie_word_embeddings": False, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
"""Fields of config.json that have no effect here."""
SHORT = {"tensor": "TP", "pipeline": "PP", "virtual_pipeline": "VP", "context": "CP", "expert": "EP"}
"""The field's usual abbreviations of parallel sizes."""
FIT_STEPS, FIT_DIFFERENCE = 8, 1e-3
"""Steps of the fit, and the step size in log space for numerical slopes."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A published run; `published.yaml` explains the fields."""

    name: str
    source: str
    date: datetime.date
    hardware: str
    gpus: int
    fp8: str
    sequence: int
    micro_batch: int
    batch: int
    model: str | None = None
    fields: dict[str, Any] | None = None
    layers: int | None = None
    lora_rank: int = 0
    parallel: dict[str, Any] = field(default_factory=dict)
    overlapped: tuple[str, ...] = ()
    deduplicated: bool = False
    tokens_per_second: float | None = None
    tflops: float | None = None

    @property
    def kind(self) -> str:
        """The applicable key of `BOUNDS`."""
        return "experts" if "expert" in self.parallel else "dense"

    @property
    def model_name(self) -> str:
        """The unit that is held out together."""
        return self.model or self.name

    @property
    def layout(self) -> str:
        """Its parallel sizes: tensor, pipeline × virtual stages, context, expert."""
        sizes = [f"{short}{self.parallel[name]}" for name, short in SHORT.items() if name in self.parallel]
        return " ".join(sizes) or "data"


def load_table() -> tuple[dict[str, dict[str, str]], list[Run]]:
    """The sources by name, and the runs."""
    content = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    runs = [Run(**{**entry, "overlapped": tuple(entry.get("overlapped", ()))}) for entry in content["runs"]]
    return content["sources"], runs


class Priced:
    """A published run as a workload of the planner."""

    def __init__(self, run: Run) -> None:
        self.run = run
        fields = dict(MODELS[run.model]) if run.model else {**COMMON, **(run.fields or {})}
        if run.layers:
            fields["num_hidden_layers"] = run.layers
        tokens = run.sequence * run.micro_batch
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(fields), encoding="utf-8")
            self.train = TrainConfig(
                output="run",
                loss=LossConfig(name="sft"),
                model=ModelConfig(checkpoint=folder, fp8=run.fp8),  # type: ignore[arg-type]
                data=DataConfig(train="groups", groups_per_step=run.batch, row_tokens=tokens),
                parallel=ParallelConfig(**run.parallel),
                lora=LoraConfig(rank=run.lora_rank),
            )
            plan = PlanConfig(
                gpus=run.gpus,
                hardware=run.hardware,
                model=folder,
                prompt_tokens=1,
                response_tokens=run.sequence,
                responses=1,
                spread=0.0,
            )
            self.workload: Workload = build_problem(plan, self.train)

    @functools.cached_property
    def placed(self) -> Placed:
        """Its layout, rows and memory."""
        return self.workload.place(self.train.parallel, self.train.model.recompute, self.train.data.row_tokens)

    def price(self, efficiencies: dict[str, float] | None = None) -> StepTime:
        """The planner's time, with its own efficiencies or these."""
        run = self.run
        assumed = dataclasses.replace(
            self.workload.assumed,
            overlapped=frozenset(run.overlapped),
            deduplicated=run.deduplicated,
            **(efficiencies or {}),  # type: ignore[arg-type]
        )
        return dataclasses.replace(self.workload, assumed=assumed).price(self.placed)

    @functools.cached_property
    def published_seconds(self) -> float:
        """Seconds of a step, from the published numbers."""
        run, flops = self.run, self.workload.flops
        if run.tokens_per_second is not None:
            rate = run.tokens_per_second
        else:
            assert run.tflops is not None
            rate = run.tflops * 1e12 / (3 * (flops.per_token + flops.per_scored + flops.per_pair * run.sequence))
        return run.batch * run.sequence / rate / run.gpus

    def residual(self, efficiencies: dict[str, float] | None = None) -> float:
        """Planned over published time of a step, minus 1."""
        return self.price(efficiencies).seconds / self.published_seconds - 1


def fit(runs: Sequence[Priced], start: dict[str, float]) -> dict[str, float]:
    """The efficiencies with the least squares of logarithmic residuals, weighted by the bounds; by Gauss–Newton steps."""

    def residuals(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        found = dict(zip(EFFICIENCIES, np.exp(values).tolist(), strict=True))
        return np.array([np.log1p(priced.residual(found)) / BOUNDS[priced.run.kind] for priced in runs])

    values = np.log([start[name] for name in EFFICIENCIES])
    for _ in range(FIT_STEPS):
        now = residuals(values)
        slopes = np.stack(
            [(residuals(values + FIT_DIFFERENCE * unit) - now) / FIT_DIFFERENCE for unit in np.eye(len(values))], axis=1
        )
        step = np.linalg.lstsq(slopes, -now, rcond=None)[0]
        values = np.minimum(values + np.clip(step, -0.3, 0.3), 0.0)  # shares are at most 1
    return dict(zip(EFFICIENCIES, np.exp(values).tolist(), strict=True))


def predict_each_model(runs: Sequence[Priced], start: dict[str, float]) -> dict[str, dict[str, float]]:
    """For each model, the efficiencies fitted to the runs of all others."""
    models = dict.fromkeys(priced.run.model_name for priced in runs)
    return {model: fit([priced for priced in runs if priced.run.model_name != model], start) for model in models}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the residuals, and their summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="calibrate again, and predict each model from a fit to all others")
    parser.add_argument("--markdown", action="store_true", help="print the table for docs/experiments/planning.md")
    options = parser.parse_args(arguments)
    sources, runs = load_table()
    priced = [Priced(run) for run in runs]
    console = Console(highlight=False, width=150)
    held_out = None
    if options.fit:
        start = {name: getattr(priced[0].workload.assumed, name) for name in EFFICIENCIES}
        found = fit(priced, start)
        console.print("fitted to all: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))
        fits = predict_each_model(priced, start)
        held_out = [item.residual(fits[item.run.model_name]) for item in priced]
    lines = [describe(item, None if held_out is None else held_out[index]) for index, item in enumerate(priced)]
    if options.markdown:
        print(
            "\n".join(f"| {' | '.join(cells)} |" for cells in [list(lines[0]), ["---"] * len(lines[0]), *map(dict.values, lines)])
        )
    else:
        table = Table(*lines[0])
        for line in lines:
            table.add_row(*line.values())
        console.print(table)
    for name, values in (("planner", [item.residual() for item in priced]), ("held out", held_out)):
        if values is not None:
            console.print(summarize(name, [item.run for item in priced], values), soft_wrap=True)
    for name, source in sources.items():
        console.print(f"{name}: {source['title']}, {source['url']}", soft_wrap=True)


def describe(item: Priced, held_out: float | None) -> dict[str, str]:
    """The table's cells of a run, by column."""
    run, time = item.run, item.price()
    flops = time.model_flops / item.workload.hardware.bf16_tflops / 1e12 / run.gpus
    shares = [f"{flops / seconds:.0%}" for seconds in (item.published_seconds, time.seconds)]
    return {
        "model": run.name,
        "GPUs": f"{run.gpus:,} {run.hardware}",
        "precision": "bf16" if run.fp8 == "none" else f"FP8 {run.fp8}",
        "layout": run.layout,
        "source": f"{run.source} {run.date:%Y-%m}",
        "published, s": f"{item.published_seconds:.2f}",
        "planned, s": f"{time.seconds:.2f}",
        "MFU": shares[0],
        "planned": shares[1],
        "residual": f"{item.residual():+.1%}",
        **({} if held_out is None else {"held out": f"{held_out:+.1%}"}),
    }


def summarize(name: str, runs: Iterable[Run], residuals: Iterable[float]) -> str:
    """Mean and largest absolute residual, for dense models and for models with experts."""
    sizes: dict[str, list[float]] = {kind: [] for kind in BOUNDS}
    for run, residual in zip(runs, residuals, strict=True):
        sizes[run.kind].append(abs(residual))
    parts = [f"{kind}: {len(found)} runs, mean {np.mean(found):.1%}, largest {max(found):.1%}" for kind, found in sizes.items()]
    return f"{name}: {'; '.join(parts)}"


if __name__ == "__main__":
    main()
