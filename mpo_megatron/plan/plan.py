"""`mpo plan`: from a model, machines and lengths to memory, time and layouts, as tables and JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.table import Table

from mpo_megatron.config import (
    ConfigError,
    ConvertConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PlanConfig,
    TrainConfig,
    check_writable,
    load_yaml,
    require,
    validate_experts,
)
from mpo_megatron.config.experts import require_no_router_losses
from mpo_megatron.config.model import ADAPTER_OFF
from mpo_megatron.data.packing import PackingError
from mpo_megatron.data.store import read_info
from mpo_megatron.families.adapters import choose_adapter
from mpo_megatron.files.atomic import replace_file
from mpo_megatron.hf.conversion import load_conversion, padded_vocab_size
from mpo_megatron.hf.flops import build_flop_model
from mpo_megatron.plan.hardware import find_hardware
from mpo_megatron.plan.memory import GIB, Kernels, StageMemory
from mpo_megatron.plan.models import find_model
from mpo_megatron.plan.parameters import count_parameters
from mpo_megatron.plan.rows import Sequences, draw_lengths, read_lengths
from mpo_megatron.plan.search import Candidate, Workload, search
from mpo_megatron.plan.step_time import TIMES, Assumptions
from mpo_megatron.terminal.console import Console
from mpo_megatron.train.objective import Objective, build_objective, check_data, needs_reference

DEFAULT_GROUPS = 60_000
"""Default number of groups of a run: about the number of UltraFeedback's prompts."""
MOST_GPUS = 4096
"""Largest number of GPUs that the search tries."""
PARTS = {
    "weights": ("weights", "weights"),
    "gradients": ("grads", "gradients"),
    "optimizer": ("optim.", "optimizer states"),
    "activations": ("kept", "activations"),
    "working": ("work", "working memory at the peak"),
    "reference": ("ref.", "the reference model"),
    "asleep": ("engine", "a sleeping engine"),
    "sampling": ("awake", "the engine while it samples, in place of activations and working memory"),
    "overhead": ("other", "memory of the GPU's libraries"),
}
"""Parts of a rank's memory by field name: column title, and description."""
WIDTH = 120
"""Width of the tables if the output is no terminal."""


def plan(config: PlanConfig) -> None:
    """Print the plan, and write it to `output` if set.

    Raises:
        ConfigError: options contradict each other, or no GPU could hold the run; then names the largest component and possible
            fixes.
    """
    if config.output:
        check_writable(Path(config.output).parent, "output")
        require(not Path(config.output).is_dir(), f"output = {config.output}; it is a folder; name a file for the plan.")
    train = load_yaml(TrainConfig, config.train) if config.train else default_train(config)
    if config.lora_rank is not None:
        train = dataclasses.replace(train, lora=dataclasses.replace(train.lora, rank=config.lora_rank))
    if config.lora_quantize is not None:
        train = dataclasses.replace(train, lora=dataclasses.replace(train.lora, quantize=config.lora_quantize))
        require(train.lora.rank > 0, f"lora_quantize = {config.lora_quantize} without adapters; set lora_rank, too.")
    if config.fp8 is not None:
        train = dataclasses.replace(train, model=dataclasses.replace(train.model, fp8=config.fp8))
    problem = build_problem(config, train)
    own = None
    if config.train:
        try:
            own = problem.evaluate(train.parallel, train.model.recompute, train.data.row_tokens)
        except PackingError as error:
            raise ConfigError(str(error)) from error
    found = search(problem) if config.suggest else []
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    print_problem(console, problem, config)
    chosen = own or (found[0] if found else None)
    if chosen is not None:
        print_memory(console, problem, chosen)
        print_time(console, problem, chosen, num_groups(config, train, problem.sequences))
    if found:
        print_suggestions(console, problem, found[: config.suggest])
    if config.output:
        content = describe(config, train, problem, own, found[: config.suggest])
        replace_file(Path(config.output), [json.dumps(content, indent=1).encode() + b"\n"])
        console.print(f"written: {config.output}", soft_wrap=True)
    if own is not None and not problem.fits(own):
        raise ConfigError(explain(problem, own))
    if own is None and config.suggest and not found:
        raise ConfigError(explain_nothing_fits(problem))


