"""A plan as tables on the terminal."""

from __future__ import annotations

from rich.table import Table

from mpo_megatron.config import PlanConfig
from mpo_megatron.plan.figures import cached_groups, summarize
from mpo_megatron.plan.memory_layout import GIB
from mpo_megatron.plan.parameters import count_parameters
from mpo_megatron.plan.search import Candidate, Workload
from mpo_megatron.plan.step_time import TIMES
from mpo_megatron.terminal.console import Console

PARTS = {
    "weights": ("weights", "weights"),
    "gradients": ("grads", "gradients"),
    "optimizer": ("optim.", "optimizer states"),
    "activations": ("act.", "activations"),
    "working": ("working", "working memory at the peak"),
    "reference": ("ref.", "the reference model"),
    "asleep": ("engine", "a sleeping engine"),
    "sampling": ("sampling", "the engine while it samples, in place of activations and working memory"),
    "overhead": ("other", "memory of the GPU's libraries"),
}
"""Parts of a rank's memory by field name: column title, and description."""
OPTIONAL = ("reference", "asleep", "sampling")
"""Parts that only some runs have."""


def print_problem(console: Console, problem: Workload, config: PlanConfig) -> None:
    """Print what is planned."""
    shape, hardware = problem.family, problem.hardware
    console.print(
        f"{config.model or config.train}: {count_parameters(shape) / 1e9:.2f} G parameters, {shape.num_hidden_layers} layers; "
        + describe_adapter(problem)
        + f"{problem.gpus} × {hardware.name} ({hardware.memory_gib} GiB), {hardware.gpus_per_node} a machine\n"
        f"{problem.data.groups_per_step} groups per step: {problem.sequences.where}"
        + (f"; FP8: {problem.model.fp8}" if problem.model.fp8 != "none" else ""),
        soft_wrap=True,
    )


def describe_adapter(problem: Workload) -> str:
    """A phrase about adapters; empty if all weights are trained."""
    if problem.adapter is None:
        return ""
    beside = "" if problem.adapter.quantize == "none" else f" beside weights in {problem.adapter.quantize}"
    return f"adapters of rank {problem.adapter.rank} are trained{beside}; "


def print_memory(console: Console, problem: Workload, candidate: Candidate) -> None:
    """Print GiB per rank for each stage, and the meaning of the columns."""
    table = Table(title=f"GiB on each rank: {candidate.describe()}")
    parts = [name for name in PARTS if name not in OPTIONAL or any(getattr(stage, name) for stage in candidate.stages)]
    for name in ("stage", "param.", *(PARTS[part][0] for part in parts), "peak", "rows", "peak at"):
        table.add_column(name, justify="right", no_wrap=name != "peak at")
    for stage in candidate.stages:
        style = None if stage.total <= problem.limit else "red"
        table.add_row(
            str(stage.stage),
            f"{stage.parameters / 1e9:.2f} G",
            *(f"{getattr(stage, name) / GIB:.2f}" for name in parts),
            f"{stage.total / GIB:.2f}",
            f"{stage.rows_in_flight:g}",
            stage.moment,
            style=style,
        )
    console.print(table)
    meanings = "; ".join(f"{short}: {long}" for short, long in (PARTS[part] for part in parts) if short != long)
    console.print(
        f"param.: parameters; {meanings}; peak: the sum of the parts that exist at one time; rows: in flight at that time",
        soft_wrap=True,
    )
    last = candidate.stages[-1]
    buffers = f"; all-to-all buffers {last.all_to_all / GIB:.2f} GiB" if last.all_to_all else ""
    console.print(
        f"{problem.limit / GIB:.1f} GiB are available; a chunk of log-probs: {last.log_probs / GIB:.2f} GiB{buffers}",
        soft_wrap=True,
    )


def print_time(console: Console, problem: Workload, candidate: Candidate, groups: int) -> None:
    """Print the parts of a step's time, and the run's duration."""
    time = candidate.time
    table = Table(title="estimated time of a step")
    table.add_column("")
    for name in (*TIMES, "all"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("seconds", *(f"{getattr(time, name):.2f}" for name in TIMES), f"{time.seconds:.2f}")
    sent = time.volumes | {"data": time.volumes["gradients"] + time.volumes["weights"]}
    table.add_row(
        "GB sent by a rank", *(f"{sent[name]:.1f}" if name in sent else "" for name in TIMES), f"{sum(time.volumes.values()):.1f}"
    )
    console.print(table)
    summary = summarize(problem, candidate, groups)
    seen = cached_groups(problem, groups)
    reference = (
        f", and {summary['reference_hours']:.1f} h before the first step for the reference log-probs of {seen:,} groups"
        if seen
        else "; no pass for reference log-probs"
    )
    console.print(
        f"{summary['rows_per_replica']:.1f} rows per replica and step, {summary['fill']:.0%} full; bubble "
        f"{time.bubble_share:.1%}; {time.model_flops / 1e15:,.1f} PFLOP per step; MFU {summary['mfu']:.1%}; "
        f"{summary['groups_per_second']:.1f} groups/s; {groups:,} groups in {summary['hours']:.1f} h{reference} "
        f"({summary['days']:.2f} days)",
        soft_wrap=True,
    )
    if choices := summary.get("choices_gb"):
        console.print(f"the reference's expert choices take {choices:,.1f} GB of disk beside its log-probs", soft_wrap=True)


def print_suggestions(console: Console, problem: Workload, found: list[Candidate]) -> None:
    """Print the best layouts."""
    table = Table(title="layouts that fit, fastest first")
    for name in ("layout", "GiB", "s / step", "bubble", "groups/s"):
        table.add_column(name, justify="right" if name != "layout" else "left")
    for candidate in found:
        table.add_row(
            candidate.describe(),
            f"{candidate.worst.total / GIB:.1f}",
            f"{candidate.time.seconds:.2f}",
            f"{candidate.time.bubble_share:.1%}",
            f"{problem.data.groups_per_step / candidate.time.seconds:.1f}",
        )
    console.print(table)
