"""Endpoints that are down, slow, busy, or return garbage: reported, counted, retried, and nothing is lost."""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import json
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from rich.console import Console

from mpo_megatron.config import ConfigError, EndpointConfig, GenerateConfig
from mpo_megatron.data.chat import Chat
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.files import DataError
from mpo_megatron.rollout.client import Client
from mpo_megatron.rollout.engines import Generation, Prompt, Response, Sampling
from mpo_megatron.rollout.engines.endpoint import EndpointEngine
from mpo_megatron.rollout.engines.seeds import WATCHED_PROMPTS, SeedWatch
from mpo_megatron.rollout.engines.servers import list_models
from mpo_megatron.rollout.generate import generate
from mpo_megatron.rollout.http_responses import retry_after
from mpo_megatron.rollout.proxies import describe_proxy, find_proxy
from mpo_megatron.rollout.records import read_lines
from tests.json_lines import write_lines
from tests.unit.rollout.conftest import Server, completion

PROMPTS = [Prompt(group_id=name, token_ids=(1, 2, 3), messages=({"role": "user", "content": name},)) for name in "abc"]
SAMPLING = Sampling(num_responses=2, max_tokens=5, top_k=7, stop=("x",), stop_token_ids=(256,))


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses before retries, recorded but skipped; the client's own clock advances."""
    noted: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        if seconds != 0.05:  # the interval at which the client checks for stop requests
            noted.append(seconds)
        await sleep(0.001)

    monkeypatch.setattr("mpo_megatron.rollout.client.asyncio.sleep", note)
    return noted


def ask(server_url: str, model: Path, **changes: Any) -> dict[str, Generation]:
    config = EndpointConfig(**{"base_url": server_url, "model": "m", "retries": 2, "concurrency": 4, "timeout": 20.0} | changes)
    engine = EndpointEngine(config, Chat(load_tokenizer(model)))
    return {item.group_id: item for item in engine.generate(PROMPTS, SAMPLING)}


def test_what_is_asked(server: Server, model_folder: Path) -> None:
    answers = ask(server.url, model_folder)
    assert {key: [response.text for response in item.responses] for key, item in answers.items()} == dict.fromkeys(
        "abc", ["fine"] * 2
    )
    asked = sorted(server.requests, key=lambda body: body["seed"])
    assert [body["seed"] for body in asked] == sorted(seed for prompt in PROMPTS for seed in prompt.response_seeds(SAMPLING))
    common = {"model": "m", "temperature": 1.0, "top_p": 1.0, "max_tokens": 5, "stop": ["x"], "top_k": 7}
    assert all(
        {key: value for key, value in body.items() if key != "seed"} == common | {"prompt": [1, 2, 3], "stop_token_ids": [256]}
        for body in asked
    )
    assert answers["a"].responses[0].num_tokens == 3
    assert answers["a"].responses[1].seed == PROMPTS[0].response_seeds(SAMPLING)[1]


@pytest.mark.parametrize(
    "pages, kind, sent",
    [
        (
            {"/v1/models": {"data": [{"id": "m", "owned_by": "vllm"}]}},
            "vllm",
            {"top_k": 7, "min_p": 0.0, "repetition_penalty": 1.0},
        ),
        ({"/v1/models": {"data": [{"id": "m", "owned_by": "sglang"}]}}, "sglang", {"top_k": 7, "return_token_ids": True}),
        ({"/v1/models": {"data": [{"id": "m", "owned_by": "llamacpp"}]}}, "llamacpp", {"top_k": 7, "repeat_penalty": 1.0}),
        ({"/openapi.json": {"paths": {"/load_model": {}}}}, "transformers", {"max_tokens": 5}),
        ({"/v1/models": {"data": "none"}, "/openapi.json": [1]}, "openai", {"top_k": 7}),
        ({"/v1/models": {"data": [{"owned_by": {"a": 1}}, {"owned_by": ["vllm"]}, 7, {}]}}, "openai", {"top_k": 7}),
        ({}, "openai", {"top_k": 7}),
    ],
)
def test_servers_are_sent_all_they_know(
    server: Server, model_folder: Path, pages: dict[str, Any], kind: str, sent: dict[str, Any]
) -> None:
    server.pages = pages
    engine = EndpointEngine(EndpointConfig(base_url=server.url, model="m"), Chat(load_tokenizer(model_folder)))
    assert engine.kind == kind
    assert engine.uncontrolled == (("top_k", "min_p", "repetition_penalty") if kind == "openai" else ())
    list(engine.generate(PROMPTS[:1], SAMPLING))
    common = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 5, "stop": ["x"]}
    assert all((common | sent).items() <= body.items() for body in server.requests)
    if kind == "transformers":
        settings = json.loads(server.requests[0]["generation_config"])
        limits = {"max_new_tokens": 5, "eos_token_id": [256], "pad_token_id": 256}
        assert settings == {"do_sample": True, "top_k": 7, "repetition_penalty": 1.0, **limits}


