"""The `distill` stage: prompts in, the base model's own answers and hidden states out.

    prompts/          part files of schemas.PROMPTS     self-made, read from JSONL, Parquet or a data set, or served
    prompts.json      number of prompts, of rows that are no prompt, of duplicates
    responses/        part files of schemas.RESPONSES   one answer for each prompt and temperature
    features/         part files of schemas.FEATURES    responses with the hidden states that training reads
    errors/prompts/   part files of schemas.ERRORS      rows that are no prompt; kept as long as the prompts
    errors/answers/   part files of schemas.ERRORS      answers that failed; the next run tries them again
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from hydra_core.base import BaseVocabulary, context_limit, load_tokenizer, load_vocabulary, resolve_base, user_turn_opening
from hydra_core.base.formats import LOSSY
from hydra_core.decoding import check_heads
from hydra_core.errors import InputError
from hydra_core.interop import VllmSettings, check_count, exportable
from hydra_core.storage import as_path
from pipelines.config import RunConfig
from pipelines.distill.answers import answer_prompts, engine_of
from pipelines.distill.prompts import COUNTS, check_prompts, read_prompts, source_digest
from pipelines.distill.self_made import make_prompts
from pipelines.distill.served import check_served, read_served
from pipelines.distill.union import other_fingerprints, other_rows
from pipelines.rows.parquet_parts import digest_of_ids, part_files, sweep
from pipelines.rows.schemas import FEATURES, PROMPTS, RESPONSES, content_id
from pipelines.runtime.artifacts import (
    RunPaths,
    StageResult,
    fingerprint,
    finished,
    require_manifest,
    served_folder,
    stage_folder,
)
from pipelines.runtime.files import remove_tree
from pipelines.runtime.lock import only_run
from pipelines.runtime.ray_cluster import check_workers, ensure_ray
from pipelines.runtime.tables import Table
from pipelines.runtime.usage import Meter
from pipelines.runtime.vllm import check_sampling, check_temperature, vllm_settings
from pipelines.tracking import Run, Tracker, system_metrics

SERVED = "served"
PARTS = ("prompts", "responses", "features", "errors/prompts", "errors/answers")
EXECUTION_FIELDS = {"workers", "max_workers", "heads", "max_batch_size", "rows_per_file", "max_error_share", "features",
                    "check_share"}
"""Settings that change no row: a run may continue with other values, and features may be added to a finished run."""


def distill_fingerprint(config: RunConfig) -> str:
    """Digest of all that decides the rows of a `distill` folder. Raises InputError if the prompts or the base do not exist."""
    source = source_digest(config.prompts)
    resolved = resolve_base(config.base.model, RunPaths.of(config).cache)
    return fingerprint("distill", _deciding_settings(config), {"base": resolved.digest} | ({"prompts": source} if source else {}))


def _deciding_settings(config: RunConfig) -> dict[str, Any]:
    prompts = config.prompts.model_dump()
    if config.prompts.source == SERVED:
        prompts |= {"path": served_folder(config)}
    if not prompts["drop_patterns"]:
        del prompts["drop_patterns"]  # outputs from before this setting stay done
    return {"prompts": prompts, "distill": config.distill.model_dump(exclude=EXECUTION_FIELDS),
            "base": config.base.model_dump(exclude={"device", "model"}),
            **({"engine": engine} if (engine := engine_of(config)) else {})}


def run_distill(config: RunConfig) -> StageResult:
    """Run the stage, or continue a killed run. Raises InputError for the user's mistakes."""
    tracker = Tracker.open(config)  # first, so that a server that does not answer is reported before a base is fetched
    folder, wanted = RunPaths.of(config).stage("distill"), distill_fingerprint(config)
    if (done := finished(folder, wanted)) is not None and not _lacks_features(config, done):
        return done
    _check_base(config)
    with ExitStack() as held:
        held.enter_context(only_run(folder, as_path(config.storage)))
        if (done := finished(folder, wanted)) is not None and not _lacks_features(config, done):
            return done  # finished by the run that held the lock until now
        stage = held.enter_context(stage_folder(config, "distill", folder, wanted, settings=_deciding_settings(config)))
        for part in (*PARTS, "candidates"):
            sweep(folder / part)
        remove_tree(folder / "errors" / "answers")  # failed answers are tried again
        if config.prompts.source == SERVED:
            check_served(config, folder)
        elif config.prompts.source != "self":
            check_prompts(config, folder)
        with (ensure_ray(config), tracker.start("distill", fingerprint=wanted) as run,
              system_metrics(config, run, tracker.uri)):
            check_workers("distill.workers", config.distill.workers)
            workers = config.distill.workers
            meter = Meter(workers.count, workers.count * workers.gpus)
            result, files = _run_in_ray(config, folder, run)
            usage = replace(meter.read(), cpu_seconds=None)  # the workers' is not seen here
            result.figures.update(usage.added_to(folder).figures())
            return stage.finish(result, files)


