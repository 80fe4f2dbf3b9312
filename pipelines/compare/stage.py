"""`compare`: runs that MLflow recorded, side by side.

    comparisons/NAME/compare.html, compare.md, compare.json    under `storage`, or in `compare.output`

The page is also an artifact of the run of each chain: `comparisons/NAME` there.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from hydra_core.errors import InputError, StoppedError
from hydra_core.storage import as_path, is_remote
from pipelines.compare.build import build_comparison
from pipelines.compare.page import page
from pipelines.compare.records import Comparison
from pipelines.compare.text import markdown, show
from pipelines.config import RunConfig
from pipelines.runtime.artifacts import StageResult
from pipelines.runtime.console import say
from pipelines.runtime.files import write_text
from pipelines.tracking import RunReader

PAGE, TEXT, DATA = "compare.html", "compare.md", "compare.json"
LONGEST = 60
"""Characters of the runs' names in the name of a folder."""


def run_compare(config: RunConfig) -> StageResult:
    """Compare `compare.runs`: print tables, write the page, and link it from the chains' runs.

    Raises InputError for fewer than two runs, and for runs that are not found, not finished or have no stage in common.
    """
    _check_output(config)
    reader = RunReader.open(config)
    comparison = build_comparison(reader, config)
    show(comparison)
    folder = as_path(config.compare.output or config.storage)
    if config.compare.output is None:
        folder = folder / "comparisons" / slug(comparison)
    write_text(folder / PAGE, page(comparison))
    write_text(folder / TEXT, markdown(comparison))
    write_text(folder / DATA, comparison.to_json())
    linked = _link(reader, comparison, folder)
    outputs = {"page": folder / PAGE, "markdown": folder / TEXT, "data": folder / DATA}
    return StageResult("compare", None, {name: str(path) for name, path in outputs.items()},
                       _figures(comparison) | {"linked_from": linked})


def slug(comparison: Comparison) -> str:
    """The name of a comparison's folder: the runs' names, and a digest of which runs of them were compared."""
    names = re.sub(r"[^\w.+-]+", "-", "-".join(comparison.labels)).strip("-.")[:LONGEST]
    ids = " ".join(run_id for run in comparison.runs for run_id in run.run_ids)
    return f"{names}-{hashlib.sha256(ids.encode()).hexdigest()[:8]}"


def _check_output(config: RunConfig) -> None:
    """Raise InputError, before anything is read, for a folder that holds other things."""
    if config.compare.output is None:
        return
    folder = as_path(config.compare.output)
    if is_remote(folder) or not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"compare.output={folder}: is a file: name a folder")
    if not (folder / DATA).exists() and any(folder.iterdir()):
        raise InputError(f"compare.output={folder}: is not empty and holds no comparison: name another folder")


def _figures(comparison: Comparison) -> dict[str, Any]:
    """What the line of JSON says: the headline, the settings that differ by stage, and the figures of each run."""
    differences: dict[str, dict[str, list[str | None]]] = {}
    for row in comparison.settings:
        for stage in row.stages:
            differences.setdefault(stage, {})[row.name] = list(row.values)
    runs: list[dict[str, Any]] = []
    for place, run in enumerate(comparison.runs):
        methods = {row.method: {"tokens_per_step": one.tokens_per_step, "speed_vs_plain": one.speed_vs_plain,
                                "interval": one.interval}
                   for row in comparison.methods if (one := row.results[place]) is not None}
        runs.append({"run_id": run.run_ids[0], "name": run.label, "hardware": run.hardware}
                    | ({"methods": methods} if methods else {"figures": {
                        name: values[place] for table in comparison.figures for name, values in table.rows}}))
    return {"headline": comparison.headline, "compared": comparison.stage, "runs": runs, "differences": differences,
            "notes": list(comparison.notes)}


def _link(reader: RunReader, comparison: Comparison, folder: Path) -> list[str]:
    """Log the page as an artifact of each chain's run; returns the ids of those that have it. A store that refuses costs no
    comparison."""
    linked = []
    for parent in dict.fromkeys(run.parent_id for run in comparison.runs):
        if parent is None:
            continue
        try:
            reader.attach(parent, [folder / PAGE, folder / TEXT], f"comparisons/{slug(comparison)}")
            linked.append(parent)
        except StoppedError as error:
            say("compare", f"run {parent} has no link to the page: {error}")
    return linked
