"""Rules for low-rank adapters (LoRA): which linear layers have one, and where its matrices are on both sides.

Each Hugging Face layer has one pair of matrices, A [rank, inputs] and B [outputs, rank], as in PEFT, even where Megatron fuses
layers (queries, keys and values; gate and up). So both sides hold the same tensors, with rules like those of weights:
conversion, checkpoints and the planner read the same table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mpo_megatron.config import LoraConfig, require
from mpo_megatron.families.family import Family
from mpo_megatron.families.rules import OUTPUT, Rule, output_rule

PEFT_PREFIX = "base_model.model."
"""PEFT's prefix of a model's module names."""

ADAPTER = ".adapter."
"""Marks an adapter's tensors in the keys of Megatron checkpoints."""

GROUPS = ("attention", "mlp", "all-linear")
"""Names of groups of layers."""

PEFT_EXPERTS = ("qwen3_moe", "mixtral")
"""Model types for which PEFT 0.21 loads the adapters of single experts beside the stacked weights of transformers 5."""

PEFT_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights with which PEFT leaves the base weights as they are. Others, such as `pissa` and `olora`, subtract
B · A from them at the start: without that, the adapter computes something else."""

OUTPUT_LAYER = OUTPUT.removesuffix(".weight")
"""Name of the output layer, which no group includes. Even if it is tied to the embedding, the adapter is its own, as in PEFT: the
embedding keeps its weights."""

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of `max_lora_rank` in vLLM 0.33, which also takes 1: the ranks for which it reserves memory."""
VLLM_REFUSED_FIELDS = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "trainable_token_indices"),
    *("alora_invocation_tokens", "layer_replication", "rank_pattern", "alpha_pattern"),
)
"""Fields of PEFT's adapter_config.json with which vLLM refuses an adapter, or computes another one: 0.26 checks `use_dora` and
`modules_to_save` only, and ignores the patterns, which 0.33 reads."""
VLLM_STACKED_EXPERTS = ("qwen3_5_moe",)
"""Model types of config.json whose classes in vLLM 0.33 take adapters of stacked experts (`is_3d_moe_weight`), not of each
expert."""
VLLM_OUTPUT_LAYERS = ("llama", "mixtral", "qwen3", "qwen3_moe", "qwen3_5_text", "qwen3_5_moe_text")
"""Model types whose classes in vLLM 0.33 have the output layer among their `embedding_modules`."""
VLLM_OUTPUT_ROWS = 258_048
"""Largest vocabulary of an output layer with an adapter in vLLM (LogitsProcessorWithLoRA)."""

MIXERS = (".self_attn.", ".linear_attn.")
"""Parts of Hugging Face names of token-mixing layers: the group `attention`. All other layers are the MLP's."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The shape of a model's adapter, the same in all layers."""

    rank: int
    alpha: float
    rslora: bool
    target_modules: tuple[str, ...]
    """Last name parts of the Hugging Face layers with an adapter, in the model's order."""
    quantize: str = "none"
    """Format of the frozen base weights: `none`, or `nf4`."""

    @property
    def scale(self) -> float:
        """Factor of B · A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True, kw_only=True)
class LinearAdapter:
    """The adapters within one of Megatron's linear layers."""

    rank: int
    scale: float
    column: bool
    """Whether tensor parallelism shards the layer's outputs; otherwise its inputs."""
    rows: dict[str, int]
    """Rows that each fused layer contributes to a block of outputs, in Megatron's order."""
    blocks: int
    """Number of blocks."""
    targets: frozenset[str]
    """The fused layers that have an adapter."""


def leaf(name: str) -> str:
    """The last part of a layer's name, from its weight's name: `q_proj`."""
    return name.removesuffix(".weight").rpartition(".")[2]


def is_adaptable(rule: Rule) -> bool:
    """Whether a rule's weight belongs to linear layers within the model's layers that can have an adapter: not a router's."""
    return rule.linear


def adaptable_rules(family: Family) -> list[Rule]:
    """The rules of all weights that can have an adapter, in the model's order: linear layers, and the output layer."""
    return [*(rule for rule in family.rules if is_adaptable(rule)), output_rule(family.rules[0])]


def adaptable_modules(family: Family) -> dict[str, str]:
    """Last name part → full name of the layers that can have an adapter, in the model's order."""
    return {leaf(name): name for rule in adaptable_rules(family) for name in rule.parts}


def choose_adapter(family: Family, config: LoraConfig) -> Adapter | None:
    """The adapter described by the options; None without LoRA.

    Raises:
        ConfigError: the model lacks a target.
    """
    if config.rank == 0:
        return None
    known = adaptable_modules(family)
    chosen: set[str] = set()
    for target in config.targets:
        names = {name for name, whole in known.items() if _is_in(target, whole)} if target in GROUPS else {target} & set(known)
        require(
            bool(names),
            f"lora.target_modules names {target}, which the model lacks or which cannot have an adapter; choose from "
            f"{', '.join(known)}, or {', '.join(GROUPS)}.",
        )
        chosen |= names
    return Adapter(
        rank=config.rank,
        alpha=2.0 * config.rank if config.alpha is None else config.alpha,
        rslora=config.rslora,
        target_modules=tuple(name for name in known if name in chosen),
        quantize=config.quantize or "none",
    )