def default_train(config: PlanConfig) -> TrainConfig:
    """A run with default options, for a model without a run configuration."""
    return TrainConfig(
        output="run",
        model=ModelConfig(checkpoint=str(config.model), fp8=config.fp8 or "none"),
        data=DataConfig(train=config.data or "groups"),
        parallel=ParallelConfig(),
    )


def build_problem(config: PlanConfig, train: TrainConfig) -> Workload:
    """Everything that determines the cost of layouts.

    Raises:
        ConfigError: unknown model or hardware, missing data, or FP8 on a GPU without FP8.
    """
    name = config.model or train.model.checkpoint
    family = find_model(name)
    hardware = find_hardware(
        config.hardware,
        gpus_per_node=config.gpus_per_node,
        memory_gib=config.memory_gib,
        intra_gbps=config.intra_gbps,
        inter_gbps=config.inter_gbps,
    )
    require(
        config.overhead_gib < hardware.memory_gib,
        f"overhead_gib = {config.overhead_gib}; {hardware.name} has {hardware.memory_gib} GiB; choose less.",
    )
    if train.model.fp8 != "none" and hardware.fp8_tflops is None:
        raise ConfigError(f"model.fp8 = {train.model.fp8}, but hardware = {hardware.name} has no FP8; set model.fp8 to none.")
    objective = build_objective(train.loss)
    validate_experts(train.experts, num_experts=family.num_experts, loss_step=train.loss.step)
    data = train.data
    if config.groups_per_step:
        data = dataclasses.replace(data, groups_per_step=config.groups_per_step)
    converted = Path(name) / "conversion.json"
    padded = load_conversion(name).padded_vocab_size if converted.is_file() else None
    attention = train.model.attention
    if attention == "auto":
        attention = "sdpa" if train.model.precision == "fp32" else config.attention
    layers = "local" if train.model.backend == "local" else "transformer_engine"
    adapter = choose_adapter(family, train.lora)
    if adapter is not None:
        require_no_router_losses(train.experts)
        require(
            adapter.quantize == "none" or train.model.fp8 == "none",
            f"lora.quantize = {adapter.quantize} with model.fp8 = {train.model.fp8}: set one of them to none.",
        )
    reference = needs_reference(objective, train, family.experts)
    # Then the reference is the policy with its adapter off, and no second model is in memory.
    own_reference = adapter is not None and train.model.reference in (None, ADAPTER_OFF, train.model.checkpoint)
    return Workload(
        family=family,
        padded_vocab=padded or padded_vocab_size(family.vocab_size, ConvertConfig(input="", output="").vocab_multiple),
        model=train.model,
        data=data,
        optimizer=train.optimizer,
        sequences=find_sequences(config, train, objective, data.groups_per_step),
        flops=build_flop_model(family, frozen=adapter is not None),
        kernels=Kernels(layers=layers, attention=attention, gpu=True),  # type: ignore[arg-type]
        resident=(objective.needs.token_kl or train.online.kl_weight > 0) and not own_reference,
        online=train.online,
        routing=train.experts,
        records_choices=train.experts.needs_choices and not objective.needs.token_kl,
        caches_reference=reference and train.model.reference != ADAPTER_OFF,
        adapter=adapter,
        gpus=config.gpus,
        hardware=hardware,
        assumed=Assumptions(
            efficiency=config.efficiency,
            fp8_efficiency=config.fp8_efficiency,
            memory_efficiency=config.memory_efficiency,
            network_efficiency=config.network_efficiency,
            latency_us=config.latency_us,
            forward_only=train.loss.step == "two_phase"
            or objective.needs_whole_batch
            or objective.needs.token_kl
            or train.experts.needs_whole_batch
            or (train.model.reference == ADAPTER_OFF and reference),
        ),
        overhead_gib=config.overhead_gib,
        usable=config.usable,
    )


LENGTHS = ("prompt_tokens", "response_tokens", "responses", "spread")
"""Options that describe groups without data."""


