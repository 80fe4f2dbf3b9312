"""How an output came to be: settings, code, versions, machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from pipelines.config import RunConfig

PACKAGES = ("hydra-heads", "torch", "ray", "deepspeed", "transformers", "mlflow", "numpy", "pyarrow")


def provenance(config: RunConfig) -> dict[str, Any]:
    """Resolved config with defaults, git commit (None outside a checkout), versions, argv and machine."""
    return {"config": config.model_dump(mode="json", by_alias=True), "git": _git(), "versions": _versions(),
            "argv": sys.argv, "python": platform.python_version(), "platform": platform.platform(),
            "cpus": os.cpu_count(), "processor": _processor()}


def _git() -> dict[str, Any] | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # an installed package or Ray's unpacked copy
        return None
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit.stdout.strip(), "changed": bool(changed.stdout.strip())}


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()
