"""Gated DeltaNet in place of a layer's attention, for packed rows whose responses share a prompt.

Megatron-Core's own layer handles only whole sequences from a zero state, and building it requires flash-linear-attention.
This one has the same parts under the same names, and follows the row's segments: a response's convolution and state continue from
the end of its prompt. The rows of its input projection are ordered by key head, so that ranks can shard heads.

Legend: T tokens of the row, N of this context-parallel rank, H key heads of this tensor-parallel rank, R value heads per key
head, K and V channels of a key and of a value, W taps of the convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    checkpoint,
    copy_to_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import Tensor
from torch.distributed import ProcessGroup

from mpo_megatron import device
from mpo_megatron.families import DeltaNet
from mpo_megatron.model.attention import RowLayout, Segment
from mpo_megatron.model.context_parallel import heads_to_tokens, spread_tokens
from mpo_megatron.model.delta_rule import DeltaRule
from mpo_megatron.model.token_gather import TokenGather, build_gather, gather_tokens


@dataclass
class DeltaNetSubmodules:
    """Types of the linear layers."""

    in_proj: Any
    """Column-parallel."""
    out_proj: Any
    """Row-parallel."""


@dataclass(frozen=True, kw_only=True)
class TapIndex:
    """Inputs of a row's convolution: every segment, preceded by the last W − 1 tokens of its context."""

    inputs: TokenGather
    """[E] token of each input; T, a row of zeros, where there is no token."""
    outputs: Tensor
    """[T] index of each token's output."""


def build_taps(segments: Sequence[Segment], taps: int | None = None) -> TapIndex:
    """The index for a convolution over `taps` tokens."""
    behind = (taps or 1) - 1
    total = max(segment.end for segment in segments)
    inputs, outputs = [], np.zeros(total, dtype=np.int64)
    filled = 0
    for start, end, context_start, context_end in segments:
        context = np.arange(max(context_start, context_end - behind), context_end)
        inputs += [np.full(behind - len(context), total), context, np.arange(start, end)]
        outputs[start:end] = np.arange(filled, filled + end - start)  # an output has the index of its first input
        filled += behind + end - start
    inputs.append(np.array([total]))  # the gather requires every row to be used
    return TapIndex(inputs=build_gather(np.concatenate(inputs).astype(np.int64)), outputs=device.upload(outputs))


def convolve(tensor: Tensor, weight: Tensor, layout: RowLayout) -> Tensor:
    """Causal convolution [T, D] of each channel of [T, D] along its segment and context, with a weight [D, 1, W]."""
    index = layout.index(build_taps, weight.shape[-1])
    inputs = gather_tokens(F.pad(tensor, (0, 0, 0, 1)), index.inputs)
    mixed = F.conv1d(inputs.t()[None], weight, groups=len(weight))[0].t()
    return mixed.index_select(0, index.outputs)


class Convolution(torch.nn.Module):
    """The convolution's weight [H·(2K + R·V), 1, W]: this tensor-parallel rank's heads."""

    def __init__(self, channels: int, taps: int, config: TransformerConfig, group: ProcessGroup) -> None:
        super().__init__()
        self.group = group
        self.weight = torch.nn.Parameter(torch.zeros(channels, 1, taps, dtype=config.params_dtype, device=device.device()))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self) -> Tensor:
        """The weight. A call, because DistributedDataParallel's module hooks wait for weights that are still being gathered."""
        return self.weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        """The weight, sharded over tensor-parallel ranks."""
        return _sharded(self.state_dict(prefix="", keep_vars=True), prefix, sharded_offsets, self.group, metadata)


