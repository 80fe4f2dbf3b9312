"""Command lines for programs of this Python environment."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def program(name: str, module: str | None = None) -> list[str]:
    """The words that start a program of this environment in a shell, whatever its PATH.

    `module`: module to run instead where the program is not installed, as in a checkout.
    """
    here, found = Path(sys.executable).with_name(name), shutil.which(name)
    if not here.exists():
        return [sys.executable, "-m", module] if module else [name]
    return [name] if found and Path(found).resolve() == here.resolve() else [str(here)]
