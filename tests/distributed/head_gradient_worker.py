"""One of two ranks: the output weight's gradient added directly to Megatron's buffer equals the one from autograd.

`python -m tests.distributed.head_gradient_worker SPEC.json` writes, per model and layout, the largest difference over all weights
and ranks, relative to the largest gradient.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from mpo_megatron.config import ModelConfig, ParallelConfig
from mpo_megatron.data.loader import RowShape, build_step
from mpo_megatron.data.store import load_groups
from mpo_megatron.families import load_family
from mpo_megatron.hf.conversion import load_conversion
from mpo_megatron.model.parallel import Ranks, model_parallel
from mpo_megatron.model.policy import Policy, build_policy
from mpo_megatron.train.checkpoints import checkpoint
from mpo_megatron.train.reference import select_all
from mpo_megatron.train.step import RowTensors, prepare_schedules, run_rows

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # isort: skip
from megatron.core.utils import get_model_config  # isort: skip


def main(spec_path: str) -> None:
    spec = json.loads(Path(spec_path).read_text())
    dist.init_process_group("gloo")
    results = []
    for case in spec["cases"]:
        parallel = ParallelConfig(**case["layout"])
        with model_parallel(parallel, seed=1) as ranks:
            results.append(compare(Path(spec["folder"]), case, parallel, ranks))
    if dist.get_rank() == 0:
        Path(spec["results"]).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def compare(folder: Path, case: dict[str, Any], parallel: ParallelConfig, ranks: Ranks) -> dict[str, Any]:
    straight = gradients(folder, case, parallel, ranks)
    with mock.patch.object(Policy, "output_weight_gradient", return_value=None):
        expected = gradients(folder, case, parallel, ranks)
    largest = over_ranks(max(gradient.abs().max().item() for gradient in expected))
    difference = over_ranks(max((a - b).abs().max().item() for a, b in zip(straight, expected, strict=True)))
    return {"case": case, "largest": largest, "difference": difference / largest}


def gradients(folder: Path, case: dict[str, Any], parallel: ParallelConfig, ranks: Ranks) -> list[torch.Tensor]:
    """This rank's gradients (with the distributed optimizer: its part) of a sum over two rows."""
    name = case["model"]
    config = ModelConfig(checkpoint=str(folder / name), precision="fp32")
    conversion = load_conversion(folder / name)
    (policy,) = build_policy(load_family(folder / name / "hf"), config, parallel, ranks, conversion.padded_vocab_size)
    checkpoint.load_weights([policy], folder / name, ranks)
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=case["distributed"], overlap_grad_reduce=case["overlap"], grad_reduce_in_fp32=True
    )
    policy.overlap_grad_reduce = case["overlap"]
    model = [DistributedDataParallel(get_model_config(policy), settings, policy, pg_collection=ranks.groups)]
    prepare_schedules(model)
    get_model_config(policy).no_sync_func = model[0].no_sync if case["overlap"] else None
    data = load_groups(folder / "groups")
    shape = RowShape(
        row_tokens=64,
        layout="shared",
        multiple=16 * parallel.row_parts,
        num_replicas=ranks.data_size,
        replica=ranks.data_rank,
        pair_weight=1e-3,
    )
    batch = build_step(0, data, np.arange(len(data)), select_all, shape)
    assert len(batch.rows) > 1

    def row_loss(row: RowTensors, token_logps: torch.Tensor, token_kl: torch.Tensor | None) -> torch.Tensor:
        return (token_logps * torch.linspace(-1, 1, len(token_logps))).sum()

    run_rows(model, batch.rows, ranks, row_loss)
    buffers = [buffer.grad_data for buffer in model[0].buffers]
    if case["distributed"]:  # reduce-scattered: each replica has its part of the sum
        buffers = [buffer.chunk(ranks.data_size)[ranks.data_rank] for buffer in buffers]
    return [buffer.clone() for buffer in buffers]


def over_ranks(value: float) -> float:
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


if __name__ == "__main__":
    main(sys.argv[1])
