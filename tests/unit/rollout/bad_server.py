"""A server whose answers for some seeds are bad, and kinds of bad answers."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

from mpo_megatron.rollout.engines import response_seed
from tests.local_server import LocalServer

K, BAD, ATTEMPTS = 4, 2, 2


SEEDS = {response_seed(1, "g", BAD, attempt) for attempt in range(ATTEMPTS)}
"""Seeds whose answers are bad."""


def body(text: Any = "Blue.", reason: Any = "stop", usage: Any = {"completion_tokens": 3}, **more: Any) -> dict[str, Any]:  # noqa: B006
    """A well-formed answer for completions and chat, with the given changes."""
    choice = {"index": 0, "finish_reason": reason, "text": text} | more.pop("choice", {})
    choice["message"] = {"role": "assistant", "content": choice["text"]} | more.pop("message", {})
    return {"id": "x", "choices": [choice], "usage": usage} | more


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Bad

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(request["seed"])
        try:
            if request["seed"] in self.server.seeds:
                self.server.misbehave(self)
            else:
                self.send(json.dumps(body(f"Answer {request['seed']}.")).encode())
        except OSError:  # the client disconnected
            self.close_connection = True

    def send(self, content: bytes, status: int = 200, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content-type": kind, "content-length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def stream(self, chunk: bytes, pause: float, status: int = 200) -> None:
        """Send a body without an end."""
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        while not self.server.over.wait(pause):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            self.wfile.flush()


class Bad(LocalServer):
    def __init__(self) -> None:
        super().__init__(Handler)
        self.misbehave: Callable[[Handler], None] = lambda handler: None
        self.asked: list[int] = []
        self.seeds = SEEDS
        self.over = threading.Event()
        self.url += "/v1"


def reply(value: Any, **options: Any) -> Callable[[Handler], None]:
    """Misbehaviour: one answer, JSON or raw bytes."""
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return lambda handler: handler.send(content, **options)


def hang_up(handler: Handler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def reset(handler: Handler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def cut_body(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    hang_up(handler)


def speak_nonsense(handler: Handler) -> None:
    handler.wfile.write(b"hello\r\n\r\n")
    hang_up(handler)


def huge_header(handler: Handler) -> None:
    handler.send(b"{}", x_padding="a" * 200_000)
