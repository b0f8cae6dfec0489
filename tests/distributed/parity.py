"""Every layout against plain `transformers`: cases, oracle, and differences.

A case is a model, a layout over ranks and a way to run it. Ranks train three steps with Megatron's distributed optimizer
(parity_worker.py); the oracle, one process that knows nothing of ours, runs each response on its own after its own copy of the
prompt, spells the loss out, and steps with torch's AdamW. Compared are the loss and every gradient of the first step, the norm of
the gradient, which clips it, and every weight after the third step, all under their Hugging Face names.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig

from mpo_megatron.config import ConvertConfig, LoraConfig
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.families import read_family
from mpo_megatron.families.adapters import choose_adapter
from mpo_megatron.model.convert import convert
from tests.distributed.adapters import attach_adapters
from tests.distributed.expert_oracle import Routed
from tests.distributed.launch import run_ranks
from tests.tiny import random_groups, save_groups, save_model

NUM_STEPS = 3
OPTIMIZER: dict[str, Any] = {
    **{"lr": 0.3, "min_lr": 0.3, "schedule": "constant", "warmup_fraction": 0.0},
    **{"beta1": 0.9, "beta2": 0.95, "eps": 0.3, "weight_decay": 0.1, "clip_grad": 1.0},
}
"""AdamW's ε is of the size of gradients: with a small one every weight moves by the learning rate whatever the size of its
gradient, and where that is near 0 in the direction of its rounding error. The clipped gradient's scale matters, too, then."""

# Relative to the loss, to the norm, to the largest value of each tensor's gradient (but see FLOOR), and to that of each weight.
# Float32 sums of a few thousand products in another order differ by some 1e-6 of their largest terms: 2⁻²⁴ · √n, layers deep.
TOLERANCE = 1e-5
STATE_TOLERANCE = 3e-5
"""Of models with Gated DeltaNets, whose decays are exponentials of float32 sums: `transformers`' own gradients are 5e-6 from
those in float64 there, and 2e-6 in models of attention alone."""
FLOOR = 1e-2
"""A gradient much smaller than the model's largest is a difference of large terms that cancel: its error is that of the terms. So
a tensor's largest value counts as at least this much of the model's."""

BETA = 0.1
SPO = {"alpha": 0.1, "gamma": 0.0, "regularizer": "token_kl", "regularizer_weight": 0.3}

