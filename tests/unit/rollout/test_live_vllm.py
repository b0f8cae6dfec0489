"""vLLM next to training, without vLLM: transfer of weights to its workers, its processes' environment, and refusals."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mpo_megatron.config import ConfigError, EndpointConfig, LiveVllmConfig, OnlineConfig, ParallelConfig, VllmConfig
from mpo_megatron.families import load_family
from mpo_megatron.files import DataError
from mpo_megatron.hf.live_engine import (
    GIB,
    choose_memory_fraction,
    engine_memory,
    quantized_sampling,
    validate_engine_layout,
)
from mpo_megatron.model.live_weights import WeightInfo
from mpo_megatron.rollout.engines import Prompt, Sampling
from mpo_megatron.rollout.live import transfer
from mpo_megatron.rollout.live import vllm as live_vllm
from mpo_megatron.rollout.live.vllm import VllmLiveEngine, choose_gpus, environment_of_an_engine, start_vllm
from tests import vllm_stand_in
from tests.tiny import save_model
from tests.waiting import TIMEOUT

PROMPTS = [Prompt(group_id="a", token_ids=(1,), messages=())]
SERVER = {"base_url": "http://127.0.0.1:1/v1", "model": "m"}


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

    def fill(self, value: float) -> None:
        for index, tensor in enumerate(self.now.values()):
            tensor.fill_(value + index)

    def check(self, engine: vllm_stand_in.Engine) -> None:
        """All workers have these weights."""
        for worker in engine.workers:
            assert worker.loaded.keys() == self.now.keys()
            for name, tensor in self.now.items():
                assert torch.equal(worker.loaded[name], tensor)
                assert worker.loaded[name].dtype == tensor.dtype


def around(engine: vllm_stand_in.Engine) -> Any:
    """A `VllmEngine` with this engine, whose answers are the prompts' ids."""
    return SimpleNamespace(engine=engine, generate=lambda prompts, sampling: iter([prompt.group_id for prompt in prompts]))


def test_weights_are_replaced_before_sampling_and_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_stand_in.install(monkeypatch)
    monkeypatch.setattr(live_vllm, "barrier", lambda: None)
    monkeypatch.setattr(transfer, "LEAST_BUFFER_BYTES", 40)  # 42 bytes, the largest weight: three chunks
    fake, weights = vllm_stand_in.Engine(), Weights()
    engine = VllmLiveEngine(weights, around(fake), seconds=TIMEOUT)
    assert engine.draws
    for value in (1.0, 2.0):
        weights.fill(value)
        engine.update()
        assert list(engine.generate(PROMPTS, Sampling(num_responses=1))) == ["a"]
        weights.check(fake)
    update = ["wake ['weights']", "start_weight_update", *["update_weights"] * 3, "finish_weight_update"]
    sampling = ["wake ['kv_cache']", "reset", "sleep 2"]
    assert fake.calls == ["init_weight_transfer_engine", "sleep 2", *[*update, *sampling] * 2]


def test_an_engine_on_gpus_of_its_own_stays_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_stand_in.install(monkeypatch)
    fake, weights = vllm_stand_in.Engine(gpus=2), Weights()
    engine = VllmLiveEngine(weights, around(fake), seconds=TIMEOUT, own_gpus=2)
    for value in (1.0, 2.0):
        weights.fill(value)
        engine.update()
        assert list(engine.generate(PROMPTS, Sampling(num_responses=1))) == ["a"]
        weights.check(fake)
    update = ["start_weight_update", "update_weights", "finish_weight_update", "reset"]
    assert fake.calls == ["init_weight_transfer_engine", *update * 2]


def test_an_engine_that_fails_ends_the_run_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_stand_in.install(monkeypatch)
    fake, weights = vllm_stand_in.Engine(gpus=2), Weights()
    engine = VllmLiveEngine(weights, around(fake), seconds=TIMEOUT, own_gpus=2)
    fake.workers[1].fails = True
    with pytest.raises(DataError, match=r"did not receive the policy's weights \(RuntimeError: CUDA out of memory\); check"):
        engine.update()
    monkeypatch.setattr(vllm_stand_in, "MEET_SECONDS", 1.0)
    gone = vllm_stand_in.Engine(gpus=1)  # of two workers
    with pytest.raises(ConfigError, match=r"could not connect at 127.0.0.1:\d+ for NCCL"):
        VllmLiveEngine(weights, around(gone), seconds=TIMEOUT, own_gpus=2)


