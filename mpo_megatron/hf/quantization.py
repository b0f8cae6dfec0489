"""Base weights in 4 bits (QLoRA): supported models and layouts. Needs no torch."""

from __future__ import annotations

import importlib.util

from mpo_megatron.config import ModelConfig, ParallelConfig, require
from mpo_megatron.families import Family
from mpo_megatron.families.adapters import is_adaptable, leaf

BLOCK = 64
"""Neighbouring weights of a row that share a scale. A block inside one rank's shard is the same on every layout."""
BYTES_PER_WEIGHT = 0.5 + 4 / BLOCK
"""Bytes per weight: two weights per byte, and a float32 scale per block."""
PACKAGE = "bitsandbytes"


def check_blocks(family: Family, parallel: ParallelConfig) -> None:
    """Check that every rank's shard of a row is a whole number of blocks.

    Raises:
        ConfigError: names the layer, its inputs, and valid layouts.
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
            f"{layer}, which is not a multiple of the block size {BLOCK}; set lora.quantize = none.",
        )
        require(
            rule.columns % (ranks * BLOCK) == 0,
            f"{layer}, but parallel.{name} = {ranks} splits blocks of {BLOCK}; choose one of {', '.join(choices)}.",
        )


def require_package(quantize: str) -> None:
    """Raise `ConfigError` unless the quantization package is installed; does not import it."""
    require(
        importlib.util.find_spec(PACKAGE) is not None,
        f"lora.quantize = {quantize} needs the package {PACKAGE}, which is not installed: pip install 'mpo-megatron[qlora]'.",
    )


def validate_quantization(family: Family, model: ModelConfig, parallel: ParallelConfig, *, samples: bool) -> None:
    """Check that a run supports base weights in 4 bits.

    Args:
        model: with `backend` resolved for this machine
        samples: whether the run samples from its policy
    Raises:
        ConfigError: names the option, the reason and the fix.
    """
    require_package("nf4")
    require(
        model.fp8 == "none",
        f"lora.quantize = nf4 with model.fp8 = {model.fp8}: base weights can have only one format; set one of them to none.",
    )
    require(
        not samples,
        "lora.quantize = nf4 with online.kl_weight: engines need the policy's full weights; set lora.quantize = none.",
    )
    require(
        family.experts is None or not model.from_engine,
        "lora.quantize = nf4: Transformer Engine computes all experts in one product, which does not support 4-bit weights; set "
        "model.backend = local.",
    )
    check_blocks(family, parallel)
