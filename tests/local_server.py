"""The HTTP server under the tests' endpoints and hubs."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LocalServer(ThreadingHTTPServer):
    """Listens on a free port of this machine; the caller starts and closes it."""

    daemon_threads = True
    request_queue_size = 128  # `endpoint.concurrency` opens 64 connections at once; beyond this queue they are reset

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
