"""Estimate the training time on this machine, before anything is written."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mpo_megatron import device
from mpo_megatron.align.defaults import fastest, machine_workload
from mpo_megatron.align.plan import Stages, count_rows
from mpo_megatron.config import AlignConfig, GenerateConfig, IterateConfig, PlanConfig, PrepareConfig, TrainConfig, require
from mpo_megatron.config.sections import has_option
from mpo_megatron.data.chat import Chat
from mpo_megatron.data.group import Group
from mpo_megatron.data.prepare import open_streams
from mpo_megatron.data.readers import build_groups
from mpo_megatron.data.spill import Spill
from mpo_megatron.data.tokenizing import load_chat
from mpo_megatron.plan.figures import summarize
from mpo_megatron.plan.hardware import TABLE
from mpo_megatron.plan.parameters import count_parameters
from mpo_megatron.plan.plan import build_problem
from mpo_megatron.plan.search import Workload
from mpo_megatron.rollout.prompts import load_prompts
from mpo_megatron.rollout.rounds import build_round
from mpo_megatron.train.launcher import count_ranks

SAMPLED_ROWS = 200
"""Number of rows whose lengths represent all."""
VLLM_BATCH = 256
"""Number of sequences that vLLM decodes concurrently by default."""


def estimate(config: AlignConfig, stages: Stages) -> str:
    """The training time here, as text: from `mpo plan` on GPUs that it knows, on a CPU from a measured matrix product."""
    lengths = sample_lengths(stages.prepare) | {
        "groups": max(1, count_rows(config.data, "data", stages.prepare) - stages.prepare.held_out)
    }
    train = stages.train
    machine = find_machine(train, stages.model, config.nproc, lengths)
    if isinstance(machine, str):
        return machine
    groups = round(lengths["groups"] * train.epochs) if not train.max_steps else train.max_steps * train.data.groups_per_step
    minutes, reference = training_minutes(machine, train, groups, chooses=not has_option(config.train, "parallel"))
    return f"Training on {groups:,} groups takes {describe_minutes(minutes)} on {machine.words}; {describe_reference(reference)}."


def describe_minutes(minutes: float) -> str:
    """A duration, as text."""
    if minutes < 1:
        return "less than a minute"
    return f"about {minutes:.0f} minutes" if minutes < 120 else f"about {minutes / 60:,.0f} hours"


def describe_reference(minutes: float) -> str:
    """What the reference's log-probs add to the training time, as text."""
    if minutes == 0:
        return "no reference is needed"
    return (
        f"{describe_minutes(minutes)} of it for the reference's log-probs" if minutes >= 1 else "with the reference's log-probs"
    )


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A run on this machine."""

    workload: Workload
    words: str
    """Description of its processors."""
    gpu: bool


def find_machine(train: TrainConfig, model: Path, nproc: int | None, lengths: Mapping[str, Any]) -> Machine | str:
    """The run on this machine; or why there is no estimate, as text."""
    if device.has_gpu():
        workload = machine_workload(train, model, nproc, lengths)
        if workload is None:
            return f"no estimate: mpo plan does not know {torch.cuda.get_device_name()}; it knows {', '.join(TABLE)}."
        return Machine(workload=workload, words=f"{workload.gpus} × {workload.hardware.name}", gpu=True)
    ranks = nproc or count_ranks(train.parallel)
    peak = measure_peak(torch.float32 if train.model.precision == "fp32" else torch.bfloat16)
    workload = build_problem(PlanConfig(gpus=ranks, model=str(model), hardware="h100", **lengths), train)
    hardware = replace(workload.hardware, bf16_tflops=peak / ranks, memory_gib=1e6)  # ranks share the cores
    words = f"this machine ({peak:.2f} TFLOP/s, measured now with a matrix product)"
    return Machine(workload=replace(workload, hardware=hardware), words=words, gpu=False)


def training_minutes(machine: Machine, train: TrainConfig, groups: int, *, chooses: bool) -> tuple[float, float]:
    """Minutes of a run with this many groups, and of its reference log-probs among them.

    Args:
        chooses: on GPUs, use the fastest layout, as `mpo align` does
    """
    workload = machine.workload
    if machine.gpu and chooses:
        candidate = fastest(workload)
    else:
        rows = max(train.data.row_tokens, workload.sequences.longest)
        candidate = workload.evaluate(train.parallel, train.model.recompute, rows)
    figures = summarize(workload, candidate, groups)
    return 60 * (figures["hours"] + figures["reference_hours"]), 60 * figures["reference_hours"]


def estimate_rounds(config: IterateConfig, model: Path) -> str:
    """The time of on-policy rounds here, as text: generation, training and its reference; scorers are unknown."""
    first = build_round(config, 1)
    train, generate = first.train, first.generate
    chat = load_chat(replace(first.prepare, tokenizer=str(model)))
    sampled = load_prompts(config.prompts, chat, max_prompt_tokens=generate.max_prompt_tokens, max_prompts=SAMPLED_ROWS)
    prompts = max(1, (count_rows([config.prompts], "prompts") - config.held_out) // config.rounds)
    answer = max(1, generate.max_tokens // 2)
    lengths = {
        "prompt_tokens": max(1, round(sum(map(len, sampled.token_ids)) / max(1, len(sampled.token_ids)))),
        "response_tokens": answer,
        "responses": max(2, min(generate.num_responses, first.select.max_responses or generate.num_responses)),
        "groups": prompts,
    }
    machine = find_machine(train, model, config.nproc, lengths)
    if isinstance(machine, str):
        return machine
    tokens = prompts * generate.num_responses * answer
    held_out = config.held_out * config.held_out_responses * answer
    minutes, reference = training_minutes(machine, train, groups_of_round(config, train, prompts), chooses=False)
    made = f"{prompts:,} prompts × {generate.num_responses} answers of about {answer} tokens (half of generate.max_tokens)"
    trained = f"training takes {describe_minutes(minutes)}, {describe_reference(reference)}"
    if generate.engine == "openai":
        return (
            f"Per round: {made}: {tokens:,} tokens at the server's speed; {trained}, on {machine.words}. Scoring is not included."
        )
    rate = generation_rate(machine, generate)
    generating = tokens / rate / 60
    total = config.rounds * (generating + minutes) + (config.rounds + 1) * held_out / rate / 60
    return (
        f"Per round: {made} take {describe_minutes(generating)} at {rate:,.0f} tokens/s; {trained}. All rounds, with answers to "
        f"held-out prompts: {describe_minutes(total)} on {machine.words}. Scoring is not included."
    )


def groups_of_round(config: IterateConfig, train: TrainConfig, prompts: int) -> int:
    """Groups that a round trains on; with `optimizer = continued`, `train.max_steps` counts the steps of all rounds."""
    if not train.max_steps:
        return round(prompts * train.epochs)
    steps = train.max_steps / config.rounds if config.optimizer == "continued" else train.max_steps
    return round(steps * train.data.groups_per_step)


def generation_rate(machine: Machine, generate: GenerateConfig) -> float:
    """Tokens per second. A decoding step multiplies each weight by a batch of tokens, or on a GPU only reads it, whichever takes
    longer.

    Keys and values, prompts and the scheduler are not counted.
    """
    workload, vllm = machine.workload, generate.engine == "vllm"
    hardware, assumed = workload.hardware, workload.assumed
    gpus = generate.vllm.tensor_parallel if vllm else 1
    batch = VLLM_BATCH if vllm else generate.transformers.batch_size
    rate = hardware.bf16_tflops * 1e12 * assumed.efficiency * (gpus if machine.gpu else workload.gpus)
    seconds = batch * (workload.flops.per_token + workload.flops.per_scored) / rate
    if machine.gpu:
        read = 2 * count_parameters(workload.family) / gpus
        seconds = max(seconds, read / (hardware.memory_gbps * 1e9 * assumed.memory_efficiency))
    return batch / seconds


def sample_lengths(prepare: PrepareConfig) -> dict[str, Any]:
    """Mean lengths of the first rows, for `mpo plan`.

    Raises:
        ConfigError: no row forms a group.
    """
    chat = load_chat(prepare)
    streams, seen = open_streams(replace(prepare, max_rows=SAMPLED_ROWS)), Spill()
    groups = [item for stream in streams for item in build_groups(stream, seen).items if isinstance(item, Group)]
    require(bool(groups), f"data = {prepare.input}; none of the first {SAMPLED_ROWS} rows is a group.")
    prompts = [len(chat.prompt(group.prompt, group.tools)[1]) for group in groups]
    responses = [_length(chat, answer) for group in groups for answer in group.responses]
    return {
        "prompt_tokens": max(1, round(sum(prompts) / len(prompts))),
        "response_tokens": max(1, round(sum(responses) / len(responses))),
        "responses": max(2, round(len(responses) / len(groups))),
    }


def _length(chat: Chat, answer: Any) -> int:
    text = answer if isinstance(answer, str) else " ".join(str(message.get("content") or "") for message in answer)
    return len(chat.tokenizer.encode(text)) + 1


def measure_peak(dtype: torch.dtype) -> float:
    """TFLOP/s of a matrix product on this machine's processor."""
    left = torch.randn(1024, 1024, dtype=dtype)
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - began)
    return 2 * 1024**3 / best / 1e12
