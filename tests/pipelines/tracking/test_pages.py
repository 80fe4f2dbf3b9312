"""MLflow's own pages in a real browser: what a person sees of chains at first sight."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hydra_core.base import Base
from pipelines.config import load_config
from pipelines.tracking import Tracker
from pipelines.tracking.pages import LONGEST_NOTE, VIEW, whole_lines
from tests.pipelines.tracking.chain import record_chain

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PAGE_MS = 240_000


def test_a_description_is_cut_to_whole_lines() -> None:
    text = "".join(f"| row {number} |\n" for number in range(2000))
    cut = whole_lines(text)
    assert len(cut) <= LONGEST_NOTE and cut.endswith("The rest is in the report among the artifacts.\n")
    assert all(re.fullmatch(r"\| row \d+ \|", line) for line in cut.splitlines()[:-2] if line)
    assert whole_lines("short\n") == "short\n"


@pytest.mark.slow
def test_the_tables_columns_show_the_chains(storage: Path, tiny_base: Base, tiny_base_dir: Path, tmp_path: Path,
                                            mlflow_server: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the columns that MLflow shows by default: data set and source of each chain. In the view `chains`, to which the
    experiment's description leads: champion, speed and settings. `HYDRA_TEST_SHOTS`: folder for screenshots."""
    playwright = pytest.importorskip("playwright.sync_api")
    if (browser := next(filter(None, map(shutil.which, BROWSERS)), None)) is None:
        pytest.skip("no chromium is installed here")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for name, speed in (("first", 1.8), ("second", 1.6)):
        config = load_config(None, {"storage": str(storage), "name": name, "tracking.uri": uri, "base.model": str(tiny_base_dir),
                                    "base.dtype": "fp32"})
        record_chain(config, tiny_base, tmp_path / name, {"hydra": speed})
    tracker, address = Tracker.open(config), mlflow_server(uri)
    shots = os.environ.get("HYDRA_TEST_SHOTS")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 3400, "height": 900})
        page.set_default_timeout(PAGE_MS)
        runs = f"{address}/#/experiments/{tracker.experiment_id}/runs"
        for where, texts in ((runs, ("spec-bench", "hydra-heads first", "Their figures side by side")),
                             (f"{runs}?viewStateShareKey={VIEW}", ("hydra (version 1)", "hydra (version 2)", "1.8", "1.6", "2.16",
                                                                  "1200", "96000"))):
            page.goto(where, wait_until="domcontentloaded")
            for text in texts:
                page.get_by_text(text).first.wait_for(state="attached")
            if shots:
                page.screenshot(path=f"{shots}/table-{len(texts)}.png")
        page.goto(f"{address}/#/experiments/{tracker.experiment_id}/runs/{tracker.parent()}", wait_until="domcontentloaded")
        page.get_by_text("champion hydra (version 2)").first.wait_for()
        if shots:
            page.screenshot(path=f"{shots}/chain.png")
        chromium.close()
