"""Command lines for programs of this Python environment."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.config import RunConfig
from pipelines.runtime.artifacts import flatten
from pipelines.runtime.provenance import without_credentials


def program(name: str, module: str | None = None) -> list[str]:
    """The words that start a program of this environment in a shell, whatever its PATH.

    `module`: module to run instead where the program is not installed, as in a checkout.
    """
    here, found = Path(sys.executable).with_name(name), shutil.which(name)
    if not here.exists():
        return [sys.executable, "-m", module] if module else [name]
    return [name] if found and Path(found).resolve() == here.resolve() else [str(here)]


def stage_command(config: RunConfig, stage: str, keep: Sequence[str], *words: str) -> str:
    """The command that runs `stage` from any shell with `words` and, of the settings of `config` that begin with one of `keep`,
    those that are not the defaults."""
    defaults = flatten(RunConfig(storage="/").model_dump(mode="json", by_alias=True))
    given = {name: value for name, value in flatten(config.model_dump(mode="json", by_alias=True)).items()
             if name.startswith(tuple(keep)) and value != defaults.get(name)}
    overrides = [f"{name}={without_credentials(value) if isinstance(value, str) else json.dumps(value)}"
                 for name, value in given.items()]
    return shlex.join([*program("hydra-heads", "jobs.cli"), stage, *words, *overrides])
