"""How long training may take on this machine, before anything is written."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from mpo_megatron import device
from mpo_megatron.align.plan import Stages, count_rows
from mpo_megatron.config import AlignConfig, PlanConfig, PrepareConfig, require
from mpo_megatron.data.chat import Chat
from mpo_megatron.data.group import Group
from mpo_megatron.data.readers import read_inputs
from mpo_megatron.data.tokenizing import load_chat
from mpo_megatron.plan.plan import build_problem, num_groups, summarize

SAMPLED_ROWS = 200
"""Rows whose lengths stand for all."""


@dataclass(frozen=True, kw_only=True)
class RunEstimate:
    """How long training may take."""

    groups: int
    minutes: float
    peak_tflops: float
    """Measured, of matrix products in float32."""


def estimate(config: AlignConfig, stages: Stages) -> RunEstimate:
    """Time of training on this machine: arithmetic over a measured peak of matrix products, before anything is written."""
    rows = max(1, count_rows(config.data, config.prepare))
    lengths = sample_lengths(stages.prepare)
    plan = PlanConfig(gpus=1, model=str(stages.model), groups=rows, hardware="h100", **lengths)
    problem = build_problem(plan, stages.train)
    peak = measure_peak()
    hardware = dataclasses.replace(problem.hardware, bf16_tflops=peak, memory_gib=1e6)
    problem = dataclasses.replace(problem, hardware=hardware)
    candidate = problem.evaluate(stages.train.parallel, stages.train.model.recompute, stages.train.data.row_tokens, 1)
    groups = num_groups(plan, stages.train, problem.sequences)
    figures = summarize(problem, candidate, groups)
    return RunEstimate(groups=groups, minutes=60 * (figures["hours"] + figures["reference_hours"]), peak_tflops=peak)


def sample_lengths(prepare: PrepareConfig) -> dict[str, Any]:
    """Mean lengths of the first rows, for `mpo plan`.

    Raises:
        ConfigError: no row gives a group.
    """
    chat = load_chat(prepare)
    groups = [item for stream in _streams(prepare, SAMPLED_ROWS) for item in stream if isinstance(item, Group)]
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


def _streams(prepare: PrepareConfig, max_rows: int) -> list[Any]:
    streams = read_inputs(
        prepare.inputs,
        format_name=prepare.format,
        split=prepare.split,
        subset=prepare.subset,
        rating=prepare.rating,
        columns=prepare.columns,
        drop_ranks=prepare.drop_ranks,
        max_rows=max_rows,
    )
    return [stream.items for stream in streams]


def measure_peak() -> float:
    """TFLOP/s of a matrix product on this machine."""
    where = "cuda" if device.has_gpu() else "cpu"
    left = torch.randn(1024, 1024, device=where)
    best = math.inf
    for _ in range(5):
        device.synchronize()
        began = time.perf_counter()
        left @ left
        device.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * 1024**3 / best / 1e12
