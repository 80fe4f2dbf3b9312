"""The page at `/`: whole in itself, never reading a model's text as markup, and run in a browser where there is one."""

from __future__ import annotations

import json
import queue
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from pipelines.serve.body_readers import BodyReaders
from pipelines.serve.ingress import PLAYGROUND, api
from pipelines.serve.messages import Answer, Generation, Piece, Token
from pipelines.serve.middleware import Limits, RequestMiddleware
from pipelines.serve.openai.responses import CHAT, DONE, Chunks

PAGE = PLAYGROUND.read_text(encoding="utf-8")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Elements(HTMLParser):
    """Tags with their attributes, and the labels around or for each field."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.labelled: set[str] = set()
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.found.append((tag, values))
        if tag == "label":
            self._inside = True
            self.labelled.add(values.get("for") or "")
        elif tag in ("input", "textarea") and self._inside:
            self.labelled.add(values["id"] or "")

    def handle_endtag(self, tag: str) -> None:
        self._inside &= tag != "label"


def test_the_page_is_served_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RequestMiddleware, "limits", Limits(BodyReaders(9, 5.0, 2**20), ("0" * 64,)))
    answer = TestClient(api).get("/")
    assert answer.status_code == 200 and answer.text == PAGE
    assert answer.headers["content-type"] == "text/html; charset=utf-8"


def test_nothing_comes_from_elsewhere_and_no_text_is_read_as_markup() -> None:
    assert not re.search(r"https?:|[\"'(]//|@import|url\(", PAGE)
    elements = Elements()
    elements.feed(PAGE)
    for tag, values in elements.found:
        assert "src" not in values and values.get("href", "data:,") == "data:,", tag
        assert not any(name.startswith("on") for name in values), tag
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "localStorage"):
        assert unsafe not in PAGE, unsafe
    assert "default-src 'none'" in PAGE and "connect-src 'self'" in PAGE


def test_it_can_be_used_by_keyboard_and_on_a_narrow_screen() -> None:
    elements = Elements()
    elements.feed(PAGE)
    fields = {str(values["id"]) for tag, values in elements.found if tag in ("input", "textarea")}
    assert fields and fields <= elements.labelled
    assert ("html", {"lang": "en"}) in elements.found
    assert any(values.get("name") == "viewport" for _, values in elements.found)
    assert {str(values.get("type")) for tag, values in elements.found if tag == "button"} == {"submit", "button"}
    assert not any(int(values.get("tabindex") or 0) > 0 for _, values in elements.found)
    assert ":focus-visible" in PAGE and "Escape" in PAGE and "ctrlKey" in PAGE
    ids = [values["id"] for _, values in elements.found if "id" in values]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'at\("([\w]+)"\)', PAGE)) <= set(ids)


def answer_of(body: dict[str, Any]) -> str:
    """The events of a short answer in two steps, with markup in it."""
    chunks = Chunks(CHAT, "hydra-heads", Generation("x", 8, speculative=body["speculative"]))
    pieces = (("<b>a", (0,)), ("b", (1,)), ("c", (2,)), ("d", (0,))) if body["speculative"] == "off" else ()
    steps = [Piece(0, text, (0,), (Token(text, -1.0, text.encode()),)) for text, _ in pieces] or [
        Piece(0, "<b>a", (0,), (Token("<b>a", -1.0, b"<b>a"),)),
        Piece(0, "bcd", (1, 2, 0), tuple(Token(text, -1.0, text.encode()) for text in "bcd"))]
    answer = Answer("x", "<b>abcd", (1, 2, 3, 4), "length", 3, len(steps) - 1, 4, 2, 0.1)
    return "".join(chunks.of(item) for item in [*steps, answer]) + chunks.usage() + DONE


@contextmanager
def served(page: str) -> Iterator[tuple[str, queue.Queue[dict[str, Any]]]]:
    """`page` at `/`, and an endpoint that answers as ours does; what the page tells at `/told`."""
    told: queue.Queue[dict[str, Any]] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            model = {"id": "hydra-heads", "configuration": "test", "base": "tiny"}
            if self.path in ("/", NARROW):
                self._give("text/html", page if self.path == "/" else FRAME)
            else:
                self._give("application/json", json.dumps({"data": [model]}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/told":
                told.put(body)
            self._give("text/event-stream", answer_of(body) if self.path != "/told" else "")

        def _give(self, kind: str, text: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", told
    finally:
        server.shutdown()
        server.server_close()


NARROW, WIDTH = "/narrow", 320
FRAME = f'<iframe src="/" width="{WIDTH}" height="900" style="border: 0"></iframe>'
"""A browser's own window is never that narrow."""
TELL = """<script>
addEventListener("load", () => {
  document.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", ctrlKey: true }));
  setInterval(() => document.getElementById("verdict").textContent && fetch("told", { method: "POST", body: JSON.stringify(
    { dom: document.body.outerHTML, wide: document.documentElement.scrollWidth, window: innerWidth }) }), 100);
});
</script></body>"""


@pytest.mark.slow
@pytest.mark.parametrize(("place", "width"), [(NARROW, WIDTH), ("/", 1280)])
def test_in_a_browser(tmp_path: Path, place: str, width: int) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no chromium is installed here")
    with served(PAGE.replace("</body>", TELL)) as (url, told):
        process = subprocess.Popen([browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
                                    f"--window-size={width},900", url.rstrip("/") + place],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            found = told.get(timeout=120)
        finally:
            process.terminate()
            process.wait(timeout=60)
    dom = found["dom"]
    assert "&lt;b&gt;a" in dom and "<b>a" not in dom.split("<script>")[0]
    assert '<span class="d1" title="draft token, depth 1">b</span>' in dom and 'class="d2"' in dom
    assert "4 tokens · 3.00 tokens per step" in dom and "4 tokens · 1.00 tokens per step" in dom
    assert "The same text" in dom
    assert found["wide"] <= found["window"] <= width  # nothing is to be scrolled sideways