def test_the_engine_is_started_without_weights_and_with_its_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def start(folder: Path, tokenizer: Any, config: VllmConfig) -> None:
        environment = os.environ.get("VLLM_ALLOW_INSECURE_SERIALIZATION")
        seen.update(config=config, gpus=os.environ["CUDA_VISIBLE_DEVICES"], unpickles=environment)

    monkeypatch.setattr(live_vllm, "VllmEngine", start)
    for gpus, backend, sleeps in (("shared", "ipc", True), ("own", "nccl", False)):
        config = LiveVllmConfig(tensor_parallel=2, gpus=gpus, options={"quantization": "fp8_per_tensor"})
        start_vllm(tmp_path, None, torch.bfloat16, config, memory_fraction=0.25, gpus=["2", "3"])  # type: ignore[arg-type]
        assert (seen["gpus"], seen["unpickles"]) == ("2,3", "1" if sleeps else None)
        assert (seen["config"].tensor_parallel, seen["config"].memory_fraction, seen["config"].dtype) == (2, 0.25, "bfloat16")
        expected = {"load_format": "dummy", "weight_transfer_config": {"backend": backend}, "quantization": "fp8_per_tensor"}
        assert (expected | {"enable_sleep_mode": sleeps}).items() <= seen["config"].options.items()


