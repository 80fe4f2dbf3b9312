"""The linter and the type checker have nothing to say."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib

import pytest

from tests.conftest import ROOT

SCRIPTS = ("tests.gpu_steps", "tests.mutation", "tests.train_speed")
"""Run by hand, so that no test sees a name in them that is gone."""


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["mypy"]], ids=" ".join)
def test_is_clean(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hydra_core_is_checked_strictly() -> None:
    """One run checks all packages, so what `mypy --strict` means stands in pyproject.toml for `hydra_core`."""
    told = subprocess.run([sys.executable, "-m", "mypy", "--help"], capture_output=True, text=True, check=True).stdout
    listed = re.search(r"enables the following flags:(.*?)\n  --", told, re.DOTALL)
    assert listed
    flags = re.sub(r"-\s+", "-", listed[1]).replace("\n", " ").replace(" ", "").split(",")
    assert "--disallow-untyped-calls" in flags and len(flags) >= 13
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    strict = settings | next(one for one in settings["overrides"] if one["module"] == ["hydra_core.*"])
    for flag in flags:
        name = flag.removeprefix("--").replace("-", "_")
        assert strict.get(name.removeprefix("no_")) is (not name.startswith("no_")), flag


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_can_be_imported(name: str) -> None:
    importlib.import_module(name)
