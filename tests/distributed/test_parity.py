"""Loss and gradients of a step equal those of plain `transformers` and autograd, in every layout.

The oracle knows nothing of ours: it runs each response on its own after its own copy of the prompt, and spells MPO out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mpo_megatron.config import ConvertConfig
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.model.convert import convert
from tests.distributed.launch import run_ranks
from tests.tiny import random_groups, save_groups, save_model

pytestmark = pytest.mark.distributed

BETA = 0.1
MODELS = {
    "qwen3": {"model_type": "qwen3", "tied": False},
    "qwen3-tied": {"model_type": "qwen3", "tied": True},
    "qwen2": {"model_type": "qwen2", "tied": False},
    "qwen2-tied": {"model_type": "qwen2", "tied": True},
}
# Float32 sums of a few thousand products in another order differ by some 1e-6 of the largest gradient.
GRADIENT_TOLERANCE = 2e-5
LOSS_TOLERANCE = 1e-5


def response_logp(model: Any, group: TokenizedGroup, k: int) -> torch.Tensor:
    """log π(y_k | x) by `transformers`, prompt and response alone in the batch."""
    prompt, response = (torch.from_numpy(tokens.astype("int64")) for tokens in (group.prompt_tokens, group.response_tokens[k]))
    logits = model(torch.cat((prompt, response))[None]).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(dim=-1).gather(1, response[:, None]).sum()


def mpo_oracle(policy: Any, reference: Any, groups: Sequence[TokenizedGroup]) -> torch.Tensor:
    """mpo Eq. 4–5 with the mean partition, averaged over the groups that have both sets."""
    losses = []
    for group in groups:
        assert group.rewards is not None
        mean = group.rewards.mean()
        preferred = [k for k, reward in enumerate(group.rewards) if reward > mean]
        if not preferred:
            continue
        terms = []
        for k in range(len(group.rewards)):
            with torch.no_grad():
                base = response_logp(reference, group, k)
            terms.append(BETA * (response_logp(policy, group, k) - base))
        everything = torch.stack(terms)
        losses.append(everything.logsumexp(0) - everything[preferred].logsumexp(0))
    return torch.stack(losses).mean()


SPO = {"alpha": 0.1, "gamma": 0.0, "regularizer": "token_kl", "regularizer_weight": 0.3}


def divergence(policy: Any, reference: Any, group: TokenizedGroup, k: int) -> torch.Tensor:
    """Σ over the tokens of y_k of KL(π_θ ‖ π_ref) of the next token, over the whole vocabulary."""
    prompt, response = (torch.from_numpy(tokens.astype("int64")) for tokens in (group.prompt_tokens, group.response_tokens[k]))
    row = torch.cat((prompt, response))[None]
    ours, theirs = (model(row).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1) for model in (policy, reference))
    return (ours.exp() * (ours - theirs.detach())).sum()


def spo_oracle(policy: Any, reference: Any, groups: Sequence[TokenizedGroup]) -> torch.Tensor:
    """spo Eq. 9 on best and worst, with the token-wise KL of both (Table 4), averaged over the groups that have both."""
    losses = []
    for group in groups:
        assert group.rewards is not None
        best, worst = int(group.rewards.argmax()), int(group.rewards.argmin())
        if best == worst:
            continue
        margin = response_logp(policy, group, best) - response_logp(policy, group, worst)
        kl = (divergence(policy, reference, group, best) + divergence(policy, reference, group, worst)) / 2
        losses.append(-torch.nn.functional.logsigmoid(SPO["alpha"] * margin) / SPO["alpha"] + SPO["regularizer_weight"] * kl)
    return torch.stack(losses).mean()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Models in both formats, groups, and the oracle's loss and gradients for each model."""
    folder = tmp_path_factory.mktemp("parity")
    groups = [
        *random_groups(5, seed=4),
        *random_groups(1, seed=7, max_responses=16, response_tokens=(1, 8), tied_share=0.0),
        *random_groups(2, seed=8, response_tokens=(1, 1), tied_share=0.0),  # an end token and nothing else
    ]
    groups = [dataclasses.replace(group, group_id=f"group-{index}") for index, group in enumerate(groups)]
    assert max(len(group.response_tokens) for group in groups) == 16
    oracles = {}
    for name, options in MODELS.items():
        for role, seed in (("policy", 1), ("reference", 2)):
            hf = save_model(folder / f"{name}-{role}-hf", seed=seed, **options)
            convert(ConvertConfig(input=str(hf), output=str(folder / f"{name}-{role}")))
        policy, reference = (
            AutoModelForCausalLM.from_pretrained(folder / f"{name}-{role}-hf", dtype=torch.float32)
            for role in ("policy", "reference")
        )
        for label, oracle in ((name, mpo_oracle), (f"{name}-spo", spo_oracle)):
            policy.zero_grad()
            loss = oracle(policy, reference, groups)
            loss.backward()
            oracles[label] = (loss.item(), {key: parameter.grad.clone() for key, parameter in policy.named_parameters()})
    save_groups(folder / "groups", groups, folder / "qwen3-policy-hf")
    return {"folder": folder, "oracles": oracles}


