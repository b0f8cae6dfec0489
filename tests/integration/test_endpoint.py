"""A real OpenAI-compatible server, `transformers serve`, answers prompts and judges answers."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mpo_megatron.config import EndpointConfig, GenerateConfig, ScoreConfig
from mpo_megatron.files import DataError
from mpo_megatron.rollout.engines import Sampling
from mpo_megatron.rollout.generate import generate
from mpo_megatron.rollout.records import read_lines
from mpo_megatron.rollout.score import score
from tests.distributed.launch import free_port
from tests.distribution import exact_distribution, p_value
from tests.tiny import save_model, save_tokenizer
from tests.waiting import TIMEOUT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("openai", "fastapi", "uvicorn", "accelerate")),
        reason="needs what `transformers serve` is made of",
    ),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    save_model(folder, vocab_size=save_tokenizer(folder), num_hidden_layers=2, hidden_size=32)
    # The server's defaults for parameters missing in a request; with them, every sample below would differ.
    settings = {"do_sample": False, "top_k": 3, "temperature": 0.1, "repetition_penalty": 3.0}
    settings |= {"eos_token_id": 256, "pad_token_id": 257}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    program = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", program, "serve", str(model), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        deadline = time.monotonic() + TIMEOUT
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def config(tmp_path: Path, model: Path, url: str) -> GenerateConfig:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"id": f"p{index}", "prompt": f"Question {index}"}) + "\n" for index in range(6)))
    return GenerateConfig(
        prompts=str(path),
        model=str(model),
        output=str(tmp_path / "out"),
        engine="openai",
        num_responses=2,
        max_tokens=12,
        temperature=0.0,
        empty="keep",
        endpoint=EndpointConfig(base_url=url, model=str(model), api="text", concurrency=3, retries=1),
    )


def texts(path: Path) -> dict[str, list[str]]:
    return {record["group_id"]: [response["text"] for response in record["responses"]] for record in read_lines(path)}


@pytest.mark.parametrize("api", ["text", "chat"])
def test_the_server_and_the_embedded_engine_agree(config: GenerateConfig, api: str) -> None:
    """Greedy answers to the same tokens: the rendered prompt, or the messages through the server's own template."""
    endpoint = dataclasses.replace(config.endpoint, api=api)
    served = texts(generate(dataclasses.replace(config, endpoint=endpoint), Console(quiet=True)))
    embedded = dataclasses.replace(config, engine="transformers", endpoint=EndpointConfig(), output=f"{config.output}-here")
    assert served == texts(generate(embedded, Console(quiet=True)))
    assert len({answers[0] for answers in served.values()}) > 1


def test_samples_differ(config: GenerateConfig) -> None:
    served = texts(generate(dataclasses.replace(config, temperature=1.0), Console(quiet=True)))
    assert len({text for answers in served.values() for text in answers}) > 6


def test_engines_draw_from_the_same_distribution(config: GenerateConfig, model: Path, tmp_path: Path) -> None:
    """Both engines against the exact probabilities, regardless of the model's generation_config.json; the seeds are fixed."""
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "p", "prompt": "Question"}) + "\n")
    sampling = {"temperature": 0.7, "top_k": 40, "top_p": 0.9}
    exact = exact_distribution(model, "Question", Sampling(num_responses=1, **sampling))
    assert len(exact) > 10
    config = dataclasses.replace(config, num_responses=240, max_tokens=1, **sampling)

    def draw(name: str, **changes: Any) -> Counter[str]:
        output = tmp_path / name
        generate(dataclasses.replace(config, output=str(output), **changes), Console(quiet=True))
        assert json.loads((output / "generate.json").read_text())["uncontrolled"] == (
            ["min_p", "repetition_penalty", "top_k"] if name == "unknown" else []
        )
        return Counter(texts(output / "samples.jsonl")["p"])

    served = p_value(draw("served"), exact)
    embedded = p_value(draw("embedded", engine="transformers", endpoint=EndpointConfig()), exact)
    unknown = dataclasses.replace(config.endpoint, server="openai")
    left_to_the_server = p_value(draw("unknown", endpoint=unknown, top_k=0), exact)
    assert min(served, embedded) > 1e-3, (served, embedded)
    assert left_to_the_server < 1e-9


def test_what_the_server_does_not_take_is_named(config: GenerateConfig) -> None:
    endpoint = dataclasses.replace(config.endpoint, api="tokens")
    with pytest.raises(DataError, match=r"refuses all of the first 8 questions; .*prompt must be a string.*Set endpoint\.api"):
        generate(dataclasses.replace(config, endpoint=endpoint), Console(quiet=True))


def test_a_judge_of_random_weights_is_garbage_and_counted(config: GenerateConfig, tmp_path: Path) -> None:
    samples = generate(config, Console(quiet=True))
    (tmp_path / "template.txt").write_text("Rate this answer to {{ prompt }}: {{ response }}")
    endpoint = {"base_url": config.endpoint.base_url, "model": config.endpoint.model, "retries": 0}
    judge = {
        "kind": "judge",
        "endpoint": endpoint,
        "template": str(tmp_path / "template.txt"),
        "max_tokens": 4,
        "garbage_retries": 1,
    }
    scoring = ScoreConfig(input=str(samples), output=str(tmp_path / "scored"), scorers={"judge": judge})
    with pytest.raises(
        DataError, match=r"scores are missing: 6 groups from judge; the first: group p0 from judge \(judge: cut\)"
    ):
        score(scoring, Console(quiet=True))
