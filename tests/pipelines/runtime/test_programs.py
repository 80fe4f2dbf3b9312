"""Commands that are shown to people, who paste them into another shell."""

from __future__ import annotations

import shlex
from pathlib import Path

from jobs.runner import read_config
from pipelines.config import load_config
from pipelines.runtime.programs import stage_command
from pipelines.serve.stage import UPDATED_WITH


def test_a_command_has_the_settings_that_it_needs(tmp_path: Path) -> None:
    folder = tmp_path / "my models"
    folder.mkdir()
    config = load_config(None, {"storage": str(tmp_path / "mes données"), "base.model": str(folder), "base.context_limit": 99,
                                "serve.app_name": "other", "serve.port": 9000, "train.lr": 0.5,
                                "tracking.uri": "http://me:hunter2@host:5000"})
    line = stage_command(config, "serve", UPDATED_WITH, "--update", "ray_address=10.0.0.1:6379")
    words = shlex.split(line)
    start = words.index("serve")
    assert words[start + 1:start + 3] == ["--update", "ray_address=10.0.0.1:6379"]
    assert "hunter2" not in line and "train.lr" not in line and "serve.port" not in line
    found = read_config("serve", None, words[start + 2:])
    assert (found.base, found.storage, found.serve.app_name) == (config.base, config.storage, "other")
    assert found.tracking.uri == "http://host:5000"


def test_the_defaults_need_no_words(tmp_path: Path) -> None:
    config = load_config(None, {"storage": str(tmp_path)})
    assert shlex.split(stage_command(config, "serve", ("base.", "serve."), "--update"))[-2:] == ["serve", "--update"]
