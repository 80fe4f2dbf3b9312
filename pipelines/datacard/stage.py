"""The `datacard` stage: what this run's rows are, and how well the heads that are trained on them draft each kind.

    datacard/datacard.json, datacard.md
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from hydra_core.base import load_vocabulary
from hydra_core.errors import InputError
from pipelines.config import RunConfig
from pipelines.datacard.acceptance import held_out_ranks, tokens_per_step_by_group
from pipelines.datacard.counts import NONE_GIVEN
from pipelines.datacard.gather import KINDS, Rows, gather
from pipelines.datacard.languages import can_detect
from pipelines.datacard.report import markdown
from pipelines.distill.stage import answered
from pipelines.rows.parquet_parts import iter_parts, part_files
from pipelines.rows.schemas import RESPONSES
from pipelines.runtime.artifacts import (
    RunPaths,
    StageResult,
    fingerprint,
    finished,
    read_manifest,
    require_manifest,
    stage_folder,
)
from pipelines.runtime.console import say
from pipelines.runtime.files import write_text
from pipelines.runtime.ray_cluster import ensure_ray, environment_options
from pipelines.tracking import Tracker

STAGE = "datacard"
HEADS = "heads"


def run_datacard(config: RunConfig) -> StageResult:
    """Count the rows of this run's `distill`, and measure acceptance by source and task with every drafter of `train.drafters`
    (or `train.only`) that is trained.

    Figures: prompts, answers, their tokens, languages, what the draft vocabulary covers. Raises InputError if `distill` has not
    finished, or its rows are of another base.
    """
    tracker = Tracker.open(config)
    digest = answered(config)[1]
    heads = trained_heads(config)
    folder, wanted = RunPaths.of(config).stage(STAGE), fingerprint(STAGE, {}, {"distill": digest})
    inputs = _inputs(config, digest, heads)
    if (done := finished(folder, wanted)) is not None and json.loads(
            (folder / "datacard.json").read_text(encoding="utf-8"))["inputs"] == inputs:
        return done
    vocabulary = load_vocabulary(config.base.model, dtype=config.base.dtype, cache=RunPaths.of(config).cache)
    _check_base(config, str(vocabulary.identity))
    # with other heads or settings over the same rows the card is written again
    with stage_folder(config, STAGE, folder, wanted) as stage, tracker.start(STAGE, fingerprint=wanted) as run:
        distilled = RunPaths.of(config).stage("distill")
        rows = gather(config, distilled, vocabulary.size, tuple(vocabulary.stop_ids))
        measured = _add_acceptance(config, rows, {name: str(path) for name, path in heads.items()})
        card = {"inputs": inputs, **card_of(rows, require_manifest(distilled, "distill")["result"]["figures"],
                                            str(vocabulary.identity), list(heads), measured)}
        write_text(folder / "datacard.json", json.dumps(card, indent=2))
        write_text(folder / "datacard.md", markdown(card, config.datacard.groups))
        files = [folder / "datacard.json", folder / "datacard.md"]
        run.log_dataset("responses", digest, str(distilled / "responses"), STAGE)
        run.log_metrics(_metrics(card))
        for path in files:
            run.log_artifact(path)
        for note in card["notes"]:
            say(STAGE, note)
        outputs = {"card": str(folder / "datacard.md"), "json": str(folder / "datacard.json")}
        return stage.finish(StageResult(STAGE, run.run_id, outputs, {
            key: value for key, value in card["rows"].items() if isinstance(value, int)}), files)


def trained_heads(config: RunConfig) -> dict[str, Path]:
    """Drafter -> folder of its heads, for those that are trained and that read what rows hold."""
    names = [config.train.only] if config.train.only else list(config.train.drafters)
    names = [name for name in names if not config.train.drafters[name].reads_taps]
    folders = {name: RunPaths.of(config).stage("train", name) for name in names}
    return {name: folder / HEADS for name, folder in folders.items() if read_manifest(folder) is not None}


def card_of(rows: Rows, distill: Mapping[str, Any], base: str, drafters: list[str], measured: int) -> dict[str, Any]:
    """The card as JSON. `distill`: figures of that stage; `measured`: held-out rows whose acceptance is known."""
    whole = rows.groups["sources"].values()
    return {
        "base": base, "drafters": drafters if measured else [], "acceptance_rows": measured, "notes": rows.notes,
        "rows": {"prompts": sum(rows.split_rows.values()), "prompts_by_split": dict(rows.split_rows),
                 "prompts_skipped": distill.get("prompts_skipped", 0), "prompt_errors": distill.get("prompt_errors", 0),
                 "answers": sum(group.answers for group in whole), "response_tokens": sum(group.tokens for group in whole),
                 "answer_errors": distill.get("errors", 0), "repeated_answers": rows.repeated_answers,
                 "finish_reasons": dict(rows.finish.most_common()), "errors": rows.errors},
        "lengths": {"prompts": rows.prompt_lengths, "answers": rows.answer_lengths},
        "languages": rows.languages, "coverage": {str(size): share for size, share in rows.coverage.items()},
        **{kind: {name: group.figures() for name, group in sorted(rows.groups[kind].items())} for kind in KINDS}}


def _add_acceptance(config: RunConfig, rows: Rows, heads: Mapping[str, str]) -> int:
    """Measure the heads on held-out rows and add what each source and task brings; returns how many rows that were."""
    distilled = RunPaths.of(config).stage("distill")
    features = distilled / "features"
    if not heads or not config.datacard.acceptance_rows or not part_files(features):
        rows.notes.append("acceptance: not measured, as there are no trained heads" if not heads else
                          "acceptance: not measured, as datacard.acceptance_rows=0 or there are no features")
        return 0
    with ensure_ray(config):
        task = ray.remote(held_out_ranks).options(num_cpus=0.5, max_retries=0, **environment_options(config))
        ids, found = ray.get(task.remote(config.model_dump(mode="json", by_alias=True), heads, str(features)))
    wanted = set(ids)
    prompt_of = {one: prompt for _, part in iter_parts(distilled / "responses", RESPONSES, ["id", "prompt_id"])
                 for one, prompt in zip(part["id"].to_pylist(), part["prompt_id"].to_pylist(), strict=True) if one in wanted}
    for place, kind in enumerate(KINDS):
        names = [rows.kinds_of.get(prompt_of.get(one, ""), (NONE_GIVEN, NONE_GIVEN))[place] for one in ids]
        for name, count in Counter(names).items():
            rows.groups[kind][name].accepted_rows = count
        for drafter, ranks in found.items():
            for name, value in tokens_per_step_by_group(ranks, names).items():
                rows.groups[kind][name].tokens_per_step[drafter] = value
    return len(ids)


def _inputs(config: RunConfig, digest: str, heads: Mapping[str, Path]) -> str:
    """Digest of all that decides the card."""
    manifests = {f"train/{name}": str((read_manifest(path.parent) or {}).get("digest")) for name, path in heads.items()}
    settings = {"datacard": config.datacard.model_dump(mode="json"), "sizes": sorted(
        {one.draft_vocab_size for one in config.train.drafters.values()}), "languages": can_detect(),
        "base": config.base.model_dump(mode="json", include={"model", "dtype"})}
    return fingerprint(STAGE, settings, {"distill": digest, **manifests})


def _check_base(config: RunConfig, identity: str) -> None:
    for path, part in iter_parts(RunPaths.of(config).stage("distill") / "responses", RESPONSES, ["base"]):
        if other := next((base for base in part["base"].unique().to_pylist() if base != identity), None):
            raise InputError(f"{path}: rows were made by base {other}, not {identity}: give that base (base.model, base.dtype)")
        return


def _metrics(card: Mapping[str, Any]) -> dict[str, float]:
    found = {key: float(value) for key, value in card["rows"].items() if isinstance(value, int)}
    found |= {f"coverage.{size}": share for size, share in card["coverage"].items()}
    for kind in KINDS:
        found |= {f"{kind}.{name}.{drafter}.tokens_per_step": value for name, group in card[kind].items()
                  for drafter, value in group["tokens_per_step"].items()}
    return found
