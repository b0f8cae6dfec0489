"""A small model in both formats, and a policy of it with adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mpo_megatron.config import ConvertConfig, ModelConfig, ParallelConfig
from mpo_megatron.families import Family, load_family
from mpo_megatron.families.adapters import Adapter
from mpo_megatron.hf.conversion import load_conversion
from mpo_megatron.model.convert import convert
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.policy import build_policy
from tests.tiny import save_model


def save_base(folder: Path, **options: Any) -> Path:
    """Write a model in both formats, `hf` and `megatron`, to the folder; options as in `save_model`."""
    save_model(folder / "hf", **options)
    convert(ConvertConfig(input=str(folder / "hf"), output=str(folder / "megatron")))
    return folder


def build_adapted(base: Path, adapter: Adapter | None, ranks: Ranks) -> tuple[Family, list[torch.nn.Module]]:
    """The family of a base, and a policy with adapters whose weights are not loaded."""
    family = load_family(base / "megatron" / "hf")
    padded = load_conversion(base / "megatron").padded_vocab_size
    settings = ModelConfig(checkpoint="", precision="fp32")
    return family, build_policy(family, settings, ParallelConfig(), ranks, padded, adapter)
