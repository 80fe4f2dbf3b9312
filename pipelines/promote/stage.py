"""`promote`: the fastest lossless configuration becomes `champion`, plain decoding included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from hydra_core.base import BaseIdentity, resolve_base
from hydra_core.base.formats import LOSSY
from hydra_core.decoding import DecodingConfiguration, save_configuration
from hydra_core.errors import InputError
from hydra_core.proposers import NgramDrafter
from pipelines.bench.plan import COMBINED, FOREIGN, GROWN, NGRAM, PLAIN, combined_heads
from pipelines.bench.stage import bench_fingerprint, find_heads
from pipelines.config import RunConfig, load_config
from pipelines.runtime.artifacts import RunPaths, StageResult, fingerprint, finished, require_manifest, stage_folder
from pipelines.serve.model_identity import configuration_digest
from pipelines.tracking import Tracker, register, resolve

STAGE = "promote"


def run_promote(config: RunConfig) -> StageResult:
    """Register the winner of this run's `bench`, again where the registry has lost it or the alias points elsewhere.

    Raises InputError when there is no bench, it measured another base or other heads, or the base is quantised lossily.
    """
    if config.base.dtype == LOSSY:
        raise InputError(f"base.dtype={LOSSY}: its answers are not the base's own, and only what is lossless is promoted: "
                         "bench and promote with auto, bf16, fp32 or int4")
    paths = RunPaths.of(config)
    manifest = require_manifest(paths.stage("bench"), "bench")
    _check_bench(config, manifest["fingerprint"])
    wanted = fingerprint(STAGE, config.promote.model_dump(), {"bench": manifest["digest"]})
    folder = paths.stage(STAGE)
    target = folder / "configuration"
    done = finished(folder, wanted)
    if done is not None and _is_champion(config, target):
        return done
    report = json.loads((paths.stage("bench") / "report.json").read_text(encoding="utf-8"))
    winner, why = choose_winner(report["methods"], config.promote.min_gain)
    configuration = _configuration(config, winner, report["plan"])
    tracker = Tracker.open(config)
    with (stage_folder(config, STAGE, folder, wanted) as stage,
          tracker.start(STAGE, fingerprint=wanted) as run):
        if done is None:
            shutil.rmtree(target, ignore_errors=True)  # left by a run that was killed before its manifest
            save_configuration(target, configuration)
        run.log_artifact(target, "configuration")
        figures = {key: report["methods"][winner][key] for key in ("tokens_per_step", "speed_vs_plain")}
        version = register(config, config.promote.model_name, run, "configuration", config.promote.alias,
                           {"drafter": winner, "base": str(configuration.base), **figures})
        result = StageResult(STAGE, run.run_id, {"configuration": str(target), "model": _uri(config)},
                             {"champion": winner, "why": why, "version": version, **figures})
        return stage.finish(result, [path for path in target.rglob("*") if path.is_file()])


def _uri(config: RunConfig) -> str:
    return f"models:/{config.promote.model_name}@{config.promote.alias}"


def _is_champion(config: RunConfig, folder: Path) -> bool:
    """Whether the alias stands for what `folder` holds: not on another server, nor after its database was lost."""
    try:
        _, registered = resolve(config, _uri(config), RunPaths.of(config).cache / "models")
    except InputError:
        return False
    return configuration_digest(registered) == configuration_digest(folder)


def _check_bench(config: RunConfig, measured: str) -> None:
    """Raise InputError unless the bench with fingerprint `measured`, run now as it was run then, would be the same work
    on this base: figures say nothing about another base, weight format or heads."""
    folder = RunPaths.of(config).stage("bench")
    then = load_config(str(folder / "config.yaml"))
    base = then.base.model_copy(update={"model": config.base.model, "dtype": config.base.dtype})
    now = then.model_copy(update={"name": config.name, "storage": config.storage, "base": base})
    if bench_fingerprint(now, find_heads(now)) != measured:
        raise InputError(f"{folder}: measured another base than base.model={config.base.model} in {config.base.dtype}, or "
                         "other heads or prompts than stand there now: set that base, or run `hydra-heads bench` again")


def choose_winner(methods: dict[str, Any], min_gain: float) -> tuple[str, str]:
    """The fastest contender that changes no output, and the reason in one line.

    Lossless means that no answer differed beyond a near-tie: in fp32 and every other format that was checked from the naive
    loop, and among those that were timed from plain decoding's. A contender whose fp32 identity was not checked does not
    qualify. Plain decoding always does.
    """
    if PLAIN not in methods:
        raise InputError("promote: the bench has no plain decoding to compare with: run `bench` again")
    lossless = {name for name, values in methods.items() if name not in (PLAIN, *FOREIGN) and _is_lossless(values)}
    speeds = {name: methods[name]["speed_vs_plain"] for name in lossless if methods[name]["speed_vs_plain"]}
    best = max(speeds, key=lambda name: speeds[name], default=None)
    refused = sorted(set(methods) - lossless - {PLAIN, *FOREIGN})
    note = f"; not considered, identity unproved or broken: {', '.join(refused)}" if refused else ""
    if best is None or speeds[best] <= min_gain:
        return PLAIN, f"no lossless contender is faster than {min_gain:g}x plain decoding{note}"
    return best, f"{speeds[best]:.2f}x plain decoding, the fastest of {len(speeds)} lossless contenders{note}"


def _is_lossless(figures: dict[str, Any]) -> bool:
    judged = [figures["fp32"], figures.get("differing"), *(figures.get("naive") or {}).values()]
    return bool(figures["fp32"]) and not any(verdicts["different"] for verdicts in judged if verdicts)


def _configuration(config: RunConfig, winner: str, plan: dict[str, Any]) -> DecodingConfiguration:
    resolved = resolve_base(config.base.model, RunPaths.of(config).cache)
    identity = BaseIdentity(resolved.name, resolved.digest, plan["base"]["dtype"])
    ngram = NgramDrafter(*plan["ngram"])
    if winner in (PLAIN, NGRAM):
        return DecodingConfiguration(winner, "plain" if winner == PLAIN else "ngram", identity, ngram)
    if winner in GROWN:
        heads = combined_heads(plan["heads"]) if winner == COMBINED else plan["heads"][winner]
        return DecodingConfiguration(winner, "combined", identity, ngram, Path(heads))
    return DecodingConfiguration(winner, "heads", identity, ngram, Path(plan["heads"][winner]))
