"""Shapes of known models against transformers' models without weights, and against the published numbers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from mpo_megatron.config import ConfigError, ParallelConfig
from mpo_megatron.families import read_family
from mpo_megatron.families.published import MODELS, build_config
from mpo_megatron.hf.conversion import padded_vocab_size
from mpo_megatron.model.weight_map import build_weight_map
from mpo_megatron.plan.models import find_model
from mpo_megatron.plan.parameters import count_parameters, part_weights, stage_parts
from tests.distributed.parity_oracle import mixtral_names, split_experts
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
    "Qwen3-235B-A22B": 235_093_634_560,
    "Qwen2.5-72B": 72_706_203_648,
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "Llama-2-70B": 68_976_648_192,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.3-70B": 70_553_706_496,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
    "TinyLlama-1.1B": 1_100_048_384,
    "stories15M": 15_191_712,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mistral-7B-v0.2": 7_241_732_096,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Mistral-Small-24B": 23_572_403_200,
    "Mixtral-8x7B": 46_702_792_704,
    "Gemma-2-2B": 2_614_341_888,
    "Gemma-2-9B": 9_241_705_984,
    "Gemma-2-27B": 27_227_128_320,
    "Gemma-3-1B": 999_885_952,
    "OLMo-2-7B": 7_298_617_344,
    "OLMo-2-13B": 13_716_198_400,
    "OLMo-3-7B": 7_298_011_136,
    "Qwen3-Next-80B-A3B": 79_674_391_296,
    "Qwen3.5-0.8B": 752_393_024,
    "Qwen3.5-2B": 1_881_825_088,
    "Qwen3.5-4B": 4_205_751_296,
    "Qwen3.5-9B": 8_953_803_264,
    "Qwen3.5-27B": 26_895_998_464,
    "Qwen3.5-35B-A3B": 34_660_610_688,
    "Qwen3.5-122B-A10B": 122_111_526_912,
    "Qwen3.5-397B-A17B": 396_346_350_336,
    "Qwen3.6-27B": 26_895_998_464,
    "Qwen3.6-35B-A3B": 34_660_610_688,
}
"""Parameters of the checkpoints on the hub; a tied embedding counts once. For hybrid models, whose checkpoints have more than the
language model, those of transformers' text models."""


def test_every_model_has_a_published_size() -> None:
    assert PUBLISHED.keys() == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_real_model(name: str) -> None:
    config = build_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    real = sum(parameter.numel() for parameter in model.parameters())
    family = read_family(config)
    assert count_parameters(family) == real == PUBLISHED[name]
    stored = split_experts(dict(model.named_parameters()))
    if isinstance(config, MixtralConfig):
        stored = mixtral_names(stored)
    slices = build_weight_map(family, padded_vocab_size(family.vocab_size, 128))
    placements = [placement for item in slices for placement in item.placements]
    shapes = {key: tuple(tensor.shape) for key, tensor in stored.items()}
    assert {placement.name: placement.shape for placement in placements} == shapes
    assert len(placements) == len(stored), "a tensor has two places"


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
    # Norms and the router are on every tensor-parallel rank; everything else is sharded.
    whole = {rule.megatron for rule in shape.rules if rule.shard is None}
    experts = sum(weight.total for weight in weights if weight.expert)
    cut = sum(weight.total for weight in weights if not weight.expert and weight.name not in whole)
    uncut = sum(weight.total for weight in weights if weight.name in whole)
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
