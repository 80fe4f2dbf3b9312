"""`promote`: the fastest lossless configuration becomes `champion`, plain decoding included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from hydra_core.base import BaseIdentity, quantisation, resolve_base
from hydra_core.base.formats import LOSSY
from hydra_core.decoding import DecodingConfiguration, save_configuration
from hydra_core.errors import InputError
from hydra_core.proposers import NgramDrafter
from pipelines.bench.inputs import bench_fingerprint, find_heads
from pipelines.bench.plan import COMBINED, DYNAMIC_TREES, FOREIGN, NGRAM, PLAIN, combined_heads, contender
from pipelines.bench.results import bench_label, fitting_bench, result_folder
from pipelines.config import RunConfig, load_config
from pipelines.runtime.artifacts import RunPaths, StageResult, fingerprint, finished, stage_folder
from pipelines.serve.model_identity import configuration_digest
from pipelines.tracking import Tracker, register, resolve

STAGE = "promote"
FEW = 6
"""Questions below which an interval over questions says little: each of them, of two or more, has to be answered faster."""


def run_promote(config: RunConfig) -> StageResult:
    """Register the winner of this run's `bench`, and again where the registry lost it or the alias points elsewhere.

    Of several benches the one with these settings counts. Raises InputError when there is none, when it measured another base
    or other heads, and when the base is quantised lossily.
    """
    if config.base.dtype == LOSSY:
        raise InputError(f"base.dtype={LOSSY}: its answers are not the base's own, and only lossless configurations are "
                         "promoted: bench and promote with auto, bf16, fp32 or int4")
    paths = RunPaths.of(config)
    bench, manifest = fitting_bench(config)
    _check_bench(config, bench, manifest["fingerprint"])
    wanted = fingerprint(STAGE, config.promote.model_dump(), {"bench": manifest["digest"]})
    folder = result_folder(paths.stage(STAGE), wanted, bench_label(config))
    target = folder / "configuration"
    done = finished(folder, wanted)
    if done is not None and _is_champion(config, target):
        return done
    report = _read_report(bench / "report.json")
    quantised = quantisation(config.base.model, cache=paths.cache)
    winner, why = choose_winner(report["methods"], config.promote.min_gain,
                                report["plan"]["base"]["dtype"] if quantised else "fp32")
    configuration = _configuration(config, winner, report["plan"])
    tracker = Tracker.open(config)
    with (stage_folder(config, STAGE, folder, wanted) as stage,
          tracker.start(STAGE, fingerprint=wanted) as run):
        if done is None:
            shutil.rmtree(target, ignore_errors=True)  # of a run that was killed before it wrote its manifest
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
    """Whether the alias names the configuration in `folder`: not so on another server, or after its database was lost."""
    try:
        _, registered = resolve(config, _uri(config), RunPaths.of(config).cache / "models")
    except InputError:
        return False
    return configuration_digest(registered) == configuration_digest(folder)


def _read_report(path: Path) -> dict[str, Any]:
    """The report of a bench, with the present names of contenders."""
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    report["methods"] = {contender(name): figures for name, figures in report["methods"].items()}
    report["plan"]["heads"] = {contender(name): folder for name, folder in report["plan"]["heads"].items()}
    return report


def _check_bench(config: RunConfig, folder: Path, measured: str) -> None:
    """Raise InputError unless the bench in `folder`, whose fingerprint is `measured`, would measure the same today on this
    base: its figures hold for no other base, weight format or heads."""
    then = load_config(str(folder / "config.yaml"))
    base = then.base.model_copy(update={"model": config.base.model, "dtype": config.base.dtype})
    now = then.model_copy(update={"name": config.name, "storage": config.storage, "base": base})
    heads = find_heads(now)
    if measured not in (bench_fingerprint(now, heads), bench_fingerprint(now, heads, now.base.device)):
        raise InputError(f"{folder}: measured another base than base.model={config.base.model} in {config.base.dtype}, or "
                         "other heads or prompts than there are now: set that base, or run `hydra-heads bench` again")


def choose_winner(methods: dict[str, Any], min_gain: float, proof: str = "fp32") -> tuple[str, str]:
    """The fastest lossless contender that is really faster than plain decoding, and the reason in one line.

    Lossless means that no answer differs by more than a near-tie: from the naive loop in the format `proof` and every other
    that was checked, and from plain decoding among timed answers. A contender whose answers in `proof` were not checked does not
    qualify; that is fp32, or the own format of a base that is loaded quantised. Really faster means that it drafts, that is, a
    step gives more than one token, that the whole 95 % interval of its speed, where there is one, lies above plain's, and that
    of fewer than `FEW` questions each, and more than one, was faster: the highest of several noisy figures is above 1 where
    none is faster. Plain decoding always qualifies. Raises InputError for a
    bench that has not timed it.
    """
    if PLAIN not in methods:
        raise InputError("promote: the bench has no plain decoding to compare with: run `bench` again")
    if not methods[PLAIN]["speed_vs_plain"]:
        raise InputError("promote: the bench timed no single request (bench.single=false), and the champion is chosen by their "
                         "speed: run `hydra-heads bench` without that setting")
    lossless = {name for name, values in methods.items() if name not in (PLAIN, *FOREIGN) and _is_lossless(values, proof)}
    refused = sorted(set(methods) - lossless - {PLAIN, *FOREIGN})
    note = f"; not considered, since not shown to be lossless: {', '.join(refused)}" if refused else ""
    noise = {name: why for name in sorted(lossless) if (why := _why_noise(methods[name]))}
    note += f"; not considered: {', '.join(f'{name} ({why})' for name, why in noise.items())}" if noise else ""
    speeds = {name: methods[name]["speed_vs_plain"] for name in lossless - noise.keys() if methods[name]["speed_vs_plain"]}
    best = max(speeds, key=lambda name: speeds[name], default=None)
    if best is None or speeds[best] <= min_gain:
        return PLAIN, f"no lossless contender is faster than {min_gain:g}x plain decoding{note}"
    return best, f"{speeds[best]:.2f}x plain decoding, the fastest of {len(speeds)} lossless contenders{note}"


def _why_noise(figures: dict[str, Any]) -> str | None:
    """Why the speed of a contender says nothing, None if it does."""
    if (figures["tokens_per_step"] or 0.0) <= 1.0:
        return "drafts nothing that is accepted"
    if (spread := figures.get("spread")) and spread[0] <= 1.0:
        return f"may be no faster: {spread[0]:.2f}x - {spread[1]:.2f}x plain"
    few, faster = figures.get("questions"), figures.get("questions_faster")
    if few is not None and few < FEW and (few < 2 or faster < few):
        return f"measured on {few} question{'s' * (few != 1)}, faster on {faster}"
    return None


def _is_lossless(figures: dict[str, Any], proof: str) -> bool:
    naive = figures.get("naive") or {}
    proven = figures["fp32"] if proof == "fp32" else naive.get(proof)
    checked = [figures["fp32"], figures.get("differing"), *naive.values()]
    return bool(proven) and not any(verdicts["different"] for verdicts in checked if verdicts)


def _configuration(config: RunConfig, winner: str, plan: dict[str, Any]) -> DecodingConfiguration:
    resolved = resolve_base(config.base.model, RunPaths.of(config).cache)
    identity = BaseIdentity(resolved.name, resolved.digest, plan["base"]["dtype"])
    ngram = NgramDrafter(*plan["ngram"])
    if winner in (PLAIN, NGRAM):
        return DecodingConfiguration(winner, "plain" if winner == PLAIN else "ngram", identity, ngram)
    if winner in DYNAMIC_TREES:
        heads = combined_heads(plan["heads"]) if winner == COMBINED else plan["heads"][winner]
        return DecodingConfiguration(winner, "combined", identity, ngram, Path(heads))
    return DecodingConfiguration(winner, "heads", identity, ngram, Path(plan["heads"][winner]))
