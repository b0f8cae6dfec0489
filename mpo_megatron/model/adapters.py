"""Low-rank adapters (LoRA) within Megatron's linear layers: output + scale · B (A x), separate for each fused Hugging Face layer.

Under tensor parallelism, the matrix on the side of size H is sharded like the weight beside it; the other one is whole on
every rank. Ranks exchange tensors of width r, not of the layer's width (r: the sum of ranks of all adapters within a layer):

    column-parallel, inputs whole      A whole, B sharded by rows.     Backward sums the gradient of A x [T, r] over ranks.
    column-parallel, inputs by tokens  (sequence parallelism)          Forward gathers A x [T, r], backward reduce-scatters it.
    row-parallel, outputs whole        A sharded by columns, B whole.  Forward sums A x [T, r] over ranks.
    row-parallel, outputs by tokens    (sequence parallelism)          Forward reduce-scatters A x [T, r], backward gathers it.
    output layer                       A whole, B sharded by rows.     Ranks have parts of the gradients of A and x: A's is summed
                                     here, that of x by the caller.
    expert's                           The dispatcher sums outputs, and gradients of inputs, over ranks; backward sums the
                                     gradient of the whole matrix.

Where a rank has only some of the tokens, it has only part of a whole matrix's gradient. Such matrices are marked
`sequence_parallel`: finalize_model_grads sums them over tensor-parallel ranks, like the gradients of norms.

Legend: T tokens, H inputs or outputs of a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import linear

from mpo_megatron import device
from mpo_megatron.families.adapters import LinearAdapter

NAME = "adapter"
"""Name of the module within a linear layer; part of checkpoint keys."""


class AdapterPair(torch.nn.Module):
    """A and B of one Hugging Face layer: this rank's shards."""

    def __init__(self, rank: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        place: dict[str, Any] = {"dtype": dtype, "device": device.device()}
        self.lora_A = torch.nn.Parameter(torch.zeros(rank, inputs, **place))
        self.lora_B = torch.nn.Parameter(torch.zeros(outputs, rank, **place))

    def forward(self) -> tuple[Tensor, Tensor]:
        """(A, B). A call, because DistributedDataParallel's module hooks wait for weights that are still being gathered."""
        return self.lora_A, self.lora_B


class LinearAdapters(torch.nn.Module):
    """The adapters within one linear layer (of one expert)."""

    def __init__(self, plan: LinearAdapter, inputs: int, config: TransformerConfig, group: ProcessGroup, *, expert: bool) -> None:
        """Create zeros of this rank's shapes.

        Args:
            inputs: inputs of the whole layer
            group: ranks that share the layer
        """
        super().__init__()
        self.plan, self.group, self.expert = plan, group, expert
        self.sequence_parallel = config.sequence_parallel and not expert and group.size() > 1
        self.blocks = plan.blocks // group.size() if plan.column and plan.blocks > 1 else plan.blocks
        parts = group.size()
        for name, rows in plan.rows.items():
            if name in plan.targets:
                outputs = plan.blocks * rows
                shape = (inputs, outputs // parts) if plan.column else (inputs // parts, outputs)
                self.add_module(name, AdapterPair(plan.rank, *shape, config.params_dtype))
        for pair in self.pairs:
            sharded, whole = (pair.lora_B, pair.lora_A) if plan.column else (pair.lora_A, pair.lora_B)
            # Without the mark, the gradient norm counts the shards of one rank only.
            set_tensor_model_parallel_attributes(sharded, True, 0 if plan.column else 1, 1)
            whole.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    @property
    def pairs(self) -> list[AdapterPair]:
        """Adapters of the fused layers that have one, in Megatron's order."""
        return [pair for pair in self.children() if isinstance(pair, AdapterPair)]

    def forward(self, x: Tensor) -> Tensor:
        """The term added to the layer's output, from the layer's input; shapes as those of the layer."""
        return self._column(x) if self.plan.column else self._row(x)

    def _column(self, x: Tensor) -> Tensor:
        names = [name for name, _ in self.named_children()]
        downs, ups = zip(*(pair() for pair in self.pairs), strict=True)
        down = torch.cat(downs)
        if self.expert:
            down = self._summed_gradient(down)
        narrow = linear(x, down) * self.plan.scale
        if self.sequence_parallel:
            narrow = gather_from_sequence_parallel_region(narrow, tensor_parallel_output_grad=True, group=self.group)
        elif not self.expert:
            narrow = self._summed_gradient(narrow)
        outputs = [linear(part, up) for part, up in zip(narrow.split(self.plan.rank, dim=-1), ups, strict=True)]
        return self._interleave(dict(zip(names, outputs, strict=True)), narrow)

    def of_head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """scale · A x [T, r] and this rank's rows of B, for a head that itself multiplies the two.

        Args:
            x: whole on every rank, which returns only its vocabulary's part of the gradient
        """
        (pair,) = self.pairs
        down, up = pair()
        # With sequence parallelism, finalize_model_grads sums the parts of A's gradient, once a step.
        return linear(x, down if self.sequence_parallel else self._summed_gradient(down)) * self.plan.scale, up

    def _interleave(self, outputs: dict[str, Tensor], like: Tensor) -> Tensor:
        """Outputs of the fused layers in Megatron's row order: block by block, zeros for a layer without adapter."""
        if len(self.plan.rows) == 1:
            return next(iter(outputs.values()))
        parts = []
        for name, rows in self.plan.rows.items():
            width = rows if self.plan.blocks > 1 else rows // self.group.size()
            shape = (*like.shape[:-1], self.blocks, width)
            parts.append(outputs[name].view(shape) if name in outputs else like.new_zeros(shape))
        return torch.cat(parts, dim=-1).flatten(-2)

    def _row(self, x: Tensor) -> Tensor:
        (pair,) = self.pairs
        down, up = pair()
        narrow = linear(x, down) * self.plan.scale
        if self.expert:
            up = self._summed_gradient(up)
        elif self.sequence_parallel:
            narrow = reduce_scatter_to_sequence_parallel_region(narrow, group=self.group)
        else:
            narrow = reduce_from_tensor_model_parallel_region(narrow, group=self.group)
        return linear(narrow, up)

    def _summed_gradient(self, tensor: Tensor) -> Tensor:
        """The same tensor; backward sums its gradient over the layer's ranks."""
        return copy_to_tensor_model_parallel_region(tensor, group=self.group)

    def sharded(self, prefix: str, offsets: tuple[Any, ...], replicas: ProcessGroup | None) -> dict[str, Any]:
        """The matrices as entries of a sharded checkpoint."""
        axis = {"lora_B": 0} if self.plan.column else {"lora_A": 1}
        axes = {f"{name}.{matrix}": dim for name, _ in self.named_children() for matrix, dim in axis.items()}
        state = self.state_dict(prefix="", keep_vars=True)
        groups = {"tp_group": self.group, "dp_cp_group": replicas}
        found: dict[str, Any] = make_sharded_tensors_for_checkpoint(state, prefix, axes, offsets, **groups)
        return found


def adapted(base: type, plan: LinearAdapter) -> type:
    """Subclass a linear layer of Megatron-Core or Transformer Engine to add adapters."""

    class Adapted(base):
        def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any) -> None:
            super().__init__(input_size, output_size, config=config, **options)
            group = (
                getattr(self, "tp_group", None) or self._tp_group
            )  # attribute of Megatron-Core's layers, or of its Transformer Engine layers
            expert = bool(options.get("is_expert", False))
            self.add_module(NAME, LinearAdapters(plan, input_size, config, group, expert=expert))
            self.adapters_on = True

        def forward(self, x: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
            output, bias = super().forward(x, *arguments, **options)
            return (output + self.adapter(x) if self.adapters_on else output), bias

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
        ) -> dict[str, Any]:
            state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
            own = f"{prefix}{NAME}."
            # The layer's own method would treat them as weights that are not sharded.
            kept = {key: value for key, value in state.items() if not key.startswith(own)}
            return kept | self.adapter.sharded(own, sharded_offsets, (metadata or {}).get("dp_cp_group"))

    return Adapted


def adapted_grouped(base: type, plan: LinearAdapter) -> type:
    """Subclass Transformer Engine's grouped linear layer of all of a rank's experts to add adapters."""

    class AdaptedGroup(base):
        def __init__(
            self, num_gemms: int, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any
        ) -> None:
            super().__init__(num_gemms, input_size, output_size, config=config, **options)
            own = [LinearAdapters(plan, input_size, config, self._tp_group, expert=True) for _ in range(num_gemms)]
            self.add_module(NAME, torch.nn.ModuleList(own))
            self.adapters_on = True

        def forward(self, x: Tensor, splits: Sequence[int], *arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
            output, bias = super().forward(x, splits, *arguments, **options)
            if not self.adapters_on:
                return output, bias
            parts = x.split([int(size) for size in splits])
            return output + torch.cat([own(part) for own, part in zip(self.adapter, parts, strict=True)]), bias

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
        ) -> dict[str, Any]:
            """Like SequentialMLP's: an axis for experts, after the axis for layers."""
            state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
            groups, count = self._pg_collection, len(self.adapter)
            for index, own in enumerate(self.adapter):
                axis = (len(sharded_offsets), groups.ep.rank() * count + index, groups.ep.size() * count)
                parts = own.sharded(f"{prefix}{NAME}.", (*sharded_offsets, axis), (metadata or {}).get("dp_cp_group"))
                for key, value in parts.items():
                    value.replica_id = (*value.replica_id[:2], groups.expt_dp.rank())
                    state[key.replace(f"{prefix}{NAME}.", f"{prefix}{NAME}.{index}.", 1)] = value
            return state

    return AdaptedGroup


def freeze_base(part: torch.nn.Module) -> None:
    """Train adapters only: other weights get no gradients, gradient buffers or optimizer states."""
    adapters = {id(parameter) for module in linear_adapters_of(part) for parameter in module.parameters()}
    for parameter in part.parameters():
        parameter.requires_grad_(id(parameter) in adapters)


def linear_adapters_of(part: torch.nn.Module) -> list[LinearAdapters]:
    """All adapters of a part of the model, in order."""
    return [module for module in part.modules() if isinstance(module, LinearAdapters)]


@torch.no_grad()
def clear_adapters(parts: Sequence[torch.nn.Module]) -> None:
    """Zero the adapters' contribution: B = 0."""
    for part in parts:
        for layer in linear_adapters_of(part):
            for pair in layer.pairs:
                pair.lora_B.zero_()


@contextlib.contextmanager
def adapters_off(parts: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Within this context the model computes exactly as the base model, without adapters."""
    layers: list[Any] = [module for part in parts for module in part.modules() if hasattr(module, "adapters_on")]
    for layer in layers:
        layer.adapters_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.adapters_on = True
