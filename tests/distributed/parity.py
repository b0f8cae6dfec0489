"""Every layout against plain `transformers`: runs the cases on ranks, and compares.

A case is a model, a layout over ranks and a way to run it (parity_cases.py). Ranks train three steps with Megatron's distributed
optimizer (parity_worker.py). The oracle is one process of `transformers` and torch's AdamW that spells the loss out
(parity_oracle.py). Loss, gradient norm (which clips) and every gradient of the first step are compared, and every weight after
the third, all under their Hugging Face names.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from mpo_megatron.config import ConvertConfig
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.model.convert import convert
from tests.distributed.launch import run_ranks
from tests.distributed.parity_cases import MODELS, Case
from tests.distributed.parity_oracle import LOSSES, NUM_STEPS, OPTIMIZER, Truth, find_truth
from tests.tiny import random_groups, save_groups, save_model

FLOOR = 1e-2
"""A gradient much smaller than the model's largest is a difference of large terms that cancel: its error is that of the terms. So
a tensor's largest value counts as at least this much of the model's."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A case's differences from the oracle, and the tensor with the largest."""

    case: Case
    loss: float
    norm: float
    gradients: float
    gradient_name: str
    weights: float
    weight_name: str
    routing: float
    """For the routers' metrics."""
    report: dict[str, Any]
    """Other messages of the worker."""

    @property
    def passed(self) -> bool:
        """Whether all is within tolerance."""
        return max(self.loss, self.norm, self.gradients, self.weights, self.routing) <= self.case.tolerance


def first_response(group: TokenizedGroup) -> TokenizedGroup:
    """The group with only its first response."""
    assert group.rewards is not None
    return dataclasses.replace(group, response_tokens=group.response_tokens[:1], rewards=group.rewards[:1])


class World:
    """Models in both formats, groups, and the oracle's results for each model and loss."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.truths: dict[str, Truth] = {}
        groups = [
            *random_groups(5, seed=4),
            *random_groups(1, seed=7, max_responses=16, response_tokens=(1, 8), tied_share=0.0),
            *random_groups(2, seed=8, response_tokens=(1, 1), tied_share=0.0),  # only an end token
            *random_groups(2, seed=9, prompt_tokens=(0, 0), response_tokens=(1, 6), tied_share=0.0),
            *(first_response(group) for group in random_groups(1, seed=10)),  # K = 1: nothing to compare with
        ]
        self.groups = [dataclasses.replace(group, group_id=f"group-{index}") for index, group in enumerate(groups)]
        assert max(len(group.response_tokens) for group in self.groups) == 16
        self.checkpoint("qwen3", "policy")
        save_groups(folder / "groups", self.groups, folder / "qwen3-policy-hf")

    def checkpoint(self, model: str, role: str) -> Path:
        """The folder of a model, created if missing; with `-hf`, that of the Hugging Face checkpoint."""
        folder = self.folder / f"{model}-{role}"
        if not folder.exists():
            hf = save_model(Path(f"{folder}-hf"), seed={"policy": 1, "reference": 2}[role], **MODELS[model])
            convert(ConvertConfig(input=str(hf), output=str(folder)))
        return folder

    def truth(self, case: Case) -> Truth:
        """What the oracle finds; the same for all layouts of a model, loss, experts and adapters."""
        key = json.dumps([case.model, case.loss, case.experts, case.lora, case.adapter_off])
        if key not in self.truths:
            reference = "policy" if case.adapter_off else "reference"
            folders = [Path(f"{self.checkpoint(case.model, role)}-hf") for role in ("policy", reference)]
            self.truths[key] = find_truth(case, self.groups, *folders)
        return self.truths[key]


def run_cases(world: World, cases: Sequence[Case], tag: str) -> list[Result]:
    """Run cases with the same number of ranks in one start, and compare them with the oracle."""
    [ranks] = {case.ranks for case in cases}
    folder = world.folder
    specs = []
    for index, case in enumerate(cases):
        for role in ("policy", "reference"):
            world.checkpoint(case.model, role)
        params = LOSSES[case.loss].params
        specs.append({**dataclasses.asdict(case), "params": params, "output": str(folder / f"{tag}-{ranks}-{index}")})
    spec = {"folder": str(folder), "steps": NUM_STEPS, "optimizer": OPTIMIZER, "cases": specs}
    path = folder / f"spec-{tag}-{ranks}.json"
    path.write_text(json.dumps(spec))
    run_ranks(ranks, "tests.distributed.parity_worker", [str(path)])
    return [compare(world, case, Path(spec["output"])) for case, spec in zip(cases, specs, strict=True)]


def compare(world: World, case: Case, output: Path) -> Result:
    """Compares a case's files with the oracle."""
    truth = world.truth(case)
    report = json.loads(output.with_suffix(".json").read_text())
    gradients, weights = (load_file(f"{output}-{name}.safetensors") for name in ("gradients", "weights"))
    largest = max(gradient.abs().max().item() for gradient in truth.gradients.values())
    gradient, gradient_name = farthest(
        gradients,
        truth.gradients,
        {name: max(tensor.abs().max().item(), FLOOR * largest) for name, tensor in truth.gradients.items()},
    )
    weight, weight_name = farthest(
        weights, truth.after, {name: tensor.abs().max().item() for name, tensor in truth.after.items()}
    )
    assert set(truth.measured) == set(report["measured"])
    routing = [abs(report["measured"][name] - value) / max(abs(value), FLOOR) for name, value in truth.measured.items()]
    return Result(
        case=case,
        loss=abs(report["loss"] - truth.loss) / abs(truth.loss),
        norm=abs(report["norm"] - truth.norm) / truth.norm,
        gradients=gradient,
        gradient_name=gradient_name,
        weights=weight,
        weight_name=weight_name,
        routing=max(routing, default=0.0),
        report=report,
    )


def farthest(ours: dict[str, Tensor], theirs: dict[str, Tensor], scale: dict[str, float]) -> tuple[float, str]:
    """The largest difference over all tensors, each relative to its scale, and the tensor's name."""
    assert set(ours) == set(theirs), sorted(set(ours) ^ set(theirs))[:4]
    return max(((ours[name] - theirs[name]).abs().max().item() / scale[name], name) for name in theirs)
