"""One of two ranks: delayed scales saved on one layout are those that the next layout loads, layer by layer.

`python -m tests.distributed.scales_worker FOLDER`: FOLDER has a model and groups; each layout but the first resumes from the one
before.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mpo_megatron.config import LossConfig, ModelConfig, OptimizerConfig, ParallelConfig
from mpo_megatron.data.loader import RowShape, build_step
from mpo_megatron.data.store import load_groups
from mpo_megatron.hf.config import load_hf_config
from mpo_megatron.hf.conversion import load_conversion
from mpo_megatron.model.parallel import Ranks, model_parallel
from mpo_megatron.model.policy import build_policy
from mpo_megatron.train import checkpoint, optimizer
from mpo_megatron.train.calibration import calibrate
from mpo_megatron.train.objective import build_objective
from mpo_megatron.train.step import forward_step, fused_step, prepare_schedules
from tests.fp8_emulation import Delayed, Emulation

LAYOUTS: tuple[dict[str, Any], ...] = ({"tensor": 2}, {"pipeline": 2}, {})


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    emulation = Emulation(pytest.MonkeyPatch())
    expected: dict[str, torch.Tensor] = {}
    for index, layout in enumerate(LAYOUTS):
        with model_parallel(ParallelConfig(**layout), seed=1) as ranks:
            emulation.modules.clear()
            expected = resume_and_step(folder, index, ParallelConfig(**layout), ranks, emulation, expected)
    dist.destroy_process_group()


def resume_and_step(
    folder: Path, index: int, parallel: ParallelConfig, ranks: Ranks, emulation: Emulation, expected: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Load the last layout's checkpoint, compare, make a step, save; the scales of all layers."""
    config = ModelConfig(checkpoint=str(folder / "model"), fp8="delayed")
    padded = load_conversion(folder / "model").padded_vocab_size
    parts = emulation.convert(build_policy(load_hf_config(folder / "model" / "hf"), config, parallel, ranks, padded))
    checkpoint.load_weights(parts, folder / "model", ranks)
    shape = RowShape(
        row_tokens=128,
        layout="shared",
        multiple=16 * parallel.row_parts,
        num_replicas=ranks.data_size,
        replica=ranks.data_rank,
        pair_weight=1e-3,
    )
    data = load_groups(folder / "groups")
    calibrate(parts, data, ranks, shape)
    model = optimizer.wrap_data_parallel(parts, OptimizerConfig(lr=1e-3), ranks)
    prepare_schedules(model)
    adam = optimizer.build_optimizer(OptimizerConfig(lr=1e-3), model, ranks)
    if index:
        checkpoint.load(folder / f"step-{index - 1}", model, adam, ranks)
        found = all_scales(parts, ranks)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    objective = build_objective(LossConfig(name="mpo", params={"beta": 0.1}))
    batch = build_step(0, data, np.arange(len(data)), objective.select, shape)
    reference = forward_step(model, batch, objective, ranks)
    optimizer.zero_gradients(model, adam)
    fused_step(model, batch, reference, objective, ranks)
    optimizer.update(model, adam)
    if dist.get_rank() == 0:
        (folder / f"step-{index}" / "megatron").mkdir(parents=True)
    dist.barrier()
    checkpoint.prepare_save(folder / f"step-{index}", model, adam, ranks).execute_sync()
    after = all_scales(parts, ranks)
    assert any(not torch.equal(after[name], expected[name]) for name in expected) or not expected
    return after


def all_scales(parts: list[torch.nn.Module], ranks: Ranks) -> dict[str, torch.Tensor]:
    """State of each layer of all stages by name; tensor-parallel ranks and replicas agree on it."""
    own = {}
    for part in parts:
        for name, module in part.named_modules():
            if isinstance(module, Delayed):
                start, _, rest = name.partition("layers.")[2].partition(".")
                layer = int(start) + ranks.pipeline.rank()  # one layer a stage
                own[f"{layer}.{rest}"] = module.get_extra_state()
    everything: list[Any] = [None, None]
    dist.all_gather_object(everything, own)
    left, right = everything
    assert all(torch.equal(left[name], right[name]) for name in left.keys() & right.keys())
    return left | right


if __name__ == "__main__":
    main(Path(sys.argv[1]))
