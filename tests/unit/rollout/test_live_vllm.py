"""vLLM beside the training, without vLLM: how weights reach its workers, what its processes inherit, and when it is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mpo_megatron.config import ConfigError, LiveVllmConfig, OnlineConfig, ParallelConfig, VllmConfig
from mpo_megatron.families import load_family
from mpo_megatron.hf.live_engine import GIB, choose_memory_fraction, engine_memory, validate_engine_layout
from mpo_megatron.model.live_weights import WeightInfo
from mpo_megatron.rollout.engines import Prompt, Sampling
from mpo_megatron.rollout.live import vllm as live_vllm
from mpo_megatron.rollout.live.vllm import VllmLiveEngine, environment_of_an_engine, start_vllm
from tests import vllm_stand_in
from tests.tiny import save_model

PROMPTS = [Prompt(group_id="a", token_ids=(1,), messages=())]


class Weights:
    """The policy's weights: a few, whose values tests set."""

    def __init__(self) -> None:
        self.now = {
            "model.embed_tokens.weight": torch.zeros(7, 3, dtype=torch.bfloat16),
            "model.layers.0.mlp.experts.0.gate_proj.weight": torch.zeros(2, 3, dtype=torch.bfloat16),
            "model.layers.0.mlp.gate.weight": torch.zeros(5, 3),  # a router in float32 between weights of 2 bytes
            "lm_head.weight": torch.zeros(7, 3, dtype=torch.bfloat16),
        }

    @property
    def metadata(self) -> list[WeightInfo]:
        return [WeightInfo(name, tuple(tensor.shape), tensor.dtype) for name, tensor in self.now.items()]

    def stream(self, *, wanted: bool = True) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, tensor.clone()) for name, tensor in self.now.items())


def test_weights_are_replaced_before_sampling_and_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_stand_in.install(monkeypatch)
    monkeypatch.setattr(live_vllm, "barrier", lambda: None)
    monkeypatch.setattr(live_vllm, "LEAST_BUFFER_BYTES", 40)  # 42 bytes, the largest weight: three chunks
    fake, weights = vllm_stand_in.Engine(), Weights()
    inner: Any = SimpleNamespace(engine=fake, generate=lambda prompts, sampling: iter([prompt.group_id for prompt in prompts]))
    engine = VllmLiveEngine(weights, inner)  # type: ignore[arg-type]
    assert engine.draws
    for value in (1.0, 2.0):
        for index, tensor in enumerate(weights.now.values()):
            tensor.fill_(value + index)
        engine.update()
        assert list(engine.generate(PROMPTS, Sampling(num_responses=1))) == ["a"]
        assert fake.workers[0].loaded.keys() == weights.now.keys()
        for name, tensor in weights.now.items():
            assert torch.equal(fake.workers[0].loaded[name], tensor)
            assert fake.workers[0].loaded[name].dtype == tensor.dtype
    update = ["wake ['weights']", "start_weight_update", *["update_weights"] * 3, "finish_weight_update"]
    sampling = ["wake ['kv_cache']", "reset", "sleep 2"]
    assert fake.calls == ["init_weight_transfer_engine", "sleep 2", *[*update, *sampling] * 2]


def test_the_engine_is_started_without_weights_and_with_its_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def start(folder: Path, tokenizer: Any, config: VllmConfig) -> None:
        seen.update(config=config, gpus=os.environ["CUDA_VISIBLE_DEVICES"])

    monkeypatch.setattr(live_vllm, "VllmEngine", start)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config = LiveVllmConfig(tensor_parallel=2, options={"quantization": "fp8"})
    start_vllm(tmp_path, None, torch.bfloat16, config, 0.25)  # type: ignore[arg-type]
    assert seen["gpus"] == "2,3"
    assert (seen["config"].tensor_parallel, seen["config"].memory_fraction, seen["config"].dtype) == (2, 0.25, "bfloat16")
    expected = {"load_format": "dummy", "weight_transfer_config": {"backend": "ipc"}, "quantization": "fp8"}
    assert expected.items() <= seen["config"].options.items()


def test_engine_processes_are_no_part_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    before = dict(os.environ)
    with environment_of_an_engine(1):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
        assert not {"LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"} & set(os.environ)
    assert dict(os.environ) == before
    with pytest.raises(ConfigError, match="another machine; this one has 3 ranks"), environment_of_an_engine(2):
        pass


def test_without_vllm_there_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(ConfigError, match="needs vLLM with its update API"):
        VllmLiveEngine(Weights(), None)  # type: ignore[arg-type]


def test_memory_follows_the_model(tmp_path: Path) -> None:
    hf = save_model(tmp_path / "hf", num_hidden_layers=4, hidden_size=64)
    family = load_family(hf)
    one = engine_memory(family, LiveVllmConfig(), parameters=10**9, dtype_bytes=2, sequences=8, tokens=1000)
    assert one.weights == 2 * 10**9
    assert one.sequence_cache == 2 * family.num_key_value_heads * family.head_dim * 2 * 4 * 1000
    assert one.cache == 8 * one.sequence_cache
    two = engine_memory(family, LiveVllmConfig(tensor_parallel=2), parameters=10**9, dtype_bytes=2, sequences=8, tokens=1000)
    assert (two.weights, two.cache) == (one.weights // 2, one.cache // min(2, family.num_key_value_heads))
    deep = engine_memory(family, LiveVllmConfig(pipeline_parallel=2), parameters=10**9, dtype_bytes=2, sequences=8, tokens=1000)
    assert (deep.weights, deep.cache) == (one.weights // 2, one.cache // 2)
    total = 80 * GIB
    assert choose_memory_fraction(one, free=70 * GIB, total=total) == one.awake / total
    tight = (one.least + one.awake) // 2
    assert choose_memory_fraction(one, free=tight, total=total) == tight / total
    with pytest.raises(ConfigError, match=r"needs .* GiB of the GPU for one sequence at a time"):
        choose_memory_fraction(one, free=one.least - 1, total=total)


def test_engines_that_fit_no_replica_are_refused(tmp_path: Path) -> None:
    family = load_family(save_model(tmp_path / "hf", num_hidden_layers=2, hidden_size=64))
    parallel = ParallelConfig(tensor=2, context=2)
    validate_engine_layout(LiveVllmConfig(tensor_parallel=2, pipeline_parallel=2), parallel, family)
    with pytest.raises(ConfigError, match=r"parallel.tensor × parallel.context = 4"):
        validate_engine_layout(LiveVllmConfig(tensor_parallel=4, pipeline_parallel=2), parallel, family)
    with pytest.raises(ConfigError, match=r"tensor_parallel = 3 does not divide num_attention_heads"):
        validate_engine_layout(LiveVllmConfig(tensor_parallel=3), parallel, family)
    with pytest.raises(ConfigError, match=r"the model has 2 layers"):
        validate_engine_layout(LiveVllmConfig(pipeline_parallel=4), parallel, family)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "vllm", "vllm": {"memory_fraction": 1.0}}, "above 0 and below 1"),
        ({"engine": "vllm", "vllm": {"tensor_parallel": 0}}, "at least 1"),
        ({"engine": "vllm", "vllm": {"options": {"load_format": "auto"}}}, "load_format is set by mpo train itself"),
        ({"vllm": {"tensor_parallel": 2}}, "online.vllm.tensor_parallel is set, but online.engine = transformers"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OnlineConfig(**options | {"vllm": LiveVllmConfig(**options["vllm"])})
