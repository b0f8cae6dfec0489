"""Shapes of known models against transformers' models without weights, and against the published numbers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from mpo_megatron.config import ConfigError, ParallelConfig
from mpo_megatron.families import read_family
from mpo_megatron.families.published import MODELS, build_config
from mpo_megatron.plan.models import find_model
from mpo_megatron.plan.parameters import count_parameters, part_weights, stage_parts
from tests.tiny import save_model

PUBLISHED = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
}
"""Parameters of the checkpoints on the hub; a tied embedding counts once."""


def test_every_model_has_a_published_size() -> None:
    assert PUBLISHED.keys() == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_real_model(name: str) -> None:
    config = build_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    real = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(read_family(config)) == real == PUBLISHED[name]


@pytest.mark.parametrize("name", MODELS)
def test_models_can_be_trained(name: str) -> None:
    read_family(build_config(name))


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tensor=4, pipeline=4),
        ParallelConfig(tensor=2, pipeline=4, virtual_pipeline=2),
        ParallelConfig(pipeline=3, first_stage_layers=14, last_stage_layers=16),
    ],
)
@pytest.mark.parametrize("name", ["Qwen2.5-14B", "Qwen3-30B-A3B"])
def test_cutting_loses_and_repeats_nothing(name: str, parallel: ParallelConfig) -> None:
    shape = read_family(build_config(name))
    stages = stage_parts(shape, parallel)
    assert sorted(layer for parts in stages for part in parts for layer in part.layers) == list(range(shape.num_hidden_layers))
    weights = [weight for parts in stages for part in parts for weight in part_weights(shape, parallel, part, shape.vocab_size)]
    # Norms and the router are on every tensor-parallel rank; everything else is cut.
    whole = {rule.megatron for rule in shape.rules if rule.shard is None}
    experts = sum(weight.size for weight in weights if weight.expert)
    cut = sum(weight.size for weight in weights if not weight.expert and weight.name not in whole)
    uncut = sum(weight.size for weight in weights if weight.name in whole)
    assert parallel.tensor * cut + uncut + experts == count_parameters(shape)


def test_tied_embeddings_lie_on_both_ends_of_a_pipeline() -> None:
    shape = read_family(build_config("Qwen2.5-3B"))
    stages = stage_parts(shape, ParallelConfig(pipeline=2))
    names = [
        {weight.name for part in parts for weight in part_weights(shape, ParallelConfig(), part, 151936)} for parts in stages
    ]
    assert "embedding.word_embeddings.weight" in names[0] - names[1]
    assert "output_layer.weight" in names[1] - names[0]


def test_names_and_folders_are_found(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert find_model("qwen3-14b").num_hidden_layers == 40
    folder = save_model(tmp_path_factory.mktemp("model"))
    assert find_model(str(folder)).hidden_size == 64
    with pytest.raises(ConfigError, match=r"Qwen3-14C; neither .* did you mean .*Qwen3-14B"):
        find_model("Qwen3-14C")
