"""One rank of the parity tests: three training steps, for several layouts in one world.

`python -m tests.distributed.parity_worker SPEC.json`: for every case, the loss and norm of the first step go to `<output>.json`,
its gradients and the weights after the last step to safetensors files beside it, under their Hugging Face names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from mpo_megatron.config import LossConfig, ModelConfig, OptimizerConfig, ParallelConfig
from mpo_megatron.data.group import load_groups
from mpo_megatron.data.loader import RowShape, StepBatch, build_step
from mpo_megatron.model.architecture import load_hf_config
from mpo_megatron.model.convert import load_conversion
from mpo_megatron.model.live_weights import send_weights
from mpo_megatron.model.parallel import Ranks, model_parallel
from mpo_megatron.model.policy import build_policy
from mpo_megatron.train import checkpoint, optimizer
from mpo_megatron.train.objective import Logps, Objective, build_objective, group_batch
from mpo_megatron.train.resident import Resident
from mpo_megatron.train.step import forward_step, fused_step, prepare_schedules, two_phase_step

from megatron.core.utils import get_model_config  # isort: skip


def main(spec_path: str) -> None:
    spec = json.loads(Path(spec_path).read_text())
    dist.init_process_group("gloo")
    for case in spec["cases"]:
        run_case(case, spec)
    dist.destroy_process_group()


def run_case(case: dict[str, Any], spec: dict[str, Any]) -> None:
    folder, output = Path(spec["folder"]), Path(case["output"])
    parallel = ParallelConfig(**case["parallel"])
    folders = {role: folder / f"{case['model']}-{role}" for role in ("policy", "reference")}
    settings = ModelConfig(checkpoint=str(folders["policy"]), precision="fp32", **case["layers"])
    hf_config = load_hf_config(folders["policy"] / "hf")
    padded = load_conversion(folders["policy"]).padded_vocab_size
    objective = build_objective(LossConfig(name=case["loss"], params=case["params"]))
    with model_parallel(parallel, seed=1) as ranks:
        parts = build_policy(hf_config, settings, parallel, ranks, padded)
        shape = row_shape(case, parallel, ranks)
        data = load_groups(folder / "groups")
        batch = build_step(0, data, np.arange(len(data)), objective.select, shape)
        checkpoint.load_weights(parts, folders["reference"], ranks)
        reference = forward_step(parts, batch, objective, ranks)
        checkpoint.load_weights(parts, folders["policy"], ranks)
        resident = None
        if objective.needs.token_kl:
            resident = Resident(build_policy(hf_config, settings, parallel, ranks, padded))
            checkpoint.load_weights(resident.parts, folders["reference"], ranks)
        config = OptimizerConfig(**spec["optimizer"], **case["optimizer"])
        model = optimizer.wrap_data_parallel(parts, config, ranks)
        prepare_schedules(model)
        adam = optimizer.build_optimizer(config, model, ranks)
        optimizer.build_scheduler(config, adam, total_steps=spec["steps"], start_step=0)  # the same rate in all steps

        def step() -> Logps:
            optimizer.zero_gradients(model, adam)
            if case["two_phase"]:
                return two_phase_step(model, batch, reference, objective, ranks, shape, torch.Generator(), resident)[0]
            assert not batch.plan.split_groups
            return fused_step(model, batch, reference, objective, ranks, resident)

        keep_whole_gradients(model, True)
        logps = step()
        gradients = {}
        for part in parts:  # in the place of the weights, they have the weights' names
            for parameter in part.parameters():
                parameter.weight, parameter.data = parameter.data, parameter.main_grad
        send_weights(model, hf_config, padded, ranks, lambda name, tensor: gradients.__setitem__(name, tensor.clone()))
        for part in parts:
            for parameter in part.parameters():
                parameter.data = parameter.weight
        keep_whole_gradients(model, False)
        _, norm = optimizer.update(model, adam)
        for _ in range(1, spec["steps"]):
            step()
            optimizer.update(model, adam)
        optimizer.gather_weights(model)
        weights: dict[str, Tensor] = {}
        send_weights(model, hf_config, padded, ranks, lambda name, tensor: weights.__setitem__(name, tensor.clone()))
        if ranks.is_main:
            save_file(gradients, f"{output}-gradients.safetensors")
            save_file(weights, f"{output}-weights.safetensors")
            report = {
                "loss": mean_loss(batch, logps, reference, objective),
                "norm": norm,
                "rows": [len(rows) for rows in batch.plan.rows],
                "split": len(batch.plan.split_groups),
            }
            output.with_suffix(".json").write_text(json.dumps(report))


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
    """Reduce gradients so that every rank has all of each, not only the part that its optimizer steps."""
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


def mean_loss(batch: StepBatch, logps: Logps, reference: Logps, objective: Objective) -> float:
    losses = objective.compute(group_batch(batch.table, logps, reference))
    return float(losses.sum()) / int(batch.contributes.sum())


if __name__ == "__main__":
    main(sys.argv[1])
