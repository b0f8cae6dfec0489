"""Names of a Hugging Face checkpoint's tensors as `transformers` reads them, and checkpoints that are no language model.

`transformers` ignores buffers of rotary frequencies, adds the prefix that a base model's checkpoint lacks, and splits stacked
experts. Weights that it would fill with random numbers are refused here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path

from mpo_megatron.config import require
from mpo_megatron.families import Family
from mpo_megatron.families.rules import EMBEDDING, TEXT_MODEL, Rule
from mpo_megatron.hf.conversion import CheckpointError
from mpo_megatron.model.safetensors_io import StoredTensor

WRAPPERS = {
    "module.": "as DistributedDataParallel saves them",
    "_orig_mod.": "as a compiled model saves them",
    "base_model.model.": "as PEFT saves them; merge the adapter into its base model first (merge_and_unload)",
}
"""Prefixes of wrapped models, and their origin."""
QUANTIZED = (
    *("_scale", "_scale_inv", ".scales", ".weight_packed", ".qweight", ".qzeros", ".g_idx", ".absmax", ".quant_map"),
    *(".quant_state", ".SCB", ".weight_zero_point", ".zero_points"),
)
"""Suffixes of tensors that accompany quantized weights."""
HEADS = {
    "score.": "a reward model or classifier",
    "classifier.": "a classifier",
    "v_head.": "a policy with a value head",
    "value_head.": "a policy with a value head",
}
"""Prefixes of output layers that are not a language model's."""


def check_kind(source: Path, family: Family) -> None:
    """Refuse folders without plain weights of a language model.

    Raises:
        ConfigError: it is an adapter, a quantized checkpoint, or a classifier by its architecture.
    """
    adapter = source / "adapter_config.json"
    require(
        not adapter.is_file(),
        f"{adapter}: a LoRA adapter beside a whole model; move one of them to another folder.",
    )
    config = source / "config.json"
    quantization = getattr(family.outer_config, "quantization_config", None)
    require(
        quantization is None,
        f"{config}: quantization_config is set; a quantized checkpoint cannot be trained: convert the original one.",
    )
    architectures = family.outer_config.architectures or []
    kinds = ("ForCausalLM",) if family.whole_config is None else ("ForCausalLM", "ForConditionalGeneration")
    require(
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures),
        f"{config}: architectures = {architectures!r}; it must be a list of names; copy or download the file again.",
    )
    for architecture in architectures:
        base = architecture.endswith("Model") and not architecture.endswith(("RewardModel", "ValueModel"))
        require(
            architecture.endswith(kinds) or base,
            f"{config}: architectures = {architecture}: a reward model or classifier has no output layer for tokens; convert a "
            "model ...ForCausalLM. To score responses with it, name its folder in mpo score.",
        )


def is_adapter(source: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (source / "adapter_config.json").is_file() and not (source / "config.json").is_file()


def read_names(tensors: dict[str, StoredTensor], family: Family, source: Path) -> dict[str, StoredTensor]:
    """The tensors under the names that weight rules use.

    Raises:
        CheckpointError: the names are those of a wrapped model, an adapter, or another output layer.
    """
    _refuse_other_models(tensors, source)
    named = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if family.whole_config is None and family.other_weights:  # `transformers` uses either name for a text model
        named = text_names(named)
    embedding = family.embedding_name
    inner = next((name for name in named if name.endswith("." + EMBEDDING)), None)
    if embedding not in named and inner is not None:
        raise CheckpointError(
            f"{source}: weight names start with {inner.removesuffix(EMBEDDING)!r} ({inner}): they belong to a larger "
            "model; save only the language model inside it."
        )
    if embedding not in named and embedding.removeprefix("model.") in named:
        if not family.tie_word_embeddings:
            raise CheckpointError(
                f"{source} holds a base model (names without the prefix `model.`), so lm_head.weight is missing; save the model "
                "...ForCausalLM."
            )
        named = _renamed(named, {name: f"model.{name}" for name in named})
    return _split_experts(named, family)


def text_names(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of a multimodal model under the names of its text model."""
    return _renamed(tensors, {name: name.replace(TEXT_MODEL, "model.", 1) for name in tensors if name.startswith(TEXT_MODEL)})


def _renamed(tensors: dict[str, StoredTensor], names: dict[str, str]) -> dict[str, StoredTensor]:
    """The tensors, with some renamed."""
    new = {name: names.get(name, name) for name in tensors}
    return {new[name]: dataclasses.replace(tensor, name=new[name]) for name, tensor in tensors.items()}


def _refuse_other_models(names: Iterable[str], source: Path) -> None:
    for name in names:
        if ".lora_" in name:
            raise CheckpointError(f"{source} holds the weights of a LoRA adapter ({name}); merge it into its base model first.")
        for prefix, origin in WRAPPERS.items():
            if name.startswith(prefix):
                raise CheckpointError(
                    f"{source}: weight names start with {prefix!r} ({name}), {origin}; save the model inside instead."
                )
        if name.endswith(QUANTIZED) or ".weight.quant_" in name:
            raise CheckpointError(
                f"{source} holds quantized weights ({name}); a quantized checkpoint cannot be trained: convert the original one."
            )
        for head, kind in HEADS.items():
            if name.startswith(head):
                raise CheckpointError(f"{source} holds {kind} ({name}), not a language model; convert a model ...ForCausalLM.")


def _split_experts(tensors: dict[str, StoredTensor], family: Family) -> dict[str, StoredTensor]:
    """Separate experts from layers that stack them in `mlp.experts.gate_up_proj` and `down_proj`, without a copy."""
    found, prefix = dict(tensors), family.embedding_name.removesuffix("embed_tokens.weight")
    for layer in range(family.num_hidden_layers) if family.experts else ():
        fused = False
        for rule in family.rules:
            if rule.experts is None:
                continue
            kind = "gate_up_proj" if len(rule.parts) == 2 else "down_proj"
            stacked = found.pop(f"{prefix}layers.{layer}.mlp.experts.{kind}", None)
            if stacked is not None:
                fused = True
                found |= _experts_of(stacked, rule, layer)
        router = found.pop(f"{prefix}layers.{layer}.mlp.gate.weight", None) if fused else None
        if router is not None:  # families with another router name use this one when experts are stacked
            [name] = next(rule.parts for rule in family.rules if rule.megatron.endswith("router.weight"))
            name = name.format(layer=layer)
            found[name] = dataclasses.replace(router, name=name)
    return found


def _experts_of(stacked: StoredTensor, rule: Rule, layer: int) -> dict[str, StoredTensor]:
    expected = (rule.experts, rule.rows, rule.columns)
    if stacked.shape != expected:
        raise CheckpointError(
            f"{stacked.name} is {list(stacked.shape)} in {stacked.file}, but {list(expected)} according to config.json. Check "
            "that config.json belongs to these weights."
        )
    parts, start = {}, stacked.start
    for expert in range(rule.experts or 0):
        for pattern, rows in rule.parts.items():
            name, shape = pattern.format(layer=layer, expert=expert), (rows, *stacked.shape[2:])
            parts[name] = StoredTensor(name, stacked.file, stacked.dtype, shape, start)
            start += math.prod(shape) * stacked.dtype.itemsize
    return parts
