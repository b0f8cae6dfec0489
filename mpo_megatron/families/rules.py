"""Rules that tell which rows of which Hugging Face tensors form a Megatron tensor, and rules that many families share.

Both sides store a matrix as rows, and conversion moves only whole rows: Megatron stacks gate on up, and interleaves q, k and v by
query group. A rule also tells how tensor parallelism shards the Megatron tensor, so the planner counts a rank's weights with the
same table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
HF_LAYER = "model.layers.{layer}."
LAYER = "decoder.layers."
TEXT_MODEL = "model.language_model."
"""Name prefix of a multimodal model's text model; standalone text models use `model.`."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes that determine the shapes of a decoder's weights."""

    hidden: int
    ffn: int
    heads: int
    groups: int
    """Key/value heads."""
    channels: int
    """Channels per head."""
    vocab: int
    tied: bool


@dataclass(frozen=True)
class RowPiece:
    """Consecutive rows of a Hugging Face tensor that stay consecutive in each block of a Megatron tensor."""

    name: str
    start: int
    """First row, in the first block."""
    rows: int
    stride: int
    """Row distance from one block's piece to the next block's."""


@dataclass(frozen=True)
class Rule:
    """One Megatron tensor as rows of Hugging Face tensors. If its parts name a `{layer}` or `{expert}`, the rule holds for each
    layer or expert."""

    megatron: str
    """Key in the Megatron checkpoint. Layers and experts share a key: Megatron stacks them on leading axes."""
    parts: dict[str, int]
    """Hugging Face name → number of rows in each block, in Megatron's order."""
    columns: int | tuple[int, ...] | None = None
    """Row length; None for a vector, whose rows are its elements; a row's shape if it has several axes."""
    blocks: int = 1
    """Number of blocks; a block is [part 1's rows, part 2's rows, …]."""
    order: tuple[RowPiece, ...] = ()
    """The pieces of a block in Megatron's order, if a part's rows in a block are not consecutive in its tensor. A part's pieces
    are adjacent."""
    padded: bool = False
    """Whether zero rows extend it to the padded vocabulary."""
    shard: Literal["rows", "columns"] | None = None
    """Sharding over tensor-parallel ranks (for an expert, expert-tensor-parallel ranks); None if each rank holds it whole."""
    experts: int | None = None
    """Number of experts with such a tensor."""
    layers: frozenset[int] | None = None
    """Layers with such a tensor; None: all."""

    @property
    def per_layer(self) -> bool:
        """Whether every layer has such a tensor."""
        return all("{layer}" in name for name in self.parts)

    def num_layers(self, model: int) -> int:
        """Number of such tensors in a model with so many layers, experts aside."""
        if not self.per_layer:
            return 1
        return model if self.layers is None else len(self.layers)

    @property
    def rows(self) -> int:
        """Rows without padding."""
        return self.blocks * sum(self.parts.values())

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        if self.columns is None:
            return ()
        return self.columns if isinstance(self.columns, tuple) else (self.columns,)

    @property
    def pieces(self) -> tuple[RowPiece, ...]:
        """The pieces of a block, in Megatron's order."""
        return self.order or tuple(RowPiece(name, 0, rows, rows) for name, rows in self.parts.items())

    @property
    def linear(self) -> bool:
        """Whether it is the matrix of a linear layer that tensor-parallel ranks shard."""
        return self.per_layer and isinstance(self.columns, int) and self.shard is not None and self.megatron.endswith(".weight")


def decoder_rules(sizes: Sizes, layers: Iterable[Rule]) -> tuple[Rule, ...]:
    """The table of a whole decoder: embedding, layers, final norm, and the output layer unless tied."""
    embedding = Rule("embedding.word_embeddings.weight", {EMBEDDING: sizes.vocab}, sizes.hidden, padded=True, shard="rows")
    norm = Rule("decoder.final_layernorm.weight", {"model.norm.weight": sizes.hidden})
    return (embedding, *layers, norm, *([] if sizes.tied else [output_rule(embedding)]))


def output_rule(embedding: Rule) -> Rule:
    """The output layer, from the embedding's rule: the same shape, whether the two are tied or not."""
    return dataclasses.replace(embedding, megatron="output_layer.weight", parts={OUTPUT: embedding.rows})


def norm_rule(megatron: str, name: str, size: int, layers: frozenset[int] | None = None) -> Rule:
    """A layer's RMS norm; `megatron` is the key after `decoder.layers.`."""
    return Rule(LAYER + megatron, {HF_LAYER + name: size}, layers=layers)


def normed_attention_rules(sizes: Sizes, *, qkv_bias: bool = False, qk_norm: bool = False) -> list[Rule]:
    """Input norm and attention; with `qk_norm`, also a norm per query and key head."""
    return [
        norm_rule("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", sizes.hidden),
        *attention_rules(sizes, qkv_bias=qkv_bias),
        *(qk_norm_rules(sizes.channels, sizes.channels) if qk_norm else []),
    ]


