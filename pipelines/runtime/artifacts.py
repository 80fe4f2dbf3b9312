"""The folder of a stage: where it writes, when the stage may be skipped, and its manifest.

A stage owns one folder. It is finished when the folder's `manifest.json` has the fingerprint of the request (settings of the
stage, the base, the manifests of earlier stages) and every listed output is still what it was: a file has its recorded size and
time of change, or else its digest, and an object the size and tag of one listing, so that nothing large is read to find that out.
A folder with another fingerprint belongs to another run and is never overwritten. If outputs change after a stage has finished,
the stage runs again: it removes the files that do not match the manifest and keeps the others.
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

from hydra_core import storage as stores
from hydra_core.errors import InputError
from hydra_core.storage import as_path, is_remote
from pipelines.config import RunConfig, Section
from pipelines.runtime.files import remove_empty, remove_file, remove_tree, write_text
from pipelines.runtime.lock import check_held, holds, only_run
from pipelines.runtime.provenance import provenance, shareable_yaml

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
CLAIM = "claim.json"
CHANGED = "mtime_ns"
"""Of a file in a manifest: when it was changed, in nanoseconds since 1970."""
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
        return cls(as_path(config.storage), config.name)

    @property
    def run(self) -> Path:
        return self.storage / "runs" / self.name

    @property
    def cache(self) -> Path:
        """What can be made again: of this machine alone where the storage is an object store."""
        return stores.local_cache() if is_remote(self.storage) else self.storage / "cache"

    def stage(self, stage: str, part: str | None = None) -> Path:
        """Folder of a stage, or of the part of it that belongs to one drafter."""
        return self.run / stage / part if part else self.run / stage


def served_folder(config: RunConfig) -> str:
    """Where the endpoint of `serve.app_name` records its answers, and where `distill` reads them, unless `prompts.path` says."""
    if config.prompts.source == "served" and config.prompts.path:
        return config.prompts.path
    return config.serve.record.folder or str(as_path(config.storage) / "served" / config.serve.app_name)


def recorded_settings(section: Section, **options: Any) -> dict[str, Any]:
    """A section as fingerprints hold it: with the earlier names of what was renamed, so that earlier outputs count as done.

    `options`: of pydantic's `model_dump`.
    """
    earlier = {now: before for before, now in section.renamed.items()}
    return {earlier.get(name, name): value for name, value in section.model_dump(**options).items()}


def earlier_bases(config: RunConfig, folder: Path) -> list[dict[str, Any]]:
    """The base as an earlier version may have put it into the fingerprint of `folder`: with the path that it had then, and every
    device."""
    known = recorded(folder)
    base = config.base.model_dump(mode="json")
    return [base | {"model": model, "device": device} for model in {base["model"], known.get("base.model", base["model"])}
            for device in DEVICES]


def fingerprint(stage: str, settings: Mapping[str, Any], upstream: Mapping[str, str]) -> str:
    """Digest of a stage's request: its settings, and the fingerprints or digests of its inputs."""
    text = json.dumps({"stage": stage, "settings": settings, "upstream": dict(upstream), "schema": SCHEMA_VERSION},
                      sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with stores.open_stream(path) as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def input_digest(field: str, path: Path) -> str:
    """`file_digest` of a file that the setting `field` names. Raises InputError if it cannot be read."""
    try:
        return file_digest(path)
    except OSError as error:
        raise InputError(f"{field}={path}: cannot be read ({error.strerror or error})") from None


@dataclass
class StageFolder:
    """The folder of a running stage. `finish` writes the manifest, with which the stage is finished."""

    stage: str
    folder: Path
    fingerprint: str
    config: RunConfig
    started: float = field(default_factory=time.time)

    def finish(self, result: StageResult, files: list[Path]) -> StageResult:
        """Write the manifest: `result`, and what tells `files` (absolute paths inside the folder) from others.

        Raises StoppedError if another run has taken over meanwhile.
        """
        check_held(self.folder)
        manifest: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "stage": self.stage,
            "fingerprint": self.fingerprint,
            "seconds": round(time.time() - self.started, 3),
            "result": asdict(result),
            "files": _described(self.folder, files),
        }
        lasting = {name: {key: value for key, value in entry.items() if key != CHANGED}
                   for name, entry in manifest["files"].items()}
        manifest["digest"] = hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()
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
    listed: dict[str, Any] = {} if manifest is None else manifest["files"]
    found = stores.listing(folder) if is_remote(folder) and listed else {}
    return [folder / name for name, entry in listed.items() if not _matches(folder / name, entry, found.get(name))]


