"""Adapters on servers that load them at run time: `mpo generate` passes a folder's path, and requests it by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM

from mpo_megatron.config import ConfigError, EndpointConfig, GenerateConfig, VllmConfig
from mpo_megatron.files import DataError
from mpo_megatron.hf.fingerprint import model_digest
from mpo_megatron.rollout.engines.served_adapter import adapter_name
from mpo_megatron.rollout.generate import generate
from tests.adapter_server import BASE, AdapterServer
from tests.distributed.adapters import start_matrix
from tests.json_lines import write_lines


@pytest.fixture(scope="module")
def adapter(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEFT's folder of an adapter that changes the answers, with the tokenizer beside it."""
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder),
        LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"]),
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(start_matrix(name, tuple(weight.shape)))
    model.save_pretrained(folder)
    for file in model_folder.iterdir():
        if file.name not in ("config.json", "model.safetensors", "generation_config.json"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(params=["vllm", "sglang"])
def server(request: pytest.FixtureRequest, model_folder: Path) -> Iterator[AdapterServer]:
    running = AdapterServer(model_folder, request.param)
    yield running
    running.close()


@pytest.fixture
def config(tmp_path: Path, adapter: Path, server: AdapterServer) -> GenerateConfig:
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"id": f"p{index}", "prompt": f"Question {index}"} for index in range(6)])
    return GenerateConfig(
        prompts=str(prompts),
        model=str(adapter),
        output=str(tmp_path / "out"),
        engine="openai",
        num_responses=2,
        max_tokens=8,
        empty="keep",
        duplicates="keep",
        load_adapter=True,
        endpoint=EndpointConfig(base_url=server.url, model=BASE, retries=0, concurrency=4),
    )


def run(config: GenerateConfig, **changes: Any) -> list[Any]:
    samples = generate(dataclasses.replace(config, **changes), Console(quiet=True))
    records = [json.loads(line) for line in samples.read_text().splitlines()]
    return [[response["token_ids"] for response in record["responses"]] for record in records if "responses" in record]


def test_the_server_answers_with_the_adapter(
    config: GenerateConfig, server: AdapterServer, tmp_path: Path, adapter: Path
) -> None:
    """Equals the embedded engine; only a name and a path are sent, and the adapter is unloaded afterwards."""
    served = run(config)
    name = adapter_name(adapter)
    assert server.actions == ["load_lora_adapter", "unload_lora_adapter"]
    assert server.asked[0][1] == {"lora_name": name, "lora_path": str(adapter)}
    fields = {body.get("lora_path", body["model"]) for path, body in server.asked if path.endswith("completions")}
    assert fields == {name}
    assert list(server.engines) == [BASE]
    here = {"engine": "transformers", "endpoint": EndpointConfig()}
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert served == run(config, **here, load_adapter=False, output=str(tmp_path / "embedded"))
    assert served != run(config, **here, load_adapter=False, model=base, output=str(tmp_path / "base"))


def test_an_adapter_that_is_there_is_shared_and_stays(config: GenerateConfig, server: AdapterServer, tmp_path: Path) -> None:
    """Another program that loaded it may still use it; shards of one command also keep it for each other."""
    whole = run(config)
    parts = [run(config, shard=f"{index}/2", output=str(tmp_path / "parts")) for index in range(2)]
    assert parts[1] == whole  # the last one joins all
    assert server.actions[2:] == ["load_lora_adapter"] * 2
    assert run(config, output=str(tmp_path / "again")) == whole
    assert "unload_lora_adapter" not in server.actions[2:]


def test_another_adapter_is_another_name(adapter: Path, config: GenerateConfig, tmp_path: Path) -> None:
    """Identified by its matrices and configuration: the command also refuses to continue samples of another adapter."""
    run(config)
    other = tmp_path / "other"
    other.mkdir()
    for file in adapter.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    assert (adapter_name(other), model_digest(other)) == (adapter_name(adapter), model_digest(adapter))
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 1}))
    assert adapter_name(other) != adapter_name(adapter)
    with pytest.raises(ConfigError, match=r"was made with another model"):
        run(config, model=str(other))


def test_servers_that_do_not_load_it_are_named(config: GenerateConfig, server: AdapterServer) -> None:
    server.loads_adapters = False
    flag = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve" if server.kind == "vllm" else "sglang.launch_server"
    with pytest.raises(ConfigError, match=rf"does not load the adapter .*\(404: .*Not Found.*\); .*{flag} … .*--max-lora-rank 4"):
        run(config)
    server.loads_adapters = True
    endpoint = dataclasses.replace(config.endpoint, model="bse")
    with pytest.raises(ConfigError, match=r"endpoint\.model = bse; http.* serves base; .*name the adapter's base model"):
        run(config, endpoint=endpoint, output=f"{config.output}-2")
    with pytest.raises(ConfigError, match=r"of kind llamacpp; only vllm and sglang load adapters; .*--merge true"):
        run(config, endpoint=dataclasses.replace(config.endpoint, server="llamacpp", api="text"), output=f"{config.output}-3")
    server.answer = lambda path, body: (500, "out of memory")  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"load_lora_adapter: 500: .*out of memory; see the server's log"):
        run(config)


def test_an_adapter_that_the_server_keeps_is_told(
    config: GenerateConfig, server: AdapterServer, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = server.answer

    def keep(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return (400, {"error": {"message": "busy"}}) if path.endswith("unload_lora_adapter") else answer(path, body)

    server.answer = keep  # type: ignore[method-assign]
    run(config)
    assert "still holds the adapter mpo-" in (said := capsys.readouterr().err)
    assert "busy" in said


def test_options_that_do_not_fit(config: GenerateConfig, model_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"load_adapter = true applies to a server"):
        run(config, engine="transformers", endpoint=EndpointConfig())
    with pytest.raises(ConfigError, match=r"vllm\.\* is set, but engine = openai does not read it; set engine = vllm"):
        run(config, vllm=VllmConfig(tensor_parallel=2))
    with pytest.raises(ConfigError, match=r"load_adapter = true, but model = .* is no adapter"):
        run(config, model=str(model_folder))
