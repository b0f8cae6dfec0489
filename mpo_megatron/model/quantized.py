"""Frozen linear layers whose weight is stored in 4 bits and dequantized only while it multiplies (QLoRA).

Forward dequantizes the weight; autograd keeps its blocks instead, from which backward dequantizes again. Over all layers, one
whole weight exists at a time. Everything else (communication, bias, adapters) is the layer's own.
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
    """What autograd keeps of a weight: the shape and strides of its view."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def quantized(base: type) -> type:
    """Subclass a linear layer of Megatron-Core (column- or row-parallel) to store its weight in blocks of NF4.

    The weight is absent until `load_quantized` and never a parameter: checkpoints and optimizers do not see it.
    """

    class Quantized(base):
        def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any) -> None:
            frozen = copy.copy(config)
            frozen.gradient_accumulation_fusion = False  # no gradient exists, and Megatron-Core would require NVIDIA's apex
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
    """Quantize the weights of a Megatron checkpoint folder into the model's quantized layers, one transformer layer at a time.

    Each rank reads its own shards, without communication. `folder` must be complete.

    Raises:
        ConfigError: a weight is missing, or the data is damaged.
    """
    reader: CheckpointReader | None = None
    for part in model:
        for layer in (module for module in unwrap(part).modules() if isinstance(module, TransformerLayer)):
            homes = quantized_layers(layer)
            if not homes:
                continue
            reader = reader or CheckpointReader(folder / "megatron")
            for home in homes:  # a parameter, so that the layer reports its boxes of the checkpoint
                home.weight = torch.nn.Parameter(torch.empty(home.weight_shape, dtype=home.weight_dtype, device=device.device()))
            places = {home.weight.untyped_storage().data_ptr() for home in homes}
            for box, data in held_boxes([part], ranks, adapters=False).items():
                if data.untyped_storage().data_ptr() in places:
                    data.copy_(reader.read(box.key, box.offsets, box.sizes))
            for home in homes:
                home.blocks = quantize(home.weight.detach())
                del home.weight