def run_cases(world: dict[str, Any], num_ranks: int, cases: list[dict[str, Any]], tag: str) -> list[dict[str, Any]]:
    folder: Path = world["folder"]
    for index, case in enumerate(cases):
        name = case.pop("name")
        case |= {
            "model": f"{name}-policy",
            "reference": f"{name}-reference",
            "gradients": f"gradients-{tag}-{index}",
            "oracle": case.get("oracle", name),
        }
    spec = {"folder": str(folder), "cases": cases, "results": str(folder / f"results-{tag}.json")}
    (folder / f"spec-{tag}.json").write_text(json.dumps(spec))
    run_ranks(num_ranks, "tests.distributed.parity_worker", [str(folder / f"spec-{tag}.json")])
    results: list[dict[str, Any]] = json.loads((folder / f"results-{tag}.json").read_text())
    return results


def check_cases(world: dict[str, Any], num_ranks: int, cases: list[dict[str, Any]], tag: str) -> list[dict[str, Any]]:
    """Run the cases and compare each with the oracle."""
    results = run_cases(world, num_ranks, cases, tag)
    folder: Path = world["folder"]
    for case, result in zip(cases, results, strict=True):
        loss, gradients = world["oracles"][case["oracle"]]
        assert result["loss"] == pytest.approx(loss, abs=LOSS_TOLERANCE), case
        exported = folder / f"{case['gradients']}-hf"
        convert(ConvertConfig(input=str(folder / case["gradients"]), output=str(exported)))
        ours = load_file(exported / "model.safetensors")
        largest = max(gradient.abs().max().item() for gradient in gradients.values())
        assert set(ours) == set(gradients)
        for key, gradient in gradients.items():
            worst = (ours[key] - gradient).abs().max().item()
            assert worst <= GRADIENT_TOLERANCE * largest, f"{case}: gradient of {key} is off by {worst}"
    return results


def test_one_rank(world: dict[str, Any]) -> None:
    cases = [{"name": name} for name in MODELS]
    cases += [
        {"name": "qwen3", "layout": "unshared", "row_tokens": 512},
        {"name": "qwen3", "two_phase": True},
        {"name": "qwen3", "two_phase": True, "row_tokens": 64},  # groups split over rows
        {"name": "qwen2-tied", "model_options": {"recompute": "full"}},
        {"name": "qwen3", "model_options": {"recompute": "selective", "logprob_chunk": 7}},
    ]
    cases += [
        {"name": name, "loss": "spo", "params": SPO, "oracle": f"{name}-spo", "two_phase": two_phase}
        for name, two_phase in (("qwen3", False), ("qwen2-tied", True))
    ]
    results = check_cases(world, 1, cases, "one")
    assert results[6]["split"] > 0


def test_two_ranks(world: dict[str, Any]) -> None:
    layouts: list[dict[str, Any]] = [{"tensor": 2}, {"tensor": 2, "sequence": False}, {"pipeline": 2}, {"context": 2}, {}]
    cases = [{"name": name, "parallel": layout} for layout in layouts for name in ("qwen3", "qwen2-tied")]
    cases += [
        {"name": "qwen3-tied", "parallel": {"tensor": 2}, "layout": "unshared", "row_tokens": 512},
        {"name": "qwen3", "parallel": {"tensor": 2}, "model_options": {"recompute": "full"}},
        {"name": "qwen3", "parallel": {"context": 2}, "layout": "unshared", "row_tokens": 512},
        {"name": "qwen2", "parallel": {"context": 2}, "model_options": {"recompute": "full", "logprob_chunk": 7}},
        *(
            {"name": "qwen3", "loss": "spo", "params": SPO, "oracle": "qwen3-spo", "parallel": layout}
            for layout in ({"tensor": 2}, {"context": 2}, {})
        ),
        {"name": "qwen3", "parallel": {}, "two_phase": True, "row_tokens": 64},  # groups split over replicas
        {"name": "qwen2", "parallel": {"pipeline": 2}, "two_phase": True, "row_tokens": 64},
        {"name": "qwen3-tied", "parallel": {"context": 2}, "two_phase": True, "row_tokens": 64},
    ]
    results = check_cases(world, 2, cases, "two")
    assert all(result["split"] > 0 for result in results[-3:])


def test_four_ranks(world: dict[str, Any]) -> None:
    layouts: list[dict[str, Any]] = [{"tensor": 2, "pipeline": 2}, {"pipeline": 4}, {"tensor": 2}, {"pipeline": 2}]
    layouts += [
        {"context": 2, "tensor": 2},  # each tensor-parallel rank has one key/value head, which both context ranks need
        {"context": 2, "tensor": 2, "sequence": False},
        {"context": 2, "pipeline": 2},
        {"context": 2},  # two replicas of two ranks
        {"context": 4},
    ]
    cases = [{"name": name, "parallel": layout} for layout in layouts for name in ("qwen3", "qwen2-tied")]
    cases += [
        {"name": "qwen3", "parallel": {"context": 2, "tensor": 2}, "two_phase": True, "row_tokens": 64},
        {"name": "qwen2", "parallel": {"context": 2}, "two_phase": True, "row_tokens": 64},
    ]
    results = check_cases(world, 4, cases, "four")
    assert all(result["split"] > 0 for result in results[-2:])
