"""Servers on this machine, and proxies that could not reach them."""

from __future__ import annotations

import http.server
import os
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from pipelines.runtime.reachability import spare_loopback, why_unreachable

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def server() -> Iterator[str]:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}/health"
    found.shutdown()


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PROXIES, *(name.upper() for name in PROXIES)):
        monkeypatch.setenv(name, "")  # so that what a test sets is taken back
        monkeypatch.delenv(name)


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY"])
def test_a_proxy_is_kept_away_from_this_machine(server: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "internal.example")
    assert why_unreachable(server) is not None  # asked through the proxy, which is not there
    spare_loopback()
    assert why_unreachable(server) is None
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "internal.example,localhost,127.0.0.1,::1"
    assert os.environ[name] == "http://127.0.0.1:9"  # for everything else


@pytest.mark.parametrize("given", [{}, {"http_proxy": "http://proxy:3128", "no_proxy": "*"}])
def test_nothing_changes_where_no_proxy_is_in_the_way(monkeypatch: pytest.MonkeyPatch, given: dict[str, str]) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    spare_loopback()
    assert dict(os.environ) == before


@pytest.mark.parametrize(("reason", "silent"), [(ssl.SSLCertVerificationError(1, "unable to get local issuer"), False),
                                                (ConnectionRefusedError(111, "refused"), True)])
def test_a_certificate_that_is_not_known_here_is_an_answer(monkeypatch: pytest.MonkeyPatch, reason: Exception,
                                                           silent: bool) -> None:
    """A client may have been told the authority, or not to check."""
    def fail(*_: object, **__: object) -> None:
        raise urllib.error.URLError(reason)

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", fail)
    assert (why_unreachable("https://host/health") is not None) == silent