def _is_in(group: str, name: str) -> bool:
    attention = any(mixer in name for mixer in MIXERS)
    if name == OUTPUT:
        return False
    return group == "all-linear" or attention == (group == "attention")


def linear_adapters(family: Family, adapter: Adapter, padded_vocab: int) -> dict[str, LinearAdapter]:
    """Adapters by the key of the weight beside them, for linear layers that have any."""
    found = {}
    for rule in adaptable_rules(family):
        rows = {leaf(name): padded_vocab if rule.padded else number for name, number in rule.parts.items()}
        targets = frozenset(rows) & frozenset(adapter.target_modules)
        if targets:
            found[rule.megatron] = LinearAdapter(
                rank=adapter.rank,
                scale=adapter.scale,
                column=rule.shard == "rows",
                rows=rows,
                blocks=rule.blocks,
                targets=targets,
            )
    return found


def adapter_rules(family: Family, adapter: Adapter) -> tuple[Rule, ...]:
    """Location of A and B of every layer: the rules of an adapter's weights, under PEFT's names."""
    rules = []
    for rule in adaptable_rules(family):
        for name, rows in rule.parts.items():
            if leaf(name) not in adapter.target_modules:
                continue
            key = rule.megatron.removesuffix(".weight") + f"{ADAPTER}{leaf(name)}."
            peft = PEFT_PREFIX + name.removesuffix(".weight")
            same = dataclasses.replace(rule, blocks=1, order=(), padded=False)
            up = f"{peft}.lora_B.weight"
            order = tuple(dataclasses.replace(piece, name=up) for piece in rule.order if piece.name == name)
            blocks = rule.blocks if order else 1  # consecutive rows form one block
            column = rule.shard == "rows"
            rules += [
                dataclasses.replace(
                    same,
                    megatron=key + "lora_A",
                    parts={f"{peft}.lora_A.weight": adapter.rank},
                    columns=rule.columns,
                    shard=None if column else "columns",
                ),
                dataclasses.replace(
                    same,
                    padded=rule.padded,
                    megatron=key + "lora_B",
                    parts={up: rule.blocks * rows // blocks},
                    blocks=blocks,
                    order=order,
                    columns=adapter.rank,
                    shard="rows" if column else None,
                ),
            ]
    return tuple(rules)


def splits_tied(family: Family, adapter: Adapter) -> bool:
    """Whether the adapter makes the output layer differ from the embedding to which it is tied."""
    return family.tie_word_embeddings and OUTPUT_LAYER in adapter.target_modules


def peft_misses_experts(family: Family, adapter: Adapter) -> bool:
    """Whether PEFT ignores the adapter's matrices of experts: it renames them to its own for some model types only."""
    return family.config.model_type not in PEFT_EXPERTS and _adapts_experts(family, adapter.target_modules)


def _adapts_experts(family: Family, targets: Collection[str]) -> bool:
    """Whether an adapter of these layers has matrices of experts."""
    leaves = {leaf(name) for rule in family.rules if rule.experts is not None and rule.linear for name in rule.parts}
    return not leaves.isdisjoint(targets)


class VllmRefusal(NamedTuple):
    """Why vLLM cannot load an adapter."""

    option: Literal["rank", "target_modules"]
    """The option of `lora` at fault."""
    reason: str
    """What vLLM cannot load: `an adapter of …`."""


def vllm_refuses_peft(settings: Mapping[str, Any]) -> str | None:
    """The field of adapter_config.json that vLLM cannot load, with its value; None if it can load all of them."""
    for name in VLLM_REFUSED_FIELDS:
        if settings.get(name):
            return f"{name} = {settings[name]}"
    if settings.get("bias", "none") != "none":
        return f"bias = {settings['bias']}"
    start = settings.get("init_lora_weights")
    return None if start in PEFT_KEEPS_BASE else f"init_lora_weights = {start}"


def vllm_refuses(family: Family, rank: int, targets: Collection[str]) -> VllmRefusal | None:
    """Why vLLM 0.33 cannot load an adapter of this rank and these layers; None if it can.

    Its layer `in_proj_qkvz` takes a missing adapter of `in_proj_qkv` for that of the whole layer (expand_packed_lora).
    """
    model_type, vocab_size = family.config.model_type, family.vocab_size
    whole_type = family.outer_config.model_type
    if rank > VLLM_RANKS[-1]:
        return VllmRefusal("rank", f"an adapter of rank {rank}, more than {VLLM_RANKS[-1]}")
    reason = None
    if OUTPUT_LAYER in targets and model_type not in VLLM_OUTPUT_LAYERS:
        reason = f"an adapter of lm_head with model type {model_type}"
    elif OUTPUT_LAYER in targets and vocab_size > VLLM_OUTPUT_ROWS:
        reason = f"an adapter of lm_head with {vocab_size} rows, more than {VLLM_OUTPUT_ROWS}"
    elif whole_type in VLLM_STACKED_EXPERTS and _adapts_experts(family, targets):
        reason = f"adapters of single experts with model type {whole_type}"
    elif "in_proj_z" in targets and "in_proj_qkv" not in targets:
        reason = "an adapter of in_proj_z without one of in_proj_qkv"
    return None if reason is None else VllmRefusal("target_modules", reason)
