"""Random groups for the tests, and the list of methods and settings to test."""

from __future__ import annotations

import dataclasses

import torch

from mpo_megatron.losses import GroupBatch

torch.set_num_threads(1)

# Every method, and every branch of every method's hyper-parameters. Sampled methods draw all candidates (M ≥
# K), which makes their value deterministic; test_sampling.py has the draws themselves.
CASES: list[tuple[str, dict[str, object]]] = [
    ("mpo", {}),
    ("mpo", {"partition": "median", "beta": 0.1}),
    ("mpo", {"partition": "trimmed_mean"}),
    ("mpo", {"partition": "top_bottom"}),
    ("mpo", {"partition": "top_bottom", "num_top": 1, "num_bottom": 3}),
    ("mpo", {"partition": "one_vs_rest"}),
    ("mpo", {"partition": "labels"}),
    ("wmpo", {}),
    ("wmpo", {"deviation": "signed", "alpha": 0.3}),
    ("wmpo", {"partition": "labels", "alpha": 0.3}),
    *[("swepo", {"weighting": "exp", "p": p, "alpha": 0.5, "beta": 0.05}) for p in (0, 1, 2)],
    *[("swepo", {"weighting": "power", "p": p, "beta": 0.05}) for p in (0, 1, 2)],
    *[("swepo", {"weighting": "listing", "p": p, "alpha": 0.5, "beta": 0.05}) for p in (0, 1, 2)],
    ("mpo_reference_free", {}),
    ("infonca", {}),
    ("infonca", {"alpha": 1.0, "beta": 0.1}),
    ("nca", {}),
    ("nca", {"alpha": 1.0, "beta": 0.1}),
    ("nca_reference_free", {}),
    ("nca_reference_free", {"alpha": 1.0, "beta": 0.1, "sft_weight": 0.5}),
    ("nca_reference_free", {"sft_weight": 0.1, "sft_normalization": "sequence"}),
    ("nca_pair", {}),
    ("spo", {}),
    ("spo", {"gamma": 0.0, "alpha": 0.0}),
    ("spo", {"pairing": "all_pairs", "regularizer": "log_prob"}),
    ("spo", {"pairing": "best_vs_each", "reduction": "sum", "regularizer": "importance"}),
    ("spo", {"form": "best_of_n"}),
    ("spo", {"form": "best_of_n", "alpha": 0.0, "regularizer": "log_prob"}),
    ("spo", {"form": "ranked"}),
    ("spo", {"form": "ranked", "eta": 0.5, "regularizer": "importance", "alpha": 0.1}),
    ("spo", {"form": "ranked", "eta": 0.0, "alpha": 0.0}),
    ("mcpo", {"sampling": "max", "num_negatives": 2}),
    ("mcpo", {"sampling": "min"}),
    ("mcpo", {"num_negatives": 99}),
    ("rnce", {"num_negatives": 99, "beta": 0.1}),
    ("dpo", {}),
    ("dpo", {"label_smoothing": 0.1, "pairing": "best_vs_each"}),
    ("dpo", {"pairing": "all_pairs", "reduction": "sum"}),
    ("dpo", {"pairing": "cross_pairs"}),
    ("dpo", {"pairing": "cross_pairs", "partition": "labels"}),
    ("dpo", {"pairing": "cross_pairs", "partition": "top_bottom"}),
    ("dpo", {"sft_weight": 0.5, "sft_normalization": "sequence"}),
    ("dpo_positive", {}),
    ("dpo_positive", {"penalty": 5.0, "beta": 0.1, "pairing": "all_pairs"}),
    ("rpo", {"pairing": "all_pairs"}),
    ("ipo", {}),
    ("ipo", {"reading": "summed"}),
    ("exo", {}),
    ("rdpo", {"label_smoothing": 0.2}),
    ("apo_zero", {}),
    ("sppo", {}),
    ("simpo", {"label_smoothing": 0.1}),
    ("simpo", {"sft_weight": 1.0}),
    ("cpo", {}),
    ("orpo", {}),
    ("slic", {}),
    ("slic", {"normalized": True, "sft_weight": 0.1, "sft_normalization": "sequence"}),
    ("kto", {"desirable_weight": 1.5}),
    ("kto", {"partition": "top_bottom"}),
    ("bco", {}),
    ("bco", {"shift": "none", "partition": "labels"}),
    ("plackett_luce", {}),
    ("sdpo", {}),
    ("sdpo", {"beta": 0.01}),
    ("sdpo", {"beta": 0.1, "form": "ranked"}),
    ("mpo_bins", {}),
    ("mpo_bins", {"beta": 0.1, "num_bins": 4}),
    ("grpo_offline", {}),
    ("sft", {}),
    ("sft", {"normalization": "sequence"}),
    ("sft", {"targets": "positives"}),
    ("sft", {"targets": "positives", "partition": "labels", "normalization": "sequence"}),
]


