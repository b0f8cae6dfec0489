"""The truth about a training step: plain `transformers`, torch's AdamW, and losses spelled out. It knows nothing of ours.

All responses that a loss compares are one padded batch, each after its own copy of its prompt. Models are causal, so padding at
the end of a row changes nothing before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, MixtralConfig

from mpo_megatron.config import LoraConfig
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.families import read_family
from mpo_megatron.families.adapters import choose_adapter
from tests.distributed.adapters import attach_adapters
from tests.distributed.expert_oracle import Routed
from tests.distributed.parity_cases import Case
from tests.float64 import Float64

NUM_STEPS = 3
OPTIMIZER: dict[str, Any] = {
    **{"lr": 0.3, "min_lr": 0.3, "schedule": "constant", "warmup_fraction": 0.0},
    **{"beta1": 0.9, "beta2": 0.95, "eps": 0.3, "weight_decay": 0.1, "clip_grad": 1.0},
}
"""AdamW's ε is of the size of gradients: with a small one every weight moves by the learning rate whatever the size of its
gradient, and where that is near 0 in the direction of its rounding error. The clipped gradient's scale matters, too, then."""

FLOOR = 1e-2
"""A gradient much smaller than the model's largest is a difference of large terms that cancel: its error is that of the terms. So
a tensor's largest value counts as at least this much of the model's."""

BETA = 0.1
SPO: dict[str, Any] = {"alpha": 0.1, "gamma": 0.0, "regularizer": "token_kl", "regularizer_weight": 0.3}


class Responses:
    """Responses of several groups as one padded batch."""

    def __init__(self, groups: Sequence[TokenizedGroup], chosen: Sequence[Sequence[int]]) -> None:
        pairs = [(group.prompt_tokens, group.response_tokens[k]) for group, ks in zip(groups, chosen, strict=True) for k in ks]
        self.sizes = [len(ks) for ks in chosen if ks]
        """Rows of each group that has any."""
        self.lengths = [(len(prompt), len(prompt) + len(response)) for prompt, response in pairs]
        """Tokens of prompt, and of prompt and response, of each row."""
        rows = [torch.from_numpy(np.concatenate(pair).astype(np.int64)) for pair in pairs]
        self.tokens = pad_sequence(rows, batch_first=True)
        """[N, T]."""
        # A response's first token is predicted from the prompt's last; without a prompt, it is given.
        place = torch.arange(self.tokens.shape[1] - 1)
        self.scored = torch.stack([(place >= max(start, 1) - 1) & (place < end - 1) for start, end in self.lengths])
        """[N, T - 1]: whether a place predicts a token of the response."""
        self.groups = torch.full(self.tokens.shape, -1)
        """[N, T]: the group in whose routing a place counts, the prompt in its first row; -1: padding, and last tokens."""
        row = 0
        for group, size in enumerate(self.sizes):
            for k in range(size):
                start, end = self.lengths[row]
                self.groups[row, (start if k else 0) : end - 1] = group
                row += 1

    def predictions(self, model: Any) -> Tensor:
        """[N, T - 1, V] log-probabilities of the next token."""
        return model(self.tokens).logits[:, :-1].float().log_softmax(dim=-1)

    def logps(self, predictions: Tensor) -> list[Tensor]:
        """log π(y | x) of each response, by group."""
        return self._by_group(predictions.gather(2, self.tokens[:, 1:, None]).squeeze(2))

    def divergences(self, ours: Tensor, theirs: Tensor) -> list[Tensor]:
        """Σ over the tokens of each response of KL(ours ‖ theirs) of the next token, over the whole vocabulary; by group."""
        return self._by_group((ours.exp() * (ours - theirs)).sum(dim=-1))

    def _by_group(self, values: Tensor) -> list[Tensor]:
        return list((values * self.scored).sum(dim=1).split(self.sizes))


@dataclass(frozen=True)
class Compared:
    """What a loss may use of a group's chosen responses, [K] each."""

    rewards: np.ndarray[Any, Any]
    policy: Tensor
    """log π(y | x)."""
    reference: Tensor
    divergence: Tensor


