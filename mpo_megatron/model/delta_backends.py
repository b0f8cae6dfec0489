"""Which back end computes the gated delta rule: what the configuration asks for, as far as this machine has it."""

from __future__ import annotations

import importlib.util

from mpo_megatron import device
from mpo_megatron.config import ModelConfig, require
from mpo_megatron.families import Family
from mpo_megatron.model.delta_rule import DeltaRule, chunked_delta_rule

INSTALL = "pip install flash-linear-attention"


def choose_delta_rule(model: ModelConfig, family: Family) -> str:
    """The back end for this machine: `torch` or `fla`; for a model without such layers `auto`.

    `auto` is `torch` without a GPU and in float32, where exactness is asked for; with bf16 on a GPU it is `fla`, whose kernels
    must be there: in plain operations a Gated DeltaNet would take most of a step.

    Raises:
        ConfigError: kernels are asked for, or needed, that are not installed; or a back end is named for a model that has no
            such layers.
    """
    if family.delta_net is None:
        require(
            model.delta_rule == "auto",
            f"model.delta_rule = {model.delta_rule}, but no layer of the model is a Gated DeltaNet; leave it out.",
        )
        return "auto"  # nothing to choose, and the choice may be made again
    if model.delta_rule == "torch":
        return "torch"
    if model.delta_rule == "auto" and (not device.has_gpu() or model.precision == "fp32"):
        return "torch"
    asked = f"model.delta_rule = {model.delta_rule}"
    require(device.has_gpu(), f"{asked}, but this machine has no GPU; set it to auto.")
    require(model.precision == "bf16", f"{asked}, but its kernels take no float32 (model.precision); set it to auto.")
    require(
        is_installed(),
        f"{asked}: the kernels for this model's layers of linear_attention (Gated DeltaNet) are not installed; {INSTALL}, or set "
        "model.delta_rule to torch, which takes several times as long.",
    )
    return "fla"


def is_installed() -> bool:
    """Whether flash-linear-attention is there."""
    return importlib.util.find_spec("fla") is not None


def delta_function(name: str) -> DeltaRule:
    """The function of a back end; its imports happen here, so that only the one in use is needed."""
    if name == "fla":
        from mpo_megatron.model.delta_fla import fla_delta_rule

        return fla_delta_rule
    return chunked_delta_rule