def name_case(case: tuple[str, dict[str, object]]) -> str:
    """A readable test id."""
    return "-".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])


def make_batch(
    num_groups: int = 8,
    num_responses: int = 6,
    *,
    seed: int = 0,
    rewards: str = "ties",
    logps: str = "wide",
    dtype: torch.dtype = torch.float64,
) -> GroupBatch:
    """Ragged random groups.

    rewards: "ties" (quarters, many equal, one group all equal), "distinct", or "spread" (1e-3 to 1e6).
    logps: "wide" (sums of −5 … −5000) or "near" (sums of −20 … −5, policy close to the reference).
    Group 0 is full; group 1 has a single response; group 2 equal rewards (ties only). Padding holds NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (num_groups, num_responses)

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    counts = torch.randint(2, num_responses + 1, (num_groups,), generator=generator)
    counts[0], counts[1] = num_responses, 1
    valid = torch.arange(num_responses) < counts.unsqueeze(-1)
    # Padding in the middle, not only at the end.
    valid = valid.gather(-1, uniform(*shape).argsort(dim=-1))
    if logps == "wide":
        policy = -5.0 * 1000.0 ** uniform(*shape)
        reference = -5.0 * 1000.0 ** uniform(*shape)
    else:
        policy = -5.0 - 15.0 * uniform(*shape)
        reference = policy + uniform(*shape) - 0.5
    if rewards == "ties":
        scores = (uniform(*shape) * 6).floor() / 4
        scores[2] = 0.75
    elif rewards == "distinct":
        scores = uniform(*shape)
    else:
        scores = 10.0 ** (9 * uniform(*shape) - 3)
    lengths = torch.randint(1, 9, shape, generator=generator)
    tokens = -3 * uniform(*shape, 8)
    reference_tokens = tokens + uniform(*shape, 8) - 0.5
    labels = torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)

    def pad(values: torch.Tensor) -> torch.Tensor:
        mask = valid if values.dim() == 2 else valid.unsqueeze(-1)
        return torch.where(mask, values, torch.nan).to(dtype)

    return GroupBatch(
        policy_logps=pad(policy),
        valid=valid,
        reference_logps=pad(reference),
        rewards=pad(scores),
        labels=labels,
        lengths=torch.where(valid, lengths, 0),
        token_logps=pad(tokens),
        reference_token_logps=pad(reference_tokens),
        generator=torch.Generator().manual_seed(seed),
    )


def as_lists(batch: GroupBatch) -> list[dict[str, list]]:
    """The groups in the oracle's form: lists over valid responses."""
    fields = {
        "logp": batch.policy_logps,
        "ref": batch.reference_logps,
        "S": batch.rewards,
        "label": batch.labels,
        "length": batch.lengths,
        "tokens": batch.token_logps,
        "ref_tokens": batch.reference_token_logps,
    }
    return [
        {key: None if values is None else values[g][batch.valid[g]].tolist() for key, values in fields.items()}
        for g in range(batch.valid.shape[0])
    ]


def index_responses(batch: GroupBatch, index: torch.Tensor) -> GroupBatch:
    """The batch with the responses of every group taken in the order `index` [K']."""
    changed = {
        field.name: getattr(batch, field.name)[:, index]
        for field in dataclasses.fields(batch)
        if isinstance(getattr(batch, field.name), torch.Tensor)
    }
    return dataclasses.replace(batch, **changed)


def get_input(batch: GroupBatch, name: str) -> str:
    """Field of the batch that receives a method's gradient."""
    return "token_logps" if name == "grpo_offline" else "policy_logps"
