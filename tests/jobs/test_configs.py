"""No configuration ships that was not parsed."""

from __future__ import annotations

from pathlib import Path

import pytest

from hydra_core.errors import InputError
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


def test_earlier_names_of_settings_are_read_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    from pipelines.config import section

    section._told.clear()
    earlier = {"distill.running_batch": 3, "bench.running_batch": 4, "bench.load": [1, 2], "bench.load_requests": 5,
               "serve.max_batch": 6}
    for _ in range(2):
        config = load_config(None, earlier)
    assert (config.distill.max_batch_size, config.bench.max_batch_size, config.serve.max_batch_size) == (3, 4, 6)
    assert (config.bench.concurrency, config.bench.concurrency_requests) == ((1, 2), 5)
    assert sorted(record.getMessage() for record in caplog.records) == [
        "bench: the setting `load_requests` is called `concurrency_requests` now",
        "bench: the setting `load` is called `concurrency` now",
        "bench: the setting `running_batch` is called `max_batch_size` now",
        "distill: the setting `running_batch` is called `max_batch_size` now",
        "serve: the setting `max_batch` is called `max_batch_size` now"]
    with pytest.raises(InputError, match="max_batch is the earlier name of max_batch_size: give one of them"):
        load_config(None, {"serve.max_batch": 1, "serve.max_batch_size": 1})
