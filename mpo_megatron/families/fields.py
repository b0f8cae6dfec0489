"""Fields of a Hugging Face config that all families read in the same way, and the refusal of unread fields."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Literal

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mpo_megatron.config import ConfigError, require
from mpo_megatron.families.family import LayerAttention, Rope
from mpo_megatron.families.rules import Sizes

DECODER = frozenset(
    {
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("vocab_size", "tie_word_embeddings", "max_position_embeddings", "rms_norm_eps", "hidden_act"),
        *("rope_parameters", "rope_theta", "rope_scaling"),
    }
)
"""Fields that every family supports."""

HARMLESS = frozenset(
    {
        # content of the folder; how the model is started, trained or generated with elsewhere
        *("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "auto_map"),
        *("initializer_range", "use_cache", "cache_implementation", "_attn_implementation_autoset", "is_llama_config"),
        *("transformers.js_config", "unsloth_version", "unsloth_fixed", "tokenizer_class", "quantization_config"),
        *("_model_name_or_path", "_commit_hash", "name_or_path", "_attn_implementation", "attn_implementation"),
        *("router_aux_loss_coef", "output_router_logits"),
        # start and end tokens and sampling of generation; older files have them here
        *("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "do_sample", "temperature", "top_p", "top_k"),
        # in every config: outputs of a forward pass, and labels of classifiers
        *("return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "is_encoder_decoder"),
        *("id2label", "label2id", "problem_type"),
    }
)
"""Fields that change neither log-probs nor gradients of a causal language model."""

REASONS = {
    "attention_dropout": "policy and reference must be deterministic; set 0",
    "attention_bias": "a bias on the output projection is not supported",
    "mlp_bias": "a bias in the MLP is not supported",
    "qkv_bias": "published models have a bias on queries, keys and values",
    "use_bidirectional_attention": "only causal attention is supported",
}
"""Why a field is refused, where its name does not tell."""

ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Activation of the MLP's gate by its name in config.json."""


def check_fields(config: PretrainedConfig, represented: Collection[str]) -> None:
    """Refuse unsupported fields that differ from the default of transformers' config class, and values that no model has.

    Raises:
        ConfigError: names the field and its value.
    """
    _check_values(config)
    check_others(config, represented)


def check_others(config: PretrainedConfig, represented: Collection[str]) -> None:
    """Refuse unsupported fields that differ from the default; the other part of `check_fields`.

    Raises:
        ConfigError: names the field and its value.
    """
    defaults = type(config)().to_dict()
    for name, value in config.to_dict().items():
        if name in represented or name in HARMLESS or (name in defaults and value == defaults[name]):
            continue
        if name not in defaults and not value:
            continue  # the feature is switched off
        if name in defaults:
            hint = REASONS.get(name, "only the default is supported")
            raise ConfigError(f"config.json: {name} = {value!r} (default {defaults[name]!r}): {hint}.")
        raise ConfigError(
            f"config.json: {name} = {value!r} is unknown to {type(config).__name__} of transformers, which ignores it; remove it "
            "from config.json if the model was trained without it."
        )


def _check_values(config: PretrainedConfig) -> None:
    dtype = getattr(config, "dtype", None)
    require(
        dtype in (None, torch.float32, torch.float16, torch.bfloat16),
        f"config.json: dtype = {dtype}; weights must be float32, float16 or bfloat16.",
    )
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    require(
        heads % groups == 0,
        f"config.json: num_key_value_heads = {groups} does not divide num_attention_heads = {heads}; check or copy "
        "the file again.",
    )
    require(
        0 <= config.rms_norm_eps < 1,
        f"config.json: rms_norm_eps = {config.rms_norm_eps}; it must be a small number >= 0; check or copy the file again.",
    )


def head_dim(config: PretrainedConfig) -> int:
    """Channels per attention head; many families set it independently of hidden_size / num_attention_heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def mlp_size(config: PretrainedConfig) -> int:
    """Intermediate size of a dense MLP; of the shared expert in a model without dense MLP and field for it."""
    return getattr(config, "intermediate_size", None) or config.shared_expert_intermediate_size


def activation(config: PretrainedConfig, field: str = "hidden_act") -> Literal["silu", "gelu_tanh"]:
    """The MLP's activation.

    Raises:
        ConfigError: an unsupported activation.
    """
    name = getattr(config, field)
    require(name in ACTIVATIONS, f"config.json: {field} = {name!r}; supported are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def decoder_sizes(config: PretrainedConfig) -> dict[str, Any]:
    """Sizes that every family has, under their names in `Family`."""
    return {
        "config": config,
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": mlp_size(config),
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": head_dim(config),
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "rms_norm_eps": config.rms_norm_eps,
        "query_scale": head_dim(config) ** -0.5,
    }


def rule_sizes(config: PretrainedConfig) -> Sizes:
    """The same sizes in the form that weight rules take."""
    return Sizes(
        hidden=config.hidden_size,
        ffn=mlp_size(config),
        heads=config.num_attention_heads,
        groups=config.num_key_value_heads,
        channels=head_dim(config),
        vocab=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
    )


ROPE_FIELDS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "llama3": (frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}), frozenset()),
    "yarn": (
        frozenset({"factor"}),
        frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    ),
    "dynamic": (frozenset({"factor"}), frozenset()),
}
"""Rotary embeddings whose frequencies do not depend on the sequence, up to `Rope.limit`: for each, required fields of
`rope_parameters`, and optional ones."""

ROPE_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"})
"""Fields allowed with any kind."""


AXES = ("mrope_section", "mrope_interleaved")
"""Assignment of rotated channels to the axes of an image's positions."""


