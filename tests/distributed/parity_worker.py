"""One rank of the parity tests: the loss and gradients of one step, for several layouts in one world.

`python -m tests.distributed.parity_worker SPEC.json`: for every case, gradients are put in the place of the weights and saved
as a checkpoint, so that `mpo convert` gives them Hugging Face names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mpo_megatron.config import LossConfig, ModelConfig, ParallelConfig
from mpo_megatron.data.group import load_groups
from mpo_megatron.data.loader import RowShape, build_step
from mpo_megatron.model.architecture import load_hf_config
from mpo_megatron.model.convert import load_conversion
from mpo_megatron.model.parallel import Ranks, model_parallel
from mpo_megatron.model.policy import build_policy
from mpo_megatron.train import checkpoint
from mpo_megatron.train.objective import build_objective, group_batch
from mpo_megatron.train.step import forward_step, fused_step, prepare_schedules, two_phase_step

from megatron.core import dist_checkpointing  # isort: skip
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # isort: skip
from megatron.core.utils import get_model_config  # isort: skip


def main(spec_path: str) -> None:
    spec = json.loads(Path(spec_path).read_text())
    dist.init_process_group("gloo")
    results = [run_case(case, Path(spec["folder"])) for case in spec["cases"]]
    if dist.get_rank() == 0:
        Path(spec["results"]).write_text(json.dumps(results))
    dist.destroy_process_group()


def run_case(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    parallel = ParallelConfig(**case.get("parallel", {}))
    model_config = ModelConfig(checkpoint=str(folder / case["model"]), precision="fp32", **case.get("model_options", {}))
    with model_parallel(parallel, seed=1) as ranks:
        conversion = load_conversion(model_config.checkpoint)
        hf_config = load_hf_config(Path(model_config.checkpoint) / "hf")
        policy = build_policy(hf_config, model_config, parallel, ranks, conversion.padded_vocab_size)
        objective = build_objective(LossConfig(name=case.get("loss", "mpo"), params=case.get("params", {"beta": 0.1})))
        shape = RowShape(
            row_tokens=case.get("row_tokens", 256),
            layout=case.get("layout", "shared"),
            multiple=16 * parallel.row_parts,
            num_replicas=ranks.data_size,
            replica=ranks.data_rank,
            pair_weight=1e-3,
        )
        data = load_groups(folder / "groups")
        batch = build_step(0, data, np.arange(len(data)), objective.select, shape)
        checkpoint.load_weights([policy], folder / case["reference"], ranks)
        reference = forward_step([policy], batch, objective, ranks)
        checkpoint.load_weights([policy], folder / case["model"], ranks)
        settings = DistributedDataParallelConfig(use_distributed_optimizer=False, grad_reduce_in_fp32=True)
        model = [DistributedDataParallel(get_model_config(policy), settings, policy, pg_collection=ranks.groups)]
        prepare_schedules(model)
        model[0].zero_grad_buffer()
        generator = torch.Generator().manual_seed(3)
        resident = None
        if objective.needs.token_kl:
            resident = build_policy(hf_config, model_config, parallel, ranks, conversion.padded_vocab_size)
            checkpoint.load_weights([resident], folder / case["reference"], ranks)
        if case.get("two_phase"):
            logps, _ = two_phase_step(model, batch, reference, objective, ranks, shape, generator, resident)
        else:
            assert not batch.plan.split_groups
            logps = fused_step(model, batch, reference, objective, ranks, resident)
        losses = objective.compute(group_batch(batch.table, logps, reference, generator=torch.Generator().manual_seed(3)))
        if "gradients" in case:
            save_gradients(policy, folder / case["gradients"], folder / case["model"], ranks)
        return {
            "loss": float(losses.sum()) / int(batch.contributes.sum()),
            "logps": logps.response.tolist(),
            "rows": [len(rows) for rows in batch.plan.rows],
            "split": len(batch.plan.split_groups),
        }


def save_gradients(policy: torch.nn.Module, target: Path, source: Path, ranks: Ranks) -> None:
    for parameter in policy.parameters():
        parameter.data.copy_(parameter.main_grad)
    if ranks.is_main:
        (target / "megatron").mkdir(parents=True)
        checkpoint.copy_side_files(source, target)
    dist.barrier()
    state = policy.sharded_state_dict(metadata={"dp_cp_group": ranks.groups.dp_cp})
    dist_checkpointing.save(
        {key: value for key, value in state.items() if not key.endswith("_extra_state")}, str(target / "megatron")
    )


if __name__ == "__main__":
    main(sys.argv[1])
