"""Requests to vLLM, and the handling of its answers; a stand-in engine with its interface runs on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mpo_megatron.config import ConfigError, EndpointConfig, VllmConfig
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.rollout.engines import Prompt, Sampling
from mpo_megatron.rollout.engines.served_adapter import ServedAdapter
from mpo_megatron.rollout.engines.vllm_engine import VllmEngine


class FakeEngine:
    """Answers the newest request first, one per step: tokens are the seed's digits, then the end token."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.waiting, self.asked, self.most = options, [], [], 0
        self.adapters: set[Any] = set()

    @classmethod
    def from_engine_args(cls, options: SimpleNamespace) -> FakeEngine:
        if "unknown" in vars(options):
            raise TypeError("unexpected keyword argument 'unknown'")
        return cls(vars(options))

    def add_request(self, name: str, prompt: dict[str, Any], params: SimpleNamespace, lora_request: Any = None) -> None:
        self.adapters.add(lora_request)
        self.waiting.append((name, params))
        self.asked.append((prompt["prompt_token_ids"], params))
        self.most = max(self.most, len(self.waiting))

    def step(self) -> list[Any]:
        name, params = self.waiting.pop()
        tokens = [ord(digit) - 33 for digit in str(params.seed)]  # byte-level ids: "!" is 0
        long = params.seed % 2 == 0
        completion = SimpleNamespace(token_ids=tokens if long else [*tokens, 256], finish_reason="length" if long else "stop")
        unfinished = SimpleNamespace(request_id="other", finished=False)
        return [unfinished, SimpleNamespace(request_id=name, finished=True, outputs=[completion])]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module, parameters = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    module.EngineArgs = lambda **options: SimpleNamespace(**options)  # type: ignore[attr-defined]
    module.LLMEngine = FakeEngine  # type: ignore[attr-defined]
    module.SamplingParams = lambda **options: SimpleNamespace(**options)  # type: ignore[attr-defined]
    parameters.RequestOutputKind = SimpleNamespace(FINAL_ONLY="final")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", parameters)


@pytest.mark.usefixtures("vllm")
def test_requests_and_answers(model_folder: Path) -> None:
    config = VllmConfig(tensor_parallel=2, max_in_flight=3, options={"enforce_eager": True})
    engine = VllmEngine(model_folder, load_tokenizer(model_folder), config)
    expected = {"tensor_parallel_size": 2, "enable_prefix_caching": True, "enforce_eager": True, "model": str(model_folder)}
    assert expected.items() <= engine.engine.options.items()
    prompts = [Prompt(group_id=name, token_ids=(1, 2, index), messages=()) for index, name in enumerate("abcd")]
    sampling = Sampling(num_responses=3, temperature=0.7, top_p=0.9, max_tokens=9, stop_token_ids=(256,), seed=5)
    answers = {item.group_id: item for item in engine.generate(prompts, sampling)}
    assert [*sorted(answers)] == [*"abcd"]
    for prompt in prompts:
        seeds = prompt.response_seeds(sampling)
        responses = answers[prompt.group_id].responses
        assert tuple(response.seed for response in responses) == seeds
        assert [response.text for response in responses] == [str(seed) for seed in seeds]  # without the end token
        assert [response.finish_reason for response in responses] == ["stop" if seed % 2 else "length" for seed in seeds]
        assert [response.num_tokens for response in responses] == [len(str(seed)) + seed % 2 for seed in seeds]
    assert engine.engine.most == 3
    ids, params = engine.engine.asked[0]
    assert ids == [1, 2, 0]
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens, params.detokenize) == (0.7, 0.9, -1, 9, False)


@pytest.mark.usefixtures("vllm")
def test_a_stop_text_ends_the_text(model_folder: Path) -> None:
    engine = VllmEngine(model_folder, load_tokenizer(model_folder), VllmConfig())
    prompt = Prompt(group_id="a", token_ids=(1,), messages=(), seeds=(12345, 678902))
    [answer] = engine.generate([prompt], Sampling(num_responses=2, stop=("34", "90"), stop_token_ids=(256,)))
    assert [(response.text, response.finish_reason) for response in answer.responses] == [("12", "stop"), ("678", "stop")]
    assert engine.engine.asked[0][1].detokenize is True


@pytest.mark.usefixtures("vllm")
def test_an_option_vllm_does_not_know_is_named(model_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"the engine refuses the checkpoint or an option: .*unknown"):
        VllmEngine(model_folder, load_tokenizer(model_folder), VllmConfig(options={"unknown": 1}))


@pytest.mark.usefixtures("vllm")
def test_an_adapter_goes_with_every_request(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM keeps the base model; it reserves memory for certain ranks."""
    module = ModuleType("vllm.lora.request")
    module.LoRARequest = lambda name, number, path: (name, number, path)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.lora", ModuleType("vllm.lora"))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", module)
    (tmp_path / "adapter_config.json").write_text('{"r": 12, "target_modules": ["q_proj"]}')
    engine = VllmEngine(model_folder, load_tokenizer(model_folder), VllmConfig(), tmp_path)
    expected = {"model": str(model_folder), "enable_lora": True, "max_loras": 1, "max_lora_rank": 16}
    assert expected.items() <= engine.engine.options.items()
    prompt = Prompt(group_id="a", token_ids=(1,), messages=(), seeds=(11, 13))
    assert len(list(engine.generate([prompt], Sampling(num_responses=2, stop_token_ids=(256,))))) == 1
    assert engine.engine.adapters == {("policy", 1, str(tmp_path))}
    (tmp_path / "adapter_config.json").write_text('{"r": 1024, "target_modules": ["q_proj"]}')
    with pytest.raises(ConfigError, match="rank 1024, more than 512, which vLLM cannot load; set engine = transformers"):
        VllmEngine(model_folder, load_tokenizer(model_folder), VllmConfig(), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"r": 12, "target_modules": ["lm_head"]}')
    VllmEngine(model_folder, load_tokenizer(model_folder), VllmConfig(), tmp_path)  # qwen3
    (tmp_path / "adapter_config.json").write_text('{"r": 12, "target_modules": ["in_proj_z", "q_proj"]}')
    with pytest.raises(ConfigError, match=r"in_proj_z without one of in_proj_qkv, which vLLM cannot load; .*--merge true"):
        VllmEngine(model_folder, load_tokenizer(model_folder), VllmConfig(), tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("lora_bias", True),
        ("rank_pattern", {"q_proj": 4}),
        ("init_lora_weights", "pissa"),
    ],
)
def test_an_adapter_that_is_not_plain_lora_is_named_before_the_engine_starts(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: Any
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # not even imported
    settings = {"r": 12, "target_modules": ["q_proj"], "bias": "none", "modules_to_save": None, field: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=rf"adapter_config\.json: {field} = .*, which vLLM cannot load; merge .* in peft"):
        VllmEngine(model_folder, load_tokenizer(model_folder), VllmConfig(), tmp_path)
    endpoint = EndpointConfig(base_url="http://localhost:1/v1", model="m")
    with pytest.raises(ConfigError, match=rf"{field} = .*, which vLLM cannot load"):
        ServedAdapter(endpoint, "vllm", tmp_path)