def _check_rope(parameters: dict[str, Any], kind: str) -> None:
    needed, optional = ROPE_FIELDS[kind]
    for name, value in parameters.items():
        known = name in needed | optional | ROPE_COMMON
        require(
            known or not value,
            f"config.json: {name} = {value!r} of the rotary embedding is not supported with rope_type = {kind!r}; remove it if "
            "the model was trained without it.",
        )
        if known and name not in ("rope_type", "type", "truncate") and value is not None:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            require(
                number and 0 < value < math.inf,
                f"config.json: {name} = {value!r} of the rotary embedding must be a positive number; check or copy "
                "the file again.",
            )
    missing = sorted(name for name in needed if parameters.get(name) is None)
    require(not missing, f"config.json: rope_type = {kind!r} needs {', '.join(missing)}; add them, or copy config.json again.")


def read_ropes(config: PretrainedConfig, *, partial: bool = False) -> tuple[Rope, ...]:
    """The rotary embedding shared by all layers.

    Args:
        partial: only part of each head may be rotated (`partial_rotary_factor`)
    Raises:
        ConfigError: an unsupported kind.
    """
    return (_read_rope(config, dict(config.rope_parameters), None, partial=partial),)


def read_layer_ropes(config: PretrainedConfig) -> tuple[tuple[Rope, ...], dict[str, int]]:
    """Distinct rotary embeddings of a config with one per kind of layer, and each kind's index among them.

    Raises:
        ConfigError: an unsupported kind.
    """
    ropes: list[Rope] = []
    index = {}
    for kind in sorted(set(config.layer_types)):
        _check_layer_type(kind)
        rope = _read_rope(config, dict(config.rope_parameters[kind]), kind)
        if rope not in ropes:
            ropes.append(rope)
        index[kind] = ropes.index(rope)
    return tuple(ropes), index


def _read_rope(config: PretrainedConfig, parameters: dict[str, Any], layer_type: str | None, *, partial: bool = False) -> Rope:
    kind, size = parameters.get("rope_type", "default"), head_dim(config)
    require(
        isinstance(kind, str) and kind in ROPE_FIELDS,
        f"config.json: rope_type = {kind!r} is not supported; supported are {', '.join(ROPE_FIELDS)}.",
    )
    for name in AXES if partial else ():  # text has the same position on all axes
        parameters.pop(name, None)
    _check_rope(parameters, kind)
    share = parameters.get("partial_rotary_factor", 1.0)
    if partial:
        size = int(size * share)
        require(
            0 < size <= head_dim(config) and size % 2 == 0,
            f"config.json: partial_rotary_factor = {share} of {head_dim(config)} channels (head_dim): an even number must be "
            "rotated; check or copy the file again.",
        )
    else:
        require(share == 1.0, f"config.json: partial_rotary_factor = {share}; this family supports 1.0 only.")
    if kind in ("default", "dynamic"):  # the latter scales beyond `limit` only
        exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
        frequencies, factor = 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), layer_type=layer_type)
    limit = config.max_position_embeddings if kind == "dynamic" else None
    return Rope(inverse_frequencies=tuple(frequencies.tolist()), factor=float(factor), limit=limit)


def _check_layer_type(kind: object) -> None:
    require(
        kind in ("full_attention", "sliding_attention"),
        f"config.json: layer_types has {kind!r}; supported are full_attention and sliding_attention.",
    )


def read_layers(config: PretrainedConfig, kinds: list[str] | None = None, rope: dict[str, int] | None = None) -> Any:
    """Window and rotary embedding of every layer.

    Args:
        kinds: `full_attention` or `sliding_attention` per layer; by default config.json's `layer_types`
        rope: index of each kind's rotary embedding; by default the first for all
    Raises:
        ConfigError: another kind, or a window without a size.
    """
    kinds = config.layer_types if kinds is None else kinds
    require(
        len(kinds) == config.num_hidden_layers,
        f"config.json: layer_types names {len(kinds)} layers, but num_hidden_layers = {config.num_hidden_layers}; "
        "check or copy the file again.",
    )
    layers = []
    for kind in kinds:
        _check_layer_type(kind)
        window = config.sliding_window if kind == "sliding_attention" else None
        require(
            kind == "full_attention" or (isinstance(window, int) and window > 0),
            f"config.json: layer_types has sliding_attention, but sliding_window = {window!r}; set the window's tokens.",
        )
        layers.append(LayerAttention(window=window, rope=(rope or {}).get(kind, 0)))
    return tuple(layers)
