"""Default training options, from the model's size, the number of groups, and this machine's GPUs."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mpo_megatron import device
from mpo_megatron.align.precision import choose_precision
from mpo_megatron.config import (
    AlignConfig,
    ConfigError,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    PlanConfig,
    TrainConfig,
    from_dict,
    validate_unused,
)
from mpo_megatron.config.checks import within
from mpo_megatron.config.sections import has_option, set_option
from mpo_megatron.data.store import INFO_FILE, read_info
from mpo_megatron.families import Family
from mpo_megatron.plan.hardware import TABLE
from mpo_megatron.plan.parameters import part_weights, stage_parts
from mpo_megatron.plan.plan import build_problem
from mpo_megatron.plan.remedies import explain_nothing_fits
from mpo_megatron.plan.search import Candidate, Workload, search

LEARNING_RATES = ((1e9, 5e-6), (4e9, 2e-6), (math.inf, 5e-7))
"""Peak learning rate by maximum number of parameters: a starting point; the papers' 7B and 8B models use 5e-7."""
ADAPTER_RATE = 20
"""Factor of the learning rate for adapters (`lora.rank`), relative to training all weights."""
MOST_GROUPS_PER_STEP, STEPS_AT_LEAST = 128, 16
"""Number of groups per step, so that an epoch has at least some steps."""


def build_training(config: AlignConfig, model: Path, family: Family) -> tuple[TrainConfig, dict[str, object]]:
    """The training configuration, and the options chosen here.

    Raises:
        ConfigError: an option is wrong, or no layout fits this machine's GPUs.
    """
    output = Path(config.output)
    options, chosen = copy.deepcopy(config.train), dict[str, object]()

    def default(name: str, value: object) -> None:
        if not has_option(options, name):
            set_option(options, name, value)
            chosen[name] = value

    def fill(name: str, value: object) -> None:
        set_option(options, name, value)

    fill("output", str(output / "run"))
    fill("model.checkpoint", str(model))
    fill("data.train", str(output / "groups"))
    fill("data.eval", str(output / "groups-eval"))
    options.setdefault("seed", config.seed)
    for name, value in choose_options(family, options, output).items():
        default(name, value)
    prepared = (output / "groups" / INFO_FILE).is_file()
    if prepared:
        info = read_info(output / "groups")
        per_step = min(MOST_GROUPS_PER_STEP, max(1, info.num_groups // STEPS_AT_LEAST))
        default("data.groups_per_step", per_step)
        if info.reward_kind == "labels" and not has_option(options, "loss.name"):
            default("loss.params.partition", "labels")
    if device.has_gpu() and prepared and not has_option(options, "parallel"):
        groups = {"data": str(output / "groups")}
        workload = machine_workload(from_dict(TrainConfig, options, "train"), model, config.nproc, groups)
        if workload is not None:
            best = fastest(workload)
            for name, value in dataclasses.asdict(best.parallel).items():
                default(f"parallel.{name}", value)
            default("model.recompute", best.model.recompute)
            default("data.row_tokens", best.row_tokens)
    train = from_dict(TrainConfig, options, "train")
    with within("train"):
        validate_unused(train)
    return train, chosen


def trains_adapter(train: Mapping[str, Any]) -> bool:
    """Whether options of training request an adapter; a rank of 0 requests none."""
    return from_dict(LoraConfig, train.get("lora", {}), "train.lora").rank > 0


def choose_options(family: Family, train: Mapping[str, Any], output: Path) -> dict[str, object]:
    """Options of training that depend on the model and the processor alone, as far as they differ from training's own defaults.

    Args:
        train: the options that the user set
        output: the command's folder, whose training keeps its precision
    """
    chosen: dict[str, object] = {"optimizer.lr": choose_learning_rate(family, adapter=trains_adapter(train))}
    precision = choose_precision(output)
    if precision != ModelConfig.precision:
        chosen["model.precision"] = precision
    return chosen


def choose_learning_rate(family: Family, *, adapter: bool) -> float:
    """A peak learning rate to start with, for all weights or for an adapter."""
    size = count_parameters(family)
    rate = next(lr for most, lr in LEARNING_RATES if size <= most)
    return rate * ADAPTER_RATE if adapter else rate


def count_parameters(family: Family) -> int:
    """Parameters of a model."""
    parallel = ParallelConfig()
    parts = [part for stage in stage_parts(family, parallel) for part in stage]
    return sum(weight.total for part in parts for weight in part_weights(family, parallel, part, family.vocab_size))


def machine_workload(train: TrainConfig, model: Path, nproc: int | None, lengths: Mapping[str, Any]) -> Workload | None:
    """The run on this machine's GPUs, for `mpo plan`; None if `mpo plan` does not know them.

    Args:
        lengths: `data`, the folder of prepared groups, or options of `mpo plan` that replace it
    """
    name = torch.cuda.get_device_name().upper()
    hardware = next((known for known in TABLE if known.upper() in name), None)
    if hardware is None:
        return None
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    gpus = nproc or torch.cuda.device_count()
    plan = PlanConfig(gpus=gpus, gpus_per_node=gpus, model=str(model), hardware=hardware, memory_gib=memory, **lengths)
    return build_problem(plan, train)


def fastest(workload: Workload) -> Candidate:
    """The fastest layout.

    Raises:
        ConfigError: none fits.
    """
    found = search(workload)
    if not found:
        raise ConfigError(explain_nothing_fits(workload))
    return found[0]
