"""One rank of the equivalence tests: the gradients of fused and two-phase steps, for every loss, in several layouts.

`python -m tests.distributed.equivalence_worker SPEC.json` writes, per layout and loss, the largest difference between the two
ways, relative to the largest gradient.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mpo_megatron.config import LossConfig, ModelConfig, ParallelConfig
from mpo_megatron.data.loader import RowShape, build_step
from mpo_megatron.data.store import load_groups
from mpo_megatron.families import load_family
from mpo_megatron.hf.conversion import load_conversion
from mpo_megatron.model.parallel import Ranks, model_parallel
from mpo_megatron.model.policy import build_policy
from mpo_megatron.train.checkpoints import checkpoint
from mpo_megatron.train.objective import build_objective
from mpo_megatron.train.resident import Resident
from mpo_megatron.train.step import forward_step, fused_step, loss_coefficients, prepare_schedules, run_rows, two_phase_step

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # isort: skip
from megatron.core.utils import get_model_config  # isort: skip

SPLIT_ROW_TOKENS = 50
"""Short rows, so that groups span several rows and, with several replicas, several ranks."""


def main(spec_path: str) -> None:
    spec = json.loads(Path(spec_path).read_text())
    dist.init_process_group("gloo")
    results = [run_layout(layout, spec["losses"], Path(spec["folder"])) for layout in spec["layouts"]]
    if dist.get_rank() == 0:
        Path(spec["results"]).write_text(json.dumps(results))
    dist.destroy_process_group()


def run_layout(layout: dict[str, Any], losses: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    parallel = ParallelConfig(**layout)
    model_config = ModelConfig(checkpoint=str(folder / "policy"), precision="fp32")
    with model_parallel(parallel, seed=1) as ranks:
        conversion = load_conversion(folder / "policy")
        [policy] = build_policy(
            load_family(folder / "policy" / "hf"), model_config, parallel, ranks, conversion.padded_vocab_size
        )
        settings = DistributedDataParallelConfig(use_distributed_optimizer=False, grad_reduce_in_fp32=True)
        model = [DistributedDataParallel(get_model_config(policy), settings, policy, pg_collection=ranks.groups)]
        prepare_schedules(model)
        weights = {role: load_weights(model, folder / role, ranks) for role in ("policy", "reference")}
        return [compare(case, model, weights, parallel, ranks, folder) for case in losses]


def load_weights(model: list[Any], folder: Path, ranks: Ranks) -> list[torch.Tensor]:
    """Copies of a checkpoint's weights, loaded into the model in turn."""
    checkpoint.load_weights(model, folder, ranks)
    return [parameter.detach().clone() for parameter in model[0].parameters()]


@torch.no_grad()
def set_weights(model: list[Any], weights: list[torch.Tensor]) -> None:
    for parameter, weight in zip(model[0].parameters(), weights, strict=True):
        parameter.copy_(weight)


def compare(
    case: dict[str, Any],
    model: list[Any],
    weights: dict[str, list[torch.Tensor]],
    parallel: ParallelConfig,
    ranks: Ranks,
    folder: Path,
) -> dict[str, Any]:
    objective = build_objective(LossConfig(name=case["name"], function=case.get("function"), params=case["params"]))
    data = load_groups(folder / "groups")
    whole = RowShape(
        row_tokens=512,
        layout="shared",
        multiple=16 * parallel.row_parts,
        num_replicas=ranks.data_size,
        replica=ranks.data_rank,
        pair_weight=1e-3,
    )
    split = dataclasses.replace(whole, row_tokens=SPLIT_ROW_TOKENS)
    batch = build_step(0, data, np.arange(len(data)), objective.select, whole)
    split_batch = build_step(0, data, np.arange(len(data)), objective.select, split)
    reference = None
    if objective.needs.reference:
        set_weights(model, weights["reference"])
        reference = forward_step(model, batch, objective, ranks)
    set_weights(model, weights["policy"])
    resident = load_resident(parallel, ranks, folder, case.get("offload", False)) if objective.needs.token_kl else None
    kl = None if resident is None else forward_step(model, batch, objective, ranks, resident).kl.tolist()

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    model[0].zero_grad_buffer()
    fused = None
    if objective.needs_whole_batch:
        everything_at_once(model, batch, reference, objective, ranks, generator(), resident)
    else:
        fused = fused_step(model, batch, reference, objective, ranks, resident)
    expected = gradients(model)
    model[0].zero_grad_buffer()
    result = two_phase_step(model, batch, reference, objective, ranks, whole, generator(), resident)
    two_phase = gradients(model)
    model[0].zero_grad_buffer()
    share = two_phase_step(model, split_batch, reference, objective, ranks, split, generator(), resident).backward_share
    in_parts = gradients(model)
    largest = max_over_ranks(max(gradient.abs().max().item() for gradient in expected))
    return {
        "loss": case,
        "layout": dataclasses.asdict(parallel),
        "largest": largest,
        "two_phase": max_over_ranks(difference(expected, two_phase)) / largest,
        "split": max_over_ranks(difference(expected, in_parts)) / largest,
        "split_groups": len(split_batch.plan.split_groups),
        "backward_share": share,
        "losses": [result.losses.tolist(), None if fused is None else fused.losses.tolist()],
        "kl": kl,
    }


def load_resident(parallel: ParallelConfig, ranks: Ranks, folder: Path, offload: bool) -> Resident:
    model_config = ModelConfig(checkpoint=str(folder / "reference"), precision="fp32")
    padded = load_conversion(folder / "reference").padded_vocab_size
    parts = build_policy(load_family(folder / "reference" / "hf"), model_config, parallel, ranks, padded)
    checkpoint.load_weights(parts, folder / "reference", ranks)
    return Resident(parts, offload=offload)


def everything_at_once(
    model: list[Any], batch: Any, reference: Any, objective: Any, ranks: Ranks, generator: torch.Generator, resident: Any
) -> None:
    """Gradients of a loss over the whole batch, with nothing dropped from the second pass."""
    policy = forward_step(model, batch, objective, ranks, resident)
    _, coefficients, kl_coefficients = loss_coefficients(batch, policy, reference, objective, generator)

    def row_loss(row: Any, token_logps: torch.Tensor, token_kl: torch.Tensor | None) -> torch.Tensor:
        slot, k = row.responses.unbind(dim=1)
        if not len(slot):
            return token_logps.sum()
        total = (coefficients[slot, k].float()[row.response_of] * token_logps).sum()
        return total if token_kl is None else total + (kl_coefficients[slot, k].float()[row.response_of] * token_kl).sum()

    run_rows(model, batch.rows, ranks, row_loss, resident)


def gradients(model: list[Any]) -> list[torch.Tensor]:
    return [parameter.main_grad.clone() for parameter in model[0].parameters()]


def difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))


def max_over_ranks(value: float) -> float:
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


if __name__ == "__main__":
    main(sys.argv[1])
