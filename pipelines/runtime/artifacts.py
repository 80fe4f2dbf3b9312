"""The folder of a stage: where it writes, when the stage may be skipped, and its manifest.

A stage owns one folder. It is finished when the folder's `manifest.json` has the fingerprint of the request (settings of the
stage, the base, the manifests of earlier stages) and every listed output still has its recorded size and digest. A folder
with another fingerprint belongs to another run and is never overwritten. If outputs change after a stage has finished, the
stage runs again: it removes the files that do not match the manifest and keeps the others.
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
from pipelines.config import RunConfig, Section
from pipelines.runtime.files import write_text
from pipelines.runtime.provenance import provenance, shareable_yaml

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
CLAIM = "claim.json"


@dataclass(frozen=True)
class StageResult:
    """The result of a stage: the one JSON line that a job prints.

    `outputs` maps names to absolute paths; `figures` holds numbers and short texts, which are top-level names of that line;
    `skipped` says that the stage had finished before and did not run.
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
    """The folders of one run, absolute, under the storage root."""

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
        """Folder of a stage, or of the part of it that belongs to one drafter."""
        return self.run / stage / part if part else self.run / stage


def recorded_settings(section: Section, **options: Any) -> dict[str, Any]:
    """A section as fingerprints hold it: with the earlier names of what was renamed, so that earlier outputs count as done.

    `options`: of pydantic's `model_dump`.
    """
    earlier = {now: before for before, now in section.renamed.items()}
    return {earlier.get(name, name): value for name, value in section.model_dump(**options).items()}


def fingerprint(stage: str, settings: Mapping[str, Any], upstream: Mapping[str, str]) -> str:
    """Digest of a stage's request: its settings, and the fingerprints or digests of its inputs."""
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
    """The folder of a running stage. `finish` writes the manifest, with which the stage is finished."""

    stage: str
    folder: Path
    fingerprint: str
    config: RunConfig
    started: float = field(default_factory=time.time)

    def finish(self, result: StageResult, files: list[Path]) -> StageResult:
        """Write the manifest: `result`, and size and sha256 of `files` (absolute paths inside the folder)."""
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
    """The manifest of a folder, or None if no stage has finished there. Raises InputError for a broken one."""
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
    """The manifest of an earlier stage. Raises InputError, which names the stage to run first, if there is none."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder}: no finished `{stage}` here: run `hydra-heads {stage}` with the same name and storage")
    return manifest


def damaged(folder: Path) -> list[Path]:
    """Files that are missing or do not match the manifest of the folder; none if it has no manifest."""
    manifest = read_manifest(folder)
    listed = {} if manifest is None else {folder / name: entry for name, entry in manifest["files"].items()}
    return [path for path, entry in listed.items() if not path.is_file() or path.stat().st_size != entry["bytes"]
            or file_digest(path) != entry["sha256"]]


def finished(folder: Path, wanted: str) -> StageResult | None:
    """The recorded result if the folder has the fingerprint `wanted` and its files are intact, else None."""
    manifest = read_manifest(folder)
    if manifest is None or manifest["fingerprint"] != wanted or damaged(folder):
        return None
    return StageResult(**{**manifest["result"], "skipped": True})


@contextmanager
def stage_folder(config: RunConfig, stage: str, folder: Path, wanted: str) -> Iterator[StageFolder]:
    """Claim `folder` for the fingerprint `wanted`. Raises InputError if it holds the output of another run.

    A folder that holds only temporary claims of killed writers counts as empty. If the block raises before anything is
    written, the claim is removed: the corrected command has another fingerprint, and would be refused as another run.
    """
    claim = folder / CLAIM
    ours = not claim.exists()
    if not ours:
        if _owner(claim) != wanted:
            raise InputError(f"{folder}: holds the `{stage}` output of another run (settings or inputs differ): "
                             "choose another `name=` or delete that folder")
        for path in damaged(folder):
            path.unlink(missing_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)  # the stage is not finished any more
    elif folder.exists() and any(not path.name.startswith(f".{CLAIM}.") for path in folder.iterdir()):
        raise InputError(f"{folder}: is not empty and not a `{stage}` output: choose another folder or empty it")
    else:
        write_text(claim, json.dumps({"fingerprint": wanted, "stage": stage}))
    try:
        yield StageFolder(stage, folder, wanted, config)
    except BaseException:
        if ours:
            _release(folder, Path(config.storage))
        raise


def _owner(claim: Path) -> str | None:
    try:
        return str(json.loads(claim.read_text(encoding="utf-8"))["fingerprint"])
    except (ValueError, KeyError, TypeError):  # the file is not a claim, or is broken
        return None


def _release(folder: Path, storage: Path) -> None:
    """Remove a folder that holds nothing but its claim, and then the empty folders above it inside the storage."""
    if any(path.is_file() and path != folder / CLAIM for path in folder.rglob("*")):
        return
    shutil.rmtree(folder)
    for parent in folder.parents:
        if storage not in parent.parents or any(parent.iterdir()):
            break
        parent.rmdir()
