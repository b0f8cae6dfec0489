"""Layers of the policy: Transformer Engine's or Megatron-Core's local ones, with our attention core and a family's features.

Megatron-Core builds a layer with one norm before attention and one before the MLP. Here, norms may also follow them, queries and
keys may be normalized over all heads, layers may differ in window and rotary embedding, and a Gated DeltaNet may replace
attention.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.nn.functional import all_reduce

from mpo_megatron import device
from mpo_megatron.families import Family
from mpo_megatron.families.adapters import LinearAdapter
from mpo_megatron.model.adapters import adapted, adapted_grouped
from mpo_megatron.model.attention import GroupAttention, RowAttention, RowLayout, ScoreSettings
from mpo_megatron.model.delta_net import DeltaNetSubmodules, GatedDeltaNet
from mpo_megatron.model.delta_rule import DeltaRule
from mpo_megatron.model.elementwise import gate, rms_norm
from mpo_megatron.model.quantized import quantized
from mpo_megatron.model.routing import route_by_rows


@dataclass(frozen=True, kw_only=True)
class RowKernels:
    """The functions with which layers mix the tokens of a row."""

    attend: RowAttention
    delta_rule: DeltaRule


class RMSNorm(torch.nn.RMSNorm):
    """RMS norm for the local layer spec; unlike Megatron-Core's own wrapper, it supports sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device.device())
        self.epsilon = eps
        self.offset = config.layernorm_zero_centered_gamma
        # Each rank sees part of the sequence: finalize_model_grads sums this weight's gradient over tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x / rms(x) times the weight, or 1 + the weight."""
        return rms_norm(x, 1 + self.weight if self.offset else self.weight, self.epsilon)


