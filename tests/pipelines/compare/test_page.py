"""The page: whole in itself, it loads nothing, reads no text as markup, and fits a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipelines.compare.page import page
from pipelines.compare.records import (
    CategoryResult,
    ComparedRun,
    Comparison,
    Cost,
    Curve,
    FigureTable,
    MethodResult,
    MethodRow,
    PairedResult,
    SettingRow,
)
from pipelines.compare.text import markdown
from tests.pipelines.serve.test_playground import BROWSERS

EVIL = "<img src=x onerror=alert(1)> | </script><b>&"


def comparison(word: str = "math") -> Comparison:
    """Everything that a page can show; `word`: a text that users choose, in every place that has one."""
    def result(speed: float) -> MethodResult:
        return MethodResult(1.1 * speed, speed, (speed - 0.1, speed + 0.1), 3.0, 55.5, 24, 0.75, (0.6, 0.3, 0.1), {
            word: CategoryResult(1.4, 1.3, (1.2, 1.4)), "writing": CategoryResult(1.5, None, None)})

    def curve(run: str, drafter: str) -> Curve:
        return Curve(run, drafter, (10, 20, 30), (1.0, 2.0, 3.0), (5.0, 3.0, 2.0), ((20, 2.0, 1.5), (30, 3.0, 1.75)))

    runs = tuple(ComparedRun(name, name, (name * 16,), name * 16, f"2 cores {word}", "m", 1.7e9, "abc" * 10) for name in "ab")
    return Comparison(
        "bench", f"a: hydra++ 1.50x plain {word}", runs, (f"note {word}",),
        (SettingRow(("distill", "train"), "prompts.path", (f"/x/{word}", None)),),
        (MethodRow("hydra++", (result(1.5), result(1.7))), MethodRow("plain", (result(1.0), None))),
        (PairedResult("hydra++", "speed against plain", "a", "b", 24, 1.13, (1.1, 1.2), 0.001, "faster"),),
        (curve("a", "hydra++"), curve("b", "hydra++"), curve("b", word)),
        (FigureTable("Tokens per second of a batch", ((word, (250.5, None)),)),),
        (Cost("a", "distill", None, 60.0, 120.0, None, None, 12345, 0.01),))


class Elements(HTMLParser):
    """Tags with their attributes, scripts and text apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.text += data


@pytest.fixture(scope="module")
def whole() -> str:
    return page(comparison())


def test_nothing_is_loaded_from_elsewhere(whole: str) -> None:
    """Neither by an element nor by a style; and the browser is told to load nothing, whatever a script wants."""
    found = Elements(whole)
    for tag, values in found.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form") and "src" not in values, tag
        assert (values.get("href") or "#").startswith("#"), values
        assert not re.search(r"https?:|//", " ".join(value or "" for name, value in values.items() if name != "content")), values
    style = re.search(r"<style>(.*?)</style>", whole, re.DOTALL)
    assert style and not re.search(r"url\(|@import|https?:", style[1])
    (policy,) = [values["content"] or "" for _, values in found.tags if values.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "http" not in policy and "*" not in policy


def test_no_text_is_read_as_markup() -> None:
    """Names of categories and drafters, paths and machines are whatever their owners wrote."""
    text = page(comparison(EVIL))
    found = Elements(text)
    assert not any(tag in ("img", "b") for tag, _ in found.tags) and EVIL in found.text
    ids = [values["id"] for _, values in found.tags if "id" in values]
    assert len(ids) == len(set(ids)) == 9 + 10  # sections and charts
    charts = [script for script in found.scripts if "newPlot" in script and "onerror" in script]
    assert charts and not any(re.search(r"(<|u003c)img", script) for script in charts)  # Plotly reads some tags in labels
    rows = [line for line in markdown(comparison(EVIL)).splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in rows if "onerror" in line}
    assert widths and all(width in {len(re.findall(r"(?<!\\)\|", line)) for line in rows if "---" in line} for width in widths)


def test_numbers_stand_to_the_right_and_texts_to_the_left(whole: str) -> None:
    kinds = {text: bool(kind) for kind, text in re.findall(r'<td( class="number")?>([^<]*)</td>', whole)}
    assert kinds["1.65"] and kinds["1.40 - 1.60"] and kinds["75 %"] and kinds["12,345"] and kinds["1.50x"]
    assert not kinds["2 cores math"] and not kinds["faster"] and not kinds["distill, train"]


def test_a_page_without_figures_carries_no_script() -> None:
    empty = Comparison("tree", "`tree` of a.", comparison().runs, (), (), (), (), (), (), ())
    assert len(page(empty)) < 20_000 and "No recorded setting differs" in page(empty)


def test_json_holds_every_figure() -> None:
    data = json.loads(comparison().to_json())
    assert data["methods"][0]["results"][1]["categories"]["writing"]["tokens_per_step"] == 1.5
    assert data["pairs"][0]["interval"] == [1.1, 1.2] and data["costs"][0]["kwh"] == 0.01


REPORT = """<script>addEventListener("load", () => setTimeout(() => { document.title = JSON.stringify({
  charts: document.querySelectorAll(".main-svg").length, wide: document.documentElement.scrollWidth, window: innerWidth,
  over: [...document.querySelectorAll("figure")].filter((one) => one.scrollWidth > one.clientWidth + 1).length,
  bars: document.querySelectorAll(".bars .point path").length }); document.body.innerHTML = ""; }, 500));</script></body>"""


FRAME = """<iframe src="page.html" width="WIDTH" height="900" style="border: 0"></iframe><script>setInterval(() => {
  try { document.body.dataset.told = frames[0].document.title; } catch {} }, 50);</script>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(tmp_path: Path, whole: str, width: int) -> None:
    """Every chart is drawn without a network, and nothing is to be scrolled sideways, on a phone too."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no chromium is installed here")
    (tmp_path / "page.html").write_text(whole.replace("</body>", REPORT), encoding="utf-8")
    # a browser's own window is never that narrow
    (tmp_path / "frame.html").write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
                           "--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1400,1000",
                           "--virtual-time-budget=20000", "--dump-dom", f"file://{tmp_path}/frame.html"],
                          capture_output=True, text=True, timeout=240)
    told = re.search(r'data-told="(\{.*?\})"', done.stdout)
    assert told, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(told[1].replace("&quot;", '"'))
    assert found["charts"] >= 10 and found["bars"] >= 8 and found["over"] == 0
    assert found["wide"] <= found["window"] == width
