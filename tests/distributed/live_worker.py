"""One rank of the tests of live weights and of SPO's regulariser on samples, in several layouts.

`python -m tests.distributed.live_worker SPEC.json` compares, on rank 0, with Hugging Face models: the weights bit by bit, the
regulariser and its gradient with a float64 computation over whole logits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mpo_megatron.config import DataConfig, LossConfig, ModelConfig, ParallelConfig, TrainConfig
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.loader import RowShape, build_step
from mpo_megatron.data.store import load_groups
from mpo_megatron.families import load_family
from mpo_megatron.hf.conversion import load_conversion
from mpo_megatron.model.live_weights import LiveWeights
from mpo_megatron.model.parallel import Ranks, model_parallel
from mpo_megatron.model.policy import build_policy
from mpo_megatron.rollout.engines import Prompt, Sampling
from mpo_megatron.rollout.live import transfer
from mpo_megatron.rollout.live import vllm as live_vllm
from mpo_megatron.rollout.live.policy import LivePolicy
from mpo_megatron.rollout.live.sample_kl import add_kl_gradients
from mpo_megatron.train.checkpoints import checkpoint
from mpo_megatron.train.objective import Logps, build_objective
from mpo_megatron.train.resident import Resident
from mpo_megatron.train.step import finalize_gradients, fused_step, prepare_schedules
from tests import vllm_stand_in

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # isort: skip
from megatron.core.utils import get_model_config  # isort: skip

KL_WEIGHT = 0.3


def main(spec_path: str) -> None:
    spec = json.loads(Path(spec_path).read_text())
    folder = Path(spec["folder"])
    dist.init_process_group("gloo")
    expected = huggingface(folder) if dist.get_rank() == 0 else None
    results = [run_layout(layout, folder, expected) for layout in spec["layouts"]]
    gathered = [gather(name, layout, folder) for name, layout in spec["gathered"]]
    if dist.get_rank() == 0:
        Path(spec["results"]).write_text(json.dumps({"layouts": results, "gathered": gathered}))
    dist.destroy_process_group()


def samples_of(folder: Path) -> list[TokenizedGroup]:
    """Groups whose responses are used as samples."""
    return list(load_groups(folder / "samples"))


def huggingface(folder: Path) -> dict[str, Any]:
    """The policy's weights, the mean divergence of a sample, and the regulariser's gradient, from whole logits in float64."""
    models = {}
    for role in ("policy", "reference"):
        models[role] = AutoModelForCausalLM.from_pretrained(folder / f"{role}-hf", dtype=torch.float64)
    weights = {name: parameter.detach().float() for name, parameter in models["policy"].named_parameters()}
    divergences = []
    for group in samples_of(folder):
        for response in group.response_tokens:
            tokens = torch.from_numpy(np.concatenate([group.prompt_tokens, response]).astype(np.int64))[None]
            predicting = slice(len(group.prompt_tokens) - 1, -1)
            policy, reference = (models[role](tokens).logits[0, predicting].log_softmax(-1) for role in ("policy", "reference"))
            divergences.append((policy.exp() * (policy - reference.detach())).sum())
    mean = torch.stack(divergences).mean()
    (KL_WEIGHT * mean).backward()
    gradients = {name: parameter.grad for name, parameter in models["policy"].named_parameters()}
    return {"weights": weights, "kl": float(mean), "gradients": gradients}


def run_layout(layout: dict[str, Any], folder: Path, expected: dict[str, Any] | None) -> dict[str, Any]:
    overlap = layout.pop("overlap", False)
    parallel = ParallelConfig(**layout)
    with model_parallel(parallel, seed=1) as ranks:
        padded = load_conversion(folder / "policy").padded_vocab_size
        family = load_family(folder / "policy" / "hf")

        def load(role: str) -> list[torch.nn.Module]:
            model_config = ModelConfig(checkpoint=str(folder / role), precision="fp32")
            parts = build_policy(family, model_config, parallel, ranks, padded)
            checkpoint.load_weights(parts, folder / role, ranks)
            return parts

        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=False, grad_reduce_in_fp32=True, overlap_grad_reduce=overlap
        )
        model: list[Any] = [
            DistributedDataParallel(get_model_config(part), settings, part, pg_collection=ranks.groups) for part in load("policy")
        ]
        prepare_schedules(model)
        resident = Resident(load("reference"))

        def collect() -> dict[str, Tensor]:
            live = LiveWeights.of_policy(model, family, padded, ranks)
            found = dict(live.stream(wanted=dist.get_rank() == 0))
            described = {info.name: (info.shape, info.dtype) for info in live.metadata}
            assert all(described[name] == (tuple(tensor.shape), tensor.dtype) for name, tensor in found.items())
            assert list(found) == (list(described) if dist.get_rank() == 0 else [])
            return found

        weights = collect()
        drawn = draw(model, family, padded, ranks, folder)
        both, kl = kl_and_loss(model, resident, ranks, parallel, folder, with_kl=True, with_loss=True)
        loss_alone, _ = kl_and_loss(model, resident, ranks, parallel, folder, with_kl=False, with_loss=True)
        kl_alone, _ = kl_and_loss(model, resident, ranks, parallel, folder, with_kl=True, with_loss=False)
        largest = max(float(gradient.abs().max()) for gradient in kl_alone)
        sums = max(float((a - b - c).abs().max()) for a, b, c in zip(both, loss_alone, kl_alone, strict=True))
        loss_largest = max(float(gradient.abs().max()) for gradient in loss_alone)
        for parameter, gradient in zip((p for part in model for p in part.parameters()), kl_alone, strict=True):
            parameter.data.copy_(gradient)
        gradients = collect()
    if expected is None:
        return {}
    return {
        "layout": layout,
        "missing": sorted(set(expected["weights"]) ^ set(weights)),
        "weights": max(float((weights[name] - weight).abs().max()) for name, weight in expected["weights"].items()),
        "samples": drawn,
        "kl": kl,
        "expected_kl": expected["kl"],
        "largest": largest,
        "loss_largest": loss_largest,
        "sum": sums,
        "gradients": max(float((gradients[name] - wanted).abs().max()) for name, wanted in expected["gradients"].items()),
    }


def gather(name: str, layout: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Compares a model's weights with its Hugging Face checkpoint, and samples from it."""
    parallel = ParallelConfig(**layout)
    with model_parallel(parallel, seed=1) as ranks:
        padded, family = load_conversion(folder / name).padded_vocab_size, load_family(folder / name / "hf")
        model_config = ModelConfig(checkpoint=str(folder / name), precision="fp32")
        parts = build_policy(family, model_config, parallel, ranks, padded)
        checkpoint.load_weights(parts, folder / name, ranks)
        settings = DistributedDataParallelConfig(use_distributed_optimizer=False)
        model = [DistributedDataParallel(get_model_config(part), settings, part, pg_collection=ranks.groups) for part in parts]
        found = dict(LiveWeights.of_policy(model, family, padded, ranks).stream())
        drawn = draw(model, family, padded, ranks, folder)
        handed = hand_to_vllm(LiveWeights.of_policy(model, family, padded, ranks))
    expected = load_file(folder / f"{name}-hf" / "model.safetensors")
    return {
        "model": f"{name} {layout}",
        "missing": sorted(set(expected) ^ set(found)),
        "equal": all(torch.equal(found[key], weight) for key, weight in expected.items()),
        "handed": [
            worker.keys() == expected.keys() and all(torch.equal(worker[key], weight) for key, weight in expected.items())
            for worker in handed
        ],
        "samples": drawn,
    }


