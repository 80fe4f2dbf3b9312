"""Rows of several runs, which `train` and `tree` read as one: this run's, and those of the runs in `train.also`."""

from __future__ import annotations

from pathlib import Path

from hydra_core.errors import InputError
from pipelines.config import RunConfig
from pipelines.runtime.artifacts import RunPaths, read_manifest


def other_rows(config: RunConfig, part: str = "features") -> tuple[Path, ...]:
    """The folders of `part` (features, responses) of the other runs, in the order of their names; none without `train.also`."""
    storage = RunPaths.of(config).storage
    return tuple(RunPaths(storage, name).stage("distill", part) for name in sorted(set(config.train.also) - {config.name}))


def other_fingerprints(config: RunConfig) -> list[str]:
    """The fingerprints of what the other runs have distilled, in the order of `other_rows`. Raises InputError for a run that has
    not finished it."""
    found = []
    for folder in other_rows(config):
        manifest = read_manifest(folder.parent)
        if manifest is None:
            raise InputError(f"train.also={folder.parent.parent.name}: {folder.parent} has no finished `distill`: name a run of "
                             "this storage that has, or leave it out")
        found.append(str(manifest["fingerprint"]))
    return found
