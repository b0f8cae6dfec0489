"""The weight map against both libraries' models at real sizes: a mapping error cannot hide in a small model.

Nothing is allocated: both models are built from fake tensors, which have shapes and no storage.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig

from mpo_megatron.config import ModelConfig, ParallelConfig
from mpo_megatron.families import read_family
from mpo_megatron.hf.conversion import padded_vocab_size
from mpo_megatron.model.parallel import model_parallel
from mpo_megatron.model.policy import Policy, build_policy
from mpo_megatron.model.weight_map import Slice, build_weight_map, extra_state_keys
from tests.distributed.parity_oracle import split_experts


def qwen(kind: type, hidden: int, layers: int, heads: int, groups: int, ffn: int, vocab: int, **options: Any) -> Any:
    return kind(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=ffn,
        vocab_size=vocab,
        **{"tie_word_embeddings": False, **options},
    )


CONFIGS: dict[str, PretrainedConfig] = {
    "Qwen2.5-0.5B": qwen(Qwen2Config, 896, 24, 14, 2, 4864, 151936, tie_word_embeddings=True),
    "Qwen2.5-14B": qwen(Qwen2Config, 5120, 48, 40, 8, 13824, 152064),
    "Qwen2.5-32B": qwen(Qwen2Config, 5120, 64, 40, 8, 27648, 152064),
    "Qwen3-0.6B": qwen(Qwen3Config, 1024, 28, 16, 8, 3072, 151936, tie_word_embeddings=True, head_dim=128),
    "Qwen3-14B": qwen(Qwen3Config, 5120, 40, 40, 8, 17408, 151936, head_dim=128),
    "Qwen3-32B": qwen(Qwen3Config, 5120, 64, 64, 8, 25600, 151936, head_dim=128),
    # Layers with experts are many tensors: a few layers tell as much as all 48 and 24.
    "Qwen3-30B-A3B": qwen(
        *(Qwen3MoeConfig, 2048, 2, 32, 4, 6144, 151936),
        **{"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
    ),
    "Qwen1.5-MoE-A2.7B": qwen(
        *(Qwen2MoeConfig, 2048, 2, 16, 16, 5632, 151936),
        **{"num_experts": 60, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    ),
    "Qwen2-MoE, dense and sparse layers": qwen(
        *(Qwen2MoeConfig, 256, 4, 4, 2, 512, 1000),
        **{"num_experts": 4, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 384, "decoder_sparse_step": 2},
    ),
}
VOCAB_MULTIPLES = {"Qwen2.5-14B": 1024, "Qwen3-32B": 1024}
"""Some vocabularies are padded here; 128, the default, divides all of Qwen's."""


def weight_map(name: str) -> list[Slice]:
    config = CONFIGS[name]
    return build_weight_map(read_family(config), padded_vocab_size(config.vocab_size, VOCAB_MULTIPLES.get(name, 128)))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_hugging_face_tensor_has_one_place(name: str) -> None:
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
        expected = {key: tuple(tensor.shape) for key, tensor in split_experts(model.state_dict()).items()}
    if CONFIGS[name].tie_word_embeddings:
        del expected["lm_head.weight"]
    placements = [placement for item in weight_map(name) for placement in item.placements]
    assert {placement.name: placement.shape for placement in placements} == expected
    assert len(placements) == len(expected), "a tensor has two places"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_megatron_tensor_has_its_shape(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing is initialised, and Megatron-Core's look at the random state cannot be faked.
    monkeypatch.setattr(CudaRNGStatesTracker, "fork", lambda self, name="": contextlib.nullcontext())
    config = CONFIGS[name]
    family = read_family(config)
    padded = padded_vocab_size(config.vocab_size, VOCAB_MULTIPLES.get(name, 128))
    parallel = ParallelConfig()
    monkeypatch.setattr(Policy, "to", lambda self, device: self)  # nothing to move
    with model_parallel(parallel, seed=1) as ranks, FakeTensorMode():
        settings = ModelConfig(checkpoint="", precision="fp32")
        [policy] = build_policy(family, settings, parallel, ranks, padded)
        sharded = policy.sharded_state_dict()
        apply_factories(sharded)  # gate and up of linear_fc1
    entries = [entry for item in sharded.values() for entry in (item if isinstance(item, list) else [item])]
    expected = {entry.key: tuple(entry.global_shape) for entry in entries if isinstance(entry, ShardedTensor)}
    assert {item.key: item.global_shape for item in weight_map(name)} == expected
    objects = {entry.unique_key for entry in entries if isinstance(entry, ShardedObject)}
    assert objects
    assert objects <= set(extra_state_keys(family))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_row_is_covered_once(name: str) -> None:
    config = CONFIGS[name]
    for item in weight_map(name):
        hf_rows = []
        megatron_rows = []
        for placement in item.placements:
            assert placement.shape[1:] == item.shape[1:]
            rows = [(run.hf_row, run.hf_row + run.num_rows) for run in placement.runs]
            assert joined(rows) == (0, placement.shape[0])
            hf_rows += rows
            megatron_rows += [(run.megatron_row, run.megatron_row + run.num_rows) for run in placement.runs]
        start, stop = joined(sorted(megatron_rows))
        is_padded = item.key in ("embedding.word_embeddings.weight", "output_layer.weight")
        assert (start, stop) == (0, config.vocab_size if is_padded else item.shape[0])


def joined(runs: list[tuple[int, int]]) -> tuple[int, int]:
    """Ends of ranges that must follow one another without gap or overlap."""
    for (_, stop), (start, _) in itertools.pairwise(runs):
        assert stop == start
    return runs[0][0], runs[-1][1]


def test_query_key_and_value_heads_interleave_by_group() -> None:
    """Hand-computed: 4 query heads in 2 groups of 16 channels are [q0 q1 k0 v0 | q2 q3 k1 v1]."""
    config = qwen(Qwen2Config, 64, 1, 4, 2, 96, 128)
    [qkv] = [item for item in build_weight_map(read_family(config), 128) if item.key.endswith("linear_qkv.weight")]
    runs = {
        placement.name.split(".")[4]: [(run.hf_row, run.megatron_row, run.num_rows) for run in placement.runs]
        for placement in qkv.placements
    }
    assert runs == {
        "q_proj": [(0, 0, 32), (32, 64, 32)],
        "k_proj": [(0, 32, 16), (16, 96, 16)],
        "v_proj": [(0, 48, 16), (16, 112, 16)],
    }
