"""A local stand-in for the Hugging Face hub: it serves a folder as a model's files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

from tests.local_server import LocalServer

COMMIT = hashlib.sha1(b"the only commit").hexdigest()


class Hub:
    """The files, and the requests received."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.models: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.taken: list[str] = []
        """Files that were downloaded."""


@contextlib.contextmanager
def running_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub connects to, with an empty cache in the folder `cache`."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            api = parts[:2] == ["api", "models"]
            owner, name, *rest = parts[2:] if api else parts
            folder = hub.models.get(f"{owner}/{name}")
            if folder is None:
                return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            if f"{owner}/{name}" in hub.gated:
                return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
            if rest[1:2] not in ([], ["main"], [COMMIT]):
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            if api:
                files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
                tree = [
                    {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": digest(path)}
                    for path in files
                ]
                info = {"id": f"{owner}/{name}", "sha": COMMIT}
                return self._send(200, json.dumps(tree if rest[:1] == ["tree"] else info).encode(), {})
            path = folder.joinpath(*rest[2:])
            if body:
                hub.taken.append(str(path.relative_to(folder)))
            return self._send(200, path.read_bytes(), {"ETag": f'"{digest(path)}"', "X-Repo-Commit": COMMIT}, body=body)

        def _send(self, status: int, content: bytes, headers: dict[str, str], *, body: bool = True) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if body and self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = LocalServer(Handler)
    hub = Hub(server.url)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for name, value in (
        ("ENDPOINT", hub.url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_CACHE", str(cache)),
        ("HF_HUB_OFFLINE", False),
    ):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def digest(path: Path) -> str:
    """A stand-in for a file's Git object."""
    return hashlib.sha1(path.read_bytes()).hexdigest()
