"""Memory that a Gated DeltaNet keeps for its backward pass, compared with the tensors that autograd saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mpo_megatron.config import ModelConfig, ParallelConfig
from mpo_megatron.families import read_family
from mpo_megatron.model.attention import row_layout
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.policy import build_policy
from mpo_megatron.plan.delta_net import delta_net_kept
from tests.tiny import CONFIGS

TOKENS = 256


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bytes_that_autograd_keeps(precision: Any, ranks: Ranks) -> None:
    config = CONFIGS["qwen3_5_text"](
        **{"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "layer_types": ["linear_attention"]},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512},
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64},
    )
    family, model = read_family(config), ModelConfig(checkpoint="", precision=precision)
    part: Any = build_policy(family, model, ParallelConfig(), ranks, 512)[0]
    layer = getattr(part, "module", part).decoder.layers[0].self_attention
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    inputs = torch.randn(TOKENS, 1, 64, dtype=dtype, requires_grad=True)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), inputs)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = layer(inputs, packed_seq_params=row_layout([(0, TOKENS, 0, 0)]))
    assert output.requires_grad
    assert family.delta_net is not None
    planned = delta_net_kept(family.delta_net, model, tokens=TOKENS, ranks=1, gpu=False, recomputed=False)
    # Ignored: indices, masks, and single numbers per token or head.
    assert planned == pytest.approx(sum(kept.values()), rel=0.1)