class WidthNorm(torch.nn.Module):
    """RMS norm of queries or keys over all heads together; each tensor-parallel rank holds the weights of its heads."""

    def __init__(self, config: TransformerConfig, heads: int, channels: int, group: ProcessGroup) -> None:
        super().__init__()
        self.eps, self.group = config.layernorm_epsilon, group
        self.weight = torch.nn.Parameter(torch.ones(heads * channels, dtype=config.params_dtype, device=device.device()))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[T, 1, heads of this rank, channels], normalized.

        Communication: the sum of squares [T, 1, 1] is summed over tensor-parallel ranks, and so is its gradient.
        """
        exact = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(2)
        total = exact.square().sum(dim=-1, keepdim=True)
        if self.group.size() > 1:
            total = all_reduce(total, group=self.group)
        normalized = exact * torch.rsqrt(total / (exact.shape[-1] * self.group.size()) + self.eps)
        return (self.weight * normalized.to(x.dtype)).view_as(x)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        """The weight, sharded over tensor-parallel ranks."""
        state = self.state_dict(prefix="", keep_vars=True)
        groups = {"tp_group": self.group, "dp_cp_group": (metadata or {}).get("dp_cp_group")}
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets, **groups)


class RowSelfAttention(SelfAttention):
    """Megatron-Core's self-attention, with its layer's rotary embedding, and optionally a norm over all heads of queries and
    keys.

    Without Transformer Engine's rotary kernel, GroupAttention rotates: Megatron-Core's own implementation makes five copies.
    """

    def __init__(self, config: TransformerConfig, *arguments: Any, rope: int, width_norm: bool, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        self.rope = rope
        if width_norm:  # not through `qk_layernorm`: Megatron would sum its weight gradients over tensor-parallel ranks
            sizes = {"q": self.num_attention_heads_per_partition, "k": self.num_query_groups_per_partition}
            norms = {
                name: WidthNorm(config, heads, self.hidden_size_per_attention_head, self.pg_collection.tp)
                for name, heads in sizes.items()
            }
            self.q_layernorm, self.k_layernorm = norms["q"], norms["k"]

    def forward(self, *arguments: Any, rotary_pos_emb: Tensor, packed_seq_params: RowLayout, **options: Any) -> Any:
        """Args:
        rotary_pos_emb: output of `Policy.rotary_embeddings`, for each of the model's rotary embeddings
        """
        own: Tensor | None = rotary_pos_emb[self.rope]
        if not self.config.apply_rope_fusion:
            packed_seq_params, own = replace(packed_seq_params, rotation=own), None
        return super().forward(*arguments, rotary_pos_emb=own, packed_seq_params=packed_seq_params, **options)


class GatedMLP(MLP):
    """Megatron-Core's MLP with the gated activation as one operation."""

    def forward(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
        """[T, 1, H] to [T, 1, H], and no bias."""
        if self.config.bias_activation_fusion:  # on a GPU, Megatron-Core's is one operation as well
            return super().forward(hidden_states, *arguments, **options)
        return self.linear_fc2(gate(self.linear_fc1(hidden_states)[0], self.config.activation_func))


def output_normed(linear: type, norm: Any) -> type:
    """Subclass a row-parallel linear layer to normalize its output."""

    class NormedOutput(linear):
        def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any) -> None:
            super().__init__(input_size, output_size, config=config, **options)
            self.post_layernorm = norm(config=config, hidden_size=output_size, eps=config.layernorm_epsilon)

        def forward(self, x: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
            output, bias = super().forward(x, *arguments, **options)
            return self.post_layernorm(output), bias

    return NormedOutput


def norm_type(linear: type) -> Any:
    """Transformer Engine's norm for its linear layers, ours for Megatron-Core's."""
    if linear.__module__.endswith("transformer_engine"):
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return RMSNorm


def build_block_spec(
    family: Family,
    config: TransformerConfig,
    transformer_engine: bool,
    pipeline_rank: int,
    chunk: int,
    kernels: RowKernels,
    adapters: dict[str, LinearAdapter],
    *,
    in_blocks: bool,
) -> TransformerBlockSubmodules:
    """The spec of one run of layers of one pipeline stage.

    Args:
        adapters: adapters by the key of the weight beside them; if there are any, only they are trained
        in_blocks: keep the weights of linear layers in 4 bits
    """
    norm: Any = RMSNorm
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        norm = TENorm
    num_layers = get_num_layers_to_build(config, vp_stage=chunk, pp_rank=pipeline_rank)
    first = get_transformer_layer_offset(config, chunk if config.virtual_pipeline_model_parallel_size else None, pipeline_rank)
    layers = [
        _layer_spec(family, layer, transformer_engine, kernels, adapters, in_blocks=in_blocks)
        for layer in range(first, first + num_layers)
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def _layer_spec(
    family: Family,
    number: int,
    transformer_engine: bool,
    kernels: RowKernels,
    adapters: dict[str, LinearAdapter],
    *,
    in_blocks: bool,
) -> ModuleSpec:
    """The spec of layer `number`, from 0.

    Args:
        in_blocks: keep the weights of its linear layers in 4 bits
    """
    num_experts = family.num_experts if family.has_experts(number) else None
    head_norm = family.qk_norm == "head"
    if transformer_engine:
        layer = get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=head_norm, num_experts=num_experts, moe_grouped_gemm=family.experts is not None
        )
    else:
        layer = get_gpt_layer_local_spec(qk_layernorm=head_norm, num_experts=num_experts, normalization="RMSNorm")
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        if num_experts is None:
            layer.submodules.mlp = functools.partial(GatedMLP.as_mlp_submodule, **layer.submodules.mlp.keywords)
        if num_experts is not None:  # checkpoints then hold the norm separately, as with Transformer Engine
            layer.submodules.sharded_state_dict_keys_map = {
                old: new for old, new in layer.submodules.sharded_state_dict_keys_map.items() if old != "pre_mlp_layernorm."
            }
    attention = layer.submodules.self_attention
    if head_norm and not transformer_engine:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = RMSNorm
    if family.has_state(number):
        _put_delta_net(layer, family, kernels)
    else:
        attention.module = RowSelfAttention
        attention.params = {
            **attention.params,
            "rope": family.attention[number].rope,
            "width_norm": family.qk_norm == "width",
        }
        attention.submodules.core_attention = functools.partial(
            GroupAttention, attend=kernels.attend, scores=layer_scores(family, number)
        )
    mlp: Any = layer.submodules.mlp.keywords["submodules"]
    if not family.pre_norms:
        _drop_input_norms(layer, mlp, transformer_engine)
    _, last = mixer_linears(layer)
    mixer = layer.submodules.self_attention.submodules
    norm_after = norm_type(getattr(mixer, last))
    if adapters:
        if transformer_engine and family.pre_norms:
            _split_input_norms(layer, mlp, dense=num_experts is None)
        if in_blocks:
            _quantize(layer, mlp)
        _add_adapters(layer, mlp, adapters, grouped=transformer_engine)
    if family.post_norms:
        for owner, name in ((mixer, last), (mlp, "linear_fc2")):
            setattr(owner, name, output_normed(getattr(owner, name), norm_after))
    if num_experts is not None:
        route_by_rows(layer, family, number)
    return layer


def _put_delta_net(layer: ModuleSpec, family: Family, kernels: RowKernels) -> None:
    """Replace attention with a Gated DeltaNet, with the same kind of linear layers."""
    linear = layer.submodules.self_attention.submodules
    layer.submodules.self_attention = ModuleSpec(
        module=GatedDeltaNet,
        params={"net": family.delta_net, "rule": kernels.delta_rule},
        submodules=DeltaNetSubmodules(in_proj=linear.linear_qkv, out_proj=linear.linear_proj),
    )
    layer.submodules.sharded_state_dict_keys_map = {
        old: new.replace("linear_qkv", "in_proj") for old, new in layer.submodules.sharded_state_dict_keys_map.items()
    }


def mixer_linears(layer: ModuleSpec) -> tuple[str, str]:
    """Names of the first and last linear layer of a layer's token mixer (attention or Gated DeltaNet)."""
    mixer = layer.submodules.self_attention.submodules
    return ("in_proj", "out_proj") if isinstance(mixer, DeltaNetSubmodules) else ("linear_qkv", "linear_proj")


def _split_input_norms(layer: ModuleSpec, mlp: Any, *, dense: bool) -> None:
    """Make norms separate modules, as in the local layers: an adapter needs the normed input, which Transformer Engine's fused
    layers do not return. Their checkpoint keys stay the same."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    layer.submodules.input_layernorm = TENorm
    first, _ = mixer_linears(layer)
    setattr(layer.submodules.self_attention.submodules, first, TEColumnParallelLinear)
    keys = {"input_layernorm.": f"self_attention.{first}.layer_norm_"}
    if dense:
        layer.submodules.pre_mlp_layernorm = TENorm
        mlp.linear_fc1 = TEColumnParallelLinear
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    layer.submodules.sharded_state_dict_keys_map = {**layer.submodules.sharded_state_dict_keys_map, **keys}


def _add_adapters(layer: ModuleSpec, mlp: Any, adapters: dict[str, LinearAdapter], *, grouped: bool) -> None:
    """Add adapters to linear layers, by the key of the weight beside them.

    Args:
        mlp: submodules of the dense MLP, or of the experts' layer
        grouped: experts are computed together
    """
    for key, owner, name, together in _linear_homes(layer, mlp, grouped=grouped):
        plan = adapters.get(f"decoder.layers.{key}.weight")
        if plan is not None:
            setattr(owner, name, (adapted_grouped if together else adapted)(getattr(owner, name), plan))


def _quantize(layer: ModuleSpec, mlp: Any) -> None:
    """Keep the weights of all linear layers in 4 bits: Megatron-Core's own layers, for which autograd keeps only the frozen
    weight."""
    for _, owner, name, _ in _linear_homes(layer, mlp, grouped=False):
        column = name in ("linear_qkv", "in_proj", "linear_fc1")
        setattr(owner, name, quantized(ColumnParallelLinear if column else RowParallelLinear))


def _linear_homes(layer: ModuleSpec, mlp: Any, *, grouped: bool) -> list[tuple[str, Any, str, bool]]:
    """(checkpoint key, submodules, name in them, whether all experts are in one) of a layer's linear layers."""
    experts = getattr(mlp, "experts", None)
    mixer = layer.submodules.self_attention.submodules
    homes: list[tuple[str, Any, str, bool]] = [(f"self_attention.{name}", mixer, name, False) for name in mixer_linears(layer)]
    if experts is None:
        homes += [(f"mlp.{name}", mlp, name, False) for name in ("linear_fc1", "linear_fc2")]
    else:
        shared = mlp.shared_experts.keywords["submodules"] if mlp.shared_experts is not None else None
        inner = experts.keywords["submodules"]
        homes += [(f"mlp.experts.experts.{name}", inner, name, grouped) for name in ("linear_fc1", "linear_fc2")]
        homes += [(f"mlp.shared_experts.{name}", shared, name, False) for name in ("linear_fc1", "linear_fc2")] if shared else []
    return homes


def _drop_input_norms(layer: ModuleSpec, mlp: Any, transformer_engine: bool) -> None:
    """Remove the norms before attention and MLP."""
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp
    if transformer_engine:  # its linear layers contain the norms
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

        layer.submodules.self_attention.submodules.linear_qkv = mlp.linear_fc1 = TEColumnParallelLinear


def layer_scores(family: Family, number: int) -> ScoreSettings:
    """The score settings of a layer."""
    scale = family.score_scale(number)
    return ScoreSettings(
        scale=None if scale == family.head_dim**-0.5 else scale,
        window=family.attention[number].window,
        cap=family.score_cap,
    )
