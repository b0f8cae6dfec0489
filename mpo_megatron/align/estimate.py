"""How long training may take on this machine, before anything is written."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import torch

from mpo_megatron import device
from mpo_megatron.align.defaults import fastest, machine_workload
from mpo_megatron.align.plan import Stages, count_rows
from mpo_megatron.config import AlignConfig, PlanConfig, PrepareConfig, require
from mpo_megatron.config.sections import has_option
from mpo_megatron.data.chat import Chat
from mpo_megatron.data.group import Group
from mpo_megatron.data.prepare import open_streams
from mpo_megatron.data.tokenizing import load_chat
from mpo_megatron.plan.hardware import TABLE
from mpo_megatron.plan.plan import build_problem, summarize
from mpo_megatron.train.launcher import count_ranks

SAMPLED_ROWS = 200
"""Rows whose lengths represent all."""


def estimate(config: AlignConfig, stages: Stages) -> str:
    """In words, how long training takes here: by `mpo plan` on GPUs that it knows, on a CPU by a measured matrix product."""
    lengths = sample_lengths(stages.prepare) | {"groups": max(1, count_rows(config.data, config.prepare))}
    train = stages.train
    if device.has_gpu():
        workload = machine_workload(train, stages.model, config.nproc, lengths)
        if workload is None:
            return f"no estimate: mpo plan does not know {torch.cuda.get_device_name()}; it knows {', '.join(TABLE)}."
        candidate = None if has_option(config.train, "parallel") else fastest(workload)
        speed = f"{workload.gpus} × {workload.hardware.name}"
    else:
        ranks = config.nproc or count_ranks(train.parallel)
        peak = measure_peak()
        plan = PlanConfig(gpus=ranks, model=str(stages.model), hardware="h100", **lengths)
        workload = build_problem(plan, train)
        hardware = replace(workload.hardware, bf16_tflops=peak / ranks, memory_gib=1e6)  # ranks share the cores
        workload, candidate = replace(workload, hardware=hardware), None
        speed = f"{peak:.2f} TFLOP/s, the speed of a matrix product here now"
    if candidate is None:
        candidate = workload.evaluate(train.parallel, train.model.recompute, train.data.row_tokens)
    groups = round(lengths["groups"] * train.epochs) if not train.max_steps else train.max_steps * train.data.groups_per_step
    figures = summarize(workload, candidate, groups)
    minutes, reference = (60 * hours for hours in (figures["hours"] + figures["reference_hours"], figures["reference_hours"]))
    share = f", {reference:,.0f} of them for the reference's log-probs" if reference else ", no reference log-probs among them"
    return f"training sees {groups:,} groups: about {minutes:,.0f} minutes on {speed}{share}."


def sample_lengths(prepare: PrepareConfig) -> dict[str, Any]:
    """Mean lengths of the first rows, for `mpo plan`.

    Raises:
        ConfigError: no row gives a group.
    """
    chat = load_chat(prepare)
    streams = open_streams(replace(prepare, max_rows=SAMPLED_ROWS))
    groups = [item for stream in streams for item in stream.items if isinstance(item, Group)]
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


def measure_peak() -> float:
    """TFLOP/s of a matrix product in float32 on this machine's processor."""
    left = torch.randn(1024, 1024)
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - began)
    return 2 * 1024**3 / best / 1e12
