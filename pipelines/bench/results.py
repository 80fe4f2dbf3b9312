"""Where results of one run lie: the first one in the stage's own folder, others beside it in folders of their own.

    RUN/bench/report.json, ...                    the first result
    RUN/bench/PROMPTS-FINGERPRINT/report.json     others: other prompts, other settings, another machine

A bench's fingerprint names the machine besides what was asked for (`runtime.hardware`), so that no table mixes two. `promote`
keeps its results in the same way. A rerun finds its folder by the fingerprint in the claim.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra_core.errors import InputError
from hydra_core.storage import is_remote, stored
from pipelines.bench.champion import FIGURE, BenchChampion, recorded_champion
from pipelines.bench.inputs import find_heads, fingerprints
from pipelines.bench.plan import CHAMPION
from pipelines.config import RunConfig, load_config
from pipelines.runtime.artifacts import (
    CLAIM,
    MANIFEST,
    RunPaths,
    StageFolder,
    StageResult,
    finished,
    read_manifest,
    require_manifest,
    stage_folder,
)
from pipelines.runtime.console import say
from pipelines.runtime.hardware import UNKNOWN, machine_of, request_of, this_hardware
from pipelines.runtime.measuring import MeasuringPlace, measured_on

CLAIM_SECONDS = 2.0
"""In which a run that has locked a folder claims it."""
SHOWN = 8
"""Characters of a fingerprint in a folder's name."""


def result_folder(root: Path, wanted: str, label: str) -> Path:
    """The folder under `root` for the work with fingerprint `wanted`: the one that holds it, `root` itself as long as it is
    free, else a new one whose name begins with `label`."""
    claimed = _claims(root)
    for folder, owner in claimed.items():
        if owner == wanted:
            return folder
    words = (label, request_of(wanted)[:SHOWN], (machine_of(wanted) or "")[:SHOWN])
    return root / "-".join(filter(None, words)) if claimed else root


@contextmanager
def claimed_result(config: RunConfig, stage: str, root: Path, wanted: str, label: str) -> Iterator[StageFolder]:
    """`stage_folder` in the folder that `result_folder` gives. Where another run has claimed that one in between, this one takes
    another."""
    deadline = time.monotonic() + CLAIM_SECONDS
    with ExitStack() as stack:
        while True:
            folder = result_folder(root, wanted, label)
            try:
                claimed = stack.enter_context(stage_folder(config, stage, folder, wanted))
                break
            except InputError:
                # the other one may hold the lock and have written no claim yet
                if ((folder / CLAIM).exists() and result_folder(root, wanted, label) == folder) or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield claimed


def bench_label(config: RunConfig) -> str:
    """What names a bench's folder: the stem of the prompts' file."""
    return re.sub(r"[^\w.-]+", "-", Path(config.bench.prompts or "held-out").stem).strip("-.") or "prompts"


def tell_of_other_machines(config: RunConfig, wanted: str, place: MeasuringPlace) -> None:
    """Say which benches of the same request were measured on other machines, before it is measured on `place`."""
    for folder, owner in _claims(RunPaths.of(config).stage("bench")).items():
        if owner is not None and owner != wanted and request_of(owner) == request_of(wanted):
            say("bench", f"{folder} was measured on another machine ({measured_on(folder)}): every contender is measured again "
                f"on this one ({place.hardware.label})")


def _tell_unknown(folder: Path, fingerprint: str) -> None:
    if machine_of(fingerprint) is None:
        say("bench", f"{folder} was measured on {UNKNOWN}: an earlier version did so")


def finished_benches(config: RunConfig) -> dict[Path, dict[str, Any]]:
    """Folder -> manifest of every finished bench of this run, the first one first."""
    root = RunPaths.of(config).stage("bench")
    found = {folder: read_manifest(folder) for folder in (root, *_folders(root, MANIFEST))}
    return {folder: manifest for folder, manifest in found.items() if manifest is not None}


