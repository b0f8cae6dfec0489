"""Reward models on a server: requests to vLLM and SGLang, their replies, and the cost of one bad answer."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron.config import ConfigError, ScoreConfig
from mpo_megatron.config.score import build_scorer_config
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.files import DataError
from mpo_megatron.rollout import client as client_module
from mpo_megatron.rollout import http_responses
from mpo_megatron.rollout.records import read_lines
from mpo_megatron.rollout.score import score
from mpo_megatron.rollout.scorers import Scorer, build_scorer
from mpo_megatron.rollout.scorers.served import read_number
from tests.json_lines import write_lines
from tests.unit.rollout.conftest import Server, group_line
from tests.waiting import TIMEOUT

GROUP = group_line("a", "one", "two!", "three", "four")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(http_responses, "MAX_BODY_BYTES", 2**16)


def build(server: Server, model_folder: Path, **options: Any) -> Scorer:
    endpoint = {"base_url": server.url, "model": "rm", "server": "vllm", "retries": 1, "timeout": 20.0, "concurrency": 4}
    options = {"kind": "served_reward_model", "endpoint": endpoint | options.pop("endpoint", {}), **options}
    if options.get("api") != "score":
        options["tokenizer"] = str(model_folder)
    return build_scorer("it", build_scorer_config("it", options))


def reply(value: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {}, value if isinstance(value, bytes) else json.dumps(value).encode()


def sum_of(body: dict[str, Any]) -> float:
    """A score that only the right tokens produce."""
    ids = body.get("input") or body.get("input_ids") or [*(body["text_1"] + "|" + body["text_2"]).encode()]
    return sum(ids) / 100


@pytest.mark.parametrize(
    ("kind", "api", "path", "shape"),
    [
        ("vllm", "classify", "/classify", lambda x: {"data": [{"index": 0, "label": None, "probs": [x], "num_classes": 1}]}),
        ("vllm", "pooling", "/pooling", lambda x: {"data": [{"index": 0, "object": "pooling", "data": [x]}]}),
        ("vllm", "pooling", "/pooling", lambda x: {"data": [{"index": 0, "object": "pooling", "data": [[x]]}]}),
        ("vllm", "score", "/score", lambda x: {"data": [{"index": 0, "object": "score", "score": x}]}),
        ("sglang", "classify", "/classify", lambda x: [{"embedding": [x], "meta_info": {"id": "7"}}]),
        ("sglang", "classify", "/classify", lambda x: {"embedding": [x], "meta_info": {"id": "7"}}),
    ],
)
def test_each_server_and_endpoint(server: Server, model_folder: Path, kind: str, api: str, path: str, shape: Any) -> None:
    paths = []

    def answer(where: str, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        paths.append(where)
        return reply(shape(sum_of(body)))

    server.answer = answer
    scorer = build(server, model_folder, api=api, endpoint={"server": kind})
    found = scorer.score([GROUP, group_line("b", "ä🙂")])
    tokenizer = load_tokenizer(model_folder)
    for group, values in zip((GROUP, group_line("b", "ä🙂")), found, strict=True):
        for response, value in zip(group["responses"], values, strict=True):
            if api == "score":
                ids = [*f"{group['prompt'][0]['content']}|{response['text']}".encode()]
            else:
                messages = [*group["prompt"], {"role": "assistant", "content": response["text"]}]
                ids = tokenizer.encode(tokenizer.render(messages, add_generation_prompt=False, variables={}))
            assert value == pytest.approx(sum(ids) / 100)
    assert set(paths) == {path}
    assert all(body["model"] == "rm" and body.get("use_activation", False) is False for body in server.requests)
    assert all("use_activation" in body for body in server.requests) == (kind == "vllm")  # else vLLM gives the sigmoid
    assert scorer.report() is not None


BAD = {
    "not JSON": b"no",
    "half of it": b'{"data": [{"probs": [1.0',
    "null": None,
    "empty": b"",
    "no data": {"data": []},
    "two answers": {"data": [{"probs": [1.0]}, {"probs": [2.0]}]},
    "two classes": {"data": [{"probs": [0.2, 0.8]}]},
    "no numbers": {"data": [{"probs": []}]},
    "text": {"data": [{"probs": ["0.5"]}]},
    "truth": {"data": [{"probs": [True]}]},
    "base64": {"data": [{"probs": "AACAPw=="}]},
    "NaN": b'{"data": [{"probs": [NaN]}]}',
    "infinity": b'{"data": [{"probs": [1e999]}]}',
    "huge": b'{"data": [{"probs": [1' + b"0" * 400 + b"]}]}",
    "very huge": b'{"data": [{"probs": [1' + b"0" * 5000 + b"]}]}",
    "deep": b"[" * 30000 + b"]" * 30000,
    "too large": b'{"data": [{"probs": [1.0]}], "x": "' + b"x" * 2**17 + b'"}',
    "an error with 200": {"object": "error", "message": "CUDA out of memory", "code": 500},
}


@pytest.mark.parametrize("name", BAD)
def test_one_bad_answer_costs_one_score(server: Server, model_folder: Path, name: str) -> None:
    tokenizer = load_tokenizer(model_folder)

    def answer(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        return reply(BAD[name] if "two!" in tokenizer.decode(body["input"]) else {"data": [{"probs": [0.5]}]})

    server.answer = answer
    scorer = build(server, model_folder)
    assert scorer.score([GROUP]) == [[0.5, None, 0.5, 0.5]]
    assert sum(scorer.notes["a"].values()) == 1


@pytest.mark.parametrize(("status", "label"), [(400, "failed: 400"), (500, "failed: 500"), (429, "failed: 429")])
def test_a_question_that_is_refused_or_lost_costs_one_score(server: Server, model_folder: Path, status: int, label: str) -> None:
    tokenizer = load_tokenizer(model_folder)

    def answer(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        bad = "two!" in tokenizer.decode(body["input"])
        return (status, {}, b'{"message": "no"}') if bad else reply({"data": [{"probs": [0.5]}]})

    server.answer = answer
    scorer = build(server, model_folder)
    assert scorer.score([GROUP]) == [[0.5, None, 0.5, 0.5]]
    assert next(iter(scorer.notes["a"])).startswith(label)
    assert len(server.requests) == 4 + (status != 400)


def test_a_server_that_hangs_is_not_waited_for(server: Server, model_folder: Path) -> None:
    def answer(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        time.sleep(2.0 if len(server.requests) == 1 else 0.0)
        return reply({"data": [{"probs": [0.5]}]})

    server.answer = answer
    started = time.monotonic()
    assert build(server, model_folder, endpoint={"timeout": 0.5}).score([group_line("a", "x")]) == [[0.5]]  # the second try
    assert time.monotonic() - started < TIMEOUT


def test_wrong_servers_and_options_are_refused(server: Server, model_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not known to be vLLM or SGLang"):
        build(server, model_folder, endpoint={"server": "auto"}).score([GROUP])
    with pytest.raises(ConfigError, match=r"scorers\.it\.api = pooling; a server of kind sglang has classify"):
        build(server, model_folder, api="pooling", endpoint={"server": "sglang"}).score([GROUP])
    with pytest.raises(ConfigError, match="classify and pooling need the model's tokenizer"):
        build_scorer_config("it", {"kind": "served_reward_model", "endpoint": {"base_url": server.url, "model": "m"}})
    with pytest.raises(DataError, match=r"group a, response 0 has \d+ tokens with its prompt, but max_length = 4"):
        build(server, model_folder, max_length=4).score([GROUP])
    assert build(server, model_folder, max_length=4, too_long="missing").score([GROUP]) == [[None] * 4]
    server.answer = lambda path, body: (404, {}, b'{"detail": "Not Found"}')
    with pytest.raises(ConfigError, match="the server does not"):
        build(server, model_folder).score([GROUP])


def test_the_command_scores_by_a_server(server: Server, model_folder: Path, tmp_path: Path) -> None:
    server.pages["/v1/models"] = {"data": [{"id": "rm", "owned_by": "vllm"}]}
    server.answer = lambda path, body: reply({"data": [{"probs": [sum_of(body)]}]})
    samples = write_lines(tmp_path / "samples.jsonl", [group_line(str(index), "x", "yy") for index in range(5)])
    scorer = {"kind": "served_reward_model", "endpoint": {"base_url": server.url, "model": "rm"}, "tokenizer": str(model_folder)}
    scored = score(ScoreConfig(input=str(samples), output=str(tmp_path / "out"), scorers={"rm": scorer}))
    records = list(read_lines(scored))
    assert len(records) == 5
    assert all(response["reward"] == response["scores"]["rm"] > 0 for record in records for response in record["responses"])


def test_numbers_are_read() -> None:
    assert read_number({"data": [{"score": -3}]}, "score") == -3.0
    assert read_number([{"embedding": [0.25]}], "embedding") == 0.25