class GatedNorm(torch.nn.Module):
    """RMS norm of each value head, times the weight [V], times the SiLU of a gate."""

    def __init__(self, channels: int, config: TransformerConfig, group: ProcessGroup) -> None:
        super().__init__()
        self.eps, self.group = config.layernorm_epsilon, group
        self.weight = torch.nn.Parameter(torch.ones(channels, dtype=config.params_dtype, device=device.device()))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """The normalized and gated tensor, […, V].

        Communication: backward sums the weight's gradient over tensor-parallel ranks, each of which holds some of the heads.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = copy_to_tensor_model_parallel_region(self.weight, group=self.group)
        normalized = F.rms_norm(x.to(dtype), x.shape[-1:], eps=self.eps).to(x.dtype)
        return (weight * normalized * F.silu(gate.to(dtype))).to(x.dtype)


class GatedDeltaNet(MegatronModule):
    """The layer: replaces Megatron-Core's self-attention."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: DeltaNetSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        net: DeltaNet,
        rule: DeltaRule,
        **options: Any,
    ) -> None:
        """Args:
        options: arguments that Megatron-Core passes to any attention module: its name, context-parallel communication
        """
        super().__init__(config)
        self.layer_number, self.net, self.rule = layer_number, net, rule
        self.tensor_group: ProcessGroup = pg_collection.tp
        self.context_group = pg_collection.cp if pg_collection.cp.size() > 1 else None
        size = self.tensor_group.size()
        self.heads, self.share = net.key_heads // size, net.value_heads // net.key_heads
        self.splits = [net.key_channels, net.key_channels, *2 * [self.share * net.value_channels], self.share, self.share]
        self.recomputed = config.recompute_granularity == "selective" and "core_attn" in (config.recompute_modules or [])
        common = {"config": config, "bias": False, "is_expert": False, "tp_group": self.tensor_group}
        self.in_proj = submodules.in_proj(
            *(config.hidden_size, net.inputs),
            **{**common, "init_method": config.init_method, "gather_output": False, "skip_bias_add": False},
            tp_comm_buffer_name="qkv",
        )
        self.conv1d = Convolution(net.convolved // size, net.taps, config, self.tensor_group)
        for name in STATE_WEIGHTS:
            weight = torch.nn.Parameter(torch.zeros(net.value_heads // size, dtype=torch.float32, device=device.device()))
            set_tensor_model_parallel_attributes(weight, True, 0, 1)
            self.register_parameter(name, weight)
        self.out_norm = GatedNorm(net.value_channels, config, self.tensor_group)
        self.out_proj = submodules.out_proj(
            *(net.values, config.hidden_size),
            **{**common, "init_method": config.output_layer_init_method, "input_is_parallel": True, "skip_bias_add": True},
            tp_comm_buffer_name="proj",
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GatedDeltaNet:
        """Keep the parameters of decays in float32, also in a bf16 model: decays multiply over the whole past."""
        super()._apply(fn, recurse)
        for name in STATE_WEIGHTS:
            weight = getattr(self, name)
            weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32))
        return self

    def forward(
        self, hidden_states: Tensor, attention_mask: None = None, packed_seq_params: RowLayout | None = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's output for this rank's tokens of the row.

        Args:
            hidden_states: [N, 1, hidden], N divided over tensor-parallel ranks with sequence parallelism
            packed_seq_params: the whole row's layout
            options: arguments that Megatron-Core passes to attention and that are unused here, such as rotary angles
        """
        if packed_seq_params is None:
            raise ValueError("GatedDeltaNet needs the row's layout in packed_seq_params.")
        layout = packed_seq_params
        projected, _ = self.in_proj(hidden_states)
        projected = projected.view(len(projected), self.heads, -1)
        weights = self.conv1d(), self.A_log, self.dt_bias
        if self.context_group is not None:
            projected = spread_tokens(projected, self.context_group)
            weights = tuple(_own_part(weight, self.context_group) for weight in weights)  # type: ignore[assignment]

        def mix(projected: Tensor, *weights: Tensor) -> Tensor:
            return self._mix(projected, *weights, layout=layout)

        if self.recomputed and self.training and torch.is_grad_enabled():
            mixed = checkpoint(mix, False, projected, *weights)
        else:
            mixed = mix(projected, *weights)
        if self.context_group is not None:
            mixed = heads_to_tokens(mixed, self.context_group)
        output, bias = self.out_proj(mixed.flatten(1)[:, None])
        return output, bias

    def _mix(self, projected: Tensor, taps: Tensor, log_rate: Tensor, bias: Tensor, *, layout: RowLayout) -> Tensor:
        """From projected inputs [T, H, 2K + 2R·V + 2R] to gated outputs [T, H·R, V]; with context parallelism, for some heads."""
        heads, net = projected.shape[1], self.net
        convolved = projected[..., : sum(self.splits[:3])]
        mixed = F.silu(convolve(convolved.flatten(1), taps, layout)).unflatten(1, (heads, -1))
        query, key, value = mixed.split(self.splits[:3], dim=-1)
        gate, rate, step = projected[..., sum(self.splits[:3]) :].split(self.splits[3:], dim=-1)
        step = step.flatten(1).to(log_rate.dtype)
        decay = -log_rate.exp() * F.softplus(step + bias)
        value = value.reshape(len(value), -1, net.value_channels)
        output = self.rule(query, key, value, decay, rate.flatten(1).to(log_rate.dtype).sigmoid(), layout)
        return self.out_norm(output, gate.reshape(output.shape))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The weights, sharded over tensor-parallel ranks."""
        own = {name: getattr(self, name) for name in STATE_WEIGHTS}
        state: dict[str, Any] = _sharded(own, prefix, sharded_offsets, self.tensor_group, metadata)
        for name, module in self.named_children():
            state |= sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tensor_group)
        return state


STATE_WEIGHTS = ("A_log", "dt_bias")
"""Parameters [H·R] from which decays are computed."""


def _own_part(weight: Tensor, group: ProcessGroup) -> Tensor:
    """A context-parallel rank's heads of a weight; other heads get zero gradients here, and the sum over ranks completes them."""
    return weight.chunk(group.size())[group.rank()]


def _sharded(
    state: dict[str, Any], prefix: str, offsets: tuple[Any, ...], group: ProcessGroup, metadata: dict[str, Any] | None
) -> dict[str, Any]:
    """Checkpoint entries of weights whose first axis is sharded over tensor-parallel ranks."""
    groups = {"tp_group": group, "dp_cp_group": (metadata or {}).get("dp_cp_group")}
    found: dict[str, Any] = make_sharded_tensors_for_checkpoint(state, prefix, dict.fromkeys(state, 0), offsets, **groups)
    return found
