"""Choose the back end of the gated delta rule from the configuration and this machine's kernels."""

from __future__ import annotations

from mpo_megatron import device
from mpo_megatron.config import ModelConfig, require
from mpo_megatron.families import Family
from mpo_megatron.model.delta_rule import DeltaRule, chunked_delta_rule
from mpo_megatron.stack.delta_kernels import broken_delta_kernels, missing_for_delta_kernels

KERNEL_CHUNK = 64
"""Tokens per chunk of flash-linear-attention's kernels, which is fixed there."""


def choose_delta_rule(model: ModelConfig, family: Family) -> str:
    """The back end for this machine: `torch` or `fla`; `auto` for a model without such layers.

    `auto` is `torch` without a GPU and in float32, where exactness matters most. With bf16 on a GPU it is `fla`, and its kernels
    are required: in plain operations, Gated DeltaNets would take most of a step.

    Raises:
        ConfigError: requested or required kernels are not installed or do not fit this GPU; or a back end is set for a model
        without
            such layers.
    """
    if family.delta_net is None:
        require(
            model.delta_rule == "auto",
            f"model.delta_rule = {model.delta_rule}, but no layer of the model is a Gated DeltaNet; remove it.",
        )
        require(
            model.delta_chunk == ModelConfig.delta_chunk,
            f"model.delta_chunk = {model.delta_chunk}, but no layer of the model is a Gated DeltaNet; remove it.",
        )
        return "auto"  # no choice to make; calling this again must stay valid
    if model.delta_rule == "torch":
        return "torch"
    if model.delta_rule == "auto" and (not device.has_gpu() or model.precision == "fp32"):
        return "torch"
    asked = f"model.delta_rule = {model.delta_rule}"
    require(device.has_gpu(), f"{asked}, but this machine has no GPU; set it to auto.")
    require(
        model.precision == "bf16",
        f"{asked}, but its kernels multiply with less precision than float32 (model.precision = fp32); set it to auto.",
    )
    require(
        model.delta_chunk == KERNEL_CHUNK,
        f"{asked}, but its kernels compute {KERNEL_CHUNK} tokens at once (model.delta_chunk = {model.delta_chunk}). Set "
        f"model.delta_chunk to {KERNEL_CHUNK}, or model.delta_rule to torch.",
    )
    missing = missing_for_delta_kernels()
    require(missing is None, f"{asked}: no kernels for layers of linear_attention (Gated DeltaNet): {missing}. {SLOWER}")
    return "fla"


SLOWER = "Or set model.delta_rule to torch, which takes several times as long."


def delta_function(model: ModelConfig) -> DeltaRule:
    """The back end of a resolved configuration; it is imported here, so that only the one in use needs its packages.

    Raises:
        ConfigError: the package of its kernels does not import.
    """
    if model.delta_rule == "fla":
        broken = broken_delta_kernels()
        require(broken is None, f"model.delta_rule = fla: {broken}. {SLOWER}")
        from mpo_megatron.model.delta_fla import fla_delta_rule

        return fla_delta_rule
    return chunked_delta_rule(model.delta_chunk)
