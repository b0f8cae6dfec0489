"""On a GPU: vLLM's offline engine draws what its settings say, also with an adapter beside the model."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from mpo_megatron.config import ConvertConfig, GenerateConfig, LoraConfig, from_dict
from mpo_megatron.families import load_family
from mpo_megatron.families.adapters import choose_adapter
from mpo_megatron.model.convert import convert
from mpo_megatron.model.convert_adapter import peft_settings
from mpo_megatron.model.weight_map import build_adapter_map
from mpo_megatron.rollout.engines import Sampling
from mpo_megatron.rollout.generate import generate
from tests.distributed.adapters import start_matrix
from tests.distribution import exact_distribution, p_value
from tests.tiny import save_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_k": 40, "top_p": 0.9}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    save_model(folder / "hf", num_hidden_layers=2, **sizes)
    # Defaults that an engine would take for settings that it is not given; with them, every sample would differ.
    settings = {"do_sample": True, "top_k": 3, "temperature": 0.1, "repetition_penalty": 3.0}
    (folder / "hf" / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 256, "pad_token_id": 257}))
    convert(ConvertConfig(input=str(folder / "hf"), output=str(folder / "megatron")))
    return folder


def draw(model: Path, output: Path, num_responses: int, **changes: Any) -> list[dict[str, Any]]:
    """The responses to one prompt."""
    prompts = output.with_suffix(".jsonl")
    prompts.write_text(json.dumps({"id": "p", "prompt": "Question"}) + "\n")
    settings = {"prompts": str(prompts), "model": str(model), "output": str(output), "num_responses": num_responses}
    settings |= {"engine": "vllm", "empty": "keep", "vllm": {"dtype": "float32", "memory_fraction": 0.3, "max_model_len": 512}}
    path = generate(from_dict(GenerateConfig, {**settings, **changes}, "generate"), Console(quiet=True))
    responses: list[dict[str, Any]] = json.loads(path.read_text())["responses"]
    return responses


def test_samples_have_the_model_s_distribution(model: Path, tmp_path: Path) -> None:
    """Whatever generation_config.json says; the seeds are fixed."""
    exact = exact_distribution(model / "hf", "Question", Sampling(num_responses=1, **SAMPLING))
    assert len(exact) > 10
    found = draw(model / "hf", tmp_path / "samples", 480, max_tokens=1, **SAMPLING)
    assert p_value(Counter(response["text"] for response in found), exact) > 1e-3


def test_an_adapter_answers_as_in_the_embedded_engine(model: Path, tmp_path: Path) -> None:
    family = load_family(model / "hf")
    adapter = choose_adapter(family, LoraConfig(rank=8))
    assert adapter is not None
    peft = tmp_path / "peft"
    peft.mkdir()
    shapes = {part.name: part.shape for item in build_adapter_map(family, adapter, family.vocab_size) for part in item.placements}
    save_file({name: start_matrix(name, shape) for name, shape in shapes.items()}, peft / "adapter_model.safetensors")
    (peft / "adapter_config.json").write_text(json.dumps(peft_settings(adapter, str(model / "hf"))))
    convert(ConvertConfig(input=str(peft), output=str(tmp_path / "adapter"), base=str(model / "megatron")))
    greedy = {"temperature": 0.0, "max_tokens": 8}
    answers = [
        draw(tmp_path / "adapter", tmp_path / engine, 1, engine=engine, **greedy)[0]["token_ids"]
        for engine in ("vllm", "transformers")
    ]
    without = draw(model / "hf", tmp_path / "base", 1, **greedy)[0]["token_ids"]
    torch.cuda.empty_cache()
    assert answers[0] == answers[1] != without
