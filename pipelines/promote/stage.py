"""`promote`: the fastest configuration that passes every gate becomes champion, or plain decoding does, or the champion stays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra_core.base import BaseIdentity, quantisation, resolve_base
from hydra_core.base.formats import LOSSY
from hydra_core.decoding import (
    DecodingConfiguration,
    DraftModelSettings,
    find_draft_model,
    read_configuration,
    save_configuration,
)
from hydra_core.decoding.configuration import ANY_FORMAT, DRAFT_MODEL
from hydra_core.errors import InputError
from hydra_core.proposers import NgramDrafter
from hydra_core.storage import as_path, is_remote, listing
from pipelines.bench.acceptance import write_acceptance
from pipelines.bench.champion import recorded_champion
from pipelines.bench.inputs import find_heads, fingerprints
from pipelines.bench.latency import MACHINE
from pipelines.bench.plan import (
    CHAMPION,
    COMBINED,
    DYNAMIC_TREES,
    NGRAM,
    NO_CONFIGURATION,
    PLAIN,
    combined_heads,
    contender,
    is_foreign,
    read_rows,
    split_sweep,
)
from pipelines.bench.results import bench_label, fitting_bench, measured_at, result_folder
from pipelines.config import PromoteSection, RunConfig, load_config
from pipelines.promote.decision import Decision, Standing, decide
from pipelines.promote.page import about_of, gate_table, headline, short_gates, short_losers, write_page
from pipelines.promote.rollback import run_rollback
from pipelines.runtime.artifacts import RunPaths, StageFolder, StageResult, fingerprint, finished, stage_folder
from pipelines.runtime.console import say
from pipelines.runtime.files import copy_folder, remove_tree
from pipelines.runtime.hardware import request_of
from pipelines.serve.model_identity import configuration_digest
from pipelines.tracking import Run, Tracker, record_champion
from pipelines.tracking.champion import (
    Reign,
    alias_uri,
    champion_number,
    only_promotion,
    promote_version,
    reigning,
)

STAGE = "promote"
BENCH_TAG = "bench_digest"
"""Tag of a version: the digest of the bench that it was chosen by."""
ACTIONS = ("reason", "force", "dry_run", "rollback")
"""Settings that say what to do, not what to decide by."""
FIRST = ("model_name", "alias", "min_gain")
"""Settings that every release had; of others a fingerprint holds those that differ from their defaults."""


@dataclass(frozen=True)
class Bench:
    """A finished bench: its folder, its manifest, its report with the present names of contenders."""

    folder: Path
    manifest: Mapping[str, Any]
    report: Mapping[str, Any]

    @property
    def measured(self) -> float:
        """Seconds since 1970."""
        return measured_at(self.folder, dict(self.manifest))


@dataclass(frozen=True)
class Present:
    """What the alias names now: the number of the version, the champion where it is one of this base with its files, and how it
    stands in the bench."""

    number: int | None
    reign: Reign | None
    standing: Standing | None


def run_promote(config: RunConfig) -> StageResult:
    """Register the winner of this run's `bench`, and again where the registry lost it; with `promote.rollback` go back instead.

    Of several benches the latest with these settings counts. A bench that is older than the champion, or that was not compared
    with it, changes nothing unless `promote.force` is set. With `promote.dry_run` nothing is written. Raises InputError when
    there is no bench, when it measured another base or other heads, and when the base is quantised lossily, whatever
    `promote.force` says; StoppedError when another promotion was first.
    """
    if config.base.dtype == LOSSY and not config.promote.rollback:
        raise InputError(f"base.dtype={LOSSY}: its answers are not the base's own, and only lossless configurations are "
                         "promoted: bench and promote with auto, bf16, fp32 or int4")
    if config.promote.rollback:
        return run_rollback(config)
    folder, manifest = fitting_bench(config)
    _check_bench(config, folder, manifest)
    with nullcontext() if config.promote.dry_run else only_promotion(config):
        return _promote(config, Bench(folder, manifest, _read_report(folder / "report.json")))


def _promote(config: RunConfig, bench: Bench) -> StageResult:
    wanted = fingerprint(STAGE, _recorded(config.promote), {"bench": bench.manifest["digest"]})
    folder = result_folder(RunPaths.of(config).stage(STAGE), wanted, bench_label(config))
    done, present = finished(folder, wanted), _present(config, bench)
    ours = done is not None and done.figures.get("promoted", True)
    if done is not None and present.reign is not None and not config.promote.dry_run and (ours or not config.promote.force) and (
            configuration_digest(present.reign.folder) == configuration_digest(folder / "configuration")):
        return done
    decision = decide(bench.report["methods"], config.promote, proof=_proof(config, bench.report), champion=present.standing,
                      sizes=_sizes(bench.report))
    figures = _figures(decision, bench.report["methods"], present)
    if config.promote.dry_run:
        gate_table(decision).show()
        say("promote", f"{headline(decision)} (a dry run: nothing is changed)")
        return StageResult(STAGE, None, {"bench": str(bench.folder)}, figures | {"dry_run": True, "decision": decision.to_json()})
    say("promote", headline(decision))
    if done is not None and decision.stays:  # what this run once promoted is not champion any more
        return replace(done, figures=done.figures | figures)
    with (stage_folder(config, STAGE, folder, wanted) as stage, Tracker.open(config).start(STAGE, fingerprint=wanted) as run):
        kept = done is not None and ours and done.figures["champion"] == decision.winner
        return _record(config, bench, decision, present, stage, run, figures, kept=kept)


def _record(config: RunConfig, bench: Bench, decision: Decision, present: Present, stage: StageFolder, run: Run,
            figures: dict[str, Any], *, kept: bool) -> StageResult:
    """Write configuration and page, register the winner, finish the stage. `kept`: the winner's configuration stands already."""
    target = stage.folder / "configuration"
    if not kept:
        remove_tree(target)  # of a run that was killed before it wrote its manifest
        if decision.stays and present.reign is not None:
            copy_folder(present.reign.folder, target)
        else:
            save_configuration(target, _configuration(config, decision.winner, bench.report["plan"]))
            write_acceptance(target, read_rows(bench.folder / "rows.jsonl"), decision.winner)
    pages = write_page(stage.folder, decision, about_of(bench.report, {
        "losslessness shown in": decision.proof, "bench": bench.folder, "measured": _time(bench.measured),
        "bench's MLflow run": bench.manifest["result"]["run_id"], "machine": _machine(bench.folder),
        "champion before": present.standing.model if present.standing else None,
        "promote.reason": config.promote.reason or None}))
    run.log_artifact(target, "configuration")
    for page in pages:
        run.log_artifact(page)
    if not decision.stays:
        tags = _tags(config, bench, decision, target, figures)
        figures["version"] = promote_version(config, run, "configuration", tags, present.number)
        record_champion(run, decision.winner, figures["version"], decision.why,
                        {name: figures[name] for name in ("tokens_per_step", "speed_vs_plain")},
                        (bench.manifest["result"]["run_id"], bench_label(config)))
    outputs = {"configuration": str(target), "model": alias_uri(config), "decision": str(pages[1])}
    files = [path for path in target.rglob("*") if path.is_file()]
    return stage.finish(StageResult(STAGE, run.run_id, outputs, figures), [*files, *pages])


