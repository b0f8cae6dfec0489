"""One rank of the parity tests: three training steps, for several layouts in one world.

`python -m tests.distributed.parity_worker SPEC.json`: for every case, the loss and norm of the first step go to `<output>.json`,
its gradients and the weights after the last step to safetensors files beside it, under their Hugging Face names.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from mpo_megatron.config import ExpertsConfig, LoraConfig, LossConfig, ModelConfig, OptimizerConfig, ParallelConfig
from mpo_megatron.data.loader import RowShape, build_step
from mpo_megatron.data.store import load_groups
from mpo_megatron.families import load_family
from mpo_megatron.families.adapters import choose_adapter
from mpo_megatron.hf.conversion import load_conversion
from mpo_megatron.model import attention_backends, attention_varlen
from mpo_megatron.model.adapter_weights import fill_adapters
from mpo_megatron.model.adapters import adapters_off
from mpo_megatron.model.live_weights import LiveWeights
from mpo_megatron.model.parallel import Ranks, model_parallel
from mpo_megatron.model.policy import build_policy
from mpo_megatron.train import optimizer
from mpo_megatron.train.checkpoints import checkpoint
from mpo_megatron.train.objective import Logps, build_objective, group_batch
from mpo_megatron.train.reference import select_all
from mpo_megatron.train.resident import AdapterOff, Resident
from mpo_megatron.train.routing import Choices, StepRouting, gather_choices, record_rows
from mpo_megatron.train.step import forward_step, fused_step, prepare_schedules, run_rows, two_phase_step
from tests.distributed.adapters import start_matrix
from tests.unit.model.rows import plain_varlen_kernel

from megatron.core.utils import get_model_config  # isort: skip


def main(spec_path: str) -> None:
    spec = json.loads(Path(spec_path).read_text())
    # `varlen` on a CPU and in float32: plain operations replace the flash attention kernel.
    attention_backends._missing = lambda model: None
    attention_varlen.find_kernel = lambda capped=False: plain_varlen_kernel  # type: ignore[assignment]
    dist.init_process_group("gloo")
    for case in spec["cases"]:
        run_case(case, spec)
    dist.destroy_process_group()


def run_case(case: dict[str, Any], spec: dict[str, Any]) -> None:
    """All steps on one layout, or the first on one layout and the others, from a checkpoint, on another."""
    legs = [case["parallel"], case["resume"]] if case["resume"] else [case["parallel"]]
    saved = Path(f"{case['output']}-checkpoint")
    steps = spec["steps"]
    for index, layout in enumerate(legs):
        parallel = ParallelConfig(**layout)
        with model_parallel(parallel, seed=1) as ranks:
            leg = Leg(case, spec, parallel, ranks)
            if index == 0:
                report = first_step(leg)
                steps -= 1
            else:
                checkpoint.load(saved, leg.model, leg.adam, ranks)
            if index == len(legs) - 1:
                for _ in range(steps):
                    leg.compute_gradients()
                    optimizer.update(leg.model, leg.adam)
                optimizer.gather_weights(leg.model)
                leg.write("weights")
            else:
                save(leg, saved)
            if ranks.is_main:
                Path(f"{case['output']}.json").write_text(json.dumps(report))


class Leg:
    """A run on one layout, ready for its first step."""

    def __init__(self, case: dict[str, Any], spec: dict[str, Any], parallel: ParallelConfig, ranks: Ranks) -> None:
        self.case, self.ranks, self.experts = case, ranks, ExpertsConfig(**case["experts"])
        folder = Path(spec["folder"])
        folders = {role: folder / f"{case['model']}-{role}" for role in ("policy", "reference")}
        settings = ModelConfig(checkpoint=str(folders["policy"]), precision="fp32", **case["layers"])
        self.family = load_family(folders["policy"] / "hf")
        self.padded_vocab = load_conversion(folders["policy"]).padded_vocab_size
        self.objective = build_objective(LossConfig(name=case["loss"], params=case["params"]))
        self.shape = row_shape(case, parallel, ranks)
        self.data = data = load_groups(folder / "groups")
        self.batch = build_step(0, data, np.arange(len(data)), self.objective.select, self.shape)
        self.adapter = choose_adapter(self.family, LoraConfig(**case["lora"]))
        self.parts = build_policy(self.family, settings, parallel, ranks, self.padded_vocab, self.adapter)
        base = "policy" if case["adapter_off"] else "reference"
        checkpoint.load_weights(self.parts, folders[base], ranks)
        if self.adapter is not None:
            fill_adapters(self.parts, self.family, self.adapter, ranks, start_matrix)
        with adapters_off(self.parts):
            self.reference = forward_step(self.parts, self.batch, self.objective, ranks)
        self.choices = self.record_choices() if case["experts"] else None
        checkpoint.load_weights(self.parts, folders["policy"], ranks)
        self.resident: Resident | None = None
        if self.objective.needs.token_kl and case["adapter_off"]:
            self.resident = AdapterOff(self.parts)
        elif self.objective.needs.token_kl:
            parts = build_policy(self.family, settings, parallel, ranks, self.padded_vocab)
            self.resident = Resident(parts, replay=self.experts.routing == "replay")
            checkpoint.load_weights(self.resident.parts, folders["reference"], ranks)
        config = OptimizerConfig(**spec["optimizer"], **case["optimizer"])
        self.model: list[Any] = optimizer.wrap_data_parallel(self.parts, config, ranks)
        prepare_schedules(self.model)
        self.adam = optimizer.build_optimizer(config, self.model, ranks)
        optimizer.build_scheduler(config, self.adam, total_steps=spec["steps"], start_step=0)  # the same rate in all steps

    def record_choices(self) -> Choices:
        """The recorded expert choices of the loaded model, computed from rows with other packing than the steps."""
        other = {"shared": "unshared", "unshared": "shared"}[self.case["rows"]]
        shape = replace(self.shape, row_tokens=96, layout=other)  # type: ignore[arg-type]
        batch = build_step(0, self.data, np.arange(len(self.data)), select_all, shape)
        routings = record_rows(batch.rows, self.ranks)
        run_rows(self.parts, batch.rows, self.ranks, None, routings=routings)
        assert self.family.experts is not None
        return gather_choices(routings, batch.rows, batch.table, self.family.experts, self.ranks)

    def build_routing(self) -> StepRouting | None:
        """The forced choices of a step; those of a resident reference, if there is one."""
        if not self.case["experts"] or self.family.experts is None:
            return None
        choices = self.choices if self.resident is None else None
        return StepRouting(self.experts, self.family.experts, self.batch, self.ranks, choices)

    def compute_gradients(self) -> Logps:
        """The policy's log-probs before the update."""
        self.routing = self.build_routing()
        optimizer.zero_gradients(self.model, self.adam)
        step = (self.model, self.batch, self.reference, self.objective, self.ranks)
        if self.case["two_phase"]:
            return two_phase_step(*step, self.shape, torch.Generator(), self.resident, self.routing).policy
        assert not self.batch.plan.split_groups
        return fused_step(*step, self.resident, self.routing).policy

    def write(self, name: str) -> None:
        """The weights, under their Hugging Face names, to `<output>-<name>.safetensors`."""
        tensors = dict(
            LiveWeights.of_policy(self.model, self.family, self.padded_vocab, self.ranks).stream()
            if self.adapter is None
            else LiveWeights.of_adapter(self.model, self.family, self.adapter, self.ranks).stream()
        )
        if self.ranks.is_main:
            save_file(tensors, f"{self.case['output']}-{name}.safetensors")


