"""No configuration ships that was not parsed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.config import load_config, to_yaml
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "jobs" / "configs").rglob("*.yaml"))


def test_the_three_are_there() -> None:
    assert {path.stem for path in CONFIGS} >= {"quickstart", "smollm2_135m", "cluster_llama_8b"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_parses_and_reads_back(path: Path, tmp_path: Path) -> None:
    config = load_config(str(path))
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(str(resolved)) == config
    assert path.read_text(encoding="utf-8").startswith("# "), "opens with the hardware it is for"
