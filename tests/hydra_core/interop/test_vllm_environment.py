"""How the tests come by a Python with vLLM: made once, whole or not at all, and a reason where it cannot be had."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import vllm_environment
from tests.packages import pretend
from tests.vllm_environment import Missing, find_vllm_python, make_environment


def test_which_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    monkeypatch.setattr(vllm_environment, "make_environment", lambda folder: made.append(folder) or folder / "bin" / "python")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HYDRA_TEST_VLLM", raising=False)
    pretend(monkeypatch, "vllm", installed=False)
    assert find_vllm_python() == str(made[0] / "bin" / "python") and made[0].parent == tmp_path / "hydra-heads-tests"
    monkeypatch.setenv("HYDRA_TEST_VLLM", sys.executable)
    assert find_vllm_python() == sys.executable
    monkeypatch.setenv("HYDRA_TEST_VLLM", str(tmp_path / "none"))
    with pytest.raises(Missing, match=r"HYDRA_TEST_VLLM=.*none: is no Python"):
        find_vllm_python()
    pretend(monkeypatch, "vllm", installed=True)
    assert find_vllm_python() == sys.executable and len(made) == 1
    assert importlib.util.find_spec("vllm") is not None


def test_made_once_by_two_at_once(tmp_path: Path) -> None:
    commands: list[str] = []

    def run(words: Sequence[str]) -> None:
        commands.append(" ".join(words[2:5]))
        (tmp_path / "env").mkdir(exist_ok=words[2] != "venv")
        time.sleep(0.05)

    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "half").touch()  # what a kill has left
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(make_environment(tmp_path / "env", run))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "env" / "bin" / "python"] * 2 and not (tmp_path / "env" / "half").exists()
    assert len(commands) == 3 and commands[1] == "pip install -q" and commands[2] == "pip uninstall -q"


def test_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(words: Sequence[str]) -> None:
        vllm_environment._run([sys.executable, "-c", "import sys; sys.exit('ERROR: No matching distribution found')"])

    with pytest.raises(Missing, match="ended with 1: ERROR: No matching distribution found"):
        make_environment(tmp_path / "env", fails)
    assert not (tmp_path / "env" / "ready").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    with pytest.raises(Missing, match=r"has 1\.0 GiB free, 8 are needed"):
        make_environment(tmp_path / "env", fails)
