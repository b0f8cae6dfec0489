"""One server with every known kind of misbehaviour; a bad answer may cost only one response.

Four responses to a prompt are requested; the third one's answers are always bad, for any seed. The other three must always
arrive.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron.config import ConfigError, EndpointConfig, GenerateConfig
from mpo_megatron.data.chat import Chat
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.files import DataError
from mpo_megatron.rollout import client as client_module
from mpo_megatron.rollout import http_responses
from mpo_megatron.rollout.draws import DrawnGroup, answer
from mpo_megatron.rollout.engines import Sampling, response_seed
from mpo_megatron.rollout.engines.answers import read_answer
from mpo_megatron.rollout.engines.endpoint import EndpointEngine
from mpo_megatron.rollout.records import Record, encode_line
from tests.unit.rollout.bad_server import (
    ATTEMPTS,
    BAD,
    SEEDS,
    Bad,
    Handler,
    K,
    body,
    cut_body,
    hang_up,
    huge_header,
    reply,
    reset,
    speak_nonsense,
)

SAMPLING = Sampling(num_responses=K, max_tokens=8, stop_token_ids=(256,), seed=1)
MESSAGES = ({"role": "user", "content": "Why is the sky blue?"},)
PROMPT = "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n"
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] }}{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def bad() -> Iterator[Bad]:
    server = Bad()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def chat(model_folder: Path) -> Chat:
    return Chat(load_tokenizer(model_folder))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(http_responses, "MAX_BODY_BYTES", 2**18)


def draw(
    bad: Bad, chat: Chat, misbehave: Callable[[Handler], None], tools: list[dict[str, Any]] | None = None, **changes: Any
) -> Record:
    """The outcome of one group; its requests are in `bad.asked`."""
    bad.misbehave, bad.asked = misbehave, []
    options = {
        "base_url": bad.url,
        "model": "m",
        "api": "chat",
        "server": "openai",
        "retries": 1,
        "concurrency": K,
        "timeout": 20.0,
    }
    engine = EndpointEngine(EndpointConfig(**options | changes), chat)
    config = GenerateConfig(prompts="p", model="m", output="o", num_responses=K, max_attempts=ATTEMPTS, empty="keep")
    record = {"group_id": "g", "prompt": list(MESSAGES)} | ({"tools": tools} if tools else {})
    group = DrawnGroup(record=record, token_ids=tuple(chat.prompt(MESSAGES)[1].tolist()))
    [record] = answer(engine, [group], SAMPLING, config)
    encode_line(record)  # can be written
    return record


UNUSABLE: dict[str, tuple[Any, str]] = {
    "content is null, cut": (body(None, "length"), "no_text"),
    "content is null, ended": (body(None), "no_text"),
    "content is a number": (body(7), "no_text"),
    "content is an object": (body({"a": 1}), "no_text"),
    "content is missing": ({"choices": [{"finish_reason": "stop", "message": {"role": "assistant"}}]}, "no_text"),
    "filtered, without text": (body(None, "content_filter"), "filtered"),
    "filtered, with text": (body("Blu", "content_filter"), "filtered"),
    "aborted": (body("Blu", "abort"), "aborted"),
    "engine error": (body("", "error"), "failed"),
    "calls a tool": (body(None, "tool_calls", message={"tool_calls": [{"id": "1"}]}), "tool_call"),
    "calls a tool, says stop": (body(None, message={"tool_calls": [{"id": "1"}]}), "tool_call"),
    "refusal": (body(None, message={"refusal": "I must not."}), "refusal"),
    "finish_reason is null": (body(reason=None), "unknown_finish"),
    "finish_reason is new": (body(reason="tired"), "unknown_finish"),
    "finish_reason is a list": (body(reason=["stop"]), "unknown_finish"),
    "thought only": (body(None, "length", message={"reasoning_content": "Hm."}), "thought_only"),
    "thought only, vLLM's name": (body(None, "stop", message={"reasoning": "Hm."}), "thought_only"),
    "half a surrogate": (body("x\ud800y"), "not_unicode"),
    "negative count": (body(usage={"completion_tokens": -5}), "bad_count"),
    "count of 401 digits": (body(usage={"completion_tokens": 10**400}), "bad_count"),
    "count above max_tokens": (body(usage={"completion_tokens": 900}), "bad_count"),
    "count is a fraction": (body(usage={"completion_tokens": 2.5}), "bad_count"),
    "count is true": (body(usage={"completion_tokens": True}), "bad_count"),
    "count is infinite": (json.dumps(body(usage={"completion_tokens": float("inf")})).encode(), "bad_count"),
    "count of 5,000 digits": (b'{"choices": [], "usage": {"completion_tokens": ' + b"9" * 5000 + b"}}", "not_json"),
    "token ids are texts": (body(choice={"token_ids": ["a"]}), "bad_tokens"),
    "token ids of another vocabulary": (body(choice={"token_ids": [10**6]}), "bad_tokens"),
    "negative token ids": (body(choice={"token_ids": [-1]}), "bad_tokens"),
    "too many token ids": (body(choice={"token_ids": [1] * 99}), "bad_count"),
    "no choices": (body() | {"choices": []}, "no_choice"),
    "choices is null": (body() | {"choices": None}, "no_choice"),
    "choices is an object": (body() | {"choices": {"0": 1}}, "no_choice"),
    "a choice is a text": (body() | {"choices": ["Blue."]}, "no_choice"),
    "message is null": ({"choices": [{"finish_reason": "stop", "message": None}]}, "no_choice"),
    "an error with status 200": ({"error": {"message": "overloaded"}}, "no_choice"),
    "a list": ([1, 2], "no_choice"),
    "a number": (5, "no_choice"),
    "null": (None, "no_choice"),
    "nested without end": (b"[" * 100_000 + b"]" * 100_000, "not_json"),
    "half of the JSON": (b'{"choices": [{"index": 0', "not_json"),
    "an empty body": (b"", "not_json"),
    "not UTF-8": (b'{"choices": "\xff\xfe"}', "not_json"),
    "a body of 300 KiB": (body("a" * 300 * 1024), "too_large"),
    "repeats the prompt": (body(f"{PROMPT}Blue."), "repeats_prompt"),
    "repeats the prompt without its special tokens": (
        body(PROMPT.replace("<|im_start|>", "").replace("<|im_end|>", "") + "Blue."), "repeats_prompt"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_answer_costs_one_response(bad: Bad, chat: Chat, name: str) -> None:
    content, label = UNUSABLE[name]
    record = draw(bad, chat, reply(content))
    assert [response["text"] for response in record["responses"]] == [
        f"Answer {response_seed(1, 'g', index)}." for index in range(K) if index != BAD
    ]
    assert (record["dropped"], record["unusable"]) == ({label: 1}, {label: ATTEMPTS})
    assert sorted(bad.asked) == sorted([*SEEDS, *(response_seed(1, "g", index) for index in range(K) if index != BAD)])


STREAMS: dict[str, tuple[Callable[[Handler], None], dict[str, Any], str]] = {
    "a body without end": (lambda handler: handler.stream(b"a" * 2**16, 0.0), {}, "too_large"),
    "HTML with status 200": (reply(b"<html>Sign in</html>", kind="text/html"), {}, "not_json"),
    "compressed": (reply(gzip.compress(b" " * 10_000_000), content_encoding="gzip"), {}, "compressed"),
    "400": (reply({"error": {"message": "content policy"}}, status=400), {}, "refused"),
    "413": (reply(b"too large", status=413), {}, "refused"),
    "422 with control characters": (reply(b"\x1b[31mbad\x07", status=422), {}, "refused"),
}


@pytest.mark.parametrize("name", STREAMS)
def test_what_is_no_json_costs_one_response(bad: Bad, chat: Chat, name: str) -> None:
    misbehave, options, label = STREAMS[name]
    record = draw(bad, chat, misbehave, **options)
    assert len(record["responses"]) == K - 1
    assert record["dropped"] == {label: 1}
    assert bad.asked.count(response_seed(1, "g", BAD)) == 1


LOST: dict[str, tuple[Callable[[Handler], None], dict[str, Any], str]] = {
    "drips for ever": (lambda handler: handler.stream(b" ", 0.02), {"timeout": 0.4}, "no answer within 0.4 s"),
    "says nothing": (lambda handler: handler.server.over.wait(20), {"timeout": 0.4}, "no answer within 0.4 s"),
    "drips an error": (lambda handler: handler.stream(b" ", 0.02, 500), {"timeout": 0.4}, "no answer within 0.4 s"),
    "hangs up": (hang_up, {}, "no connection: "),
    "resets the connection": (reset, {}, "no connection: ReadError"),
    "hangs up in the middle": (cut_body, {}, "no connection: "),
    "does not speak HTTP": (speak_nonsense, {}, "no connection: "),
    "a header of 200 kB": (huge_header, {}, "no connection: "),
    "500": (reply(b"down", status=500), {}, "500"),
    "500, nested without end": (reply(b"[" * 100_000, status=500), {}, "500"),
    "503 with a Retry-After of a year": (
        reply(b"", status=503, retry_after="31536000"), {"max_wait": 0.01}, "503"
    ),
    "429": (reply(b"", status=429, retry_after="0"), {}, "429"),
    "408": (reply(b"", status=408), {}, "408"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOST)
def test_a_lost_answer_leaves_the_others_for_the_next_run(bad: Bad, chat: Chat, name: str) -> None:
    misbehave, options, reason = LOST[name]
    started = time.monotonic()
    record = draw(bad, chat, misbehave, **options)
    assert record["error"].startswith(reason)
    assert sorted(response["index"] for response in record["responses"]) == [0, 1, 3]
    assert bad.asked.count(response_seed(1, "g", BAD)) >= 2  # the same seed, retried
    assert time.monotonic() - started < 20  # an idle machine takes a second; a limit for each read would never end


USABLE: dict[str, tuple[Any, dict[str, Any]]] = {
    "no usage": (body() | {"usage": None}, {"text": "Blue.", "num_tokens": 5}),
    "a count of 0": (body(usage={"completion_tokens": 0}), {"num_tokens": 5}),
    "usage is a list": (body(usage=[1]), {"num_tokens": 5}),
    "two choices": (body() | {"choices": body()["choices"] * 2}, {"text": "Blue."}),
    "content in parts": (body([{"type": "text", "text": "Bl"}, {"type": "text", "text": "ue."}]), {"text": "Blue."}),
    "fields that nobody knows": (body() | {"choices": [body()["choices"][0] | {"mood": {"a": [1]}}]}, {"text": "Blue."}),
    "an empty thought": (body(message={"reasoning_content": " "}), {"text": "Blue."}),
    "control characters": (body("\x1b[2J\x00"), {"text": "\x1b[2J\x00"}),
    "cut at the limit": (body("Blu", "length"), {"finish_reason": "length"}),
    "stopped because it repeats itself": (body("aaa", "repetition"), {"finish_reason": "repetition"}),
    "ended as text-generation-inference says it": (body(reason="eos_token"), {"finish_reason": "stop"}),
    "token ids": (body("!!", choice={"token_ids": [0, 0, 256]}), {"token_ids": [0, 0, 256], "num_tokens": 3}),
    "answers as another model": (body(model="models/other"), {"text": "Blue.", "model": "models/other"}),
    "answers as a version of the model": (body(model="org/m-2026-11-29"), {"text": "Blue."}),
    "token ids of another text": (body("Blue.", choice={"token_ids": [0, 0, 256]}), {"text": "Blue."}),
}


def test_the_guide_lists_all_of_them() -> None:
    page = (Path(__file__).parents[3] / "docs" / "reference" / "rollouts.md").read_text(encoding="utf-8")
    number = len(UNUSABLE) + len(STREAMS) + len(LOST)
    assert number >= 40
    assert f"misbehaves in {number} ways, and in {len(USABLE)} odd but usable ones" in " ".join(page.split())
    listed = {
        name for line in page.splitlines() if line.startswith("| ") for name in line.split(" | ")[-1].strip(" |").split("; ")
    }
    assert {*UNUSABLE, *STREAMS, *LOST, *USABLE} <= listed


@pytest.mark.parametrize("name", USABLE)
def test_what_is_usable_is_used(bad: Bad, chat: Chat, name: str) -> None:
    content, expected = USABLE[name]
    record = draw(bad, chat, reply(content))
    assert len(record["responses"]) == K
    found = record["responses"][BAD]
    assert expected.items() <= found.items()
    assert ("token_ids" in found) == ("token_ids" in expected)
    assert "unusable" not in record


NAMES = [
    ("gpt-4o-2024-08-06", "gpt-4o", True),
    ("mistral-large-2411", "mistral-large-latest", True),
    ("llama3", "llama3:latest", True),
    ("/data/Qwen3-8B/", "Qwen/qwen3-8b", True),
    ("Qwen/Qwen3-8B@main", "Qwen/Qwen3-8B", True),
    ("/hub/models--Qwen--Qwen3-8B/snapshots/0ab1c2d3", "Qwen/Qwen3-8B", True),
    ("models/qwen3-8b.gguf", "qwen3-8b", True),
    ("gpt-4o-mini", "gpt-4o", False),
    ("model-7b-other", "model-7b", False),
    ("Qwen3-8B-Base", "Qwen3-8B", False),
    ("gpt-4o-2024-08-06", "gpt-4o-2024-05-13", False),
    ("qwen2.5", "qwen2", False),
    *((f"gemini-1.5-pro-{version}", "gemini-1.5-pro", True) for version in ("001", "002", "latest")),
    *((f"gpt-4-{date}", "gpt-4", True) for date in ("0613", "1106", "20240409", "2024-04-09", "2404", "240409", "2024-04")),
    *((f"model-7b-{number}", "model-7b", False) for number in ("123", "1234", "32768", "100000", "20241399", "8192", "256")),
    ("-latest", "m", False),
]


@pytest.mark.parametrize(("served", "requested", "same"), NAMES)
def test_a_version_of_a_model_is_told_from_another_one(
    served: str, requested: str, same: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    client = client_module.Client(EndpointConfig(base_url="http://localhost:1/v1", model=requested))
    assert client.find_other_model({"model": served}, requested) == (None if same else served)
    assert client.find_other_model({"model": served}, requested) == (None if same else served)
    assert capsys.readouterr().err.count(f"answers as {served}") == (not same)  # once


STATED: dict[str, tuple[Any, float | None]] = {
    "one a token": ({"token_logprobs": [-0.5, 0, -1]}, -1.5),
    "one too few": ({"token_logprobs": [-0.5, -1]}, None),
    "above 0": ({"token_logprobs": [-0.5, 0.1, -1]}, None),
    "null": ({"token_logprobs": [None, -0.5, -1]}, None),
    "no list": ({"token_logprobs": -1.5}, None),
    "infinite": ({"token_logprobs": [-math.inf, 0, 0]}, None),
    "none": (None, None),
}


@pytest.mark.parametrize("name", STATED)
def test_log_probabilities_are_read_or_missing(chat: Chat, name: str) -> None:
    stated, expected = STATED[name]
    answer = body("another text", choice={"token_ids": [0, 0, 256], "logprobs": stated})
    asked = dataclasses.replace(SAMPLING, logps=True)
    found = read_answer(answer, api="tokens", seed=1, sampling=asked, tokenizer=chat.tokenizer, thoughts=None)
    assert (found.token_ids, found.text, found.logp) == ((0, 0, 256), "!!", expected)  # the tokens count, not the text


def test_another_seed_gives_another_answer(bad: Bad, chat: Chat) -> None:
    def first_is_bad(handler: Handler) -> None:
        first = bad.asked.count(response_seed(1, "g", BAD, 1)) == 0
        handler.send(json.dumps(body(None, "length") if first else body("Blue.")).encode())

    record = draw(bad, chat, first_is_bad)
    assert len(record["responses"]) == K
    assert (
        record["responses"][BAD] | {"text": "Blue.", "attempt": 1, "seed": response_seed(1, "g", BAD, 1)}
        == record["responses"][BAD]
    )
    assert record["unusable"] == {"no_text": 1}
    assert "dropped" not in record


def test_a_group_without_any_response_fails_and_goes_on_with_other_seeds(
    bad: Bad, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = {response_seed(1, "g", index, attempt) for index in range(K) for attempt in range(ATTEMPTS)}
    monkeypatch.setattr(bad, "seeds", every)
    record = draw(bad, chat, reply(body(None, "content_filter")))
    assert record["error"] == "no usable response: 4 × filtered (finish_reason = 'content_filter')"
    assert record["attempts"] == {str(index): ATTEMPTS for index in range(K)}
    again = DrawnGroup.begin({"group_id": "g", "prompt": []}, (), record)
    assert set(again.prompt(SAMPLING).seeds).isdisjoint(every)


def test_thoughts_are_put_back_as_the_template_writes_them(bad: Bad, model_folder: Path) -> None:
    tokenizer = load_tokenizer(model_folder)
    tokenizer.backend.chat_template = THINKING
    for said, put_back in (("Blue.", "Blue."), ("Blue.<|im_end|>", "Blue."), ("<|im_end|>", "")):
        thinking = body(said, message={"reasoning_content": "It scatters."}, usage={"completion_tokens": 8})
        record = draw(bad, Chat(tokenizer), reply(thinking))
        assert record["responses"][BAD]["text"] == f"<think>\nIt scatters.\n</think>\n\n{put_back}"
        assert record["responses"][BAD]["num_tokens"] == 8


@pytest.mark.parametrize("arguments", ['{"city": "Ulm"}', {"city": "Ulm"}, "{city", None])
def test_calls_of_offered_tools_are_put_back(bad: Bad, model_folder: Path, arguments: Any) -> None:
    tokenizer = load_tokenizer(model_folder)
    tokenizer.backend.chat_template = THINKING
    calls = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
    record = draw(bad, Chat(tokenizer), reply(body(None, "tool_calls", message={"tool_calls": calls})), tools)
    if arguments in ("{city", None):
        assert record["dropped"] == {"tool_call": 1}
        return
    text = '<call>{"name": "weather", "arguments": {"city": "Ulm"}}</call>'
    assert record["responses"][BAD] | {"text": text, "finish_reason": "stop"} == record["responses"][BAD]


def test_thoughts_that_the_template_does_not_write_are_refused(bad: Bad, chat: Chat) -> None:
    with pytest.raises(ConfigError, match=r"returns a thought .* chat template does not render it .* without its parser"):
        draw(bad, chat, reply(body(message={"reasoning_content": "It scatters."})))


@pytest.mark.parametrize(
    "status, error, message",
    [
        (401, ConfigError, "api_key_env = OPENAI_API_KEY; it is not set"),
        (403, ConfigError, "api_key_env"),
        (404, ConfigError, "the server does not know one of these"),
        (405, ConfigError, "the server does not know one of these"),
    ],
)
def test_what_concerns_every_question_ends_the_command(
    bad: Bad, chat: Chat, monkeypatch: pytest.MonkeyPatch, status: int, error: type[Exception], message: str
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(error, match=message):
        draw(bad, chat, reply(b"{}", status=status))


@pytest.mark.parametrize("status", [302, 307])
def test_prompts_and_key_follow_no_redirect(bad: Bad, chat: Chat, status: int) -> None:
    elsewhere = bad.url.replace("127.0.0.1", "localhost") + "/elsewhere"
    with pytest.raises(ConfigError, match=rf"redirects to {elsewhere} \(status {status}\)\. Redirects are not followed"):
        draw(bad, chat, reply(b"", status=status, location=elsewhere))
    assert len(bad.asked) <= K  # one for each response


def test_a_server_that_refuses_everything_ends_the_command(bad: Bad, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad, "seeds", {response_seed(1, "g", index) for index in range(K)})
    monkeypatch.setattr(client_module, "_MIN_LOST", 2)
    with pytest.raises(DataError, match=r"refuses all of the first 2 questions; the last: 400.*no tools here.*Set endpoint\.api"):
        draw(bad, chat, reply({"error": "no tools here"}, status=400), concurrency=1)