def _run_in_ray(config: RunConfig, folder: Path, run: Run) -> tuple[StageResult, list[Path]]:
    """Compute all rows that are missing; returns the result and its files."""
    total = None
    if config.prompts.source == SERVED:
        counts = read_served(config, folder)
        total, figures = counts["answers"], dict[str, Any](counts)
    else:
        if config.prompts.source != "self":
            read_prompts(config, folder)
        figures = {**make_prompts(config, folder)}
    digest = digest_of_ids(folder / "prompts", PROMPTS, key="prompt_id")
    run.log_dataset("prompts", digest, config.prompts.path or str(folder / "prompts"), "distill")
    figures |= answer_prompts(config, folder, total)
    run.log_metrics({name: value for name, value in figures.items() if isinstance(value, (int, float))})
    run.log_headline({"rows": figures["responses"]})
    run.describe(f"{figures['responses']:,} answers of the base", Table(("figure", "value"), [
        (name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value)) for name, value in figures.items()
    ]).markdown())
    outputs = {part: str(folder / part) for part in ("prompts", "responses", "features", "errors")}
    files = [path for part in PARTS for path in part_files(folder / part)]
    return StageResult("distill", run.run_id, outputs, figures), [*files, folder / COUNTS]


def _check_base(config: RunConfig) -> None:
    """Raise InputError for a base that cannot distill with these settings, before a folder is claimed or a worker started."""
    model, cache = config.base.model, RunPaths.of(config).cache
    if config.base.dtype == LOSSY:
        raise InputError(f"base.dtype={LOSSY}: heads learn from the base itself, not from a lossy copy: distill and train with "
                         "auto, bf16 or fp32, and bench those heads with the lossy base")
    context_limit(model, cache=cache, asked=config.base.context_limit)
    if config.prompts.source == "self":
        user_turn_opening(load_tokenizer(resolve_base(model, cache).folder))
    vocabulary = load_vocabulary(model, dtype=config.base.dtype, cache=cache)
    if config.distill.heads:
        check_heads(config.distill.heads, vocabulary)
    if (vllm := vllm_settings(config, "distill.workers", config.distill.workers)) is not None:
        _check_vllm(config, vocabulary, vllm)


def _check_vllm(config: RunConfig, vocabulary: BaseVocabulary, vllm: VllmSettings) -> None:
    """Raise InputError for heads and temperatures that vLLM cannot decode with."""
    heads = config.distill.heads
    if heads:
        check_count(vllm.num_speculative_tokens, exportable(heads, vocabulary).num_heads)
    made = config.prompts.source == "self" or config.prompts.self_made
    named = [("distill.temperatures", value) for value in config.distill.temperatures]
    for field, temperature in [*named, *([("prompts.temperature", config.prompts.temperature)] if made else [])]:
        check_temperature(field, temperature)
        check_sampling(config, bool(heads), field, temperature)


def _lacks_features(config: RunConfig, done: StageResult) -> bool:
    """Whether a finished run has the hidden states of held-out rows only, and the settings ask for those of all rows."""
    return config.distill.features == "all" and done.figures.get("feature_rows", 0) < done.figures.get("responses", 0)


def answered(config: RunConfig) -> tuple[Path, str]:
    """Folder and digest of the answers of this run's finished `distill`, for training with online features."""
    return _rows_of(config, "responses", RESPONSES)


def distilled(config: RunConfig) -> tuple[Path, str]:
    """Folder and digest of the features of this run's finished `distill`. Raises InputError if it has not finished.

    The digest is of the fingerprint and the ids of the rows, not of the files: rows that are lost and computed again are
    written to other files. With `train.also` it is of the rows of those runs too, which lie in `union.other_rows`.
    """
    return _rows_of(config, "features", FEATURES)


def _rows_of(config: RunConfig, part: str, contract: pa.Schema) -> tuple[Path, str]:
    folder = RunPaths.of(config).stage("distill")
    manifest = require_manifest(folder, "distill")
    digest = digest_of_ids(folder / part, contract, manifest["fingerprint"])
    others = [digest_of_ids(place, contract, made) for place, made in
              zip(other_rows(config, part), other_fingerprints(config), strict=True)]
    return folder / part, content_id(digest, *others) if others else digest