@pytest.mark.parametrize(
    ("config", "rank", "visible", "expected"),
    [
        ({"tensor_parallel": 2}, 2, None, ["2", "3"]),
        ({"tensor_parallel": 2}, 2, "4,5,6,7,8", ["6", "7"]),
        ({"gpus": "own", "tensor_parallel": 2}, 4, None, ["4", "5"]),  # ranks 4 to 7 are this machine's 0 to 3
        ({"gpus": "own", "tensor_parallel": 2}, 6, None, ["6", "7"]),
        ({"gpus": "own"}, 6, "GPU-a,GPU-b,GPU-c,GPU-d,GPU-e,GPU-f", ["GPU-f"]),
        ({"gpus": "own", "pipeline_parallel": 2, "tensor_parallel": 2}, 4, None, "its 2 engines of 4 need 8 more"),
        ({"tensor_parallel": 3}, 6, None, "another machine; this one has 4 ranks"),
        ({}, 5, None, []),
    ],
)
def test_gpus_of_an_engine(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], rank: int, visible: str | None, expected: list[str] | str
) -> None:
    """Two machines of eight GPUs and four ranks; two ranks are a replica."""
    for name, value in (("RANK", rank if rank > 3 else rank + 4), ("LOCAL_RANK", rank % 4), ("LOCAL_WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(live_vllm, "get_world_size", lambda: 8)
    monkeypatch.setattr(live_vllm, "all_gather_object", lambda target, own: target.__setitem__(slice(None), [True, False] * 4))

    def choose() -> list[str]:
        return choose_gpus(LiveVllmConfig(**config), draws=rank % 2 == 0)

    if isinstance(expected, list):
        assert choose() == expected
        return
    with pytest.raises(ConfigError, match=expected):
        choose()


def test_engine_processes_are_no_part_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    before = dict(os.environ)
    with environment_of_an_engine(["6"], unpickles=True):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
        assert not {"LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"} & set(os.environ)
    assert dict(os.environ) == before


def test_without_vllm_there_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(ConfigError, match="needs vLLM with its weight update API"):
        VllmLiveEngine(Weights(), None, seconds=TIMEOUT)


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
    hybrid = load_family(save_model(tmp_path / "hybrid", model_type="qwen3_5_text", num_hidden_layers=4, hidden_size=64))
    three = engine_memory(hybrid, LiveVllmConfig(), parameters=10**9, dtype_bytes=2, sequences=8, tokens=1000)
    # One layer of attention; three states [4, 16, 8] in float32 and 3 inputs of convolutions of 2 · 2 · 16 + 4 · 8 channels.
    assert three.sequence_cache == 2 * 2 * 32 * 2 * 1000 + 3 * (4 * 16 * 8 * 4 + 3 * 96 * 2)
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
    validate_engine_layout(LiveVllmConfig(tensor_parallel=4, pipeline_parallel=2, gpus="own"), parallel, family)
    with pytest.raises(ConfigError, match=r"the model has 2 layers"):
        validate_engine_layout(LiveVllmConfig(pipeline_parallel=4), parallel, family)
    hybrid = load_family(save_model(tmp_path / "hybrid", model_type="qwen3_5_text", num_hidden_layers=4))
    validate_engine_layout(LiveVllmConfig(tensor_parallel=2), parallel, hybrid)
    with pytest.raises(ConfigError, match=r"tensor_parallel = 4 does not divide linear_num_key_heads = 2; choose one of 1, 2"):
        validate_engine_layout(LiveVllmConfig(tensor_parallel=4), parallel, hybrid)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("fp8", "it reads only FP8 checkpoints; fp8_per_tensor quantises others"),
        ("awq", "it reads only quantised weights, but the policy's are not quantised: choose one of fp8_per_tensor, "),
        ("torchao", "only if all weights arrive in one call"),
        *((name, "it reads only quantised weights") for name in ("gptq", "gptq_marlin", "compressed-tensors", "modelopt_fp4", 4)),
    ],
)
def test_quantised_engines_that_cannot_take_weights_are_refused(tmp_path: Path, method: Any, reason: str) -> None:
    family = load_family(save_model(tmp_path / "hf", num_hidden_layers=2, hidden_size=64))
    for usable in (None, "fp8_per_tensor", "mxfp8", "experts_int8"):
        validate_engine_layout(LiveVllmConfig(options={"quantization": usable}), ParallelConfig(), family)
    with pytest.raises(ConfigError, match=rf"online.vllm.options.quantization = {method}; .*{reason}"):
        validate_engine_layout(LiveVllmConfig(options={"quantization": method}), ParallelConfig(), family)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({}, None),
        ({"quantization": None, "kv_cache_dtype": "auto", "enforce_eager": True}, None),
        ({"quantization": "fp8_per_block"}, "quantization = fp8_per_block"),
        ({"quantization_config": {"linear": "mxfp8"}}, "quantization_config = {'linear': 'mxfp8'}"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "kv_cache_dtype = fp8_e4m3"),
    ],
)
def test_engines_that_sample_from_another_policy_are_known(options: dict[str, Any], cause: str | None) -> None:
    assert quantized_sampling(options) == cause


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "vllm", "vllm": {"memory_fraction": 1.0}}, "above 0 and below 1"),
        ({"engine": "vllm", "vllm": {"tensor_parallel": 0}}, "at least 1"),
        ({"engine": "vllm", "vllm": {"options": {"load_format": "auto"}}}, "load_format is set by mpo train itself"),
        ({"vllm": {"tensor_parallel": 2}}, "online.vllm.tensor_parallel is set, but online.engine = transformers"),
        ({"engine": "server", "vllm": {"gpus": "own"}}, "online.vllm.gpus is set, but online.engine = server"),
        ({"endpoint": SERVER}, "online.endpoint.base_url is set, but online.engine = transformers"),
        ({"weights_address": "trainer"}, "online.weights_address is set, but online.engine = transformers"),
        ({"engine": "server"}, "online.endpoint.base_url is missing"),
        ({"engine": "server", "endpoint": SERVER | {"api": "chat"}}, "online.endpoint.api = chat; samples must continue"),
        ({"engine": "server", "endpoint": SERVER | {"server": "sglang"}}, "only vLLM can receive live weights"),
        ({"engine": "server", "endpoint": SERVER, "weights_address": "http://me"}, "write a name or address, or host:port"),
        ({"engine": "server", "endpoint": SERVER, "weights_address": ""}, "write a name or address, or host:port"),
        ({"engine": "server", "endpoint": SERVER, "weights_address": "me:65536"}, "a port up to 65535"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    kinds = {"vllm": LiveVllmConfig, "endpoint": EndpointConfig}
    with pytest.raises(ConfigError, match=message):
        OnlineConfig(**{name: kinds[name](**value) if name in kinds else value for name, value in options.items()})
