"""The shape-relevant part of published models' config.json, so that planning needs no download."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    "vocab_size",
)
"""Order of the fields in the entries below."""


def _decoder(model_type: str, /, *sizes: int, **fields: Any) -> dict[str, Any]:
    """Fields of every config.json, and further ones."""
    common = {"model_type": model_type, "tie_word_embeddings": False, "attention_dropout": 0.0}
    return {**common, **dict(zip(SIZES, sizes, strict=True)), **fields}


def _qwen(model_type: str, /, *sizes: int, tied: bool, **fields: Any) -> dict[str, Any]:
    fields |= {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "use_sliding_window": False}
    if model_type == "qwen2":
        fields |= {"max_position_embeddings": 32768, "max_window_layers": sizes[2]}
    else:
        fields |= {"max_position_embeddings": 40960, "head_dim": 128, "attention_bias": False}
    return _decoder(model_type, *sizes, tie_word_embeddings=tied, **fields)


def _llama(*sizes: int, positions: int, theta: float, tied: bool = False, factor: float | None = None, **fields: Any) -> Any:
    """Llama-like models; `factor` scales Llama 3.1's rotary embedding."""
    fields |= {"hidden_act": "silu", "rms_norm_eps": 1e-5, "attention_bias": False, "max_position_embeddings": positions}
    fields |= {"rope_theta": theta, "pretraining_tp": 1, "tie_word_embeddings": tied}
    if factor is not None:
        fields["rope_scaling"] = {
            **{"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings": 8192,
        }
    return _decoder("llama", *sizes, **fields)


def _mistral(*sizes: int, theta: float, window: int | None = None, **fields: Any) -> dict[str, Any]:
    fields |= {"hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "rope_theta": theta}
    return _decoder("mistral", *sizes, sliding_window=window, **fields)


def _gemma2(*sizes: int, head: int, scalar: int) -> dict[str, Any]:
    return _decoder(
        "gemma2",
        *sizes,
        **{"head_dim": head, "query_pre_attn_scalar": scalar, "tie_word_embeddings": True, "max_position_embeddings": 8192},
        **{"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6},
        **{"rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096, "cache_implementation": "hybrid"},
        **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention_bias": False},
    )


def _olmo(model_type: str, /, *sizes: int, **fields: Any) -> dict[str, Any]:
    fields |= {"hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False, "rope_theta": 500000}
    return _decoder(model_type, *sizes, **fields)


def _hybrid(model_type: str, /, *sizes: int, values: int, tied: bool = False, **fields: Any) -> dict[str, Any]:
    """The text models of Qwen3.5 and 3.6; `values` is the number of value heads."""
    fields |= {"hidden_act": "silu", "rms_norm_eps": 1e-6, "head_dim": 256, "max_position_embeddings": 262144}
    fields |= {"linear_num_value_heads": values, "rope_parameters": {"rope_type": "default", "rope_theta": 1e7}}
    fields["rope_parameters"]["partial_rotary_factor"] = 0.25
    found = _decoder(model_type, *sizes, tie_word_embeddings=tied, **fields)
    if model_type == "qwen3_5_moe_text":  # no layer has a dense MLP
        del found["intermediate_size"]
    return found


def _shared(experts: int, per_token: int, channels: int) -> dict[str, Any]:
    """Fields of experts with one shared expert of the same size."""
    size = {"moe_intermediate_size": channels, "shared_expert_intermediate_size": channels}
    return {"num_experts": experts, "num_experts_per_tok": per_token, **size}


_EXPERTS: dict[str, Any] = {
    **{"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1},
    "norm_topk_prob": True,
}

MODELS: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": _qwen("qwen2", 896, 4864, 24, 14, 2, 151936, tied=True),
    "Qwen2.5-1.5B": _qwen("qwen2", 1536, 8960, 28, 12, 2, 151936, tied=True),
    "Qwen2.5-3B": _qwen("qwen2", 2048, 11008, 36, 16, 2, 151936, tied=True),
    "Qwen2.5-7B": _qwen("qwen2", 3584, 18944, 28, 28, 4, 152064, tied=False),
    "Qwen2.5-14B": _qwen("qwen2", 5120, 13824, 48, 40, 8, 152064, tied=False),
    "Qwen2.5-32B": _qwen("qwen2", 5120, 27648, 64, 40, 8, 152064, tied=False),
    "Qwen3-0.6B": _qwen("qwen3", 1024, 3072, 28, 16, 8, 151936, tied=True),
    "Qwen3-1.7B": _qwen("qwen3", 2048, 6144, 28, 16, 8, 151936, tied=True),
    "Qwen3-4B": _qwen("qwen3", 2560, 9728, 36, 32, 8, 151936, tied=True),
    "Qwen3-8B": _qwen("qwen3", 4096, 12288, 36, 32, 8, 151936, tied=False),
    "Qwen3-14B": _qwen("qwen3", 5120, 17408, 40, 40, 8, 151936, tied=False),
    "Qwen3-32B": _qwen("qwen3", 5120, 25600, 64, 64, 8, 151936, tied=False),
    "Qwen3-30B-A3B": _qwen("qwen3_moe", 2048, 6144, 48, 32, 4, 151936, tied=False, **_EXPERTS),
    "Qwen3-Next-80B-A3B": _decoder(
        *("qwen3_next", 2048, 5120, 48, 16, 2, 151936),
        **{"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e7, "max_position_embeddings": 262144, "head_dim": 256},
        **_shared(512, 10, 512),
    ),
    "Qwen3.5-0.8B": _hybrid("qwen3_5_text", 1024, 3584, 24, 8, 2, 248320, values=16, tied=True),
    "Qwen3.5-2B": _hybrid("qwen3_5_text", 2048, 6144, 24, 8, 2, 248320, values=16, tied=True),
    "Qwen3.5-4B": _hybrid("qwen3_5_text", 2560, 9216, 32, 16, 4, 248320, values=32, tied=True),
    "Qwen3.5-9B": _hybrid("qwen3_5_text", 4096, 12288, 32, 16, 4, 248320, values=32),
    "Qwen3.5-27B": _hybrid("qwen3_5_text", 5120, 17408, 64, 24, 4, 248320, values=48),
    "Qwen3.5-35B-A3B": _hybrid("qwen3_5_moe_text", 2048, 0, 40, 16, 2, 248320, values=32, **_shared(256, 8, 512)),
    "Qwen3.5-122B-A10B": _hybrid("qwen3_5_moe_text", 3072, 0, 48, 32, 2, 248320, values=64, **_shared(256, 8, 1024)),
    "Qwen3.5-397B-A17B": _hybrid("qwen3_5_moe_text", 4096, 0, 60, 32, 2, 248320, values=64, **_shared(512, 10, 1024)),
    "Qwen3.6-27B": _hybrid("qwen3_5_text", 5120, 17408, 64, 24, 4, 248320, values=48),
    "Qwen3.6-35B-A3B": _hybrid("qwen3_5_moe_text", 2048, 0, 40, 16, 2, 248320, values=32, **_shared(256, 8, 512)),
    "Qwen3-235B-A22B": _qwen(
        "qwen3_moe", 4096, 12288, 94, 64, 4, 151936, tied=False, **{**_EXPERTS, "moe_intermediate_size": 1536}
    ),
    "Qwen2.5-72B": _qwen("qwen2", 8192, 29568, 80, 64, 8, 152064, tied=False),
    "Llama-2-7B": _llama(4096, 11008, 32, 32, 32, 32000, positions=4096, theta=10000.0),
    "Llama-2-13B": _llama(5120, 13824, 40, 40, 40, 32000, positions=4096, theta=10000.0),
    "Llama-2-70B": _llama(8192, 28672, 80, 64, 8, 32000, positions=4096, theta=10000.0),
    "Llama-3-8B": _llama(4096, 14336, 32, 32, 8, 128256, positions=8192, theta=500000.0),
    "Llama-3.1-8B": _llama(4096, 14336, 32, 32, 8, 128256, positions=131072, theta=500000.0, factor=8.0),
    "Llama-3.1-70B": _llama(8192, 28672, 80, 64, 8, 128256, positions=131072, theta=500000.0, factor=8.0),
    "Llama-3.1-405B": _llama(16384, 53248, 126, 128, 8, 128256, positions=131072, theta=500000.0, factor=8.0),
    "Llama-3.2-1B": _llama(2048, 8192, 16, 32, 8, 128256, positions=131072, theta=500000.0, factor=32.0, tied=True, head_dim=64),
    "Llama-3.2-3B": _llama(3072, 8192, 28, 24, 8, 128256, positions=131072, theta=500000.0, factor=32.0, tied=True, head_dim=128),
    "Llama-3.3-70B": _llama(8192, 28672, 80, 64, 8, 128256, positions=131072, theta=500000.0, factor=8.0),
    "SmolLM2-135M": _llama(576, 1536, 30, 9, 3, 49152, positions=8192, theta=100000, tied=True, is_llama_config=True),
    "SmolLM2-360M": _llama(960, 2560, 32, 15, 5, 49152, positions=8192, theta=100000, tied=True, is_llama_config=True),
    "SmolLM2-1.7B": _llama(2048, 8192, 24, 32, 32, 49152, positions=8192, theta=130000, tied=True),
    "TinyLlama-1.1B": _llama(2048, 5632, 22, 32, 4, 32000, positions=2048, theta=10000.0),
    "stories15M": _llama(288, 768, 6, 6, 6, 32000, positions=256, theta=10000.0, tied=True),
    "Mistral-7B-v0.1": _mistral(4096, 14336, 32, 32, 8, 32000, theta=10000.0, window=4096),
    "Mistral-7B-v0.2": _mistral(4096, 14336, 32, 32, 8, 32000, theta=1e6),
    "Mistral-7B-v0.3": _mistral(4096, 14336, 32, 32, 8, 32768, theta=1e6),
    "Mistral-Small-24B": _mistral(5120, 32768, 40, 32, 8, 131072, theta=1e8, head_dim=128),
    "Mixtral-8x7B": _mistral(4096, 14336, 32, 32, 8, 32000, theta=1e6, num_local_experts=8, num_experts_per_tok=2)
    | {"model_type": "mixtral", "router_aux_loss_coef": 0.02},
    "Gemma-2-2B": _gemma2(2304, 9216, 26, 8, 4, 256000, head=256, scalar=256),
    "Gemma-2-9B": _gemma2(3584, 14336, 42, 16, 8, 256000, head=256, scalar=256),
    "Gemma-2-27B": _gemma2(4608, 36864, 46, 32, 16, 256000, head=128, scalar=144),
    "Gemma-3-1B": _decoder(
        *("gemma3_text", 1152, 6912, 26, 4, 1, 262144),
        **{"head_dim": 256, "query_pre_attn_scalar": 256, "tie_word_embeddings": True, "max_position_embeddings": 32768},
        **{"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "rope_theta": 1000000, "sliding_window": 512},
        **{"rope_local_base_freq": 10000, "sliding_window_pattern": 6, "attention_bias": False},
    ),
    "OLMo-2-7B": _olmo("olmo2", 4096, 11008, 32, 32, 32, 100352, max_position_embeddings=4096),
    "OLMo-2-13B": _olmo("olmo2", 5120, 13824, 40, 40, 40, 100352, max_position_embeddings=4096),
    "OLMo-3-7B": _olmo(
        *("olmo3", 4096, 11008, 32, 32, 32, 100278),
        **{"max_position_embeddings": 65536, "sliding_window": 4096},
        rope_scaling={
            **{"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "beta_fast": 32, "beta_slow": 1},
            "attention_factor": 1.2079441541679836,
        },
    ),
}
"""Published config.json fields by name; base and instruction-tuned models share them. Qwen2.5 entries are Instruct's: base
models have four times the positions and, from 14B on, another `rms_norm_eps`.

Qwen3.5 and 3.6: only the text models, without vision tower and multi-token prediction.

Sizes, heads, windows, caps and rotary fields agree with litgpt's config.py (June 2026) for models that it has; the fields of
Gemma 2 and OLMo 3 with copies of their config.json in public repositories; parameter counts with the hub's (see the tests).
"""


def build_config(name: str) -> PretrainedConfig:
    """The Hugging Face configuration of an entry of `MODELS`."""
    return AutoConfig.for_model(**MODELS[name])
