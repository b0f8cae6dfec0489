"""PEFT adapters on plain `transformers` models, as a reference for ours.

PEFT has no corresponding adapters for experts, since `transformers` stacks their weights, and gate and up. Here, their weights
are W + scale · B · A by parametrization, and autograd does the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils.parametrize import register_parametrization

from mpo_megatron.families.adapters import PEFT_PREFIX, Adapter


def start_matrix(name: str, shape: tuple[int, ...]) -> Tensor:
    """Initial values of an adapter matrix in tests, by its PEFT name; B is not 0, so that A has a gradient."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class ExpertAdapters(torch.nn.Module):
    """W [E, rows, columns] of all experts, with A and B of each, for each of the layers fused in the rows."""

    def __init__(self, prefix: str, leaves: list[str], weight: Tensor, adapter: Adapter) -> None:
        super().__init__()
        self.scale, self.leaves, self.matrices = adapter.scale, leaves, torch.nn.ParameterDict()
        experts, rows, columns = weight.shape
        for expert in range(experts):
            for leaf in leaves:
                for kind, shape in (("A", (adapter.rank, columns)), ("B", (rows // len(leaves), adapter.rank))):
                    name = f"{prefix}.{expert}.{leaf}.lora_{kind}.weight"
                    self.matrices[name.replace(".", "/")] = torch.nn.Parameter(start_matrix(PEFT_PREFIX + name, shape))
        self.prefix = prefix

    def forward(self, weight: Tensor) -> Tensor:
        """W + scale · B · A, expert by expert."""

        def added(expert: int, leaf: str) -> Tensor:
            a, b = (self.matrices[f"{self.prefix}.{expert}.{leaf}.lora_{kind}.weight".replace(".", "/")] for kind in "AB")
            return self.scale * b @ a

        return weight + torch.stack([torch.cat([added(expert, leaf) for leaf in self.leaves]) for expert in range(len(weight))])


def attach_adapters(model: Any, adapter: Adapter | None) -> Callable[..., dict[str, Tensor]]:
    """Add adapters to the model and freeze all other weights; returns a function that copies matrices or gradients by PEFT
    names."""
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import, and only these cases need it

    assert adapter is not None
    experts = {
        name: module for name, module in model.named_modules() if name.endswith(".experts") and hasattr(module, "gate_up_proj")
    }
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        use_rslora=adapter.rslora,
        # Full names: with the last parts alone, PEFT would also target a layer's stacked experts.
        target_modules=[
            name
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in adapter.target_modules
        ],
        lora_dropout=0.0,
    )
    # For types that it knows, PEFT would give stacked experts one adapter for all layers with the same suffix.
    with mock.patch.object(model.config, "model_type", "plain"):
        inject_adapter_in_model(config, model)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in parameter_name)
    with torch.no_grad():
        for name, parameter in named_matrices(model).items():
            parameter.copy_(start_matrix(name, tuple(parameter.shape)))
    for name, module in experts.items():
        for weight, leaves in (("gate_up_proj", ["gate_proj", "up_proj"]), ("down_proj", ["down_proj"])):
            register_parametrization(module, weight, ExpertAdapters(name, leaves, getattr(module, weight), adapter))

    def copy(model: Any, *, gradients: bool = False) -> dict[str, Tensor]:
        found = {}
        for name, matrix in named_matrices(model).items():
            value = matrix.grad if gradients else matrix
            found[name] = (torch.zeros_like(matrix) if value is None else value).detach().clone()
        return found

    return copy


def named_matrices(model: Any) -> dict[str, Tensor]:
    """A and B of every layer under PEFT's names."""
    found = {}
    for name, parameter in model.named_parameters():
        if ".matrices." in name:
            found[PEFT_PREFIX + name.rpartition(".matrices.")[2].replace("/", ".")] = parameter
        elif ".lora_" in name:
            found[PEFT_PREFIX + name.replace(".default.", ".")] = parameter
    return found
