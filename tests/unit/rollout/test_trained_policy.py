"""What the engine that answers cannot load is refused before the training that would write it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import LlamaConfig, Qwen3_5MoeConfig, Qwen3_5MoeTextConfig

from mpo_megatron.align.align import align
from mpo_megatron.align.plan import build_stages
from mpo_megatron.config import AlignConfig, ConfigError, GenerateConfig, IterateConfig, LoraConfig
from mpo_megatron.families import load_family, read_family
from mpo_megatron.families.adapters import VLLM_RANKS, Adapter, vllm_refuses
from mpo_megatron.hf.adapter import AdapterRecord
from mpo_megatron.rollout import validation
from mpo_megatron.rollout.rounds import build_plan
from mpo_megatron.rollout.trained_policy import check_trained_policy
from tests.tiny import save_model

QUIET = Console(quiet=True)
VLLM, EMBEDDED = {"engine": "vllm"}, {"engine": "transformers"}


@pytest.fixture(autouse=True)
def _vllm_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "require_package", lambda *_: None)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a type whose output layer takes no adapter in vLLM."""
    return save_model(tmp_path_factory.mktemp("qwen2") / "hf", model_type="qwen2", num_hidden_layers=1, hidden_size=32)


def write_lines(path: Path, **fields: Any) -> str:
    path.write_text("".join(json.dumps({"prompt": f"Question {index}?", **fields}) + "\n" for index in range(20)))
    return str(path)


def rounds_options(model: Path, folder: Path) -> dict[str, Any]:
    score = {"scorers": {"short": {"kind": "regex", "pattern": "a"}}}
    prompts = write_lines(folder / "prompts.jsonl")
    return {"output": str(folder / "out"), "model": str(model), "prompts": prompts, "held_out": 4, "rounds": 2, "score": score}


def plan_rounds(model: Path, folder: Path, sections: dict[str, Any]) -> None:
    build_plan(IterateConfig(**rounds_options(model, folder), **sections))


def plan_aligned_rounds(model: Path, folder: Path, sections: dict[str, Any]) -> None:
    align(AlignConfig(**rounds_options(model, folder), **sections, plan=True), QUIET)


def plan_aligning(model: Path, folder: Path, sections: dict[str, Any]) -> None:
    groups = write_lines(folder / "groups.jsonl", responses=[{"text": "yes", "reward": 1}, {"text": "no", "reward": 0}])
    build_stages(AlignConfig(output=str(folder / "out"), model=str(model), data=[groups], **sections), model)


COMMANDS = {"iterate": plan_rounds, "align with prompts": plan_aligned_rounds, "align": plan_aligning}
FOR_QWEN2: dict[str, tuple[dict[str, Any], str | None]] = {
    "rank": ({"rank": 1024}, r"train\.lora\.rank = 1024 with generate\.engine = vllm: an adapter of rank 1024, more than 512"),
    "output layer": (
        {"rank": 4, "target_modules": ["all-linear", "lm_head"]},
        r"train\.lora\.target_modules = .*lm_head.* with generate\.engine = vllm: an adapter of lm_head with model type qwen2, "
        r"which vLLM cannot load; set generate\.engine = transformers, or change train\.lora\.target_modules",
    ),
    "no such layer": ({"rank": 4, "target_modules": "wq"}, r"lora\.target_modules names wq, which the model lacks"),
    "allowed": ({"rank": 512}, None),
    "rsLoRA": ({"rank": 4, "rslora": True}, None),
    "whole model": ({}, None),
}


