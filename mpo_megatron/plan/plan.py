"""`mpo plan`: from a model, machines and lengths to memory, time and layouts, as tables and JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

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
from mpo_megatron.families import Family
from mpo_megatron.families.adapters import Adapter, choose_adapter
from mpo_megatron.files.atomic import replace_file
from mpo_megatron.hf.conversion import load_conversion, padded_vocab_size
from mpo_megatron.hf.flops import build_flop_model
from mpo_megatron.plan.figures import describe
from mpo_megatron.plan.hardware import find_hardware
from mpo_megatron.plan.memory_layout import Kernels
from mpo_megatron.plan.models import find_model
from mpo_megatron.plan.remedies import explain, explain_nothing_fits
from mpo_megatron.plan.rows import Sequences, draw_lengths, read_lengths
from mpo_megatron.plan.search import Workload, search
from mpo_megatron.plan.step_time import Assumptions
from mpo_megatron.plan.tables import print_memory, print_problem, print_suggestions, print_time
from mpo_megatron.terminal.console import Console
from mpo_megatron.train.objective import Objective, build_objective, check_data, needs_reference

DEFAULT_GROUPS = 60_000
"""Default number of groups of a run: about the number of UltraFeedback's prompts."""
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
    groups = num_groups(config, train, problem.sequences)
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
        print_time(console, problem, chosen, groups)
    if found:
        print_suggestions(console, problem, found[: config.suggest])
    if config.output:
        content = describe(config, problem, groups, own, found[: config.suggest])
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
    adapter = find_adapter(family, train)
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
        assumed=assume(config, train, objective, reference=reference),
        overhead_gib=config.overhead_gib,
        usable=config.usable,
    )


def find_adapter(family: Family, train: TrainConfig) -> Adapter | None:
    """The adapter that is trained; None if all weights are.

    Raises:
        ConfigError: the model or another option does not allow it.
    """
    adapter = choose_adapter(family, train.lora)
    if adapter is not None:
        require_no_router_losses(train.experts)
        require(
            adapter.quantize == "none" or train.model.fp8 == "none",
            f"lora.quantize = {adapter.quantize} with model.fp8 = {train.model.fp8}: set one of them to none.",
        )
    return adapter


def assume(config: PlanConfig, train: TrainConfig, objective: Objective, *, reference: bool) -> Assumptions:
    """What an estimate of time assumes.

    Args:
        reference: the run reads reference log-probs
    """
    return Assumptions(
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
