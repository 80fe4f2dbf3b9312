"""Every command calls its own stage, and every setting that is a path is one wherever the stage runs."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from hydra_core.errors import InputError
from jobs import cli
from jobs.paths import PATH_FIELDS
from jobs.runner import STAGES, read_config
from pipelines.config import RunConfig
from pipelines.runtime.artifacts import StageResult

CHOSEN = ["name=this", "base.dtype=fp32"]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, RunConfig]]:
    """Which stages were called, with which settings."""
    found: list[tuple[str, RunConfig]] = []
    for name in STAGES:
        package = importlib.import_module(f"pipelines.{name}")

        def run(config: RunConfig, name: str = name) -> StageResult:
            found.append((name, config))
            return StageResult(name, None, {}, {"made": name})

        monkeypatch.setitem(package.__dict__, f"run_{name}", run)  # in place of the name that would import the stage
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_module_and_a_command_run_the_stage_of_their_name(stage: str, called: list[tuple[str, RunConfig]], tmp_path: Path,
                                                            capfd: pytest.CaptureFixture[str]) -> None:
    words = [f"storage={tmp_path}", *CHOSEN]
    assert importlib.import_module(f"jobs.{stage}").main(words) == 0
    assert cli.main([stage, *words]) == 0
    assert [name for name, _ in called] == [stage, stage]
    assert all((config.name, config.storage) == ("this", str(tmp_path)) for _, config in called)
    for line in capfd.readouterr().out.splitlines():
        assert (json.loads(line)["stage"], json.loads(line)["made"]) == (stage, stage)


def path_settings() -> set[str]:
    """Settings whose description speaks of a file or folder on disk."""
    found = set()
    for section, field in RunConfig.model_fields.items():
        for name, setting in getattr(field.annotation, "model_fields", {}).items():
            text = str(setting.annotation)
            if "str" in text and re.search(r"\b(file|folder|directory|JSONL|path)\b", setting.description or ""):
                found.add(f"{section}.{name}")
    return found


def test_every_setting_that_is_a_path_is_known_as_one() -> None:
    """A new one has to be made absolute too: inside a submitted job a relative path has no meaning."""
    elsewhere = {"train.start"}  # a map, made absolute by itself
    others = path_settings() - {*PATH_FIELDS} - elsewhere
    assert not others, f"{sorted(others)}: say that it is a path in jobs/paths.py"


def value_of(config: RunConfig, dotted: str) -> Any:
    section, name = dotted.split(".")
    return getattr(getattr(config, section), name)


BESIDE = {"prompts.path": ["prompts.source=jsonl"], "serve.tls_keyfile": ["serve.tls_certfile=/c.pem"],
          "serve.tls_certfile": ["serve.tls_keyfile=/k.pem"]}
"""What such a setting needs beside it."""


@pytest.mark.parametrize("dotted", PATH_FIELDS)
def test_relative_paths_are_the_callers(dotted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x.gguf").touch()
    beside = BESIDE.get(dotted, [])
    words = [f"storage={tmp_path}", f"{dotted}=./there/x.gguf", *beside]
    assert value_of(read_config("batch", None, words), dotted) == str(tmp_path / "there" / "x.gguf")
    whole = f"{tmp_path}/there/x.gguf"
    assert value_of(read_config("batch", None, [f"{dotted}={whole}", *beside]), dotted) == whole
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(InputError, match=rf"{re.escape(dotted)}=\./there/x\.gguf: is a relative path"):
        read_config("batch", None, words)
    assert value_of(read_config("batch", None, [f"{dotted}={whole}", *beside]), dotted) == whole