@pytest.mark.parametrize("case", FOR_QWEN2)
@pytest.mark.parametrize("plan", COMMANDS.values(), ids=COMMANDS)
def test_it_is_refused_with_the_configuration(
    plan: Callable[[Path, Path, dict[str, Any]], None], case: str, qwen2: Path, tmp_path: Path
) -> None:
    lora, message = FOR_QWEN2[case]
    sections = {"generate": VLLM, "train": {"lora": lora}}
    if message is None:
        plan(qwen2, tmp_path, sections)
        return
    with pytest.raises(ConfigError, match=message):
        plan(qwen2, tmp_path, sections)
    assert not (tmp_path / "out").exists()
    if case != "no such layer":
        plan(qwen2, tmp_path, sections | {"generate": EMBEDDED})


@pytest.mark.parametrize("plan", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize(("rank", "loads"), [(0, "load_weights"), (2, "load_adapter")])
def test_a_server_must_load_what_is_trained(
    plan: Callable[[Path, Path, dict[str, Any]], None], rank: int, loads: str, qwen2: Path, tmp_path: Path
) -> None:
    """Otherwise it would answer with the same weights before and after."""
    server = {"engine": "openai", "endpoint": {"base_url": "http://localhost:1/v1", "model": "m"}}
    train = {"lora": {"rank": rank}}
    for options in ({}, {"load_weights": True, "load_adapter": True} | {loads: False}):
        with pytest.raises(
            ConfigError, match=rf"generate\.engine = openai; a server keeps its weights.*generate\.{loads} = true"
        ):
            plan(qwen2, tmp_path, {"generate": server | options, "train": train})
    assert not (tmp_path / "out").exists()
    plan(qwen2, tmp_path, {"generate": server | {loads: True}, "train": train})


def test_an_adapter_that_training_continues_is_checked_too(qwen2: Path, tmp_path: Path) -> None:
    generate = GenerateConfig(prompts="p", model="m", output="o", engine="vllm")
    family, lora = load_family(qwen2), LoraConfig()

    def save(*targets: str) -> None:
        adapter = Adapter(rank=2, alpha=4.0, rslora=False, target_modules=targets)
        (tmp_path / "adapter.json").write_bytes(AdapterRecord(adapter=adapter, base="b", base_digest="0").to_bytes())

    save("q_proj")
    check_trained_policy(generate, lora, family, tmp_path)
    save("q_proj", "lm_head")
    check_trained_policy(replace(generate, engine="transformers"), lora, family, tmp_path)
    with pytest.raises(ConfigError, match=rf"model = {tmp_path} with .*lm_head.*, or start from another model"):
        check_trained_policy(generate, lora, family, tmp_path)


def test_what_vllm_cannot_load(qwen2: Path) -> None:
    """The facts of vllm/config/lora.py, vllm/lora and the model classes of vLLM 0.33."""
    family = load_family(qwen2)
    assert vllm_refuses(family, VLLM_RANKS[-1], ["q_proj"]) is None
    assert vllm_refuses(family, VLLM_RANKS[-1] + 1, ["q_proj"]) == ("rank", "an adapter of rank 513, more than 512")
    assert vllm_refuses(family, 1, ["lm_head"]) == ("target_modules", "an adapter of lm_head with model type qwen2")
    wide = read_family(LlamaConfig(vocab_size=262_144, architectures=["LlamaForCausalLM"]))
    assert vllm_refuses(wide, 1, ["q_proj"]) is None
    refusal = vllm_refuses(wide, 1, ["q_proj", "lm_head"])
    assert refusal is not None
    assert refusal.reason == "an adapter of lm_head with 262144 rows, more than 258048"
    text = read_family(Qwen3_5MoeTextConfig())
    whole = read_family(Qwen3_5MoeConfig())
    assert vllm_refuses(text, 1, ["gate_proj"]) is None
    assert vllm_refuses(whole, 1, ["q_proj", "lm_head"]) is None
    assert vllm_refuses(whole, 1, ["q_proj", "down_proj"]) == (
        "target_modules",
        "adapters of single experts with model type qwen3_5_moe",
    )
    assert vllm_refuses(text, 1, ["in_proj_z"]) == ("target_modules", "an adapter of in_proj_z without one of in_proj_qkv")
