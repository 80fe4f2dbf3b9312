"""A small HTTP server that stands in for an endpoint: it can be killed, stay away, and come back as another."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pipelines.serve.model_identity import ModelDigest

A, B = (ModelDigest(f"tiny@{letter}:fp32", 256, "plain") for letter in "ab")
A_WITH_HEADS = ModelDigest(A.base, A.context_limit, "some-heads")
GONE = (404, "text/plain", b"Path '/v1/chat/completions' not found. Ping http://.../-/routes for available routes.")
"""What Serve's proxy says while it stops and starts."""


class StandIn:
    """Answers every prompt with its model's base and the prompt. `model`: what it decodes; `name`: under which name; `ours`:
    whether it says so as our endpoint does; `earlier`: as one of an earlier version does, whose `/ready` has no fingerprint.
    `instead`: a reply (status, content type, body) to the next requests, if it gives one for their number and body. `asked`:
    bodies of requests; `connections`: opened so far."""

    def __init__(self, model: ModelDigest = A, name: str = "hydra-heads", ours: bool = True) -> None:
        self.model, self.name, self.ours = model, name, ours
        self.fingerprint: str | None = model.fingerprint if ours else "fp_1"
        self.earlier = False
        self.instead: Callable[[int, dict[str, Any]], tuple[int, str, bytes] | None] = lambda *_: None
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.port = self.connections = 0
        self._live: set[socket.socket] = set()
        self._server: ThreadingHTTPServer | None = None
        self.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def become(self, model: ModelDigest) -> None:
        self.model, self.fingerprint = model, model.fingerprint

    def start(self) -> None:
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                stand_in.connections += 1
                stand_in._live.add(self.connection)

            def do_GET(self) -> None:
                if self.path == "/v1/models":
                    self.give(200, {"data": [{"id": stand_in.name}]})
                elif self.path == "/ready" and stand_in.ours:
                    told = {} if stand_in.earlier else {"fingerprint": stand_in.model.fingerprint}
                    self.give(200, {"status": "ready", **vars(stand_in.model), **told})
                else:
                    self.give(404, {"detail": "Not Found"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stand_in.asked.append(body)
                stand_in.headers.append(dict(self.headers))
                if (other := stand_in.instead(len(stand_in.asked), body)) is not None:
                    self.give_raw(*other)
                elif body["model"] != stand_in.name:
                    self.give(404, {"error": {"message": f"model {body['model']!r} does not exist", "code": "model_not_found"}})
                else:
                    text = f"{stand_in.model.base}: {body['messages'][0]['content']}"
                    self.give(200, {"model": stand_in.name, "system_fingerprint": stand_in.fingerprint,
                                    "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
                                    "usage": {"completion_tokens": 2}})

            def give(self, status: int, value: Any) -> None:
                self.give_raw(status, "application/json", json.dumps(value).encode())

            def give_raw(self, status: int, kind: str, raw: bytes) -> None:
                with suppress(OSError):  # killed meanwhile
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(raw)))
                    if 300 <= status < 400:
                        self.send_header("Location", raw.decode())
                    self.end_headers()
                    self.wfile.write(raw)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                """Connections that `kill` broke are no errors of a test."""

        self._server = Server(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def kill(self) -> None:
        """Connections break, and new ones are refused."""
        if self._server is None:
            return
        self._server.shutdown()
        self._server.socket.close()
        self._server = None
        for live in self._live:
            with suppress(OSError):
                live.shutdown(socket.SHUT_RDWR)
        self._live.clear()

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
