"""A small model in both formats, an adapter of it in PEFT, and a policy of it with adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mpo_megatron.config import ConvertConfig, ModelConfig, ParallelConfig
from mpo_megatron.families import Family, load_family
from mpo_megatron.families.adapters import Adapter
from mpo_megatron.hf.conversion import load_conversion
from mpo_megatron.model.attention import row_layout
from mpo_megatron.model.convert import convert
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.policy import build_policy
from tests.distributed.adapters import start_matrix
from tests.tiny import save_model

TOKENS = torch.tensor([[5, 9, 2, 77, 31, 8, 8, 60]])
"""A text, [1, T]."""


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


def save_peft(base: Path, folder: Path, **options: Any) -> Any:
    """A saved PEFT adapter with nonzero B, and its model."""
    from peft import LoraConfig, get_peft_model  # seconds

    model = AutoModelForCausalLM.from_pretrained(base / "hf", dtype=torch.float32)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]} | options
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(start_matrix(name, tuple(weight.shape)))
    adapted.save_pretrained(folder)
    return adapted.eval()


def token_logps(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    """Log-probs [T - 1] of a text's tokens after the first, by a model of `transformers` or PEFT."""
    logps: Tensor = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    return logps


def token_row(tokens: Tensor = TOKENS) -> Any:
    """A policy's arguments for the same log-probs."""
    length = tokens.shape[1]
    return tokens, torch.arange(length)[None], row_layout([(0, length, 0, 0)]), np.arange(length - 1), tokens[0, 1:]