def gated_attention_rules(sizes: Sizes, layers: frozenset[int]) -> list[Rule]:
    """Input norm, attention with an output gate, and norms per query and key head.

    The query projection stores [query, gate] rows per head; Megatron expects [queries, gates] per query group.
    """
    channels, per_group = sizes.channels, sizes.heads // sizes.groups
    query, key, value = (f"{HF_LAYER}self_attn.{name}_proj.weight" for name in "qkv")
    both = 2 * per_group * channels
    order = (
        *(RowPiece(query, 2 * head * channels, channels, both) for head in range(per_group)),
        *(RowPiece(query, (2 * head + 1) * channels, channels, both) for head in range(per_group)),
        *(RowPiece(name, 0, channels, channels) for name in (key, value)),
    )
    _, output = attention_rules(sizes)
    rules = [
        norm_rule("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", sizes.hidden),
        Rule(
            LAYER + "self_attention.linear_qkv.weight",
            {query: both, key: channels, value: channels},
            sizes.hidden,
            blocks=sizes.groups,
            order=order,
            shard="rows",
        ),
        output,
        *qk_norm_rules(channels, channels),
    ]
    return [dataclasses.replace(rule, layers=layers) for rule in rules]


def attention_rules(sizes: Sizes, *, qkv_bias: bool = False) -> list[Rule]:
    """Projections of queries, keys and values, and the output projection."""
    hidden, heads, groups, channels = sizes.hidden, sizes.heads, sizes.groups, sizes.channels
    # Megatron: [query heads of group 0, its key head, its value head, query heads of group 1, …]
    rows = {"q": heads // groups * channels, "k": channels, "v": channels}

    def qkv(kind: str) -> dict[str, int]:
        return {f"{HF_LAYER}self_attn.{name}_proj.{kind}": number for name, number in rows.items()}

    key = LAYER + "self_attention."
    rules = [Rule(key + "linear_qkv.weight", qkv("weight"), hidden, blocks=groups, shard="rows")]
    if qkv_bias:
        rules.append(Rule(key + "linear_qkv.bias", qkv("bias"), blocks=groups, shard="rows"))
    output = {HF_LAYER + "self_attn.o_proj.weight": hidden}
    return [*rules, Rule(key + "linear_proj.weight", output, heads * channels, shard="columns")]


def qk_norm_rules(queries: int, keys: int, *, shard: Literal["rows"] | None = None) -> list[Rule]:
    """RMS norms of queries and keys."""
    return [
        Rule(
            f"{LAYER}self_attention.{letter}_layernorm.weight",
            {f"{HF_LAYER}self_attn.{letter}_norm.weight": size},
            shard=shard,
        )
        for letter, size in (("q", queries), ("k", keys))
    ]


def gated_rules(
    megatron: str,
    names: Sequence[str],
    hidden: int,
    ffn: int,
    *,
    layers: frozenset[int] | None = None,
    experts: int | None = None,
) -> list[Rule]:
    """Gate and up, stacked, and down.

    Args:
        megatron: key of the MLP after `decoder.layers.`, ending in a dot
        names: names of gate, up and down after `model.layers.N.`
    """
    gate, up, down = (HF_LAYER + name for name in names)
    return [
        Rule(f"{LAYER}{megatron}linear_fc1.weight", {gate: ffn, up: ffn}, hidden, shard="rows", layers=layers, experts=experts),
        Rule(f"{LAYER}{megatron}linear_fc2.weight", {down: hidden}, ffn, shard="columns", layers=layers, experts=experts),
    ]


def mlp_names(prefix: str) -> list[str]:
    """Gate, up and down, as most families name them."""
    return [f"{prefix}{name}_proj.weight" for name in ("gate", "up", "down")]


def mlp_rules(sizes: Sizes, norm: str = "post_attention_layernorm.weight") -> list[Rule]:
    """Input norm, by its name after `model.layers.N.`, and a dense MLP."""
    return [
        norm_rule("mlp.linear_fc1.layer_norm_weight", norm, sizes.hidden),
        *gated_rules("mlp.", mlp_names("mlp."), sizes.hidden, sizes.ffn),
    ]


def post_norm_rules(hidden: int) -> tuple[Rule, Rule]:
    """Norms on the outputs of attention and MLP."""
    return (
        norm_rule("self_attention.linear_proj.post_layernorm.weight", "post_attention_layernorm.weight", hidden),
        norm_rule("mlp.linear_fc2.post_layernorm.weight", "post_feedforward_layernorm.weight", hidden),
    )


def router_rule(name: str, experts: int, hidden: int, layers: frozenset[int] | None = None) -> Rule:
    """The router of a layer's experts, by its name after `model.layers.N.`."""
    return Rule(f"{LAYER}mlp.router.weight", {HF_LAYER + name: experts}, hidden, layers=layers)


def llama_rules(sizes: Sizes) -> tuple[Rule, ...]:
    """Llama's table: a norm before attention and one before a dense MLP."""
    return decoder_rules(sizes, [*normed_attention_rules(sizes), *mlp_rules(sizes)])
