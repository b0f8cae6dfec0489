"""Layouts for the comparison with plain `transformers`: models, and how each is cut over ranks and run."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

from tests.tiny import HYBRID

# Relative to the loss, to the norm, to the largest value of each tensor's gradient, and to that of each weight.
# Float32 sums of a few thousand products in another order differ by some 1e-6 of their largest terms: 2⁻²⁴ · √n, layers deep.
TOLERANCE = 1e-5
RATIO = 4.0
"""Of our rounding error to that of `transformers` in float32, both against float64, in models with Gated DeltaNets. Decays are
exponentials of float32 sums: rounding grows with the size of the weights, and no fixed number fits all. The two errors add up."""

EIGHT_LAYERS = {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3"},
    "qwen3-tied": {"model_type": "qwen3", "tied": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied": {"model_type": "qwen2", "tied": True},
    "qwen3-deep": {"model_type": "qwen3", **EIGHT_LAYERS},
    "qwen3-deep-tied": {"model_type": "qwen3", "tied": True, **EIGHT_LAYERS},
    "qwen2-wide": {"model_type": "qwen2", "hidden_size": 128, "intermediate_size": 256},
    "qwen2-wide-tied": {"model_type": "qwen2", "tied": True, "hidden_size": 128, "intermediate_size": 256},
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
    "qwen3.5-yarn": {
        "model_type": "qwen3_5_text",
        "rope_parameters": {
            **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4},
            "partial_rotary_factor": 0.25,
        },
    },
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
    def has_states(self) -> bool:
        """Whether some layers are Gated DeltaNets."""
        return MODELS[self.model]["model_type"] in HYBRID

    def __str__(self) -> str:
        options = [*self.parallel.items(), *self.layers.items(), *self.optimizer.items(), *self.experts.items()]
        words = [f"{name} {str(value).lower()}" for name, value in options]
        if self.resume is not None:
            words.append(f"resumed on {' '.join(f'{name} {size}' for name, size in self.resume.items()) or 'replicas alone'}")
        words += ["two-phase"] * self.two_phase + ["split groups"] * (self.row_tokens < 256)
        words += ["unshared prompts"] * (self.rows == "unshared") + [self.loss] * (self.loss != "mpo")
        words += [f"lora {name} {value}".lower() for name, value in self.lora.items()] + ["adapter off"] * self.adapter_off
        return f"{self.model}: {', '.join(words) or 'plain'}"


SPLIT: dict[str, Any] = {"two_phase": True, "row_tokens": 64}
"""Short rows: groups span several rows of several replicas."""
UNSHARED: dict[str, Any] = {"rows": "unshared", "row_tokens": 512}
BALANCE = {"balance_coeff": 0.2, "z_coeff": 0.05}
"""Large, so that the regulariser's gradients are comparable to the loss's."""
OVER_STEP = {**BALANCE, "balance_over": "step"}
REPLAY = {"routing": "replay"}
QUANTIZED = {"rank": 4, "quantize": "nf4"}
"""Needs rows of whole blocks of 64 on every rank: the wide models."""
WITH_OUTPUT = {"rank": 4, "target_modules": ["all-linear", "lm_head"]}
QUANTIZED_WITH_OUTPUT = {**WITH_OUTPUT, "quantize": "nf4"}
"""The output layer keeps its precision."""

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
    Case(model="qwen3-next", lora={"rank": 4, "rslora": True}),
    Case(model="qwen3.5", lora={"rank": 4, "rslora": True}, **UNSHARED),
    Case(model="qwen3.5-wide", lora=QUANTIZED, adapter_off=True, **SPLIT),
    Case(model="gemma2", lora=WITH_OUTPUT, adapter_off=True, loss="spo", layers={"logprob_chunk": 7}, core=True),
    Case(model="qwen2-wide", lora=QUANTIZED_WITH_OUTPUT, adapter_off=True, loss="spo", core=True),
    # two ranks
    Case(model="qwen2-tied", ranks=2, parallel={"tensor": 2}, lora=WITH_OUTPUT, core=True),
    Case(model="qwen3", ranks=2, parallel={"tensor": 2, "sequence": False}, lora=WITH_OUTPUT, adapter_off=True, loss="spo"),
    Case(
        model="qwen3-tied",
        ranks=2,
        parallel={"pipeline": 2},
        resume={"tensor": 2},
        lora=WITH_OUTPUT,
        optimizer={"overlap": "all"},
        core=True,
    ),
    Case(model="qwen3", ranks=2, parallel={"context": 2}, lora=WITH_OUTPUT, **SPLIT),
    Case(model="qwen2-wide", ranks=2, parallel={"tensor": 2}, lora=QUANTIZED, core=True),
    Case(model="qwen2-wide-tied", ranks=2, parallel={"tensor": 2}, lora=QUANTIZED_WITH_OUTPUT, core=True),
    Case(model="qwen3.5-wide", ranks=2, parallel={"pipeline": 2}, lora=QUANTIZED_WITH_OUTPUT, **SPLIT),
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
    Case(model="qwen3.5", ranks=2, parallel={"tensor": 2}, resume={"context": 2}, lora={"rank": 4}),
    Case(model="qwen3-next", ranks=2, resume={"tensor": 2}, lora={"rank": 4}),
    Case(model="qwen3.5-yarn", ranks=2, parallel={"tensor": 2}),
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
