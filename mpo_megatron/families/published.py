"""Published models' config.json, as far as it shapes them: names → fields, so that planning needs no download."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig


def _shape(
    model_type: str, hidden: int, ffn: int, layers: int, heads: int, groups: int, vocab: int, tied: bool
) -> dict[str, Any]:
    shape: dict[str, Any] = {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32768 if model_type == "qwen2" else 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_sliding_window": False,
    }
    if model_type != "qwen2":
        shape |= {"head_dim": 128, "attention_bias": False}
    return shape


_EXPERTS = {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1}

MODELS: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": _shape("qwen2", 896, 4864, 24, 14, 2, 151936, True),
    "Qwen2.5-1.5B": _shape("qwen2", 1536, 8960, 28, 12, 2, 151936, True),
    "Qwen2.5-3B": _shape("qwen2", 2048, 11008, 36, 16, 2, 151936, True),
    "Qwen2.5-7B": _shape("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
    "Qwen2.5-14B": _shape("qwen2", 5120, 13824, 48, 40, 8, 152064, False),
    "Qwen2.5-32B": _shape("qwen2", 5120, 27648, 64, 40, 8, 152064, False),
    "Qwen3-0.6B": _shape("qwen3", 1024, 3072, 28, 16, 8, 151936, True),
    "Qwen3-1.7B": _shape("qwen3", 2048, 6144, 28, 16, 8, 151936, True),
    "Qwen3-4B": _shape("qwen3", 2560, 9728, 36, 32, 8, 151936, True),
    "Qwen3-8B": _shape("qwen3", 4096, 12288, 36, 32, 8, 151936, False),
    "Qwen3-14B": _shape("qwen3", 5120, 17408, 40, 40, 8, 151936, False),
    "Qwen3-32B": _shape("qwen3", 5120, 25600, 64, 64, 8, 151936, False),
    "Qwen3-30B-A3B": _shape("qwen3_moe", 2048, 6144, 48, 32, 4, 151936, False) | _EXPERTS | {"norm_topk_prob": True},
}
"""Published config.json fields by name; base and instruction-tuned models share them."""


def build_config(name: str) -> PretrainedConfig:
    """The Hugging Face configuration of an entry of `MODELS`."""
    return AutoConfig.for_model(**MODELS[name])