def choose_all(rewards: np.ndarray[Any, Any]) -> list[int]:
    """All responses of a group that has some above its mean."""
    return list(range(len(rewards))) if (rewards > rewards.mean()).any() else []


def mpo_loss(group: Compared) -> Tensor:
    """mpo Eq. 4–5 with the mean partition."""
    terms = BETA * (group.policy - group.reference)
    preferred = torch.from_numpy(group.rewards > group.rewards.mean())
    return terms.logsumexp(0) - terms[preferred].logsumexp(0)


def choose_ends(rewards: np.ndarray[Any, Any]) -> list[int]:
    """The best and the worst response of a group that has both."""
    best, worst = int(rewards.argmax()), int(rewards.argmin())
    return [best, worst] if best != worst else []


def spo_loss(group: Compared) -> Tensor:
    """spo Eq. 9 on best and worst, with the token-wise KL of both (Table 4)."""
    best, worst = group.policy
    margin = torch.nn.functional.logsigmoid(SPO["alpha"] * (best - worst)) / SPO["alpha"]
    return SPO["regularizer_weight"] * group.divergence.mean() - margin


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss as its paper has it."""

    params: dict[str, Any]
    """Hyper-parameters."""
    choose: Callable[[np.ndarray[Any, Any]], list[int]]
    """The responses that it compares, from the rewards of a group; none where there is nothing to compare."""
    compute: Callable[[Compared], Tensor]
    """Of a group; a step has their mean."""


LOSSES = {
    "mpo": Loss(params={"beta": BETA}, choose=choose_all, compute=mpo_loss),
    "spo": Loss(params=SPO, choose=choose_ends, compute=spo_loss),
}


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What the oracle finds."""

    loss: float
    norm: float
    gradients: dict[str, Tensor]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    measured: dict[str, float]
    """Metrics of routers in the first step."""

    def differences(self, loss: float, norm: float, gradients: dict[str, Tensor], after: dict[str, Tensor]) -> Differences:
        """How far another computation's numbers are from these."""
        largest = max(gradient.abs().max().item() for gradient in self.gradients.values())
        gradient, gradient_name = farthest(gradients, self.gradients, FLOOR * largest)
        weight, weight_name = farthest(after, self.after, 0.0)
        return Differences(
            loss=abs(loss - self.loss) / abs(self.loss),
            norm=abs(norm - self.norm) / self.norm,
            gradients=gradient,
            gradient_name=gradient_name,
            weights=weight,
            weight_name=weight_name,
        )


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Relative differences from a truth, and the tensors with the largest."""

    loss: float
    norm: float
    gradients: float
    gradient_name: str
    weights: float
    weight_name: str


def farthest(ours: dict[str, Tensor], theirs: dict[str, Tensor], floor: float) -> tuple[float, str]:
    """The largest difference over all tensors, each relative to its largest value or to the floor, and the tensor's name."""
    assert set(ours) == set(theirs), sorted(set(ours) ^ set(theirs))[:4]
    scale = {name: max(tensor.abs().max().item(), floor) for name, tensor in theirs.items()}
    return max(((ours[name] - theirs[name]).abs().max().item() / scale[name], name) for name in theirs)


def find_truth(
    case: Case,
    groups: Sequence[TokenizedGroup],
    policy_folder: Path,
    reference_folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
) -> Truth:
    """Three steps of plain `transformers`; with adapters, of PEFT.

    Args:
        case: of which only model, loss, experts and adapters count
        dtype: of all computations
    """
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager" if case.model == "gemma2" else None,  # other implementations ignore score caps
            experts_implementation="eager" if dtype is torch.float64 else None,  # others have no float64
        )
        for folder in (policy_folder, reference_folder)
    )
    weights_of: Callable[..., dict[str, Tensor]] = copy_weights
    if case.lora.get("quantize"):
        for model in (policy, reference):
            round_to_nf4(model)
    if case.lora:
        weights_of = attach_adapters(policy, choose_adapter(read_family(policy.config), LoraConfig(**case.lora)))
    for model in (policy, reference):
        model.to(dtype)
    with Float64() if dtype is torch.float64 else contextlib.nullcontext():
        return run_steps(case, groups, policy, reference, weights_of)


