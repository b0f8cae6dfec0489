"""What a checkpoint learned, measured with plain `transformers`: mpo_megatron computes none of the model's outputs here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Sets = tuple[list[bool], list[bool]]
"""For one group's responses: indices of preferred ones (Y+) and of others (Y−)."""
_BATCH = 64
"""Sequences per forward pass."""


@dataclass(frozen=True)
class HeldOutGroup:
    """One prompt with its responses, as text."""

    prompt: str
    """The rendered prompt."""
    responses: tuple[str, ...]
    preferred: Sets


@dataclass(frozen=True)
class Scores:
    """One model's scores of every response of every group, in nats."""

    total: list[list[float]]
    """log π(y | x), summed over the response's tokens."""
    per_token: list[list[float]]
    """The same, divided by the number of tokens."""


def load_held_out(folder: Path) -> list[HeldOutGroup]:
    """The held-out groups with contrast: a response above the group's mean reward (or labelled chosen), and another one."""
    from mpo_megatron.data.store import load_groups

    data = load_groups(folder)
    preferred = ((data.text(index), _split_by_preference(data.rewards(index), data.labels(index))) for index in range(len(data)))
    return [HeldOutGroup(*text, sets) for text, sets in preferred if all(any(flags) for flags in sets)]


def _split_by_preference(rewards: Any, labels: Any) -> Sets:
    """A group's preferred and other responses, by training's own rule, because rounding can decide on which side a reward is."""
    import torch

    from mpo_megatron.losses import GroupBatch, PartitionParams, compute_partition

    given = torch.tensor(labels if rewards is None else rewards)[None]
    batch = GroupBatch(
        policy_logps=torch.zeros(given.shape),
        rewards=None if rewards is None else given,
        labels=given if rewards is None else None,
        valid=torch.ones(given.shape, dtype=torch.bool),
    )
    positive, negative = compute_partition(batch, PartitionParams(partition="labels" if rewards is None else "mean"))
    return positive[0].tolist(), negative[0].tolist()


def score_groups(checkpoint: Path, groups: Sequence[HeldOutGroup], max_response_tokens: int) -> Scores:
    """Load a Hugging Face checkpoint and compute the log-prob of every response."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True).eval()
    sequences = []
    for group in groups:
        prompt = tokenizer.encode(group.prompt, add_special_tokens=False)
        for text in group.responses:
            response = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
            sequences.append((prompt, response[:max_response_tokens]))
    with torch.inference_mode():
        totals = [total for batch in _batches(sequences) for total in _sum_logps(model, batch)]
    lengths = [len(response) for _, response in sequences]
    per_token = [total / length for total, length in zip(totals, lengths, strict=True)]
    return Scores(_regroup(totals, groups), _regroup(per_token, groups))


def _sum_logps(model: Any, sequences: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """log π(response | prompt) of each sequence, padded on the right, where causal attention never looks."""
    import torch

    longest = max(len(prompt) + len(response) for prompt, response in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    scored = torch.zeros(len(sequences), longest)
    for row, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        scored[row, len(prompt) : end] = 1
    logps = model(input_ids=ids).logits[:, :-1].log_softmax(dim=-1)
    picked = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)
    totals: list[float] = (picked * scored[:, 1:]).double().sum(dim=1).tolist()
    return totals


def _batches(sequences: Sequence[tuple[list[int], list[int]]]) -> Iterable[Sequence[tuple[list[int], list[int]]]]:
    return (sequences[start : start + _BATCH] for start in range(0, len(sequences), _BATCH))


def _regroup(values: Sequence[float], groups: Sequence[HeldOutGroup]) -> list[list[float]]:
    iterator = iter(values)
    return [[next(iterator) for _ in group.responses] for group in groups]


def subtract(scores: Scores, reference: Scores) -> list[list[float]]:
    """log π / π_ref of every response, in nats: the implicit reward of preference optimization."""
    return [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(scores.total, reference.total, strict=True)]


def compute_accuracy(values: Sequence[Sequence[float]], groups: Sequence[HeldOutGroup]) -> float:
    """Share of the pairs Y+ × Y− in which the preferred response has the larger value; a tie counts half."""
    outcomes = []
    for row, group in zip(values, groups, strict=True):
        chosen, rejected = _split(row, group)
        outcomes += [1.0 if a > b else 0.5 if a == b else 0.0 for a in chosen for b in rejected]
    return sum(outcomes) / len(outcomes)


def compute_margin(values: Sequence[Sequence[float]], groups: Sequence[HeldOutGroup]) -> float:
    """Mean over Y+ minus mean over Y−, averaged over groups."""
    margins = []
    for row, group in zip(values, groups, strict=True):
        chosen, rejected = _split(row, group)
        margins.append(sum(chosen) / len(chosen) - sum(rejected) / len(rejected))
    return sum(margins) / len(margins)


def _split(row: Sequence[float], group: HeldOutGroup) -> tuple[list[float], list[float]]:
    chosen, rejected = ([value for value, flag in zip(row, flags, strict=True) if flag] for flags in group.preferred)
    return chosen, rejected