def first_step(leg: Leg) -> dict[str, Any]:
    """A step whose gradients are written; returns its metrics."""
    keep_whole_gradients(leg.model, True)
    logps = leg.compute_gradients()
    parameters = [parameter for part in leg.parts for parameter in part.parameters() if parameter.requires_grad]
    weights = [parameter.data for parameter in parameters]
    for parameter in parameters:  # export gradients in place of weights, under the weights' names
        parameter.data = parameter.main_grad
    leg.write("gradients")
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data = weight
    keep_whole_gradients(leg.model, False)
    _, norm = optimizer.update(leg.model, leg.adam)
    losses = leg.objective.compute(group_batch(leg.batch.table, logps, leg.reference))
    return {
        "loss": float(losses.sum()) / int(leg.batch.contributes.sum()),
        "norm": norm,
        "rows": [len(rows) for rows in leg.batch.plan.rows],
        "measured": {} if leg.routing is None else {name: mean.value for name, mean in leg.routing.measured.items()},
        "split": len(leg.batch.plan.split_groups),
    }


def save(leg: Leg, folder: Path) -> None:
    """A training checkpoint, weights and optimizer."""
    if leg.ranks.is_main:
        (folder / "megatron").mkdir(parents=True)
    dist.barrier()
    checkpoint.prepare_save(folder, leg.model, leg.adam, leg.ranks).execute_sync()


def row_shape(case: dict[str, Any], parallel: ParallelConfig, ranks: Ranks) -> RowShape:
    return RowShape(
        row_tokens=case["row_tokens"],
        layout=case["rows"],
        multiple=16 * parallel.row_parts,
        num_replicas=ranks.data_size,
        replica=ranks.data_rank,
        pair_weight=1e-3,
        rows_multiple=parallel.rows_multiple,
    )


def keep_whole_gradients(model: list[Any], on: bool) -> None:
    """Reduce gradients so that every rank has all of them, not only the part for its optimizer."""
    finish = get_model_config(model[0])
    if on:
        original = finish.finalize_model_grads_func
        finish.finalize_model_grads_func = lambda *arguments, **options: original(
            *arguments, **options | {"force_all_reduce": True}
        )
        finish.finalize_model_grads_func.original = original
    else:
        finish.finalize_model_grads_func = finish.finalize_model_grads_func.original
    for part in model:
        part.force_all_reduce = on


if __name__ == "__main__":
    main(sys.argv[1])
