"""A vLLM server that receives the policy's weights: requests, their order, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mpo_megatron.config import ConfigError, EndpointConfig, GenerateConfig, OnlineConfig
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.files import DataError
from mpo_megatron.rollout.engines import Prompt, Sampling
from mpo_megatron.rollout.engines.endpoint import EndpointEngine
from mpo_megatron.rollout.engines.vllm_server import UNDER_WAY, VllmServer
from mpo_megatron.rollout.generate import generate
from mpo_megatron.rollout.live import served
from mpo_megatron.rollout.live.served import ServedLiveEngine, sender_address
from mpo_megatron.rollout.records import read_ids, read_lines
from tests import vllm_stand_in
from tests.unit.rollout.test_live_vllm import Weights
from tests.vllm_server import LOGPS, TOKENS, Handler, Server, serve
from tests.waiting import TIMEOUT

PROMPTS = [Prompt(group_id=name, token_ids=(1, 2), messages=()) for name in ("a", "b")]
SAMPLING = Sampling(num_responses=2, max_tokens=8, stop_token_ids=(256,), logps=True)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    vllm_stand_in.install(monkeypatch)
    monkeypatch.setattr(served, "get_world_size", lambda: 1)
    with serve() as found:
        yield found


def config_of(server: Server, **changes: Any) -> OnlineConfig:
    endpoint = EndpointConfig(base_url=server.url, model="m", server="vllm", retries=0, timeout=TIMEOUT)
    return OnlineConfig(kl_weight=0.1, engine="server", endpoint=endpoint, **changes)


def control(server: Server) -> VllmServer:
    return VllmServer(config_of(server).endpoint, "online.endpoint", seconds=TIMEOUT)


def connect(server: Server, weights: Weights, model_folder: Path) -> ServedLiveEngine:
    config = config_of(server)
    engine = EndpointEngine(config.endpoint, load_tokenizer(model_folder))
    return ServedLiveEngine(weights, engine, control(server), config)


def test_a_server_gets_weights_and_samples(server: Server, model_folder: Path) -> None:
    weights = Weights()
    live = connect(server, weights, model_folder)
    assert live.draws
    for value in (1.0, 2.0):
        weights.fill(value)
        server.calls.clear()
        live.update()
        weights.check(server.engine)
        assert server.calls == [
            *("/update_weight_version", "/pause?mode=wait"),
            *("/start_weight_update", "/update_weights", "/finish_weight_update"),
            *("/reset_prefix_cache", "/resume", "/update_weight_version"),
        ]
        found = list(live.generate(PROMPTS, SAMPLING))
        assert sorted(generation.group_id for generation in found) == ["a", "b"]
        for generation in found:
            assert [response.token_ids for response in generation.responses] == [tuple(TOKENS)] * 2
            assert [response.as_line()["engine_logp"] for response in generation.responses] == [sum(LOGPS)] * 2
    assert server.weights.startswith("mpo-")
    assert server.weights.endswith("-2")


def test_samples_of_other_weights_are_refused(server: Server, model_folder: Path) -> None:
    live = connect(server, Weights(), model_folder)
    live.update()
    server.weights = "default"  # as after a restart
    with pytest.raises(DataError, match=r"has weights 'default' instead of 'mpo-\w+-1'; it was restarted, or"):
        list(live.generate(PROMPTS, SAMPLING))


def test_a_worker_that_fails_leaves_the_server_paused(server: Server, model_folder: Path) -> None:
    live = connect(server, Weights(), model_folder)
    server.engine.workers[0].fails = True
    with pytest.raises(DataError, match=r"/update_weights failed: 500: CUDA out of memory; .* restart it if it is paused"):
        live.update()
    assert server.paused


def test_prefixes_of_old_weights_end_the_run(server: Server, model_folder: Path) -> None:
    live = connect(server, Weights(), model_folder)
    server.forgets = False
    with pytest.raises(DataError, match="still caches prefixes of the old weights"):
        live.update()


def set_config(section: str, **values: Any) -> Callable[[Server], None]:
    return lambda server: server.config[section].update(values)


REFUSALS: dict[str, tuple[Callable[[Server], Any], str]] = {
    "version": (lambda server: setattr(server, "version", "0.31.2"), r"vLLM 0.31.2; weight routes are known for vllm"),
    "short": (set_config("model_config", max_model_len=99), "its max_model_len is 99; a prompt with its sample takes 100"),
    "no length": (lambda server: server.config.clear(), "its max_model_len is None"),
    "awq": (set_config("model_config", quantization="awq"), "its quantization = awq; it reads only quantised weights"),
    "ipc": (set_config("weight_transfer_config", backend="ipc"), "its weight transfer is ipc, not nccl; start it with VLLM_"),
}


def check(server: VllmServer) -> None:
    server.check_version()
    server.check_model(max_tokens=100)
    server.require_nccl()


@pytest.mark.parametrize("name", REFUSALS)
def test_servers_that_cannot_take_weights_are_refused(server: Server, name: str) -> None:
    change, message = REFUSALS[name]
    change(server)
    with pytest.raises(ConfigError, match=message):
        check(control(server))


def test_what_a_server_says_of_itself(server: Server) -> None:
    asked = control(server)
    asked.check_version()
    assert asked.require_nccl() == 2
    assert asked.check_model(max_tokens=100) is None
    server.config["model_config"]["quantization"] = "fp8_per_tensor"
    assert asked.check_model(max_tokens=100) == "quantization = fp8_per_tensor"
    server.config["model_config"]["quantization"] = None
    server.config["cache_config"]["cache_dtype"] = "fp8"
    assert asked.check_model(max_tokens=100) == "kv_cache_dtype = fp8"


def test_questions_are_repeated_and_changes_are_not(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = VllmServer(replace(config_of(server).endpoint, retries=1, max_wait=0.0), "online.endpoint", seconds=TIMEOUT)
    for method in ("do_GET", "do_POST"):
        usual, busy = getattr(Handler, method), [True]

        def answer(handler: Handler, usual: Any = usual, busy: list[bool] = busy) -> None:
            if busy:
                busy.clear()
                handler.rfile.read(int(handler.headers.get("content-length", 0)))
                handler.send({}, 503)
            else:
                usual(handler)

        monkeypatch.setattr(Handler, method, answer)
    assert asked.version() == "default"
    with pytest.raises(DataError, match="/update_weight_version failed: 503"):
        asked.pause()


def test_a_server_without_the_routes_says_how_to_start_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.vllm_server.Handler.do_GET", lambda handler: handler.send(None))
    with pytest.raises(ConfigError, match="has no /server_info; start it with VLLM_SERVER_DEV_MODE=1"):
        control(server).describe()


def test_where_the_server_finds_the_sender(server: Server) -> None:
    host, port = sender_address(config_of(server))
    assert host == "127.0.0.1"  # the address from which this machine reaches the server
    assert 1024 <= port < 32_768
    assert sender_address(config_of(server, weights_address="trainer:20123")) == ("trainer", 20123)
    assert sender_address(config_of(server, weights_address="10.0.0.7"))[0] == "10.0.0.7"
    nowhere = EndpointConfig(base_url="http://127.0.0.1:1/v1", model="m")
    with pytest.raises(DataError, match="cannot be reached"):
        sender_address(OnlineConfig(engine="server", endpoint=nowhere))


# --------------------------------------------------------------------------------------------------- mpo generate


@pytest.fixture
def asked(server: Server, model_folder: Path, tmp_path: Path) -> GenerateConfig:
    """`mpo generate` with a server that reads a checkpoint's weights."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Why {index}?"}) + "\n" for index in range(3)))
    return GenerateConfig(
        prompts=str(tmp_path / "prompts.jsonl"),
        model=str(model_folder),
        output=str(tmp_path / "out"),
        engine="openai",
        num_responses=2,
        max_tokens=8,
        load_weights=True,
        endpoint=EndpointConfig(base_url=server.url, model="m", server="vllm", retries=0, timeout=TIMEOUT),
    )