def run_steps(
    case: Case, groups: Sequence[TokenizedGroup], policy: Any, reference: Any, weights_of: Callable[..., dict[str, Tensor]]
) -> Truth:
    """Three steps of a policy.

    Args:
        weights_of: copies of the trained weights, or of their gradients, by name
    """
    loss = LOSSES[case.loss]
    rewards = [np.asarray(group.rewards) for group in groups]
    chosen = [loss.choose(values) for values in rewards]
    responses = Responses(groups, chosen)
    routed = Routed(policy, reference, responses.tokens, responses.groups.flatten(), case.experts) if case.experts else None
    with torch.no_grad():
        theirs = responses.predictions(reference)
    given = [values[ks] for values, ks in zip(rewards, chosen, strict=True) if ks]

    def compute_loss() -> Tensor:
        ours = responses.predictions(policy if routed is None else routed)
        columns = (given, responses.logps(ours), responses.logps(theirs), responses.divergences(ours, theirs))
        return torch.stack([loss.compute(Compared(*values)) for values in zip(*columns, strict=True)]).mean()

    adam = build_adam(policy)
    before = weights_of(policy)
    found: dict[str, Any] = {}
    for step in range(NUM_STEPS):
        adam.zero_grad()
        value = compute_loss()
        added, measured = (0.0, {}) if routed is None else routed.terms()
        (value + added).backward()
        if step == 0:
            found = {"loss": value.item(), "gradients": weights_of(policy, gradients=True), "measured": measured}
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), OPTIMIZER["clip_grad"])
        found.setdefault("norm", norm.item())
        adam.step()
    return Truth(**found, before=before, after=weights_of(policy))


def build_adam(model: Any) -> torch.optim.AdamW:
    """torch's AdamW on the weights that are trained; biases and norms do not decay."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [weight for weight in weights if weight.dim() > 1], "weight_decay": OPTIMIZER["weight_decay"]},
            {"params": [weight for weight in weights if weight.dim() == 1], "weight_decay": 0.0},
        ],
        lr=OPTIMIZER["lr"],
        betas=(OPTIMIZER["beta1"], OPTIMIZER["beta2"]),
        eps=OPTIMIZER["eps"],
    )


@torch.no_grad()
def round_to_nf4(model: Any) -> None:
    """Round the linear layers of attention and MLPs to the values of bitsandbytes' NF4."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for name, weight in model.named_parameters():
        if weight.dim() > 1 and "proj" in name:
            weight.copy_(dequantize_4bit(*quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4")))


def copy_weights(model: Any, *, gradients: bool = False) -> dict[str, Tensor]:
    """Copies of a model's weights, or of their gradients, under the names they have in checkpoints."""
    named = {name: (weight.grad if gradients else weight).detach().clone() for name, weight in model.named_parameters()}
    split = split_experts(named)
    return mixtral_names(split) if isinstance(model.config, MixtralConfig) else split


def split_experts(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts one by one, as in checkpoints; `transformers` stacks them when it loads them."""
    split: dict[str, Tensor] = {}
    for name, tensor in named.items():
        if ".experts." not in name:
            split[name] = tensor
            continue
        prefix, kind = name.rsplit(".", 1)
        for expert, matrix in enumerate(tensor):
            parts = {"gate_proj": matrix[: len(matrix) // 2], "up_proj": matrix[len(matrix) // 2 :]}
            for part, rows in (parts if kind == "gate_up_proj" else {kind: matrix}).items():
                split[f"{prefix}.{expert}.{part}.weight"] = rows
    return split


MIXTRAL_NAMES = {".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def mixtral_names(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mixtral's names in checkpoints; those in `transformers` are every family's."""
    renamed = {}
    for name, tensor in named.items():
        for new, old in MIXTRAL_NAMES.items():
            name = name.replace(new, old)
        renamed[name] = tensor
    return renamed