def done_bench(config: RunConfig, heads: dict[str, str], champion: BenchChampion | None, machine: str) -> StageResult | None:
    """The result of a finished bench of these settings that says what a new one would: on the machine with the digest `machine`,
    or by an earlier version, which did not record one; with the present champion, or where that is one of its own contenders or
    none at all."""
    for folder, manifest in reversed(_latest_last(finished_benches(config))):
        then, measured = recorded_champion(manifest), manifest["fingerprint"]
        compared = champion is None or champion.method != CHAMPION or (then is not None and then["digest"] == champion.digest)
        if (compared and machine_of(measured) in (machine, None) and request_of(measured) in fingerprints(config, heads, then)
                and (done := finished(folder, measured)) is not None):
            _tell_unknown(folder, measured)
            return done
    return None


def measured_at(folder: Path, manifest: dict[str, Any]) -> float:
    """When the bench in `folder` was measured, in seconds since 1970; of one that did not record it, when it was finished."""
    told = (manifest["result"]["figures"].get(FIGURE) or {}).get("measured")
    if told:
        return datetime.fromisoformat(told).timestamp()
    path = folder / MANIFEST
    if is_remote(path):
        found = stored(path)
        return found.written if found else 0.0
    return path.stat().st_mtime


def fitting_bench(config: RunConfig) -> tuple[Path, dict[str, Any]]:
    """Folder and manifest of the bench that these settings ask for, where the run has only one, that one. Of several it is the
    latest on this machine, else the latest of all.

    Raises InputError when no bench is finished, and when none of several has these settings.
    """
    root, benches = RunPaths.of(config).stage("bench"), finished_benches(config)
    if not benches:
        return root, require_manifest(root, "bench")
    with suppress(InputError):  # of settings that do not matter where there is only one
        heads, here = find_heads(config), this_hardware().digest
        fitting = [(folder, manifest) for folder, manifest in _latest_last(benches)
                   if request_of(manifest["fingerprint"]) in fingerprints(config, heads, recorded_champion(manifest))]
        if fitting:
            folder, manifest = next((one for one in reversed(fitting) if machine_of(one[1]["fingerprint"]) == here), fitting[-1])
            _tell_unknown(folder, manifest["fingerprint"])
            return folder, manifest
    if len(benches) == 1:
        return next(iter(benches.items()))
    known = "; ".join(f"{folder} ({_differences(config, folder)})" for folder in benches)
    raise InputError(f"{root}: none of the {len(benches)} benches of this run has these settings: give the settings of one of "
                     f"them: {known}")


def _latest_last(benches: dict[Path, dict[str, Any]]) -> list[tuple[Path, dict[str, Any]]]:
    return sorted(benches.items(), key=lambda item: measured_at(*item))


def _differences(config: RunConfig, folder: Path) -> str:
    """The settings of the bench in `folder` that differ from those of `config`."""
    then = load_config(str(folder / "config.yaml"))
    sections = ("bench", "ngram", "draft_model", "base")
    pairs = [(f"{section}.{name}", value, getattr(getattr(config, section), name)) for section in sections
             for name, value in getattr(then, section).model_dump(mode="json").items()]
    found = [f"{name}={_shown(value)}" for name, value, now in pairs if _shown(value) != _shown(now)]
    return ", ".join(found) or "the same settings, other inputs"


def _shown(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)


def _claims(root: Path) -> dict[Path, str | None]:
    """Folder -> fingerprint of its claim, None where that is not readable."""
    found: dict[Path, str | None] = {}
    for folder in (root, *_folders(root, CLAIM)):
        if (folder / CLAIM).exists():
            try:
                found[folder] = str(json.loads((folder / CLAIM).read_text(encoding="utf-8"))["fingerprint"])
            except (ValueError, KeyError, TypeError):
                found[folder] = None
    return found


def _folders(root: Path, file: str) -> list[Path]:
    return sorted(path.parent for path in root.glob(f"*/{file}"))