def find_sequences(config: PlanConfig, train: TrainConfig, objective: Objective, groups_per_step: int) -> Sequences:
    """Lengths from the data if given, else from the options.

    Raises:
        ConfigError: the data lacks what the loss reads.
    """
    given = [name for name in LENGTHS if getattr(config, name) != getattr(PlanConfig, name)]
    require(
        config.data is None or not given,
        f"{' and '.join(given)}: lengths come from data = {config.data}; remove one of them.",
    )
    folder = config.data
    # Without --train, data.train is only a placeholder: a folder of that name may be anything.
    if config.train is not None and not given and (Path(train.data.train) / "prepare.json").is_file():
        folder = folder or train.data.train
    if folder:
        info = read_info(folder)
        check_data(objective, has_rewards=info.reward_kind != "labels", has_labels=info.has_labels, where=folder)
        return read_lengths(folder, objective.select, groups_per_step)
    require(
        config.responses > 1 or not objective.needs.contrast,
        f"responses = {config.responses}; loss.name = {train.loss.name} compares a group's responses; give at least 2.",
    )
    return draw_lengths(
        prompt=config.prompt_tokens,
        response=config.response_tokens,
        responses=config.responses,
        spread=config.spread,
        select=objective.select,
        groups_per_step=groups_per_step,
        num_groups=config.groups or DEFAULT_GROUPS,
    )


def num_groups(config: PlanConfig, train: TrainConfig, sequences: Sequences) -> int:
    """Groups that the whole run processes."""
    if train.max_steps:
        return train.max_steps * (config.groups_per_step or train.data.groups_per_step)
    return round((config.groups or sequences.num_groups) * train.epochs)


# ------------------------------------------------------------------------------------------------------ what does not fit


def explain(problem: Workload, candidate: Candidate) -> str:
    """Why a layout does not fit, and what would make it fit."""
    worst = candidate.worst
    name = max((name for name in PARTS if name != "overhead"), key=lambda name: getattr(worst, name))
    ways = remedies(problem, candidate)
    return (
        f"{candidate.describe()}: stage {worst.stage} needs {worst.total / GIB:.1f} GiB, but only {problem.limit / GIB:.1f} of "
        f"the {problem.hardware.memory_gib} GiB of {problem.hardware.name} are available; the largest part is {PARTS[name][1]}, "
        f"{getattr(worst, name) / GIB:.1f} GiB. "
        + (f"It would fit with {'; or '.join(ways)}." if ways else explain_nothing_fits(problem))
    )


def remedies(problem: Workload, candidate: Candidate) -> list[str]:
    """Single changes that make a layout fit, and the best layout overall."""
    parallel, ways = candidate.parallel, []

    def works(
        name: str,
        tried: Workload = problem,
        layout: ParallelConfig = parallel,
        recompute: str = candidate.model.recompute,
        row_tokens: int = candidate.row_tokens,
        gpus: int = problem.gpus,
    ) -> None:
        try:
            if tried.fits(tried.evaluate(layout, recompute, row_tokens, gpus)):
                ways.append(name)
        except (ConfigError, PackingError):
            return

    if candidate.model.recompute != "full":
        works("model.recompute = full", recompute="full")
    half = candidate.row_tokens // 2
    if half >= problem.sequences.longest:
        works(f"data.row_tokens = {half}", row_tokens=half)
    if candidate.model.logprob_chunk is None or candidate.model.logprob_chunk > 256:
        small = dataclasses.replace(problem, model=dataclasses.replace(problem.model, logprob_chunk=256))
        works("model.logprob_chunk = 256", tried=small)
    for field in ("tensor", "pipeline", "context"):
        size = 2 * getattr(parallel, field)
        if field != "tensor" or size <= problem.hardware.gpus_per_node:
            works(f"parallel.{field} = {size}", layout=dataclasses.replace(parallel, **{field: size}))
    works(f"{2 * problem.gpus} GPUs", gpus=2 * problem.gpus)
    found = search(problem)
    return [*ways, f"another layout, the fastest of which is {found[0].describe()}"] if found else ways


def explain_nothing_fits(problem: Workload) -> str:
    """A message that no layout fits, with the number of GPUs that would suffice."""
    gpus = problem.gpus
    while gpus < MOST_GPUS:
        gpus *= 2
        found = search(problem, gpus)
        if found:
            return (
                f"No layout of this model fits {problem.gpus} × {problem.hardware.name} ({problem.hardware.memory_gib} GiB); "
                f"with {gpus} GPUs it does: {found[0].describe()}."
            )
    return f"No layout of this model fits {problem.hardware.name} GPUs, up to {MOST_GPUS} of them; use shorter responses or rows."


