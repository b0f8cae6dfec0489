"""A run's folder as training writes it, created on the spot for tests of its readers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from mpo_megatron.config import DataConfig, LossConfig, ModelConfig, TrainConfig, to_dict
from mpo_megatron.config.sealed import seal_yaml
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.outcomes import GroupOutcome, write_outcomes
from mpo_megatron.data.store import PreparedGroups, load_groups
from mpo_megatron.data.store_writing import write_groups
from mpo_megatron.files.digests import seal_line
from mpo_megatron.train.tracking.facts import record_start

HOSTILE = (
    "</script><script>document.title = 'broken'</script><img src=x onerror=\"document.title='broken'\"> "
    '<b>bold</b> \u2028 & "quoted"'
)
"""A response that would break a page that treats texts as HTML."""


def write_data(folder: Path, num_groups: int = 12, *, seed: int = 0) -> PreparedGroups:
    """Prepared groups of 2 to 4 responses with texts; group 3 has the hostile one."""
    rng = np.random.default_rng(seed)
    groups = []
    for index in range(num_groups):
        size = 2 + index % 3
        texts = [f"answer {k} to question {index}" for k in range(size)]
        if index == 3:
            texts[1] = HOSTILE
        groups.append(
            TokenizedGroup(
                group_id=f"group-{index:02d}",
                prompt_tokens=np.arange(5 + index, dtype=np.int32),
                response_tokens=tuple(np.arange(3 + k + index, dtype=np.int32) for k in range(size)),
                rewards=np.sort(rng.random(size))[::-1].copy(),
                prompt_text=f"<|im_start|>user\nquestion {index}<|im_end|>\n<|im_start|>assistant\n",
                response_texts=tuple(texts),
            )
        )
    write_groups(folder, groups, tokenizer_digest="t", vocab_size=99, end_token_ids=[], reward_kind="scores")
    return load_groups(folder)


def write_run(
    folder: Path,
    data: PreparedGroups,
    *,
    steps: int = 40,
    total_steps: int = 40,
    every: int = 10,
    held_out: bool = True,
    beta: float = 0.1,
    chosen: float = 1.0,
    outcomes: bool = True,
) -> Path:
    """A run that learned: margins grow with the steps, by group; response k of a group moves by `chosen` − k nats at the end."""
    folder.mkdir(parents=True)
    config = TrainConfig(
        output=str(folder),
        model=ModelConfig(checkpoint="model"),
        data=DataConfig(train=str(data.path), eval=str(data.path) if held_out else None, groups_per_step=8),
        loss=LossConfig(name="mpo", params={"beta": beta}),
        max_steps=total_steps,
    )
    (folder / "config.yaml").write_bytes(seal_yaml(to_dict(config)))
    record_start(
        folder,
        config,
        step=0,
        total_steps=total_steps,
        train=data,
        held_out=data if held_out else None,
        model_digest="m" * 64,
        reference_digest="m" * 64,
        data_parallel=2,
    )
    lines: list[dict[str, Any]] = []
    for step in range(steps + 1):
        share = step / total_steps
        learned = {
            "loss": 0.7 * math.exp(-2 * share),
            "margin": 5 * share,
            "accuracy": 0.5 + 0.4 * share,
            "chosen_log_ratio": chosen * share,
            "rejected_log_ratio": -2 * share,
            "kl": share,
        }
        if step:
            running = {"grad_norm": 1.0 + (step == 7) * 30, "lr": 1e-6, "skipped_groups": 0, "tokens_per_second": 1000.0 + step}
            times = {"tflops_per_rank": 0.1, "seconds": 0.5, "peak_memory_gib": 2.0, "data_wait": 0.0}
            ranks = {"slowest_rank": 1, "step_seconds_max_over_mean": 1.01}
            lines.append({"step": step, **learned, **running, **times, **ranks})
        if held_out and step % every == 0:
            lines.append({"step": step, **{f"eval/{name}": value for name, value in learned.items()}})
            if outcomes:
                write_outcomes(
                    folder, step, [_outcome(data, index, share, chosen) for index in range(len(data))], data.info.data_digest
                )
    (folder / "metrics.jsonl").write_bytes(b"".join(map(seal_line, lines)))
    return folder


def _outcome(data: PreparedGroups, index: int, share: float, chosen: float) -> GroupOutcome:
    group = data[index]
    size = group.num_responses
    moved = [share * (chosen - k) * (1 if index % 4 else -1) for k in range(size)]
    reference = [-10.0 - k for k in range(size)]
    return GroupOutcome(
        index=index,
        group_id=group.group_id,
        policy_logps=tuple(old + change for old, change in zip(reference, moved, strict=True)),
        reference_logps=tuple(reference),
        sets=(1, *([0] * (size - 1))),
    )
