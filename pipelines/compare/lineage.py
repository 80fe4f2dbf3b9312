"""Which runs led to a run: the distilling, trainings and trees whose outputs it read, each with the settings that it recorded.

A run logs the folders that it reads. The manifest in such a folder names the run that wrote it, which may belong to another
chain. Where the folder is gone, or was written again since, the latest finished run of that stage in the same chain counts that
began before the reader.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hydra_core.bundled import BUNDLED, EARLIER
from hydra_core.storage import as_path
from pipelines.compare.reports import report_of
from pipelines.runtime.artifacts import RunPaths, read_manifest, recorded
from pipelines.runtime.artifacts import flatten as flatten_values
from pipelines.tracking import Chain, Input, RunReader, RunRecord

HEADS = " heads"
"""How the names of inputs end that are heads; before it stands the drafter's name."""
ORDER = ("distill", "train", "tree", "bench", "promote")
"""Stages in the order in which they follow each other; all others come last."""


@dataclass(frozen=True)
class StageRun:
    """A run of one stage that led to what is compared, or that run itself.

    `run`: None where only its folder is known; `params`: the flattened configuration that it recorded; `manifest`: of its
    folder, empty where it is not known.
    """

    stage: str
    part: str | None
    run: RunRecord | None
    params: Mapping[str, str]
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        return self.stage, self.part or ""


def stages_behind(reader: RunReader, chain: Chain, runs: tuple[RunRecord, ...]) -> tuple[StageRun, ...]:
    """`runs`, which are complete, and everything that led to them, in the order of the stages."""
    found: dict[tuple[str, str], StageRun] = {}
    todo = [StageRun(run.stage, run.part, run, run.params, own_manifest(run)) for run in runs]
    while todo:
        one = todo.pop(0)
        if one.key in found:
            continue
        found[one.key] = one
        if one.run is not None:
            todo += _producers(reader, _chain_of(reader, chain, one.run), one.run)
        elif one.stage in ("train", "tree"):
            todo += _beside(one)
    rank = {stage: place for place, stage in enumerate(ORDER)}
    return tuple(sorted(found.values(), key=lambda one: (rank.get(one.stage, len(ORDER)), one.part or "")))


def own_manifest(run: RunRecord) -> Mapping[str, Any]:
    """The manifest that `run` has written into its chain's folder; empty where that is not reached, or another run wrote it."""
    name, _, storage = run.tags.get("hydra_heads.chain", "").partition("@")
    if not storage or not run.stage:
        return {}
    try:
        folder = RunPaths(as_path(storage), name).stage(run.stage, run.part)
        for place in (folder, *(path.parent for path in folder.glob("*/manifest.json"))):
            manifest = read_manifest(place)
            if manifest is not None and manifest["result"]["run_id"] == run.run_id:
                return manifest
    except Exception:  # of a storage that is not reached from here: each kind raises its own exceptions
        pass
    return {}


def _chain_of(reader: RunReader, chain: Chain, run: RunRecord) -> Chain:
    """The chain that `run` belongs to, which heads of another chain lead to."""
    same = run.parent_id is None or run.parent_id == chain.parent_id or any(one.run_id == run.run_id for one in chain.runs)
    return chain if same else reader.find(run.run_id)


def _producers(reader: RunReader, chain: Chain, run: RunRecord) -> list[StageRun]:
    """The runs that wrote what `run` has read."""
    wanted: list[tuple[str, str | None, Input | None]] = []
    heads = {one.name.removesuffix(HEADS): one for one in run.inputs if one.name.endswith(HEADS)}
    rows = next((one for one in run.inputs if one.name in ("features", "prompts")), None)
    if run.stage == "bench":
        trees = [one.part for one in (*chain.finished("tree"), *chain.finished("train")) if one.part and not heads]
        wanted += [("tree", name, heads.get(name)) for name in dict.fromkeys((*heads, *trees)) if name not in (BUNDLED, EARLIER)]
        wanted += [("distill", None, rows)] if run.params.get("bench.prompts", "None") == "None" else []
    elif run.stage == "tree":
        wanted += [("train", run.part, heads.get(run.part or ""))]
    elif run.stage == "promote":
        wanted += [("bench", None, None)]
    elif run.stage in ("load", "batch"):
        return _served(reader, run)
    elif run.stage != "distill":
        wanted += [("distill", None, rows)]
    found = [_producer(reader, chain, run, *one) for one in wanted]
    return [one for one in found if one is not None]


def _producer(reader: RunReader, chain: Chain, consumer: RunRecord, stage: str, part: str | None,
              source: Input | None) -> StageRun | None:
    """The run of `stage` whose output `consumer` has read; heads that have no tree yet come from `train`."""
    if source is not None and (one := _writer(reader, consumer, part, source)) is not None:
        return one
    for name in ("tree", "train") if stage == "tree" else (stage,):
        for run in chain.finished(name, part):
            if run.started <= consumer.started and run.run_id != consumer.run_id:
                complete = reader.complete(run)
                return StageRun(name, run.part, complete, complete.params, own_manifest(complete))
    return None


def _writer(reader: RunReader, consumer: RunRecord, part: str | None, source: Input) -> StageRun | None:
    """What the folder of `source` says of the run that wrote it, None where it says nothing or was written again later."""
    try:
        place = as_path(source.path)
        folder = next((folder for folder in (place, place.parent) if (folder / "manifest.json").exists()), None)
        if folder is None:
            return _copied_heads(place, part)
        manifest = read_manifest(folder) or {}
        stage, run_id = str(manifest["stage"]), manifest["result"]["run_id"]
        if run_id is None:
            return StageRun(stage, part, None, _texts(recorded(folder)), manifest)
    except Exception:  # of a storage that is not reached from here: each kind raises its own exceptions
        return None
    run = reader.get(run_id)
    if run is None or run.started > consumer.started:
        return None
    run = reader.complete(run)
    return StageRun(stage, run.part, run, run.params, manifest)


def _copied_heads(folder: Any, part: str | None) -> StageRun | None:
    """Heads that lie outside of any run: what their `provenance.json` says of their training."""
    path = folder / "provenance.json"
    if not path.exists():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))["config"]
    return StageRun("train", part, None, _texts(flatten_values(config)))


def _beside(one: StageRun) -> list[StageRun]:
    """The distilling behind a training of which only the configuration is known: that configuration has its settings too."""
    return [StageRun("distill", None, None, one.params)] if any(name.startswith("prompts.") for name in one.params) else []


def _served(reader: RunReader, run: RunRecord) -> list[StageRun]:
    """The run that registered the model which answered, as `load` records it with its params and `batch` in its report."""
    label = run.params.get("serves") or str(report_of(reader, run).get("model", ""))
    version = _VERSION.match(label)
    promoted = reader.run_of_version(version["name"], version["one"] or version["other"]) if version else None
    if promoted is None:
        return []
    promoted = reader.complete(promoted)
    return [StageRun("promote", None, promoted, promoted.params, own_manifest(promoted))]


_VERSION = re.compile(r"models:/(?P<name>[^/@ ]+)(/(?P<one>\d+)$|@\S+ \(version (?P<other>\d+)\))")
"""How a model of the registry is called: by its version, or by an alias with the version that it named then."""


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}