# -------------------------------------------------------------------------------------------------------------- for people


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
    """Print GiB per rank for each stage."""
    table = Table(title=f"GiB on each rank: {candidate.describe()}")
    for name in ("stage", "param.", *(short for short, _ in PARTS.values()), "peak", "rows", "peak at"):
        table.add_column(name, justify="right", no_wrap=name != "peak at")
    for stage in candidate.stages:
        style = None if stage.total <= problem.limit else "red"
        table.add_row(
            str(stage.stage),
            f"{stage.parameters / 1e9:.2f} G",
            *(f"{getattr(stage, name) / GIB:.2f}" for name in PARTS),
            f"{stage.total / GIB:.2f}",
            f"{stage.rows_in_flight:g}",
            stage.moment,
            style=style,
        )
    console.print(table)
    last = candidate.stages[-1]
    buffers = f"; all-to-all buffers {last.all_to_all / GIB:.2f} GiB" if last.all_to_all else ""
    console.print(
        f"{problem.limit / GIB:.1f} GiB are available; `rows`: in flight at the same time; "
        f"a chunk of log-probs: {last.log_probs / GIB:.2f} GiB{buffers}",
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


# ------------------------------------------------------------------------------------------------------------ for programs


def summarize(problem: Workload, candidate: Candidate, groups: int) -> dict[str, float]:
    """Figures of a whole run with this many groups; the reference processes each group once, if needed."""
    time, step = candidate.time, problem.data.groups_per_step
    tokens = [
        sums.tokens / len(rows)
        for counts, sampled in zip(candidate.packed.sums, candidate.packed.rows, strict=True)
        for sums, rows in zip(counts, sampled, strict=True)
    ]
    hours = groups / step * time.seconds / 3600
    seen = cached_groups(problem, groups)
    reference_hours = seen / step * time.forward_seconds / 3600
    return {
        "seconds_per_step": time.seconds,
        "groups_per_second": step / time.seconds,
        "mfu": time.model_flops / time.seconds / problem.gpus / problem.hardware.bf16_tflops / 1e12,
        "rows_per_replica": candidate.packed.rows_per_replica,
        "fill": sum(tokens) / len(tokens) / candidate.row_tokens,
        "hours": hours,
        "reference_hours": reference_hours,
        "days": (hours + reference_hours) / 24,
        **choices_on_disk(problem, seen),
    }


def cached_groups(problem: Workload, groups: int) -> int:
    """Number of groups whose reference log-probs are computed before the first step, in a run with this many groups."""
    return min(groups, problem.sequences.num_groups) if problem.caches_reference else 0


def choices_on_disk(problem: Workload, groups: int) -> dict[str, float]:
    """GB of the reference's expert choices for this many groups; empty if they are not recorded."""
    experts = problem.family.experts
    if experts is None or not problem.records_choices or not problem.caches_reference:
        return {}
    means = [(t.prompt_lengths + ((t.lengths - 1) * t.valid).sum(axis=1)).mean() for t, _ in problem.sequences.steps]
    tokens = float(sum(means) / len(means)) * groups
    return {"choices_gb": tokens * experts.choices * experts.id_bytes / 1e9}


def describe(
    config: PlanConfig, train: TrainConfig, problem: Workload, own: Candidate | None, found: list[Candidate]
) -> dict[str, Any]:
    """The whole plan as plain values: bytes, seconds, GB."""
    groups = num_groups(config, train, problem.sequences)

    def one(candidate: Candidate) -> dict[str, Any]:
        return {
            "parallel": dataclasses.asdict(candidate.parallel),
            "recompute": candidate.model.recompute,
            "row_tokens": candidate.row_tokens,
            "data_parallel": candidate.replicas,
            "fits": problem.fits(candidate),
            "stages": [describe_stage(stage) for stage in candidate.stages],
            "time": dataclasses.asdict(candidate.time) | {"bubble_share": candidate.time.bubble_share},
            "run": summarize(problem, candidate, groups),
        }

    return {
        "config": dataclasses.asdict(config),
        "parameters": count_parameters(problem.family),
        "hardware": dataclasses.asdict(problem.hardware),
        "limit_bytes": problem.limit,
        "groups": groups,
        "sequences": problem.sequences.where,
        "run": one(own) if own else None,
        "suggestions": [one(candidate) for candidate in found],
    }


def describe_stage(stage: StageMemory) -> dict[str, Any]:
    """A stage's memory with its sums."""
    return dataclasses.asdict(stage) | {"static": stage.static, "dynamic": stage.dynamic, "total": stage.total}
