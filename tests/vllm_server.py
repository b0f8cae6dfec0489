"""A vLLM server that implements only weight updates: the routes of `tools/vllm_names.py`, with the stand-in's workers."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests import vllm_stand_in
from tests.local_server import LocalServer

TOKENS, LOGPS = [0, 0, 256], [-0.5, -0.25, -0.25]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        server.calls.append(self.path)
        content = {
            "/version": {"version": server.version},
            "/server_info?config_format=json": {"vllm_config": server.config},
            "/get_world_size": {"world_size": len(server.engine.workers)},
            "/weight_info": {"weight_version": server.weights},
        }
        self.send(content.get(self.path))

    def do_POST(self) -> None:
        server, text = self.server, self.rfile.read(int(self.headers["content-length"]))
        body = json.loads(text or b"{}")
        if self.path != "/v1/completions":
            server.calls.append(self.path)
        try:
            self.send(self.answer(self.path.partition("?")[0].removeprefix("/"), body))
        except RuntimeError as error:
            self.send({"error": {"message": str(error)}}, 500)

    def answer(self, route: str, body: dict[str, Any]) -> dict[str, Any] | None:
        server = self.server
        if route in ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"):
            if route == "init_weight_transfer_engine":
                assert not server.connected
                server.connected = True
            server.engine.collective_rpc(route, kwargs=body)
        elif route == "shutdown_weight_transfer_engine":
            server.connected = False
        elif route == "collective_rpc":
            server.loaded.append((body["method"], body["kwargs"]))
            return {"results": [None]}
        elif route == "reset_prefix_cache":
            return {"success": server.forgets}
        elif route == "update_weight_version":
            server.weights = body["new_version"]
        elif route in ("pause", "resume"):
            server.paused = route == "pause"
        elif route == "v1/completions":
            assert not server.paused
            logprobs = {"token_logprobs": LOGPS} if body.get("logprobs") == 0 else None
            choice = {"text": "!!", "finish_reason": "stop", "token_ids": TOKENS, "logprobs": logprobs}
            return {"choices": [choice], "usage": {"completion_tokens": len(TOKENS)}}
        else:
            return None
        return {}

    def send(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(404 if content is None else status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(LocalServer):
    def __init__(self, workers: int) -> None:
        super().__init__(Handler)
        self.url += "/v1"
        self.engine = vllm_stand_in.Engine(workers)
        self.version, self.weights, self.paused, self.forgets = "0.33.0", "default", False, True
        self.connected = True  # to a killed run
        self.calls: list[str] = []
        self.loaded: list[tuple[str, Any]] = []
        self.config: dict[str, Any] = {
            "model_config": {"max_model_len": 4096, "quantization": None, "quantization_config": None},
            "cache_config": {"cache_dtype": "auto"},
            "weight_transfer_config": {"backend": "nccl"},
        }


@contextlib.contextmanager
def serve(workers: int = 2) -> Iterator[Server]:
    """A server on loopback, until the end of the block."""
    server = Server(workers)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
