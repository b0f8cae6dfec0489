"""vLLM beside the training, without vLLM: how weights reach its workers, what its processes inherit, and its absence."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpo_megatron.config import ConfigError
from mpo_megatron.rollout.engines import Prompt, Sampling
from mpo_megatron.rollout.live import vllm as live_vllm
from mpo_megatron.rollout.live.vllm import LoadWeights, VllmLiveEngine, environment_of_an_engine


class FakeEngine:
    """Records what vLLM's engine is asked; its worker keeps the weights it is given."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.loaded: dict[str, torch.Tensor] = {}
        worker = LoadWeights()
        worker.model_runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load))
        self.worker = worker

    def load(self, weights: Any) -> None:
        self.loaded.update({name: tensor.clone() for name, tensor in weights})

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> None:
        self.calls.append(method)
        getattr(self.worker, method)(*args)
        assert all(isinstance(argument, str) for argument in args)  # nothing that would be pickled

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {tags[0]}")

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset")


def test_weights_are_replaced_before_sampling_and_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeEngine()
    inner = SimpleNamespace(engine=fake, generate=lambda prompts, sampling: iter([prompt.group_id for prompt in prompts]))
    monkeypatch.setattr(live_vllm, "VllmEngine", lambda *arguments: inner)
    monkeypatch.setattr(live_vllm, "PART_BYTES", 40)  # two of the weights below
    engine = VllmLiveEngine(Path("model"), None, torch.float32, 0.3)  # type: ignore[arg-type]
    prompts = [Prompt(group_id="a", token_ids=(1,), messages=())]
    for value in (1.0, 2.0):
        weights = {f"layer.{index}.weight": torch.full((2, 3), value + index) for index in range(3)}
        for name, weight in weights.items():
            engine.receive(name, weight)
            weight.zero_()  # it belongs to the caller
        assert list(engine.generate(prompts, Sampling(num_responses=1))) == ["a"]
        assert {name: float(tensor[0, 0]) for name, tensor in fake.loaded.items()} == {
            f"layer.{index}.weight": value + index for index in range(3)
        }
    batch = ["wake weights", "load_weights_from", "load_weights_from", "wake kv_cache", "reset", "sleep 2"]
    assert fake.calls == ["sleep 2", *batch, *batch]


def test_engine_processes_are_no_part_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    before = dict(os.environ)
    with environment_of_an_engine():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
        assert not {"LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"} & set(os.environ)
    assert dict(os.environ) == before


def test_without_vllm_there_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(ConfigError, match="vLLM"):
        VllmLiveEngine(tmp_path, None, torch.bfloat16, 0.3)  # type: ignore[arg-type]