def _tags(config: RunConfig, bench: Bench, decision: Decision, folder: Path, figures: Mapping[str, Any]) -> dict[str, str]:
    """Tags of the registered version, besides those that say who was champion when."""
    winner = next(one for one in decision.contenders if one.contender == decision.winner)
    return {"drafter": decision.winner, "base": str(read_configuration(folder).base),
            **{name: str(figures[name]) for name in ("tokens_per_step", "speed_vs_plain")}, "decision": decision.why,
            "gates": short_gates(winner) or "none: plain decoding", "lost": short_losers(decision), "chain": config.name,
            BENCH_TAG: str(bench.manifest["digest"])}


def _figures(decision: Decision, methods: Mapping[str, Any], present: Present) -> dict[str, Any]:
    name: str | None = decision.winner
    if decision.stays:
        name = present.standing.method if present.standing else None
    found = methods.get(name) if name else None
    return {"champion": decision.winner, "why": decision.why,
            "version": present.standing.version if decision.stays and present.standing else None,
            **{key: found[key] if found else None for key in ("tokens_per_step", "speed_vs_plain")},
            **({"promoted": False} if decision.stays else {})}


# -- the present champion ----------------------------------------------------------------------------------------------

def _present(config: RunConfig, bench: Bench) -> Present:
    number = champion_number(config)
    try:
        reign = reigning(config) if number is not None else None
        found = None if reign is None else read_configuration(reign.folder)
    except InputError as error:  # its files are gone
        say("promote", f"the champion is not considered: {error}")
        return Present(number, None, None)
    if reign is None or found is None:
        return Present(number, None, None)
    own = resolve_base(config.base.model, RunPaths.of(config).cache)
    if found.base.digest != own.digest or found.base.weight_format not in (config.base.dtype, ANY_FORMAT):
        say("promote", f"the champion is not considered: {reign.model} is of another base ({found.base})")
        return Present(number, None, None)
    return Present(number, reign, _standing(config, bench, reign, found.name))