def hand_to_vllm(weights: LiveWeights) -> list[dict[str, Tensor]]:
    """What the workers of an engine on both ranks' GPUs, and of one on others, have after its second update; on the rank that
    asks it."""
    found = []
    for own_gpus in (0, 2):
        engine = vllm_stand_in.Engine(gpus=2) if dist.get_rank() == 0 else None
        inner: Any = None if engine is None else SimpleNamespace(engine=engine)
        with pytest.MonkeyPatch.context() as patch:
            vllm_stand_in.install(patch)
            patch.setattr(transfer, "LEAST_BUFFER_BYTES", 1)  # a buffer of the largest weight's size: many chunks
            live = live_vllm.VllmLiveEngine(weights, inner, seconds=60, own_gpus=own_gpus)
            for _ in range(2):
                live.update()
        found += [] if engine is None else [worker.loaded for worker in engine.workers]
    return found


def draw(model: list[Any], family: Any, padded: int, ranks: Ranks, folder: Path) -> list[list[list[int]]]:
    """Samples of the policy; the requests are the same for every layout."""
    config = TrainConfig(
        output=str(folder / "run"),
        model=ModelConfig(checkpoint=str(folder / "policy"), precision="fp32"),
        data=DataConfig(train=str(folder / "groups")),
    )
    setup: Any = SimpleNamespace(
        config=config, model_folder=folder / "policy", family=family, padded_vocab_size=padded, adapter=None
    )
    prompts = [
        Prompt(group_id=group.group_id, token_ids=tuple(group.prompt_tokens.tolist()), messages=())
        for group in samples_of(folder)
    ]
    found = LivePolicy(setup, ranks, model).sample(prompts, Sampling(num_responses=2, max_tokens=6))
    return [[list(response.token_ids) for response in generation.responses] for generation in found]


def kl_and_loss(
    model: list[Any], resident: Any, ranks: Ranks, parallel: ParallelConfig, folder: Path, *, with_kl: bool, with_loss: bool
) -> tuple[list[Tensor], float]:
    """Gradients of the regulariser, of a loss on data, or of both as in a step; and the mean divergence of a sample."""
    shape = RowShape(
        row_tokens=60,
        layout="shared",
        multiple=16 * parallel.row_parts,
        num_replicas=ranks.data_size,
        replica=ranks.data_rank,
        pair_weight=1e-3,
    )
    kl = 0.0
    for part in model:
        part.zero_grad_buffer()
    if with_kl:
        logps, table = add_kl_gradients(model, samples_of(folder), KL_WEIGHT, ranks, shape, resident)
        assert logps.kl is not None
        kl = float(logps.kl.sum()) / int(table.valid.sum())
    if with_loss:
        objective = build_objective(LossConfig(name="mpo", params={"beta": 0.1}))
        data = load_groups(folder / "groups")
        batch = build_step(0, data, np.arange(len(data)), objective.select, shape)
        reference = Logps(response=torch.full(batch.table.valid.shape, -20.0, dtype=torch.float64))
        fused_step(model, batch, reference, objective, ranks)
    else:
        for part in model:
            if part.ddp_config.overlap_grad_reduce:  # otherwise the loss's last row does
                part.start_grad_sync()
        finalize_gradients(model, None, pg_collection=ranks.groups)
    return [parameter.main_grad.clone() for part in model for parameter in part.parameters()], kl


if __name__ == "__main__":
    main(sys.argv[1])