EIGHT_LAYERS = {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3"},
    "qwen3-tied": {"model_type": "qwen3", "tied": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied": {"model_type": "qwen2", "tied": True},
    "qwen3-deep": {"model_type": "qwen3", **EIGHT_LAYERS},
    "qwen3-deep-tied": {"model_type": "qwen3", "tied": True, **EIGHT_LAYERS},
    "qwen2-wide": {"model_type": "qwen2", "hidden_size": 128, "intermediate_size": 256},
    "qwen2-moe-wide": {
        "model_type": "qwen2_moe",
        **{"hidden_size": 128, "intermediate_size": 256, "mlp_only_layers": [0]},
        **{"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128},
    },
    "qwen3.5-wide": {"model_type": "qwen3_5_text", "hidden_size": 128, "intermediate_size": 256, "linear_value_head_dim": 32},
    "qwen3-moe": {"model_type": "qwen3_moe", "norm_topk_prob": True},
    "qwen2-moe": {"model_type": "qwen2_moe", "mlp_only_layers": [0]},
    "qwen2-moe-tied": {"model_type": "qwen2_moe", "tied": True, "num_experts_per_tok": 3},
    "qwen2-window": {
        "model_type": "qwen2",
        **{"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4},
    },
    "qwen3.5": {"model_type": "qwen3_5_text"},
    "qwen3.5-tied": {"model_type": "qwen3_5_text", "tied": True, "linear_num_value_heads": 2},
    "qwen3.5-moe": {"model_type": "qwen3_5_moe_text"},
    "qwen3-next": {"model_type": "qwen3_next", "mlp_only_layers": [0], "linear_conv_kernel_dim": 3},
    "llama": {
        "model_type": "llama",
        "rope_parameters": {
            **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            **{"original_max_position_embeddings": 16, "rope_theta": 1e4},
        },
    },
    "smollm": {"model_type": "llama", "tied": True},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "mixtral": {"model_type": "mixtral", "sliding_window": 7},
    "gemma2": {
        "model_type": "gemma2",
        "tied": True,
        **{"sliding_window": 5, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0},
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "tied": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "olmo2": {"model_type": "olmo2"},
    "olmo3": {
        "model_type": "olmo3",
        "sliding_window": 5,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {
                **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4},
            },
        },
    },
}
"""Arguments of `save_model`; windows are shorter than most prompts and responses."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on a layout."""

    model: str
    ranks: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    """Options of `parallel`."""
    resume: dict[str, Any] | None = None
    """Layout of the second and third step, which then start from a checkpoint of the first; None: no checkpoint is written."""
    layers: dict[str, Any] = field(default_factory=dict)
    """Options of `model`, such as recomputation; `attention: varlen` replaces the flash kernel by plain operations."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """Options of `optimizer`, in addition to those of all cases."""
    rows: str = "shared"
    row_tokens: int = 256
    two_phase: bool = False
    loss: str = "mpo"
    experts: dict[str, Any] = field(default_factory=dict)
    """Options of `experts`."""
    lora: dict[str, Any] = field(default_factory=dict)
    """Options of `lora`: then only adapters are trained, and compared under PEFT's names."""
    adapter_off: bool = False
    """The reference is the policy with its adapter off, not another model."""
    core: bool = False
    """Whether it runs in the normal test suite."""

    @property
    def tolerance(self) -> float:
        """Maximum difference from the oracle."""
        return STATE_TOLERANCE if MODELS[self.model]["model_type"].startswith(("qwen3_5", "qwen3_next")) else TOLERANCE

    def __str__(self) -> str:
        options = [*self.parallel.items(), *self.layers.items(), *self.optimizer.items(), *self.experts.items()]
        words = [f"{name} {str(value).lower()}" for name, value in options]
        if self.resume is not None:
            words.append(f"resumed on {' '.join(f'{name} {size}' for name, size in self.resume.items()) or 'replicas alone'}")
        words += ["two-phase"] * self.two_phase + ["split groups"] * (self.row_tokens < 256)
        words += ["unshared prompts"] * (self.rows == "unshared") + [self.loss] * (self.loss != "mpo")
        words += [f"lora {name} {value}".lower() for name, value in self.lora.items()] + ["adapter off"] * self.adapter_off
        return f"{self.model}: {', '.join(words) or 'plain'}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """A case's differences from the oracle, and the tensor with the largest."""

    case: Case
    loss: float
    norm: float
    gradients: float
    gradient_name: str
    weights: float
    weight_name: str
    routing: float
    """For the routers' metrics."""
    report: dict[str, Any]
    """Other messages of the worker."""

    @property
    def passed(self) -> bool:
        """Whether all is within tolerance."""
        return max(self.loss, self.norm, self.gradients, self.weights, self.routing) <= self.case.tolerance


SPLIT = {"two_phase": True, "row_tokens": 64}
"""Short rows: groups span several rows of several replicas."""
UNSHARED = {"rows": "unshared", "row_tokens": 512}
BALANCE = {"balance_coeff": 0.2, "z_coeff": 0.05}
"""Large, so that the regulariser's gradients are comparable to the loss's."""
OVER_STEP = {**BALANCE, "balance_over": "step"}
REPLAY = {"routing": "replay"}
QUANTIZED = {"rank": 4, "quantize": "nf4"}
"""Needs rows of whole blocks of 64 on every rank: the wide models."""

ALL_CASES = [
    Case(model="qwen3", core=True),
    Case(model="qwen2"),
    Case(model="qwen2-tied", layers={"recompute": "full"}, core=True),
    Case(model="qwen3", layers={"recompute": "selective", "logprob_chunk": 7}, core=True),
    Case(model="qwen3-tied", **UNSHARED, core=True),
    Case(model="qwen3", **SPLIT, core=True),
    Case(model="qwen3", layers={"attention": "varlen"}, core=True),
    Case(model="qwen3", loss="spo", core=True),
    Case(model="qwen2-tied", loss="spo", two_phase=True),
    Case(model="qwen3-moe", core=True),
    Case(model="qwen2-moe", **SPLIT),
    Case(model="qwen2-moe-tied", layers={"recompute": "selective"}),
    Case(model="qwen2-window", layers={"attention": "varlen"}),
    Case(model="llama", core=True),
    Case(model="smollm", **SPLIT),
    Case(model="mistral", core=True),
    Case(model="mistral", layers={"attention": "varlen", "recompute": "full"}),
    Case(model="mistral", **UNSHARED),
    Case(model="mixtral"),
    Case(model="gemma2", loss="spo", core=True),
    Case(model="gemma2", layers={"attention": "varlen"}, **SPLIT),
    Case(model="gemma3", layers={"recompute": "full"}),
    Case(model="olmo2"),
    Case(model="olmo3", layers={"attention": "varlen"}),
    Case(model="qwen3.5", core=True),
    Case(model="qwen3.5", **UNSHARED),
    Case(model="qwen3.5-tied", layers={"recompute": "selective"}, **SPLIT),
    Case(model="qwen3.5-moe", layers={"recompute": "full"}),
    Case(model="qwen3-next"),
    Case(model="qwen3-moe", experts=BALANCE, layers={"recompute": "selective", "recompute_modules": ["moe"]}, core=True),
    Case(model="qwen3-moe", experts=BALANCE, **UNSHARED),
    Case(model="qwen2-moe", experts=OVER_STEP, **SPLIT, core=True),
    Case(model="mixtral", experts=REPLAY, **UNSHARED, core=True),
    Case(model="qwen2-moe-tied", experts={**BALANCE, **REPLAY}, loss="spo", layers={"recompute": "full"}),
    Case(model="qwen3", lora={"rank": 4}, core=True),
    Case(
        model="qwen2-tied", lora={"rank": 3, "rslora": True, "target_modules": ["v_proj", "up_proj"]}, adapter_off=True, **SPLIT
    ),
    Case(model="qwen3", lora={"rank": 4}, adapter_off=True, loss="spo", layers={"recompute": "full"}, core=True),
    Case(model="gemma2", lora={"rank": 2, "alpha": 3.0}, layers={"recompute": "selective"}, **UNSHARED),
    Case(model="qwen2-moe", lora={"rank": 4}, core=True),
    Case(model="qwen2-wide", lora=QUANTIZED, adapter_off=True, layers={"recompute": "full"}, core=True),
    Case(model="qwen2-moe-wide", lora=QUANTIZED, **SPLIT),
    Case(model="qwen3.5", lora={"rank": 4}, adapter_off=True, **SPLIT),
    Case(model="qwen3-next", lora={"rank": 4}, layers={"recompute": "full"}),
    Case(model="qwen3.5-wide", lora=QUANTIZED, adapter_off=True, **SPLIT),
    # two ranks
    Case(model="qwen2-wide", ranks=2, parallel={"tensor": 2}, lora=QUANTIZED, core=True),
    Case(model="qwen2-wide", ranks=2, parallel={"tensor": 2, "sequence": False}, lora=QUANTIZED, **SPLIT),
    Case(model="qwen2-wide", ranks=2, parallel={"pipeline": 2}, lora=QUANTIZED, adapter_off=True, loss="spo"),
    Case(model="qwen2-moe-wide", ranks=2, parallel={"expert": 2}, lora=QUANTIZED, core=True),
    Case(model="qwen2-moe-wide", ranks=2, parallel={"tensor": 2, "expert_tensor": 2}, lora=QUANTIZED),
    Case(model="qwen3", ranks=2, lora={"rank": 4}, optimizer={"overlap": "all"}, core=True),
    Case(model="qwen2-tied", ranks=2, parallel={"tensor": 2}, lora={"rank": 4}, core=True),
    Case(model="qwen2-tied", ranks=2, parallel={"tensor": 2, "sequence": False}, lora={"rank": 4}, **SPLIT, core=True),
    Case(model="gemma2", ranks=2, parallel={"tensor": 2}, lora={"rank": 4}, layers={"recompute": "full"}),
    Case(model="qwen3.5", ranks=2, parallel={"tensor": 2}, lora={"rank": 4}),
    Case(model="qwen3.5", ranks=2, parallel={"context": 2}, lora={"rank": 4}),
    Case(model="qwen3-next", ranks=2, parallel={"tensor": 2, "expert": 2}, lora={"rank": 4}, **SPLIT),
    Case(model="qwen3.5-wide", ranks=2, parallel={"tensor": 2}, lora=QUANTIZED),
    Case(model="qwen3.5-wide", ranks=2, parallel={"pipeline": 2}, lora=QUANTIZED, layers={"recompute": "selective"}),
    Case(model="qwen3-tied", ranks=2, parallel={"pipeline": 2, "virtual_pipeline": 2}, lora={"rank": 4}, core=True),
    Case(model="qwen3", ranks=2, parallel={"pipeline": 2}, lora={"rank": 4}, adapter_off=True, loss="spo"),
    Case(model="qwen3", ranks=2, parallel={"context": 2}, lora={"rank": 4}, **UNSHARED, core=True),
    Case(model="qwen2-moe", ranks=2, parallel={"expert": 2}, lora={"rank": 4}, **SPLIT, core=True),
    Case(model="qwen3-moe", ranks=2, parallel={"tensor": 2}, lora={"rank": 4}, layers={"recompute": "full"}),
    Case(model="qwen3-moe", ranks=2, parallel={"tensor": 2, "expert_tensor": 2}, lora={"rank": 4}, core=True),
    Case(model="qwen3", ranks=2),
    Case(model="qwen2-tied", ranks=2, **SPLIT, core=True),
    Case(model="qwen2-tied", ranks=2, optimizer={"overlap": "gradients"}),
    Case(model="qwen2-tied", ranks=2, optimizer={"overlap": "all"}, core=True),
    Case(model="qwen3", ranks=2, parallel={"tensor": 2}, core=True),
    Case(model="qwen2-tied", ranks=2, parallel={"tensor": 2, "sequence": False}),
    Case(model="qwen3-tied", ranks=2, parallel={"tensor": 2}, layers={"recompute": "full"}, **UNSHARED),
    Case(model="qwen3", ranks=2, parallel={"tensor": 2}, loss="spo"),
    Case(model="qwen2", ranks=2, parallel={"tensor": 2, "sequence": False}, layers={"attention": "varlen"}, **SPLIT, core=True),
    Case(model="qwen3-tied", ranks=2, parallel={"context": 2}, layers={"attention": "varlen"}, core=True),
    Case(model="qwen2", ranks=2, parallel={"pipeline": 2}, **SPLIT, core=True),
    Case(model="qwen2-tied", ranks=2, parallel={"pipeline": 2, "first_stage_layers": 1}, core=True),
    Case(model="qwen3-tied", ranks=2, parallel={"pipeline": 2, "virtual_pipeline": 2}, core=True),
    Case(model="qwen2", ranks=2, parallel={"pipeline": 2, "virtual_pipeline": 2}, layers={"recompute": "full"}, **SPLIT),
    Case(model="qwen3", ranks=2, parallel={"context": 2}, core=True),
    Case(model="qwen2-tied", ranks=2, parallel={"context": 2}, layers={"recompute": "full", "logprob_chunk": 7}, **SPLIT),
    Case(model="qwen3", ranks=2, parallel={"context": 2}, loss="spo"),
    Case(model="qwen3-moe", ranks=2, parallel={"expert": 2}, core=True),
    Case(model="qwen2-moe", ranks=2, parallel={"expert": 2}, optimizer={"overlap": "all"}, **SPLIT),
    Case(model="qwen2-moe-tied", ranks=2, parallel={"tensor": 2}, core=True),
    Case(model="qwen3-moe", ranks=2, parallel={"tensor": 2, "expert": 2}),
    Case(model="qwen2-moe-tied", ranks=2, parallel={"tensor": 2, "expert_tensor": 2}, layers={"recompute": "full"}),
    Case(model="qwen2-moe", ranks=2, parallel={"context": 2, "expert": 2}, core=True),
    Case(model="qwen2-window", ranks=2, parallel={"context": 2}, layers={"recompute": "selective"}, core=True),
    Case(model="llama", ranks=2, parallel={"tensor": 2}, core=True),
    Case(model="llama", ranks=2, parallel={"context": 2}),
    Case(model="smollm", ranks=2, parallel={"pipeline": 2}),
    Case(model="mistral", ranks=2, parallel={"tensor": 2}, **SPLIT),
    Case(model="mistral", ranks=2, parallel={"pipeline": 2, "virtual_pipeline": 2}),
    Case(model="mistral", ranks=2, parallel={"context": 2}, core=True),
    Case(model="mixtral", ranks=2, parallel={"expert": 2}, core=True),
    Case(model="mixtral", ranks=2, parallel={"tensor": 2}, **SPLIT),
    Case(model="mixtral", ranks=2, parallel={"tensor": 2, "expert": 2}),
    Case(model="gemma2", ranks=2, parallel={"tensor": 2}, core=True),
    Case(model="gemma2", ranks=2, parallel={"tensor": 2, "sequence": False}, **SPLIT),
    Case(model="gemma2", ranks=2, parallel={"pipeline": 2}),
    Case(model="gemma2", ranks=2, parallel={"context": 2}),
    Case(model="gemma3", ranks=2, parallel={"pipeline": 2}, core=True),
    Case(model="gemma3", ranks=2, parallel={"tensor": 2}, loss="spo"),
    Case(model="gemma3", ranks=2, parallel={"context": 2}, **SPLIT),
    Case(model="olmo2", ranks=2, parallel={"tensor": 2}),
    Case(model="olmo2", ranks=2, parallel={"pipeline": 2}, layers={"recompute": "full"}),
    Case(model="olmo2", ranks=2, parallel={"context": 2}, **SPLIT),
    Case(model="olmo3", ranks=2, parallel={"tensor": 2, "sequence": False}),
    Case(model="olmo3", ranks=2, parallel={"pipeline": 2}),
    Case(model="olmo3", ranks=2, parallel={"context": 2}),
    Case(model="qwen3.5", ranks=2, parallel={"tensor": 2}, core=True),
    Case(model="qwen3.5", ranks=2, parallel={"tensor": 2, "sequence": False}, **SPLIT),
    Case(model="qwen3.5", ranks=2, parallel={"context": 2}, layers={"recompute": "selective"}, core=True),
    Case(model="qwen3.5", ranks=2, parallel={"pipeline": 2, "virtual_pipeline": 2}, core=True),
    Case(model="qwen3.5", ranks=2, parallel={"pipeline": 2, "first_stage_layers": 1}, layers={"recompute": "full"}),
    Case(model="qwen3.5", ranks=2, optimizer={"overlap": "all"}),
    Case(model="qwen3.5-tied", ranks=2, parallel={"tensor": 2}, **UNSHARED),
    Case(model="qwen3.5-moe", ranks=2, parallel={"expert": 2}),
    Case(model="qwen3.5-moe", ranks=2, parallel={"tensor": 2}),
    Case(model="qwen3-next", ranks=2, parallel={"context": 2, "expert": 2}),
    Case(model="qwen3-moe", ranks=2, parallel={"expert": 2}, experts=BALANCE, **SPLIT, core=True),
    Case(model="qwen3-moe", ranks=2, parallel={"tensor": 2}, experts=BALANCE, layers={"recompute": "full"}, core=True),
    Case(model="qwen3-moe", ranks=2, parallel={"context": 2}, experts=BALANCE),
    Case(model="mixtral", ranks=2, parallel={"expert": 2}, experts=BALANCE),
    Case(model="qwen2-moe", ranks=2, experts=OVER_STEP, **SPLIT, core=True),
    Case(model="qwen2-moe", ranks=2, parallel={"pipeline": 2}, experts=OVER_STEP, two_phase=True),
    Case(model="mixtral", ranks=2, parallel={"tensor": 2, "expert": 2}, experts=REPLAY, **SPLIT, core=True),
    Case(
        model="mixtral",
        ranks=2,
        parallel={"pipeline": 2, "virtual_pipeline": 2},
        layers={"recompute": "selective", "recompute_modules": ["moe"]},
        experts=REPLAY,
        core=True,
    ),
    Case(model="mixtral", ranks=2, parallel={"context": 2}, experts=REPLAY, **SPLIT),
    Case(model="qwen2-moe-tied", ranks=2, experts={**BALANCE, **REPLAY}, loss="spo"),
    # four ranks
    Case(model="qwen3", ranks=4, parallel={"tensor": 2, "pipeline": 2}),
    Case(model="qwen2-tied", ranks=4, parallel={"tensor": 2, "pipeline": 2, "virtual_pipeline": 2}, core=True),
    Case(model="qwen3-deep", ranks=4, parallel={"tensor": 4}),
    Case(model="qwen3-deep-tied", ranks=4, parallel={"pipeline": 4, "virtual_pipeline": 2}),
    Case(model="qwen3-deep", ranks=4, parallel={"pipeline": 4, "first_stage_layers": 1, "last_stage_layers": 3}, **SPLIT),
    Case(
        model="qwen3-deep-tied", ranks=4, parallel={"pipeline": 2, "virtual_pipeline": 4}, optimizer={"overlap": "all"}, core=True
    ),
    Case(model="qwen3", ranks=4, parallel={"context": 2, "tensor": 2}, core=True),
    Case(model="qwen2-tied", ranks=4, parallel={"context": 2, "tensor": 2, "sequence": False}, **SPLIT),
    Case(model="qwen2", ranks=4, parallel={"context": 2}, optimizer={"overlap": "all"}, **SPLIT, core=True),
    Case(model="qwen3", ranks=4, parallel={"context": 4}),
    Case(model="qwen3-tied", ranks=4, parallel={"context": 2, "pipeline": 2, "virtual_pipeline": 2}, **UNSHARED),
    Case(model="qwen3-moe", ranks=4, parallel={"expert": 2}, **SPLIT, core=True),
    Case(model="qwen3-moe", ranks=4, parallel={"expert": 4}, layers={"recompute": "full"}),
    Case(model="qwen2-moe", ranks=4, parallel={"pipeline": 2, "virtual_pipeline": 2, "expert": 2}, core=True),
    Case(model="qwen2-moe-tied", ranks=4, parallel={"tensor": 2, "expert": 2}, optimizer={"overlap": "all"}, **SPLIT),
    Case(model="qwen3-moe", ranks=4, parallel={"tensor": 2, "expert_tensor": 2}),
    Case(model="mistral", ranks=4, parallel={"tensor": 2, "context": 2}),
    Case(model="qwen3.5", ranks=4, parallel={"tensor": 2, "pipeline": 2}, resume={"context": 2}),
    Case(model="qwen3-moe", ranks=4, parallel={"tensor": 2, "context": 2, "expert": 4}, experts=BALANCE, core=True),
    Case(model="mixtral", ranks=4, parallel={"pipeline": 2, "expert": 2}, resume={"tensor": 2}, experts=REPLAY, **SPLIT),
    Case(model="mixtral", ranks=4, parallel={"tensor": 2, "expert": 2, "pipeline": 2}),
    Case(model="gemma3", ranks=4, parallel={"tensor": 2, "pipeline": 2}, resume={"context": 2}),
    Case(model="olmo3", ranks=4, parallel={"tensor": 2, "context": 2}, resume={"pipeline": 2, "virtual_pipeline": 2}, core=True),
    Case(model="qwen3-moe", ranks=4, parallel={"expert": 4}, resume={"tensor": 2, "expert": 2, "pipeline": 2}, core=True),
    Case(model="qwen2-moe", ranks=4, parallel={"pipeline": 2, "expert": 2}, resume={"tensor": 2}),
    Case(model="qwen2-moe-tied", ranks=4, parallel={"tensor": 2, "expert": 2}, resume={"pipeline": 2, "virtual_pipeline": 2}),
    Case(model="qwen3-deep-tied", ranks=4, parallel={"pipeline": 4, "virtual_pipeline": 2}, resume={"tensor": 4}, core=True),
    Case(
        model="qwen3-deep",
        ranks=4,
        parallel={"tensor": 2},
        resume={"pipeline": 2, "virtual_pipeline": 2},
        optimizer={"overlap": "all"},
    ),
    Case(model="qwen3", ranks=4, parallel={"tensor": 2}, resume={"pipeline": 2}, lora={"rank": 4}, core=True),
    Case(model="qwen3-moe", ranks=4, parallel={"expert": 2}, resume={"tensor": 2, "expert": 4}, lora={"rank": 4}, **SPLIT),
    # eight ranks
    Case(model="qwen3-deep", ranks=8, parallel={"tensor": 2, "pipeline": 2, "context": 2}),
    Case(model="qwen3-deep-tied", ranks=8, parallel={"tensor": 2, "pipeline": 2, "context": 2, "virtual_pipeline": 2}, **SPLIT),
    Case(model="qwen3-deep", ranks=8, parallel={"tensor": 2, "pipeline": 2, "virtual_pipeline": 4}, optimizer={"overlap": "all"}),
    Case(model="qwen3-deep-tied", ranks=8, parallel={"pipeline": 8}),
    Case(
        model="qwen3-deep",
        ranks=8,
        parallel={"tensor": 4},
        layers={"recompute": "full"},
        optimizer={"overlap": "gradients"},
        **SPLIT,
    ),
    Case(model="qwen3-moe", ranks=8, parallel={"tensor": 2, "pipeline": 2, "expert": 4}, layers={"recompute": "full"}),
    Case(model="qwen2-moe", ranks=8, parallel={"pipeline": 2, "virtual_pipeline": 2, "context": 2, "expert": 2}, **SPLIT),
    Case(model="qwen3-moe", ranks=8, parallel={"tensor": 2, "expert": 4}, optimizer={"overlap": "all"}, **SPLIT),
]
CASES = [case for case in ALL_CASES if not case.lora.get("quantize") or importlib.util.find_spec("bitsandbytes") is not None]
"""All layouts compared with the oracle; with 4-bit ones if bitsandbytes is installed."""


def response_logp(model: Any, group: TokenizedGroup, k: int) -> Tensor:
    """log π(y_k | x) by `transformers`, prompt and response alone in the batch; without a prompt the first token is given."""
    prompt, response = (torch.from_numpy(tokens.astype("int64")) for tokens in (group.prompt_tokens, group.response_tokens[k]))
    row, first = torch.cat((prompt, response)), max(len(prompt), 1)
    logits = model(row[None]).logits[0, first - 1 : -1].float()
    return logits.log_softmax(dim=-1).gather(1, row[first:, None]).sum()


def mpo_oracle(policy: Any, groups: Sequence[TokenizedGroup], base: Callable[[int, int], Tensor], reference: Any) -> Tensor:
    """mpo Eq. 4–5 with the mean partition, averaged over the groups that have both sets."""
    losses = []
    for index, group in enumerate(groups):
        assert group.rewards is not None
        mean = group.rewards.mean()
        preferred = [k for k, reward in enumerate(group.rewards) if reward > mean]
        if not preferred:
            continue
        terms = [BETA * (response_logp(policy, group, k) - base(index, k)) for k in range(len(group.rewards))]
        everything = torch.stack(terms)
        losses.append(everything.logsumexp(0) - everything[preferred].logsumexp(0))
    return torch.stack(losses).mean()


def divergence(policy: Any, reference: Any, group: TokenizedGroup, k: int) -> Tensor:
    """Σ over the tokens of y_k of KL(π_θ ‖ π_ref) of the next token, over the whole vocabulary."""
    prompt, response = (torch.from_numpy(tokens.astype("int64")) for tokens in (group.prompt_tokens, group.response_tokens[k]))
    row, first = torch.cat((prompt, response))[None], max(len(prompt), 1)
    ours, theirs = (model(row).logits[0, first - 1 : -1].log_softmax(dim=-1) for model in (policy, reference))
    return (ours.exp() * (ours - theirs.detach())).sum()


def spo_oracle(policy: Any, groups: Sequence[TokenizedGroup], base: Callable[[int, int], Tensor], reference: Any) -> Tensor:
    """spo Eq. 9 on best and worst, with the token-wise KL of both (Table 4), averaged over the groups that have both."""
    losses = []
    for group in groups:
        assert group.rewards is not None
        best, worst = int(group.rewards.argmax()), int(group.rewards.argmin())
        if best == worst:
            continue
        margin = response_logp(policy, group, best) - response_logp(policy, group, worst)
        kl = (divergence(policy, reference, group, best) + divergence(policy, reference, group, worst)) / 2
        losses.append(-torch.nn.functional.logsigmoid(SPO["alpha"] * margin) / SPO["alpha"] + SPO["regularizer_weight"] * kl)
    return torch.stack(losses).mean()


LOSSES = {"mpo": ({"beta": BETA}, mpo_oracle), "spo": (SPO, spo_oracle)}
"""Hyper-parameters and oracle of each loss."""


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What the oracle finds."""

    loss: float
    norm: float
    gradients: dict[str, Tensor]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    measured: dict[str, float]
    """Metrics of routers in the first step."""


def first_response(group: TokenizedGroup) -> TokenizedGroup:
    """The group with only its first response."""
    assert group.rewards is not None
    return dataclasses.replace(group, response_tokens=group.response_tokens[:1], rewards=group.rewards[:1])


class World:
    """Models in both formats, groups, and the oracle's results for each model and loss."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        groups = [
            *random_groups(5, seed=4),
            *random_groups(1, seed=7, max_responses=16, response_tokens=(1, 8), tied_share=0.0),
            *random_groups(2, seed=8, response_tokens=(1, 1), tied_share=0.0),  # only an end token
            *random_groups(2, seed=9, prompt_tokens=(0, 0), response_tokens=(1, 6), tied_share=0.0),
            *(first_response(group) for group in random_groups(1, seed=10)),  # K = 1: nothing to compare with
        ]
        self.groups = [dataclasses.replace(group, group_id=f"group-{index}") for index, group in enumerate(groups)]
        assert max(len(group.response_tokens) for group in self.groups) == 16
        self.checkpoint("qwen3", "policy")
        save_groups(folder / "groups", self.groups, folder / "qwen3-policy-hf")

    def checkpoint(self, model: str, role: str) -> Path:
        """The folder of a model, created if missing; with `-hf`, that of the Hugging Face checkpoint."""
        folder = self.folder / f"{model}-{role}"
        if not folder.exists():
            hf = save_model(Path(f"{folder}-hf"), seed={"policy": 1, "reference": 2}[role], **MODELS[model])
            convert(ConvertConfig(input=str(hf), output=str(folder)))
        return folder

    @functools.cache  # noqa: B019 (a world lives as long as its process)
    def truth(self, model: str, loss: str, experts: str = "{}", lora: str = "{}", adapter_off: bool = False) -> Truth:
        """Three steps of plain `transformers`; with adapters, of PEFT.

        Args:
            experts, lora: options of these sections as JSON
        """
        policy, reference = (
            AutoModelForCausalLM.from_pretrained(
                f"{self.checkpoint(model, role)}-hf",
                dtype=torch.float32,
                attn_implementation="eager" if model == "gemma2" else None,  # other implementations ignore score caps
            )
            for role in ("policy", "policy" if adapter_off else "reference")
        )
        weights_of: Callable[..., dict[str, Tensor]] = copy_weights
        if json.loads(lora).get("quantize"):
            for model_of_it in (policy, reference):
                round_to_nf4(model_of_it)
        if lora != "{}":
            weights_of = attach_adapters(policy, choose_adapter(read_family(policy.config), LoraConfig(**json.loads(lora))))

        @functools.cache
        @torch.no_grad()
        def base(index: int, k: int) -> Tensor:
            return response_logp(reference, self.groups[index], k)

        named = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
        decayed = [weight for weight in named.values() if weight.dim() > 1]
        others = [weight for weight in named.values() if weight.dim() == 1]  # biases and norms
        adam = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": OPTIMIZER["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
            lr=OPTIMIZER["lr"],
            betas=(OPTIMIZER["beta1"], OPTIMIZER["beta2"]),
            eps=OPTIMIZER["eps"],
        )
        before = weights_of(policy)
        options = json.loads(experts)
        routed = Routed(policy, reference, options) if options else None
        found: dict[str, Any] = {}
        for step in range(NUM_STEPS):
            adam.zero_grad()
            value = LOSSES[loss][1](policy if routed is None else routed, self.groups, base, reference)
            added, measured = (0.0, {}) if routed is None else routed.terms(self.groups)
            (value + added).backward()
            if step == 0:
                found = {"loss": value.item(), "gradients": weights_of(policy, gradients=True), "measured": measured}
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), OPTIMIZER["clip_grad"])
            found.setdefault("norm", norm.item())
            adam.step()
        return Truth(**found, before=before, after=weights_of(policy))