def test_generation_by_a_server_that_reads_weights(server: Server, asked: GenerateConfig, tmp_path: Path) -> None:
    def run(output: str) -> None:
        samples = generate(replace(asked, output=str(tmp_path / output)), Console(quiet=True))
        assert [len(record["responses"]) for record in read_lines(samples)] == [2, 2, 2]

    run("one")
    assert server.loaded == [("reload_weights", {"weights_path": str(Path(asked.model).absolute())})]
    changes = [call for call in server.calls if call not in ("/version", "/weight_info", "/server_info?config_format=json")]
    assert changes == [
        *("/update_weight_version", "/pause?mode=wait", "/collective_rpc"),
        *("/reset_prefix_cache", "/resume", "/update_weight_version"),
    ]
    run("two")
    assert len(server.loaded) == 1  # already loaded
    server.weights = "default"
    run("three")
    assert len(server.loaded) == 2
    assert "with weights" in json.loads((tmp_path / "one" / "generate.json").read_text())["identity"]["model"]


def test_a_server_has_a_version_only_with_whole_weights_and_awake(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each call: a command killed there leaves no state that the next one would trust."""
    post, seen = VllmServer._post, list[str]()

    def look(self: VllmServer, path: str, body: dict[str, Any], cure: str) -> Any:
        answer = post(self, path, body, cure)
        seen.append(server.weights)
        whole = {"default": [], "mpo-new": ["reload_weights"]}.get(server.weights)
        assert whole is None or (not server.paused and [method for method, _ in server.loaded] == whole)
        return answer

    monkeypatch.setattr(VllmServer, "_post", look)
    asked = control(server)
    asked.pause()
    asked.load("elsewhere")
    asked.resume("mpo-new")
    assert set(seen[:-1]) == {UNDER_WAY}
    assert seen[-1] == "mpo-new"


def test_responses_of_other_weights_are_not_kept(
    server: Server, asked: GenerateConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.config["cache_config"]["cache_dtype"] = "fp8"
    answer = Handler.answer

    def steal(handler: Handler, route: str, body: dict[str, Any]) -> Any:
        if route == "v1/completions":
            server.weights = "another's"
        return answer(handler, route, body)

    monkeypatch.setattr(Handler, "answer", steal)
    with pytest.raises(DataError, match="has weights \"another's\" instead of 'mpo-"):
        generate(asked, Console(quiet=True))
    assert read_ids(Path(asked.output) / "samples.jsonl") == set()
    assert "kv_cache_dtype = fp8: responses are drawn from a quantised policy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "transformers", "endpoint": EndpointConfig()}, "load_weights = true applies to a server"),
        ({"load_adapter": True}, "remove one of them"),
        ({"endpoint": {"server": "sglang"}}, "is of kind sglang; only vllm can load weights"),
    ],
)
def test_weights_that_no_server_reads_are_refused(asked: GenerateConfig, changes: dict[str, Any], message: str) -> None:
    if isinstance(changes.get("endpoint"), dict):
        changes = changes | {"endpoint": replace(asked.endpoint, **changes["endpoint"])}
    with pytest.raises(ConfigError, match=message):
        generate(replace(asked, **changes), Console(quiet=True))
