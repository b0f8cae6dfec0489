"""From config.json to a `Family`: the only place that reads a model's name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from mpo_megatron.config import ConfigError, require
from mpo_megatron.config.values import show
from mpo_megatron.families import gemma, llama, mistral, olmo, qwen, qwen_hybrid
from mpo_megatron.families.family import Family
from mpo_megatron.files.digests import check_file

READERS: dict[str, Callable[[PretrainedConfig], Family]] = {
    "qwen2": qwen.read_qwen2,
    "qwen3": qwen.read_qwen3,
    "qwen2_moe": qwen.read_qwen2_moe,
    "qwen3_moe": qwen.read_qwen3_moe,
    "qwen3_next": qwen_hybrid.read_qwen3_next,
    "qwen3_5_text": qwen_hybrid.read_qwen3_5,
    "qwen3_5_moe_text": qwen_hybrid.read_qwen3_5_moe,
    "qwen3_5": qwen_hybrid.read_text_model,
    "qwen3_5_moe": qwen_hybrid.read_text_model,
    "llama": llama.read_llama,
    "mistral": mistral.read_mistral,
    "mixtral": mistral.read_mixtral,
    "gemma2": gemma.read_gemma2,
    "gemma3_text": gemma.read_gemma3,
    "olmo2": olmo.read_olmo2,
    "olmo3": olmo.read_olmo3,
}
"""`model_type` of config.json → function that reads it."""


SIZES = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"), 10**9),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"), 10**5),
}
"""Count fields, at least 1 each, and an upper bound beyond any model's, because tables have that length. transformers itself
refuses values that are not whole numbers."""


def model_name(config: PretrainedConfig) -> dict[str, str]:
    """The field of a config.json that identifies the model."""
    return {"model_type": config.model_type}


def load_family(folder: str | Path) -> Family:
    """The model that config.json in `folder` describes.

    Raises:
        ConfigError: config.json is missing, does not parse or is damaged, or the model is not supported.
    """
    path = Path(folder) / "config.json"
    require(path.is_file(), f"{path}: no such file; a Hugging Face checkpoint folder has a config.json.")
    check_file(path)
    try:
        settings = json.loads(path.read_bytes())
        model_type = settings.get("model_type")
    except (ValueError, RecursionError, AttributeError) as error:
        raise ConfigError(f"{path}: not a JSON object ({error}); copy the checkpoint again.") from error
    _require_known(model_type, f"{path}: ", of_several="text_config" in settings)
    _require_possible(settings, path)
    if isinstance(settings.get("text_config"), dict):
        _require_possible(settings["text_config"], path)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (StrictDataclassError, *FAILURES) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}; check or copy the file again.") from error
    try:
        return read_family(config)
    except ConfigError as error:
        if not str(error).startswith(f"{path.name}: "):
            raise
        raise ConfigError(f"{path.parent}/{error}") from error


FAILURES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, OSError, RecursionError)
"""Errors that `transformers` raises on a damaged config.json."""


def _require_possible(fields: dict[str, Any], path: Path) -> None:
    """Refuse impossible sizes, and non-finite numbers, which are not JSON but accepted by Python.

    Raises:
        ConfigError: names the field.
    """
    for name, value in fields.items():
        numbers = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        finite = all(not isinstance(number, float) or math.isfinite(number) for number in numbers)
        possible = finite and (name not in SIZES or type(value) is not int or 0 < value <= SIZES[name])
        require(possible, f"{path}: {name} = {show(value)}; no model has this value; check or copy the file again.")


def read_family(config: PretrainedConfig) -> Family:
    """The model that a Hugging Face config describes.

    Raises:
        ConfigError: it is not supported; names the field of config.json.
    """
    _require_known(config.model_type)
    return READERS[config.model_type](config)


def _require_known(model_type: object, where: str = "", *, of_several: bool = False) -> None:
    hint = "; it contains a text model: save that separately" if of_several else ""
    require(
        isinstance(model_type, str) and model_type in READERS,
        f"{where}model_type = {model_type!r} is not supported; supported are {', '.join(READERS)}{hint}.",
    )