def _described(folder: Path, files: list[Path]) -> dict[str, dict[str, Any]]:
    """Name -> size, and digest and time of change, or the tag that the object store gave."""
    if is_remote(folder):
        found = stores.listing(folder)
        return {name: {"bytes": found[name].bytes, "tag": found[name].tag}
                for name in sorted(stores.name_in(path, folder) for path in files)}
    return {str(path.relative_to(folder)): {"bytes": (about := path.stat()).st_size, "sha256": file_digest(path),
                                            CHANGED: about.st_mtime_ns} for path in sorted(files)}


def _matches(path: Path, entry: Mapping[str, Any], found: stores.Stored | None) -> bool:
    """Whether a file or object is the one of a manifest's `entry`; `found`: what the store says of it. What was copied from
    another kind of storage since has neither time nor tag, and is known by its digest, or at least its size."""
    if is_remote(path):
        if found is None or found.bytes != entry["bytes"]:
            return False
        return found.tag == entry["tag"] if "tag" in entry else file_digest(path) == entry["sha256"]
    if not path.is_file() or (about := path.stat()).st_size != entry["bytes"]:
        return False
    return about.st_mtime_ns == entry.get(CHANGED) or "sha256" not in entry or file_digest(path) == entry["sha256"]


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
    with nullcontext() if holds(folder) else only_run(folder, as_path(config.storage)):
        ours = not (folder / CLAIM).exists()
        owner = _claim(stage, folder, wanted, earlier, flatten(settings or {}))
        try:
            yield StageFolder(stage, folder, owner, config)
        except BaseException:
            if ours:
                _release(folder, as_path(config.storage))
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
        remove_file(path)
    remove_file(folder / MANIFEST)  # the stage is not finished any more
    return owner


def own_content(folder: Path) -> list[Path]:
    """What lies in `folder`, the claim last, without other outputs inside it (a partition, a second bench) and their locks."""
    if is_remote(folder):
        names = stores.listing(folder)
        tops = {name.split("/")[0] for name in names}
        others = {top for top in tops if f"{top}/{CLAIM}" in names or f".{top}.lock" in tops or top.endswith(".lock")}
        return sorted((folder / top for top in tops - others), key=lambda path: (path.name == CLAIM, path.name))
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if not path.name.endswith(".lock") and not (path / CLAIM).exists()
             and not (folder / f".{path.name}.lock").exists()]
    return sorted(found, key=lambda path: path.name == CLAIM)


def remove_content(folder: Path) -> None:
    """Remove `own_content`, and then the folder if nothing else is in it."""
    for path in own_content(folder):
        if is_remote(path):
            remove_tree(path)
            remove_file(path)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    remove_empty(folder)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names with plain values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
        flat |= inner
    return flat


def _differences(folder: Path, settings: Mapping[str, Any]) -> str:
    """The settings of the output in `folder` that differ from `settings`, with both values."""
    then = recorded(folder)
    shown = [f"{name} {_shown(then[name])} -> {_shown(value)}" for name, value in settings.items()
             if name in then and _shown(then[name]) != _shown(value)]
    if not then or not settings:
        return "settings or inputs differ"
    return ", ".join(shown) or "the settings are the same: its inputs were made again, or are others"


def recorded(folder: Path) -> dict[str, Any]:
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
    if is_remote(folder):  # an upload that was killed has left nothing
        return
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


def claimed_by(folder: Path) -> str | None:
    """The fingerprint of the request that `folder` belongs to, finished or not; None where no stage has claimed it."""
    return _owner(folder / CLAIM) if (folder / CLAIM).exists() else None


def _release(folder: Path, storage: Path) -> None:
    """Remove a folder that holds nothing of its own but its claim, and then the empty folders above it inside the storage."""
    own = own_content(folder)
    if is_remote(folder):
        kept = {path.name for path in own}
        if any(name.split("/")[0] in kept and name != CLAIM for name in stores.listing(folder)):
            return
    elif any(path.is_file() and path != folder / CLAIM for found in own for path in (found, *found.rglob("*"))):
        return
    remove_content(folder)
    if folder.exists() or is_remote(folder):
        return
    for parent in folder.parents:
        if storage not in parent.parents or any(parent.iterdir()):
            break
        parent.rmdir()
