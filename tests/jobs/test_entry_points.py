"""Every entry point runs its own stage; every path that a job is given is checked."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from hydra_core.errors import InputError
from jobs import runner
from jobs.paths import JOB_VARIABLE, PATH_FIELDS
from pipelines.config import RunConfig, list_settings, load_config
from pipelines.runtime.artifacts import StageResult
from tests.conftest import ROOT

OTHERS = {"runner", "stages", "cli", "usage", "summary", "paths", "__init__"}
NO_PATHS = {"storage", "prompts.field", "prompts.source", "distill.rows_per_file", "distill.features", "batch.format",
            "batch.field", "batch.rows_per_file", "batch.partition", "train.features", "train.drafters", "name", "prompts.count",
            "prompts.self_made", "prompts.split", "train.start", "train.dry_run", "bench.methods", "distill.feature_dtype",
            "batch.engine", "tracking.uri", "prompts.starts"}
"""Settings whose description speaks of files or folders, and that hold none, or whose path is checked otherwise."""


def test_every_stage_has_an_entry_point_and_no_other_file_is_one() -> None:
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} - OTHERS == set(runner.STAGES)


@pytest.mark.parametrize("stage", runner.STAGES)
def test_an_entry_point_runs_its_own_stage(stage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                           capfd: pytest.CaptureFixture[str]) -> None:
    """Down to `run_STAGE` of `pipelines.STAGE`, with the settings of the command line."""
    seen: list[tuple[str, RunConfig]] = []

    def record(config: RunConfig) -> StageResult:
        seen.append((stage, config))
        return StageResult(stage, None, {}, {"here": stage})

    monkeypatch.setattr(importlib.import_module(f"pipelines.{stage}"), f"run_{stage}", record)
    words: list[str] = [f"storage={tmp_path}", "name=mine", "base.dtype=fp32"]
    assert importlib.import_module(f"jobs.{stage}").main(words) == 0
    ((_, config),) = seen
    assert (config.storage, config.name) == (str(tmp_path), "mine")
    assert f'"here": "{stage}"' in capfd.readouterr().out


@pytest.mark.parametrize("field", [*PATH_FIELDS, "train.start.medusa"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_relative_path_of_every_field(field: str, inside: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Outside a job it is the caller's; inside it would point into Ray's unpacked copy."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.delenv(JOB_VARIABLE, raising=False)
    if inside:
        monkeypatch.setenv(JOB_VARIABLE, "{}")
    words = [f"{field}=here", *(["prompts.source=jsonl"] if field == "prompts.path" else [])]
    if inside:
        with pytest.raises(InputError, match=rf"^{re.escape(field)}=here: is a relative path, which has no meaning"):
            runner.read_config("batch", None, words)
        words[0] = f"{field}=/data/here"
        assert value_of(runner.read_config("batch", None, words), field) == "/data/here"
    else:
        assert value_of(runner.read_config("batch", None, words), field) == str(tmp_path / "here")


def value_of(config: RunConfig, dotted: str) -> Any:
    found: Any = config
    for name in dotted.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    return found


def test_every_setting_that_names_a_file_is_checked() -> None:
    speaks = {setting.name for setting in list_settings(RunConfig) if "text" in setting.kind
              and re.search(r"\b(files?|folders?|directory|JSONL|path)\b", setting.description)}
    assert speaks - NO_PATHS - set(PATH_FIELDS) == set()
    assert set(PATH_FIELDS) <= {setting.name for setting in list_settings(load_config(None, {"storage": "/"}).__class__)}
