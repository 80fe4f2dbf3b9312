"""Where a stage writes, when it may be skipped, and what it leaves behind.

A stage owns one folder. It is done when the folder's `manifest.json` carries the fingerprint of what was asked (the
stage's settings, the base, the manifests it built on) and every listed output still has its recorded size and digest.
A folder with another fingerprint belongs to another run and is never overwritten. A stage whose outputs were changed
after it had finished is made again: what no longer is what the manifest says goes, the rest stays.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra_core.errors import InputError
from pipelines.config import RunConfig
from pipelines.runtime.files import write_text
from pipelines.runtime.provenance import provenance, shareable_yaml

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
CLAIM = "claim.json"


@dataclass(frozen=True)
class StageResult:
    """What a stage hands back: the one JSON line a job prints.

    `outputs` maps names to absolute paths, `figures` holds numbers and short texts (top-level names of that line),
    `skipped` says that a finished stage was found and not run again.
    """

    stage: str
    run_id: str | None
    outputs: dict[str, str]
    figures: dict[str, Any]
    skipped: bool = False

    def to_json(self) -> str:
        line = self.figures | {"stage": self.stage, "run_id": self.run_id, "outputs": self.outputs, "skipped": self.skipped}
        return json.dumps(line, sort_keys=True)


@dataclass(frozen=True)
class RunPaths:
    """Every folder of one run, absolute, under the storage root."""

    storage: Path
    name: str

    @classmethod
    def of(cls, config: RunConfig) -> RunPaths:
        return cls(Path(config.storage), config.name)

    @property
    def run(self) -> Path:
        return self.storage / "runs" / self.name

    @property
    def cache(self) -> Path:
        return self.storage / "cache"

    def stage(self, stage: str, part: str | None = None) -> Path:
        """Folder of a stage, or of one drafter's part of it (`++` is no trouble for a file system)."""
        return self.run / stage / part if part else self.run / stage


def fingerprint(stage: str, settings: Mapping[str, Any], upstream: Mapping[str, str]) -> str:
    """Digest of what a stage was asked to do: its settings and the fingerprints or digests it builds on."""
    text = json.dumps({"stage": stage, "settings": settings, "upstream": dict(upstream), "schema": SCHEMA_VERSION},
                      sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass
class StageFolder:
    """One stage's folder while it runs; `finish` writes the manifest that makes it done."""

    stage: str
    folder: Path
    fingerprint: str
    config: RunConfig
    started: float = field(default_factory=time.time)

    def finish(self, result: StageResult, files: list[Path]) -> StageResult:
        """Record `files` (absolute, inside the folder) with size and sha256, and the result itself."""
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "stage": self.stage,
            "fingerprint": self.fingerprint,
            "seconds": round(time.time() - self.started, 3),
            "result": asdict(result),
            "files": {str(path.relative_to(self.folder)): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
                      for path in sorted(files)},
        }
        manifest["digest"] = hashlib.sha256(json.dumps(manifest["files"], sort_keys=True).encode()).hexdigest()
        write_text(self.folder / "config.yaml", shareable_yaml(self.config))
        write_text(self.folder / "provenance.json", json.dumps(provenance(self.config), indent=2, sort_keys=True))
        write_text(self.folder / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True))
        return result


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest, or None when the stage has not finished there. Raises InputError if it is broken."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{path}: is not a readable manifest: delete the folder and run the stage again") from None
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"{path}: schema_version {manifest.get('schema_version')} is not {SCHEMA_VERSION}")
    return manifest


def require_manifest(folder: Path, stage: str) -> dict[str, Any]:
    """The manifest of a stage this one builds on. Raises InputError that says which stage to run first."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder}: no finished `{stage}` here: run `hydra-heads {stage}` with the same name and storage")
    return manifest


def damaged(folder: Path) -> list[Path]:
    """Files that are missing or no longer what the folder's manifest says; none where there is no manifest."""
    manifest = read_manifest(folder)
    listed = {} if manifest is None else {folder / name: entry for name, entry in manifest["files"].items()}
    return [path for path, entry in listed.items() if not path.is_file() or path.stat().st_size != entry["bytes"]
            or file_digest(path) != entry["sha256"]]


def finished(folder: Path, wanted: str) -> StageResult | None:
    """The recorded result when this very work is done and its files are intact, else None."""
    manifest = read_manifest(folder)
    if manifest is None or manifest["fingerprint"] != wanted or damaged(folder):
        return None
    return StageResult(**{**manifest["result"], "skipped": True})


@contextmanager
def stage_folder(config: RunConfig, stage: str, folder: Path, wanted: str) -> Iterator[StageFolder]:
    """Claim `folder` for this work. Raises InputError when it holds another run's output.

    Whoever fails before anything was written gives the folder up again: the corrected command asks for other work, and
    would be refused as another run.
    """
    claim = folder / CLAIM
    ours = not claim.exists()
    if not ours:
        if _owner(claim) != wanted:
            raise InputError(f"{folder}: holds the `{stage}` output of another run (settings or inputs differ): "
                             "choose another `name=` or delete that folder")
        for path in damaged(folder):
            path.unlink(missing_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)  # not finished any more
    elif folder.exists() and any(not path.name.startswith(f".{CLAIM}.") for path in folder.iterdir()):  # of a killed writer
        raise InputError(f"{folder}: is not empty and not a `{stage}` output: choose another folder or empty it")
    else:
        write_text(claim, json.dumps({"fingerprint": wanted, "stage": stage}))
    try:
        yield StageFolder(stage, folder, wanted, config)
    except BaseException:
        if ours:
            _give_up(folder, Path(config.storage))
        raise


def _owner(claim: Path) -> str | None:
    try:
        return str(json.loads(claim.read_text(encoding="utf-8"))["fingerprint"])
    except (ValueError, KeyError, TypeError):  # not a claim of ours, or no longer
        return None


def _give_up(folder: Path, storage: Path) -> None:
    """Remove a folder that holds nothing but its claim, and the folders above it in the storage that are empty then."""
    if any(path.is_file() and path != folder / CLAIM for path in folder.rglob("*")):
        return
    shutil.rmtree(folder)
    for parent in folder.parents:
        if storage not in parent.parents or any(parent.iterdir()):
            break
        parent.rmdir()