@torch.no_grad()
def round_to_nf4(model: Any) -> None:
    """Round the linear layers of attention and MLPs to the values of bitsandbytes' NF4."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for name, weight in model.named_parameters():
        if weight.dim() > 1 and "proj" in name:
            weight.copy_(dequantize_4bit(*quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4")))


def copy_weights(model: Any, *, gradients: bool = False) -> dict[str, Tensor]:
    """Copies of a model's weights, or of their gradients, under the names they have in checkpoints."""
    named = {name: (weight.grad if gradients else weight).detach().clone() for name, weight in model.named_parameters()}
    split = split_experts(named)
    return mixtral_names(split) if isinstance(model.config, MixtralConfig) else split


def split_experts(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts one by one, as in checkpoints; `transformers` stacks them when it loads them."""
    split: dict[str, Tensor] = {}
    for name, tensor in named.items():
        if ".experts." not in name:
            split[name] = tensor
            continue
        prefix, kind = name.rsplit(".", 1)
        for expert, matrix in enumerate(tensor):
            parts = {"gate_proj": matrix[: len(matrix) // 2], "up_proj": matrix[len(matrix) // 2 :]}
            for part, rows in (parts if kind == "gate_up_proj" else {kind: matrix}).items():
                split[f"{prefix}.{expert}.{part}.weight"] = rows
    return split


MIXTRAL_NAMES = {".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def mixtral_names(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mixtral's names in checkpoints; those in `transformers` are every family's."""
    renamed = {}
    for name, tensor in named.items():
        for new, old in MIXTRAL_NAMES.items():
            name = name.replace(new, old)
        renamed[name] = tensor
    return renamed


def run_cases(world: World, cases: Sequence[Case], tag: str) -> list[Result]:
    """Run cases with the same number of ranks in one start, and compare them with the oracle."""
    [ranks] = {case.ranks for case in cases}
    folder = world.folder
    specs = []
    for index, case in enumerate(cases):
        for role in ("policy", "reference"):
            world.checkpoint(case.model, role)
        params = LOSSES[case.loss][0]
        specs.append({**dataclasses.asdict(case), "params": params, "output": str(folder / f"{tag}-{ranks}-{index}")})
    spec = {"folder": str(folder), "steps": NUM_STEPS, "optimizer": OPTIMIZER, "cases": specs}
    path = folder / f"spec-{tag}-{ranks}.json"
    path.write_text(json.dumps(spec))
    run_ranks(ranks, "tests.distributed.parity_worker", [str(path)])
    return [compare(world, case, Path(spec["output"])) for case, spec in zip(cases, specs, strict=True)]


def compare(world: World, case: Case, output: Path) -> Result:
    """Compares a case's files with the oracle."""
    truth = world.truth(case.model, case.loss, json.dumps(case.experts), json.dumps(case.lora), case.adapter_off)
    report = json.loads(output.with_suffix(".json").read_text())
    gradients, weights = (load_file(f"{output}-{name}.safetensors") for name in ("gradients", "weights"))
    largest = max(gradient.abs().max().item() for gradient in truth.gradients.values())
    gradient, gradient_name = farthest(
        gradients,
        truth.gradients,
        {name: max(tensor.abs().max().item(), FLOOR * largest) for name, tensor in truth.gradients.items()},
    )
    weight, weight_name = farthest(
        weights, truth.after, {name: tensor.abs().max().item() for name, tensor in truth.after.items()}
    )
    assert set(truth.measured) == set(report["measured"])
    routing = [abs(report["measured"][name] - value) / max(abs(value), FLOOR) for name, value in truth.measured.items()]
    return Result(
        case=case,
        loss=abs(report["loss"] - truth.loss) / abs(truth.loss),
        norm=abs(report["norm"] - truth.norm) / truth.norm,
        gradients=gradient,
        gradient_name=gradient_name,
        weights=weight,
        weight_name=weight_name,
        routing=max(routing, default=0.0),
        report=report,
    )


def farthest(ours: dict[str, Tensor], theirs: dict[str, Tensor], scale: dict[str, float]) -> tuple[float, str]:
    """The largest difference over all tensors, each relative to its scale, and the tensor's name."""
    assert set(ours) == set(theirs), sorted(set(ours) ^ set(theirs))[:4]
    return max(((ours[name] - theirs[name]).abs().max().item() / scale[name], name) for name in theirs)
