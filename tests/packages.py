"""Packages that a test takes for installed or missing."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest


def pretend(patch: pytest.MonkeyPatch, name: str, installed: bool) -> None:
    """Whether `name` is found by who looks for it. All other packages are found as they are: MLflow, for one, looks for a package
    once and keeps what it found for the process."""
    real = importlib.util.find_spec

    def find(asked: str, *more: Any) -> Any:
        return (object() if installed else None) if asked == name else real(asked, *more)

    patch.setattr(importlib.util, "find_spec", find)
