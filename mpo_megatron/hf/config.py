"""The Hugging Face config of a model, and what of it cannot be represented.

Supported: Qwen2 / Qwen2.5 (`qwen2`: bias on q, k, v), Qwen3 (`qwen3`: RMS norm on q and k), and both with experts (`qwen2_moe`,
`qwen3_moe`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from mpo_megatron.config import ConfigError, require
from mpo_megatron.digests import check_file
from mpo_megatron.hf import experts

SUPPORTED = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")
"""`model_type` of the Hugging Face configs that can be represented."""


def load_hf_config(folder: str | Path) -> PretrainedConfig:
    """The Hugging Face config in `folder`, checked by `check_supported`.

    Raises:
        ConfigError: no config.json there, one that does not parse or is damaged, or a model that cannot be represented.
    """
    path = Path(folder) / "config.json"
    require(path.is_file(), f"{path}: no such file; a Hugging Face checkpoint folder has a config.json.")
    check_file(path)
    try:
        model_type = json.loads(path.read_bytes()).get("model_type")
    except (ValueError, RecursionError, AttributeError) as error:
        raise ConfigError(f"{path}: not a JSON object ({error}); copy the checkpoint again.") from error
    require(
        model_type in SUPPORTED,
        f"{path}: model_type = {model_type!r} is not supported; supported are {', '.join(SUPPORTED)}.",
    )
    try:
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}; is it damaged, or of another checkpoint?") from error
    check_supported(hf_config)
    return hf_config


def check_supported(hf_config: PretrainedConfig) -> None:
    """Refuse what this implementation would compute differently from `transformers`; nothing is ignored silently.

    Raises:
        ConfigError: naming the field of config.json and the rule.
    """
    require(
        hf_config.model_type in SUPPORTED,
        f"model_type = {hf_config.model_type!r} is not supported; supported are {', '.join(SUPPORTED)}.",
    )
    layer_types = set(getattr(hf_config, "layer_types", None) or ())
    require(
        not getattr(hf_config, "use_sliding_window", False) and layer_types <= {"full_attention"},
        "config.json: use_sliding_window = true (or layer_types with sliding_attention): only full attention is implemented; "
        "set use_sliding_window to false if no training or generation row is longer than the window.",
    )
    rope = rope_parameters(hf_config)
    require(
        rope.get("rope_type", "default") == "default",
        f"config.json: rope_type = {rope.get('rope_type')!r}: only default rotary embeddings are implemented; remove the rope "
        "scaling if no row is longer than the context the model was trained with.",
    )
    require(hf_config.hidden_act == "silu", f"config.json: hidden_act = {hf_config.hidden_act!r}; only silu is implemented.")
    require(
        not getattr(hf_config, "attention_bias", False),
        "config.json: attention_bias = true puts a bias on the output projection; that is not implemented.",
    )
    require(
        getattr(hf_config, "attention_dropout", 0.0) == 0.0,
        f"config.json: attention_dropout = {hf_config.attention_dropout}; policy and reference must be deterministic; set 0.",
    )
    experts.check_supported(hf_config)


def rope_parameters(hf_config: PretrainedConfig) -> dict[str, Any]:
    """Rotary settings with `rope_theta` and `rope_type`, wherever this version of transformers keeps them."""
    rope = dict(getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {})
    if "rope_theta" not in rope:  # transformers 4 kept it beside the other fields
        rope["rope_theta"] = hf_config.rope_theta
    rope.setdefault("rope_type", rope.pop("type", "default"))
    return rope


def head_dim(hf_config: PretrainedConfig) -> int:
    """Channels of one attention head; Qwen3 sets it apart from hidden_size / num_attention_heads."""
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """`vocab_size` rounded up to a multiple of `multiple`, so that it can be cut over tensor-parallel ranks."""
    return -(-vocab_size // multiple) * multiple
