"""The linter and the type checker have nothing to say."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SCRIPTS = ("tests.gpu_steps", "tests.mutation", "tests.train_speed")
"""Run by hand, so that no test sees a name in them that is gone."""


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["mypy"], ["mypy", "--strict", "-p", "hydra_core"]], ids=" ".join)
def test_is_clean(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_can_be_imported(name: str) -> None:
    importlib.import_module(name)
