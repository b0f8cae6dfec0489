"""Frozen linear layers whose weight is kept in 4 bits and whole only while it multiplies (QLoRA).

Forward makes the weight, and autograd keeps its blocks instead, from which backward makes it once more: of all layers, one weight
is whole at a time. Everything else (communication, bias, adapters) is the layer's own.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mpo_megatron import device
from mpo_megatron.mcore.weights import unwrap
from mpo_megatron.model.convert_torch_dist import CheckpointReader
from mpo_megatron.model.live_weights import held_boxes
from mpo_megatron.model.nf4 import Blocks, quantize
from mpo_megatron.model.parallel import Ranks


class _View(NamedTuple):
    """What autograd keeps of a weight: how it looked at it."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def quantized(base: type) -> type:
    """A linear layer of Megatron-Core (column- or row-parallel) whose weight is kept in blocks of NF4.

    It has none until `load_quantized`, and none among its parameters: neither checkpoints nor optimizers see it.
    """

    class Quantized(base):
        def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any) -> None:
            frozen = copy.copy(config)
            frozen.gradient_accumulation_fusion = False  # there is no gradient, and Megatron-Core would ask for NVIDIA's apex
            super().__init__(input_size, output_size, config=frozen, **options)
            self.weight_shape, self.weight_dtype = self.weight.shape, self.weight.dtype
            self.blocks: Blocks | None = None
            del self.weight

        def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Any:
            assert self.blocks is not None, "weights are not loaded"
            with self._whole_weight(self.blocks):
                return super().forward(x, *arguments, **options)

        @contextlib.contextmanager
        def _whole_weight(self, blocks: Blocks) -> Iterator[None]:
            weight = blocks.dequantize()
            place = weight.untyped_storage().data_ptr()

            def keep(tensor: Tensor) -> Tensor | _View:
                if tensor.untyped_storage().data_ptr() != place:
                    return tensor
                return _View(tensor.size(), tensor.stride(), int(tensor.storage_offset()))

            def restore(kept: Tensor | _View) -> Tensor:
                return blocks.dequantize().as_strided(*kept) if isinstance(kept, _View) else kept

            self.weight = weight
            try:
                with saved_tensors_hooks(keep, restore):
                    yield
            finally:
                del self.weight

    return Quantized


def quantized_layers(part: torch.nn.Module) -> list[Any]:
    """The quantized layers within a part of the model."""
    return [module for module in part.modules() if hasattr(module, "blocks") and hasattr(module, "weight_shape")]


@torch.no_grad()
def load_quantized(model: Sequence[torch.nn.Module], folder: Path, ranks: Ranks) -> None:
    """Quantize the weights of a Megatron checkpoint's folder into the model's quantized layers, one transformer layer at a time.

    Each rank reads its own shards; nothing is communicated. `folder` is known to be whole.

    Raises:
        ConfigError: a weight is missing, or the data are damaged.
    """
    reader: CheckpointReader | None = None
    for part in model:
        for layer in (module for module in unwrap(part).modules() if isinstance(module, TransformerLayer)):
            homes = quantized_layers(layer)
            if not homes:
                continue
            reader = reader or CheckpointReader(folder / "megatron")
            for home in homes:  # a parameter, so that the layer says which boxes of the checkpoint it is
                home.weight = torch.nn.Parameter(torch.empty(home.weight_shape, dtype=home.weight_dtype, device=device.device()))
            places = {home.weight.untyped_storage().data_ptr() for home in homes}
            for box, data in held_boxes([part], ranks, adapters=False).items():
                if data.untyped_storage().data_ptr() in places:
                    data.copy_(reader.read(box.key, box.offsets, box.sizes))
            for home in homes:
                home.blocks = quantize(home.weight.detach())
                del home.weight
