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

import torch
from safetensors.torch import load_file

from mpo_megatron.config import ConvertConfig
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.model.convert import convert
from tests.distributed.launch import run_ranks
from tests.distributed.parity_cases import MODELS, RATIO, TOLERANCE, Case
from tests.distributed.parity_oracle import FLOOR, LOSSES, NUM_STEPS, OPTIMIZER, Differences, Truth, find_truth
from tests.tiny import random_groups, save_groups, save_model


@dataclass(frozen=True, kw_only=True)
class Result(Differences):
    """A case's differences from the oracle."""

    case: Case
    routing: float
    """For the routers' metrics."""
    gradient_tolerance: float
    weight_tolerance: float
    report: dict[str, Any]
    """Other messages of the worker."""

    @property
    def passed(self) -> bool:
        """Whether all is within tolerance."""
        return (
            max(self.loss, self.norm, self.routing) <= TOLERANCE
            and self.gradients <= self.gradient_tolerance
            and self.weights <= self.weight_tolerance
        )


def first_response(group: TokenizedGroup) -> TokenizedGroup:
    """The group with only its first response."""
    assert group.rewards is not None
    return dataclasses.replace(group, response_tokens=group.response_tokens[:1], rewards=group.rewards[:1])


class World:
    """Models in both formats, groups, and the oracle's results for each model and loss."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.truths: dict[str, Truth] = {}
        self.roundings: dict[str, Differences] = {}
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
        if key_of(case) not in self.truths:
            self.truths[key_of(case)] = find_truth(case, self.groups, *self.folders(case))
        return self.truths[key_of(case)]

    def tolerances(self, case: Case) -> tuple[float, float]:
        """Maximum differences of gradients and weights from the oracle."""
        if not case.has_states:
            return TOLERANCE, TOLERANCE
        if key_of(case) not in self.roundings:
            exact, rounded = find_truth(case, self.groups, *self.folders(case), dtype=torch.float64), self.truth(case)
            self.roundings[key_of(case)] = exact.differences(rounded.loss, rounded.norm, rounded.gradients, rounded.after)
        rounding = self.roundings[key_of(case)]
        assert max(rounding.loss, rounding.norm) <= TOLERANCE, f"{case}: the oracles in float32 and in float64 disagree"
        return max(TOLERANCE, (1 + RATIO) * rounding.gradients), max(TOLERANCE, (1 + RATIO) * rounding.weights)

    def folders(self, case: Case) -> list[Path]:
        """The Hugging Face checkpoints of policy and reference."""
        roles = ("policy", "policy" if case.adapter_off else "reference")
        return [Path(f"{self.checkpoint(case.model, role)}-hf") for role in roles]


def key_of(case: Case) -> str:
    """Everything of a case that the oracle's numbers depend on."""
    return json.dumps([case.model, case.loss, case.experts, case.lora, case.adapter_off])


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
    differences = truth.differences(report["loss"], report["norm"], gradients, weights)
    gradient_tolerance, weight_tolerance = world.tolerances(case)
    assert set(truth.measured) == set(report["measured"])
    routing = [abs(report["measured"][name] - value) / max(abs(value), FLOOR) for name, value in truth.measured.items()]
    return Result(
        **dataclasses.asdict(differences),
        case=case,
        routing=max(routing, default=0.0),
        gradient_tolerance=gradient_tolerance,
        weight_tolerance=weight_tolerance,
        report=report,
    )
