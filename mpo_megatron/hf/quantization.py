"""Base weights in 4 bits (QLoRA): which models and layouts can have them. Needs no torch."""

from __future__ import annotations

import importlib.util

from mpo_megatron.config import ModelConfig, ParallelConfig, require
from mpo_megatron.families import Family
from mpo_megatron.families.adapters import is_adaptable, leaf

BLOCK = 64
"""Weights that share a scale: neighbours in a row. A block within one rank's shard is the same on every layout."""
BYTES_PER_WEIGHT = 0.5 + 4 / BLOCK
"""Two weights a byte, and a float32 scale for each block."""
PACKAGE = "bitsandbytes"


def check_blocks(family: Family, parallel: ParallelConfig) -> None:
    """Check that every rank's shard of a row is a whole number of blocks.

    Raises:
        ConfigError: naming the layer, its inputs, and the layouts that work.
    """
    for rule in family.rules:
        if not is_adaptable(rule):
            continue
        assert isinstance(rule.columns, int)
        expert = rule.experts is not None
        name, ranks = ("expert_tensor", parallel.expert_tensor) if expert else ("tensor", parallel.tensor)
        ranks = 1 if rule.shard == "rows" else ranks
        layer = f"lora.quantize = nf4: {leaf(next(iter(rule.parts)))} has {rule.columns} inputs"
        choices = [str(number) for number in range(1, rule.columns // BLOCK + 1) if rule.columns % (number * BLOCK) == 0]
        require(
            bool(choices),
            f"{layer}, which blocks of {BLOCK} do not divide; set lora.quantize = none.",
        )
        require(
            rule.columns % (ranks * BLOCK) == 0,
            f"{layer}, and parallel.{name} = {ranks} cuts blocks of {BLOCK}; choose one of {', '.join(choices)}.",
        )


def require_package(quantize: str) -> None:
    """Raise `ConfigError` unless the package that quantizes is installed; nothing is imported."""
    require(
        importlib.util.find_spec(PACKAGE) is not None,
        f"lora.quantize = {quantize} needs the package {PACKAGE}, which is not installed: pip install 'mpo-megatron[qlora]'.",
    )


def validate_quantization(family: Family, model: ModelConfig, parallel: ParallelConfig, *, samples: bool) -> None:
    """Check that a run can have its base weights in 4 bits.

    Args:
        model: with `backend` as this machine has it
        samples: the run samples from its policy
    Raises:
        ConfigError: naming the option, the reason and the fix.
    """
    require_package("nf4")
    require(
        model.fp8 == "none",
        f"lora.quantize = nf4 with model.fp8 = {model.fp8}: base weights have one format; set one of them to none.",
    )
    require(
        not samples,
        "lora.quantize = nf4 with online.kl_weight: engines are given whole weights of the policy; set lora.quantize = none.",
    )
    require(
        family.experts is None or not model.from_engine,
        "lora.quantize = nf4: Transformer Engine computes experts in one product, which reads no 4-bit weights; set "
        "model.backend = local.",
    )
    check_blocks(family, parallel)
