"""The work of test_pretend_gpu.py on the pretend GPU, in one process.

`python -m tests.pretend_gpu tests.integration.pretend_gpu_worker FOLDER` writes FOLDER/results.json.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packaging.version import Version

from mpo_megatron import device
from mpo_megatron.config import CheckpointConfig, DataConfig, LossConfig, ModelConfig, OptimizerConfig, TrainConfig
from mpo_megatron.mcore.preparation import prepare


def main(folder: Path) -> None:
    prepare()
    import megatron.core.optimizer as megatron_optimizer
    import megatron.core.utils
    from megatron.core.optimizer import distrib_optimizer

    results: dict[str, Any] = {"refused": refused(), "fp32": run(training(folder, "fp32"))}
    bf16 = training(folder, "bf16", precision="bf16", steps=5)
    results["bf16"] = run(bf16)
    # Megatron offloads only with Transformer Engine's Adam, which is replaced by another Adam.
    megatron.core.utils.get_te_version = lambda: Version("2.11.0")
    megatron_optimizer.Adam = GPUAdam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    from mpo_megatron.train import inputs

    inputs.check_offload = lambda *arguments: None  # it would report that Transformer Engine is missing
    offloaded = training(folder, "offloaded", precision="bf16", steps=5, cpu_offload=0.5)
    run(dataclasses.replace(offloaded, stop_after=2))
    results["offloaded"] = run(offloaded)  # from the checkpoint after two steps
    results["planted"] = planted(training(folder, "planted"))
    (folder / "results.json").write_text(json.dumps(results))


class GPUAdam(torch.optim.Optimizer):
    """AdamW that counts steps per group, and is not a subclass of the host's AdamW, like Transformer Engine's."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(parameter))
                mean = state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
                square = state["exp_avg_sq"].lerp_(parameter.grad.square(), 1 - beta2)
                scale = (square / (1 - beta2 ** group["step"])).sqrt() + group["eps"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(mean, scale, value=-group["lr"] / (1 - beta1 ** group["step"]))


def training(folder: Path, name: str, *, precision: Any = "fp32", steps: int = 2, cpu_offload: float = 0.0) -> TrainConfig:
    """A run over all groups in each step; the same on any device."""
    return TrainConfig(
        output=str(folder / name),
        model=ModelConfig(checkpoint=str(folder / "model"), precision=precision, attention="sdpa", backend="local"),
        data=DataConfig(train=str(folder / "groups"), groups_per_step=4, row_tokens=128),
        optimizer=OptimizerConfig(lr=1e-2, warmup_fraction=0.0, cpu_offload=cpu_offload),
        checkpoint=CheckpointConfig(every=2),
        loss=LossConfig(params={"beta": 0.1}),
        max_steps=steps,
    )


def run(config: TrainConfig) -> list[list[float]]:
    """Loss and gradient norm of each step."""
    from mpo_megatron.train.loop import train
    from mpo_megatron.train.setup import build_setup

    train(build_setup(config, 1))
    lines = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
    return [[line["loss"], line["grad_norm"]] for line in lines if "loss" in line]


def refused() -> dict[str, str | None]:
    """The exception for each of some mistakes; None if there was none."""
    gpu, cpu = torch.ones(2, 3, device="cuda"), torch.ones(2, 3)
    mistakes: dict[str, Callable[[], Any]] = {
        "a tensor of each": lambda: gpu + cpu,
        "adding to the host": lambda: cpu.add_(gpu),
        "joining": lambda: torch.cat([gpu, cpu]),
        "indexing the host": lambda: cpu[torch.tensor([0], device="cuda")],
        "numpy": gpu.numpy,
        "pinning": gpu.pin_memory,
        "the host's generator": lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
        "numpy without a copy": lambda: np.asarray(gpu),
    }
    allowed: dict[str, Callable[[], Any]] = {
        "a number of the host": lambda: gpu * torch.tensor(2.0),
        "the host's index": lambda: gpu[torch.tensor([0])],
        "copies": lambda: (cpu.copy_(gpu), gpu.copy_(cpu), gpu.cpu().numpy(), cpu.to("cuda") + gpu),
    }
    return {name: failure(action) for name, action in {**mistakes, **allowed}.items()}


def failure(action: Callable[[], Any]) -> str | None:
    try:
        action()
    except (RuntimeError, TypeError) as error:
        return type(error).__name__
    return None


def planted(config: TrainConfig) -> str | None:
    """The outcome of a run whose rows stay on the host."""
    device.upload = torch.as_tensor  # type: ignore[assignment]
    return failure(lambda: run(config))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
