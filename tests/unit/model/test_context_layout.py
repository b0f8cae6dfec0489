"""Which context-parallel layouts a model allows."""

from __future__ import annotations

import pytest
from transformers import Qwen3Config

from mpo_megatron.config import ConfigError, ParallelConfig
from mpo_megatron.model.architecture import validate_layout

CONFIG = Qwen3Config(num_attention_heads=40, num_key_value_heads=8, num_hidden_layers=4, intermediate_size=512)


@pytest.mark.parametrize("layout", [{"context": 8}, {"context": 40}, {"tensor": 8, "context": 5}, {"tensor": 2, "context": 20}])
def test_heads_are_shared_out_whole(layout: dict[str, int]) -> None:
    validate_layout(CONFIG, ParallelConfig(**layout), 1024)


def test_uneven_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel.context = 16 cannot share out the 40 attention heads and 8 key/value heads"):
        validate_layout(CONFIG, ParallelConfig(context=16), 1024)
    with pytest.raises(ConfigError, match=r"20 attention heads and 4 key/value heads .* choose one of 1, 2, 4, 20"):
        validate_layout(CONFIG, ParallelConfig(tensor=2, context=5), 1024)