def _standing(config: RunConfig, bench: Bench, reign: Reign, name: str) -> Standing:
    """How the champion stands in the bench: compared with in it, after it became champion, or not."""
    model, number, again = reign.model, reign.version.number, "run `hydra-heads bench` again"
    then = recorded_champion(bench.manifest)
    if reign.version.tags.get(BENCH_TAG) == bench.manifest["digest"]:  # perhaps by a run that was killed just after
        return Standing(model, number, name, None, "it was promoted from this bench")
    if bench.measured < reign.version.since:
        why = (f"this run's bench was measured at {_time(bench.measured)}, before {model} became champion at "
               f"{_time(reign.version.since)}: {again}, which times it too, or set promote.force=true")
    elif then is None or then["digest"] != configuration_digest(reign.folder):
        why = (f"this run's bench was not compared with it: {again} with bench.champion={str(config.bench.champion).lower()}, or "
               "set promote.force=true")
    else:
        return Standing(model, number, name, then["method"])
    return Standing(model, number, name, None, why)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


# -- the bench ---------------------------------------------------------------------------------------------------------

def _recorded(section: PromoteSection) -> dict[str, Any]:
    values, changed = section.model_dump(), section.model_dump(exclude_defaults=True)
    return {name: values[name] for name in FIRST} | {name: value for name, value in changed.items() if name not in ACTIONS}


def _read_report(path: Path) -> dict[str, Any]:
    """The report of a bench, with the present names of contenders."""
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    report["methods"] = {contender(name): figures for name, figures in report["methods"].items()}
    report["plan"]["heads"] = {contender(name): folder for name, folder in report["plan"]["heads"].items()}
    if report["plan"].get("shared_answers"):
        raise InputError(f"{path}: was measured with bench.shared_answers, which no configuration says: bench without it")
    return report


def _check_bench(config: RunConfig, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise InputError unless the bench in `folder` would measure the same today on this base: its figures hold for no other
    base, weight format or heads."""
    then = load_config(str(folder / "config.yaml"))
    base = then.base.model_copy(update={"model": config.base.model, "dtype": config.base.dtype})
    now = then.model_copy(update={"name": config.name, "storage": config.storage, "base": base})
    if request_of(manifest["fingerprint"]) not in fingerprints(now, find_heads(now), recorded_champion(manifest)):
        raise InputError(f"{folder}: measured another base than base.model={config.base.model} in {config.base.dtype}, or "
                         "other heads or prompts than there are now: set that base, or run `hydra-heads bench` again")


def _proof(config: RunConfig, report: Mapping[str, Any]) -> str:
    """The format in which losslessness has to be shown: that in which the bench judged. One of an earlier release judged in fp32,
    and in the own format of a base that is loaded quantised."""
    if "proof" in report:
        return str(report["proof"]["format"])
    quantised = quantisation(config.base.model, cache=RunPaths.of(config).cache)
    return str(report["plan"]["base"]["dtype"]) if quantised else "fp32"


def _sizes(report: Mapping[str, Any]) -> dict[str, int | None]:
    """Contender -> bytes of the heads or of the model that it drafts with, 0 without; None where they are gone."""
    plan = report["plan"]
    found: dict[str, int | None] = {}
    for name in report["methods"]:
        if name in (PLAIN, NGRAM, *NO_CONFIGURATION) or is_foreign(name):
            found[name] = 0
        elif name == DRAFT_MODEL:
            found[name] = _bytes(find_draft_model(DraftModelSettings.of(plan["draft_model"]), Path(plan["cache"])).folder)
        elif name == CHAMPION:
            found[name] = _bytes(as_path(plan["champion"]) / "heads") or 0  # it may have none
        else:
            folder = combined_heads(plan["heads"]) if name == COMBINED else plan["heads"].get(split_sweep(name, plan["heads"])[0])
            found[name] = _bytes(as_path(folder)) if folder else None
    return found


def _machine(folder: Path) -> str | None:
    """What the bench in `folder` says of the machine that timed it; None where it says nothing."""
    try:
        found = json.loads((folder / MACHINE).read_text(encoding="utf-8"))
        return ", ".join(f"{name} {value}" for name, value in found.items())
    except (OSError, ValueError, AttributeError):
        return None


def _bytes(folder: Path) -> int | None:
    if is_remote(folder):
        return sum(one.bytes for one in listing(folder).values()) or None
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else None


def _configuration(config: RunConfig, winner: str, plan: Mapping[str, Any]) -> DecodingConfiguration:
    resolved = resolve_base(config.base.model, RunPaths.of(config).cache)
    identity = BaseIdentity(resolved.name, resolved.digest, plan["base"]["dtype"])
    ngram = NgramDrafter(*plan["ngram"])
    if winner == DRAFT_MODEL:
        settings = DraftModelSettings.of(plan["draft_model"])
        return DecodingConfiguration(winner, "draft-model", identity, ngram, draft_model=settings)
    if winner in (PLAIN, NGRAM):
        return DecodingConfiguration(winner, "plain" if winner == PLAIN else "ngram", identity, ngram)
    if winner in DYNAMIC_TREES:
        heads = combined_heads(plan["heads"]) if winner == COMBINED else plan["heads"][winner]
        return DecodingConfiguration(winner, "combined", identity, ngram, as_path(heads))
    return DecodingConfiguration(winner, "heads", identity, ngram, as_path(plan["heads"][winner]))
