"""Programs of this environment, as a shell starts them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def program(name: str, module: str | None = None) -> list[str]:
    """Words that start a program of this environment from a shell, whose PATH may lead to another one or to none.

    `module`: what to run instead where the program was never installed, as in a checkout.
    """
    here, found = Path(sys.executable).with_name(name), shutil.which(name)
    if not here.exists():
        return [sys.executable, "-m", module] if module else [name]
    return [name] if found and Path(found).resolve() == here.resolve() else [str(here)]
