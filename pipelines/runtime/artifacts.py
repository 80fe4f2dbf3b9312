"""The folder of a stage: where it writes, when the stage may be skipped, and its manifest.

A stage owns one folder. It is finished when the folder's `manifest.json` has the fingerprint of the request (settings of the
stage, the base, the manifests of earlier stages) and every listed output still has its recorded size and digest. A folder
with another fingerprint belongs to another run and is never overwritten. If outputs change after a stage has finished, the
stage runs again: it removes the files that do not match the manifest and keeps the others.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hydra_core.errors import InputError
from pipelines.config import RunConfig, Section
from pipelines.runtime.files import write_text
from pipelines.runtime.lock import holds, only_run
from pipelines.runtime.provenance import provenance, shareable_yaml

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
CLAIM = "claim.json"
DEVICES = ("auto", "cpu", "cuda")
LEFTOVER = r"\.[0-9a-f]{8}\.(part|old)$"
"""How names end of what `atomic_file` and `atomic_folder` write before they rename it, and of a folder that they replace."""


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


def earlier_bases(config: RunConfig, folder: Path) -> list[dict[str, Any]]:
    """The base as an earlier version may have put it into the fingerprint of `folder`: with the path that it had then, and every
    device."""
    recorded = _recorded(folder)
    base = config.base.model_dump(mode="json")
    return [base | {"model": model, "device": device} for model in {base["model"], recorded.get("base.model", base["model"])}
            for device in DEVICES]


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


def input_digest(field: str, path: Path) -> str:
    """`file_digest` of a file that the setting `field` names. Raises InputError if it cannot be read."""
    try:
        return file_digest(path)
    except OSError as error:
        raise InputError(f"{field}={path}: cannot be read ({error.strerror})") from None


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


def finished(folder: Path, wanted: str, earlier: Collection[str] = ()) -> StageResult | None:
    """The recorded result if the folder has the fingerprint `wanted`, or one of `earlier` (what earlier versions gave to the same
    request), and its files are intact, else None."""
    manifest = read_manifest(folder)
    if manifest is None or manifest["fingerprint"] not in (wanted, *earlier) or damaged(folder):
        return None
    return StageResult(**{**manifest["result"], "skipped": True})


@contextmanager
def stage_folder(config: RunConfig, stage: str, folder: Path, wanted: str, *, earlier: Collection[str] = (),
                 settings: Mapping[str, Any] | None = None) -> Iterator[StageFolder]:
    """Claim `folder` for the fingerprint `wanted`, under the lock of `only_run`. Raises InputError if it holds the output of
    another run, naming the `settings` (by section and name) that differ, or if another process works in it now.

    `earlier`: fingerprints that earlier versions gave to the same request; a folder that has one keeps it.

    What killed writers have left under temporary names is removed. If the block raises before anything is
    written, the claim is removed: the corrected command has another fingerprint, and would be refused as another run.
    """
    with nullcontext() if holds(folder) else only_run(folder, Path(config.storage)):
        ours = not (folder / CLAIM).exists()
        owner = _claim(stage, folder, wanted, earlier, flatten(settings or {}))
        try:
            yield StageFolder(stage, folder, owner, config)
        except BaseException:
            if ours:
                _release(folder, Path(config.storage))
            raise


def _claim(stage: str, folder: Path, wanted: str, earlier: Collection[str], settings: Mapping[str, Any]) -> str:
    """Claim `folder`; returns its fingerprint."""
    claim = folder / CLAIM
    _sweep(folder)
    if not claim.exists():
        if own_content(folder):
            raise InputError(f"{folder}: is not empty and not a `{stage}` output: choose another folder or empty it")
        write_text(claim, json.dumps({"fingerprint": wanted, "stage": stage, "settings": settings}))
        return wanted
    owner = _owner(claim)
    if owner is None or owner not in (wanted, *earlier):
        raise InputError(f"{folder}: holds the `{stage}` output of another run ({_differences(folder, settings)}): "
                         "choose another `name=` or delete that folder")
    for path in damaged(folder):
        path.unlink(missing_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)  # the stage is not finished any more
    return owner


def own_content(folder: Path) -> list[Path]:
    """What lies in `folder`, the claim last, without other outputs inside it (a partition, a second bench) and their locks."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if not path.name.endswith(".lock") and not (path / CLAIM).exists()
             and not (folder / f".{path.name}.lock").exists()]
    return sorted(found, key=lambda path: path.name == CLAIM)


def remove_content(folder: Path) -> None:
    """Remove `own_content`, and then the folder if nothing else is in it."""
    for path in own_content(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    with suppress(OSError):
        folder.rmdir()


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names with plain values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
        flat |= inner
    return flat


def _differences(folder: Path, settings: Mapping[str, Any]) -> str:
    """The settings of the output in `folder` that differ from `settings`, with both values."""
    then = _recorded(folder)
    shown = [f"{name} {_shown(then[name])} -> {_shown(value)}" for name, value in settings.items()
             if name in then and _shown(then[name]) != _shown(value)]
    if not then or not settings:
        return "settings or inputs differ"
    return ", ".join(shown) or "the settings are the same: its inputs were made again, or are others"


def _recorded(folder: Path) -> dict[str, Any]:
    """The settings of the output in `folder`, by dotted name: those of its claim, and those recorded beside a finished one."""
    found: dict[str, Any] = {}
    for file, read in (("config.yaml", yaml.safe_load), (CLAIM, lambda text: json.loads(text).get("settings", {}))):
        with suppress(OSError, ValueError, AttributeError, yaml.YAMLError):  # missing, or broken
            found |= flatten(read((folder / file).read_text(encoding="utf-8")))
    return found


def _shown(value: Any) -> str:
    """A value as an override has it; the same for what JSON or YAML has made of it."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_shown, value))}]"
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)


def _sweep(folder: Path) -> None:
    """Remove what atomic writes of killed processes have left in and beside `folder`, whose lock this process holds."""
    own = re.compile(rf"\.{re.escape(folder.name)}{LEFTOVER}")
    leftovers = [path for path in folder.glob(".*") if re.search(LEFTOVER, path.name)]
    leftovers += [path for path in folder.parent.glob(".*") if own.fullmatch(path.name)]
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _owner(claim: Path) -> str | None:
    try:
        return str(json.loads(claim.read_text(encoding="utf-8"))["fingerprint"])
    except (ValueError, KeyError, TypeError):  # the file is not a claim, or is broken
        return None


def _release(folder: Path, storage: Path) -> None:
    """Remove a folder that holds nothing of its own but its claim, and then the empty folders above it inside the storage."""
    own = own_content(folder)
    if any(path.is_file() and path != folder / CLAIM for found in own for path in (found, *found.rglob("*"))):
        return
    remove_content(folder)
    if folder.exists():
        return
    for parent in folder.parents:
        if storage not in parent.parents or any(parent.iterdir()):
            break
        parent.rmdir()