def test_a_server_that_is_not_there_is_named(model_folder: Path, pauses: list[float]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(DataError, match="cannot be reached: no connection"):
        EndpointEngine(EndpointConfig(base_url=url, model="m", retries=1), Chat(load_tokenizer(model_folder)))
    assert len(pauses) == 1


def test_busy_servers_say_when(server: Server, model_folder: Path, pauses: list[float]) -> None:
    refused: set[int] = set()

    def answer(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        if body["seed"] in refused:
            return completion("fine")
        refused.add(body["seed"])
        return 429, {"retry-after": "7.5"}, b"{}"

    server.answer = answer
    assert all(item.error is None for item in ask(server.url, model_folder).values())
    assert pauses == [7.5] * 6
    assert len(server.requests) == 12


def test_pauses_grow_and_end(server: Server, model_folder: Path, pauses: list[float]) -> None:
    server.answer = lambda path, body: (503, {}, b"busy")
    answers = ask(server.url, model_folder, concurrency=1, retries=4, max_wait=3.0)
    assert all(item.error.startswith("503") and not item.responses for item in answers.values())
    assert len(pauses) == 6 * 4
    for pause, longest in zip(pauses, [0.5, 1.0, 2.0, 3.0] * 6, strict=True):
        assert 0.75 * longest <= pause <= longest


def test_retry_after_forms() -> None:
    assert retry_after("2", 0.5, 60) == 2
    assert retry_after("120", 0.5, 60) == 60
    assert retry_after("-3", 0.5, 60) == 0
    assert retry_after("soon", 0.5, 60) == 0.5
    assert retry_after(None, 0.5, 60) == 0.5
    assert 20 < retry_after(email.utils.formatdate(time.time() + 30), 0.5, 60) <= 31


def test_a_slow_answer_is_lost(server: Server, model_folder: Path, pauses: list[float]) -> None:
    wait = threading.Event()

    def answer(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        if body["seed"] == PROMPTS[2].response_seeds(SAMPLING)[1]:
            wait.wait(30)
        return completion("fine")

    server.answer = answer
    answers = ask(server.url, model_folder, timeout=0.5, retries=1)
    wait.set()
    assert answers["c"].error == "no answer within 0.5 s"
    assert answers["a"].error is None


def test_a_wrong_key_stops_at_once_and_is_not_shown(server: Server, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    server.answer = lambda path, body: (401, {}, json.dumps({"error": {"message": "bad key sk-very-secret"}}).encode())
    with pytest.raises(ConfigError, match="api_key_env = MY_KEY; the key in this variable is refused") as caught:
        ask(server.url, model_folder, api_key_env="MY_KEY", concurrency=1)
    assert "sk-very-secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert server.keys == ["Bearer sk-very-secret"]


def test_an_unknown_model_stops_at_once(server: Server, model_folder: Path) -> None:
    server.answer = lambda path, body: (404, {}, b'{"error": "no such model"}')
    with pytest.raises(ConfigError, match="model = m, api = tokens; the server does not know one of these"):
        ask(server.url, model_folder, concurrency=1)
    assert len(server.requests) == 1


def test_a_server_that_goes_down_loses_nothing(
    server: Server, tmp_path: Path, model_folder: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the way up, then no connection: the command stops early; when the server is back, it requests only the rest."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    path = write_lines(tmp_path / "p.jsonl", [{"id": f"p{index}", "prompt": f"Question {index}"} for index in range(40)])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        down = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    config = GenerateConfig(
        prompts=str(path),
        model=str(model_folder),
        output=str(tmp_path / "out"),
        engine="openai",
        num_responses=2,
        endpoint=EndpointConfig(base_url=server.url, model="m", retries=1, concurrency=2),
    )
    served = 0

    def answer(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        nonlocal served
        served += 1
        return completion(f"answer {body['seed']}") if served <= 21 else (500, {}, b"down")

    server.answer = answer
    with pytest.raises(DataError, match=r"the last 8 questions got no answer, each tried 2 times; the last: 500"):
        generate(config, Console(quiet=True))
    done = {record["group_id"] for record in read_lines(tmp_path / "out" / "samples.jsonl")}
    assert len(done) == 10
    away = dataclasses.replace(config, endpoint=dataclasses.replace(config.endpoint, base_url=down))
    with pytest.raises(DataError, match="no connection"):
        generate(away, Console(quiet=True))
    server.requests.clear()
    server.answer = lambda path, body: completion(f"answer {body['seed']}")
    records = list(read_lines(generate(config, Console(quiet=True))))
    assert len(records) == 40
    assert len(server.requests) in (59, 60)  # what arrived of the group under way is kept if its failure was recorded
    assert all(response["text"] == f"answer {response['seed']}" for record in records for response in record["responses"])
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert b"sk-very-secret" not in written


def test_certificates_are_read_once_and_checked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[ssl.SSLContext] = []

    class Noted(openai.DefaultAsyncHttpxClient):
        def __init__(self, *, verify: ssl.SSLContext, **options: Any) -> None:
            given.append(verify)
            super().__init__(verify=verify, **options)

    monkeypatch.setattr(openai, "DefaultAsyncHttpxClient", Noted)
    client = Client(EndpointConfig(base_url=server.url, model="m", timeout=20.0))
    for _ in range(2):
        assert client.ask_one(None, lambda connection, _: list_models(connection)).failure is None
    first, second = given
    assert first is second
    assert (first.verify_mode, first.check_hostname) == (ssl.CERT_REQUIRED, True)


PROXY = "http://user:secret@proxy.example:3128"


@pytest.mark.parametrize(
    ("url", "variables", "proxy"),
    [
        ("http://localhost:8000/v1", {"http_proxy": PROXY, "all_proxy": PROXY}, None),
        ("http://127.0.0.1:8000/v1", {"http_proxy": PROXY}, None),
        ("http://[::1]:8000/v1", {"http_proxy": PROXY}, None),
        ("http://node7:8000/v1", {"http_proxy": PROXY}, PROXY),
        ("http://node7:8000/v1", {"http_proxy": PROXY, "no_proxy": "node7"}, None),
        ("https://api.example/v1", {"http_proxy": PROXY}, None),
        ("https://api.example/v1", {"https_proxy": "proxy.example:3128"}, "http://proxy.example:3128"),
        ("https://api.example/v1", {"all_proxy": PROXY}, PROXY),
    ],
)
def test_proxies_of_the_environment(
    url: str, variables: dict[str, str], proxy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_proxy(url) == proxy
    assert "secret" not in describe_proxy(PROXY)


def test_a_proxy_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:9")
    client = Client(EndpointConfig(base_url="http://node7.invalid/v1", model="m", retries=0, timeout=20.0))
    failure = client.ask_one(None, lambda connection, _: list_models(connection)).failure
    assert failure is not None
    assert failure.reason.startswith("no connection (through the proxy http://127.0.0.1:9): ")
    monkeypatch.setenv("http_proxy", "gopher://user:secret@127.0.0.1:9")
    client = Client(EndpointConfig(base_url="http://node7.invalid/v1", model="m", retries=0))
    with pytest.raises(ConfigError, match=r"the proxy gopher://127\.0\.0\.1:9 of the environment cannot be used"):
        client.ask_one(None, lambda connection, _: list_models(connection))


@pytest.mark.parametrize("key", ["sk-1\n", "sk 1", "sk-\u00e9"])
def test_a_key_that_no_header_holds_is_refused(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY; the key in this variable holds a space, a line break") as caught:
        Client(EndpointConfig(base_url="http://localhost:1/v1", model="m"))
    assert key not in str(caught.value)


@pytest.mark.parametrize("url", ["http://[::1/v1", "http://host:99999/v1", "http://host/v1?key=secret", "http://ho st/v1"])
def test_addresses_that_no_request_can_have(url: str) -> None:
    with pytest.raises(ConfigError, match=r"base_url = .*; it must be http://host:port/v1") as caught:
        EndpointConfig(base_url=url, model="m")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("texts", "warned"), [(("a", "a"), True), (("a", "b"), False)])
def test_a_server_that_ignores_seeds_is_noticed(texts: tuple[str, str], warned: bool, capsys: pytest.CaptureFixture[str]) -> None:
    watch = SeedWatch("http://host/v1")
    responses = [Response(text=text, finish_reason="stop", num_tokens=9, seed=seed) for seed, text in enumerate(texts)]
    for _ in range(2 * WATCHED_PROMPTS):
        watch.watch(responses, Sampling(num_responses=2, max_tokens=16))
        watch.watch(responses, Sampling(num_responses=2, max_tokens=16, temperature=0.0))
    assert capsys.readouterr().err.count("equal responses to different seeds") == warned
