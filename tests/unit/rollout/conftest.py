"""Tiny models and a server with configurable misbehaviour, for the tests of generating and scoring."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron.rollout.records import Record
from tests.local_server import LocalServer
from tests.tiny import save_model, save_tokenizer

Answer = Callable[[str, dict[str, Any]], tuple[int, dict[str, str], bytes]]
"""(path, body) → (status, headers, body)."""


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model whose every output is a token of its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    return save_model(folder, vocab_size=save_tokenizer(folder), num_hidden_layers=2, hidden_size=32)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint, as `mpo iterate` starts from."""
    from mpo_megatron.model.convert_import import import_from_hf  # imports Megatron: seconds

    folder = tmp_path_factory.mktemp("model")
    save_model(folder / "hf", num_hidden_layers=2, hidden_size=32)
    import_from_hf(folder / "hf", folder / "megatron", vocab_multiple=128)
    return folder / "megatron"


class Server:
    """An HTTP server with answers from a test; it records its requests."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.answer: Answer = lambda path, body: completion("fine")
        self.pages: dict[str, Any] = {}
        """By path: answers to GET."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.requests.append(body)
                outer.keys.append(self.headers.get("authorization", ""))
                status, headers, content = outer.answer(self.path, body)
                try:
                    self.send_response(status)
                    for name, value in ({"content-type": "application/json"} | headers).items():
                        self.send_header(name, value)
                    self.send_header("content-length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:  # the client disconnected
                    pass

            def do_GET(self) -> None:
                content = json.dumps(outer.pages.get(self.path, {})).encode()
                self.send_response(200 if self.path in outer.pages else 404)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = LocalServer(Handler)
        self.url = f"{self.server.url}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def completion(text: str, *, reason: str = "stop", tokens: int = 3) -> tuple[int, dict[str, str], bytes]:
    """An answer that is valid for both completions and chat."""
    choice = {"index": 0, "text": text, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    body = {"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]}
    return 200, {}, json.dumps(body | {"usage": {"completion_tokens": tokens, "prompt_tokens": 1, "total_tokens": 1}}).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def group_line(group_id: str, *texts: str, **fields: Any) -> Record:
    """A group line as `mpo generate` writes it."""
    responses = [
        {"text": text, "finish_reason": "stop", "num_tokens": len(text), "seed": index} for index, text in enumerate(texts)
    ]
    return {
        "group_id": group_id,
        "prompt": [{"role": "user", "content": f"Question {group_id}"}],
        **fields,
        "responses": responses,
    }


def write_prompt_file(path: Path, number: int, order: int = 1, **fields: Any) -> Path:
    rows = [{"prompt": f"Question {index}?", "answer": index, **fields} for index in range(number)][::order]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
