"""The `distill` stage: prompts in, the base model's own answers and hidden states out.

    prompts/          part files of schemas.PROMPTS     self-made, or read from JSONL, Parquet or a data set
    prompts.json      number of prompts, of rows that are no prompt, of duplicates
    responses/        part files of schemas.RESPONSES   one answer for each prompt and temperature
    features/         part files of schemas.FEATURES    responses with the hidden states that training reads
    errors/prompts/   part files of schemas.ERRORS      rows that are no prompt; kept as long as the prompts
    errors/answers/   part files of schemas.ERRORS      answers that failed; the next run tries them again
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute

from hydra_core.base import (
    BaseIdentity,
    context_limit,
    hidden_width,
    load_tokenizer,
    load_vocabulary,
    resolve_base,
    user_turn_opening,
)
from hydra_core.base.formats import LOSSY
from hydra_core.decoding import check_heads
from hydra_core.errors import InputError
from pipelines.config import DistillSection, RunConfig
from pipelines.distill.actors import FEATURE_ROWS, FeatureWriter, PromptWriter, ResponseWriter, WorkerSettings
from pipelines.distill.prompts import file_prompts, source_digest
from pipelines.rows.parquet_parts import deduplicate, finished_ids, part_files, read_parts, sweep, write_part
from pipelines.rows.prompt_reader import count_rows
from pipelines.rows.schemas import ERRORS, FEATURES, PROMPTS, RESPONSES, check_counts, content_id
from pipelines.runtime.artifacts import RunPaths, StageResult, fingerprint, finished, require_manifest, stage_folder
from pipelines.runtime.console import Progress, say
from pipelines.runtime.files import write_text
from pipelines.runtime.lock import only_run
from pipelines.runtime.ray_cluster import check_workers, ensure_ray, environment_options, run_blocks
from pipelines.tracking import Run, Tracker

BLOCK_BATCHES = 8   # full batches in one block of work: the end of a block, where the batch is not full, costs little
BLOCKS_EACH = 4     # blocks for each of several workers if there are enough rows: Ray Data assigns two at a time
LEAST_AGREEMENT = {"fp32": 0.99, "bf16": 0.9, "int4": 0.9}  # share of greedy tokens that their own hidden states must reproduce
MOST_WAVES = 6
COUNTS = "prompts.json"
WORK = {PromptWriter.__name__: "prompts", ResponseWriter.__name__: "answers", FeatureWriter.__name__: "hidden states"}
"""What an actor makes of the rows of a block, for lines of progress."""
COUNTED = ("ok", "errors", "rejected")
"""Counts that add up to the rows of a block."""
PARTS = ("prompts", "responses", "features", "errors/prompts", "errors/answers")
EXECUTION_FIELDS = {"workers", "heads", "max_batch_size", "rows_per_file", "max_error_share", "features"}
"""Settings that change no row: a run may continue with other values, and features may be added to a finished run."""


def distill_fingerprint(config: RunConfig) -> str:
    """Digest of all that decides the rows of a `distill` folder. Raises InputError if the prompts or the base do not exist."""
    source = source_digest(config.prompts)
    resolved = resolve_base(config.base.model, RunPaths.of(config).cache)
    return fingerprint("distill", _deciding_settings(config), {"base": resolved.digest} | ({"prompts": source} if source else {}))


def _deciding_settings(config: RunConfig) -> dict[str, Any]:
    return {"prompts": config.prompts.model_dump(), "distill": config.distill.model_dump(exclude=EXECUTION_FIELDS),
            "base": config.base.model_dump(exclude={"device", "model"})}


def run_distill(config: RunConfig) -> StageResult:
    """Run the stage, or continue a killed run. Raises InputError for the user's mistakes."""
    tracker = Tracker.open(config)  # first, so that a server that does not answer is reported before a base is fetched
    folder, wanted = RunPaths.of(config).stage("distill"), distill_fingerprint(config)
    if (done := finished(folder, wanted)) is not None and not _lacks_features(config, done):
        return done
    _check_base(config)
    with ExitStack() as held:
        held.enter_context(only_run(folder, Path(config.storage)))
        if (done := finished(folder, wanted)) is not None and not _lacks_features(config, done):
            return done  # finished by the run that held the lock until now
        stage = held.enter_context(stage_folder(config, "distill", folder, wanted, settings=_deciding_settings(config)))
        for part in (*PARTS, "candidates"):
            sweep(folder / part)
        shutil.rmtree(folder / "errors" / "answers", ignore_errors=True)  # failed answers are tried again
        if config.prompts.source != "self":
            _read_prompts(config, folder)  # a file without a usable row is reported before Ray is started
        with ensure_ray(config), tracker.start("distill", fingerprint=wanted) as run:
            check_workers("distill.workers", config.distill.workers)
            return stage.finish(*_run_in_ray(config, folder, run))


def _run_in_ray(config: RunConfig, folder: Path, run: Run) -> tuple[StageResult, list[Path]]:
    """Compute all rows that are missing; returns the result and its files."""
    figures = _prompts(config, folder)
    prompt_ids = read_parts(folder / "prompts", PROMPTS, ["prompt_id"])["prompt_id"].to_pylist()
    run.log_dataset("prompts", content_id(sorted(prompt_ids)), config.prompts.path or str(folder / "prompts"), "distill")
    answers, counts = _responses(config, folder)
    figures |= answers | _features(config, folder, counts)
    run.log_metrics({name: value for name, value in figures.items() if isinstance(value, (int, float))})
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


def _lacks_features(config: RunConfig, done: StageResult) -> bool:
    """Whether a finished run has the hidden states of held-out rows only, and the settings ask for those of all rows."""
    return config.distill.features == "all" and done.figures.get("feature_rows", 0) < done.figures.get("responses", 0)


def answered(config: RunConfig) -> tuple[Path, str]:
    """Folder and digest of the answers of this run's finished `distill`, for training with online features."""
    folder = RunPaths.of(config).stage("distill")
    manifest = require_manifest(folder, "distill")
    return folder / "responses", content_id(manifest["fingerprint"], sorted(finished_ids(folder / "responses", RESPONSES)))


def distilled(config: RunConfig) -> tuple[Path, str]:
    """Folder and digest of the features of this run's finished `distill`. Raises InputError if it has not finished.

    The digest is of the fingerprint and the ids of the rows, not of the files: rows that are lost and computed again are
    written to other files.
    """
    folder = RunPaths.of(config).stage("distill")
    manifest = require_manifest(folder, "distill")
    ids = finished_ids(folder / "features", FEATURES)
    return folder / "features", content_id(manifest["fingerprint"], sorted(ids))


def _settings(config: RunConfig, folder: Path, max_new_tokens: int, temperature: float = 0.0) -> WorkerSettings:
    distill = config.distill
    return WorkerSettings(config.base, str(RunPaths.of(config).cache), str(folder), distill.workers.threads,
                          distill.max_batch_size, distill.rows_per_file, max_new_tokens, temperature, distill.held_out,
                          distill.feature_dtype, distill.features, distill.heads)


def _run(config: RunConfig, actor: type, settings: WorkerSettings, blocks: list[pa.Table]) -> dict[str, int]:
    """Sums of the counts that `actor` returns for each block."""
    workers = config.distill.workers
    with Progress("distill", WORK[actor.__name__], sum(map(len, blocks))) as progress:
        return run_blocks(actor, settings, blocks, actors=workers.count, cpus=workers.cpus, gpus=workers.gpus,
                          storage=Path(settings.folder), options=environment_options(config),
                          done=lambda counts: progress.advance(sum(counts.get(name, 0) for name in COUNTED)))


def _blocks(table: pa.Table, rows: int) -> list[pa.Table]:
    return [table.slice(start, rows) for start in range(0, len(table), rows)]


# -- prompts -----------------------------------------------------------------------------------------------------------

def _prompts(config: RunConfig, folder: Path) -> dict[str, int]:
    """Counts of the prompts, which are written if they are missing."""
    counts = _written(folder)
    if counts is None or counts.get("self_made", 0) < config.prompts.self_made:
        counts = _self_made(config, folder)
    total = counts["prompts"] + counts["prompt_errors"] + counts["prompts_skipped"]
    say("distill", f"prompts read {total} = {counts['prompts']} ok + {counts['prompt_errors']} errors + "
                   f"{counts['prompts_skipped']} skipped")
    return counts


def _written(folder: Path) -> dict[str, int] | None:
    """Counts of the prompts if these and their error rows are complete, else None."""
    if not part_files(folder / "prompts") or not (folder / COUNTS).exists():
        return None
    counts: dict[str, int] = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
    found = (len(read_parts(folder / "prompts", PROMPTS, ["prompt_id"])),
             len(read_parts(folder / "errors" / "prompts", ERRORS, ["id"])))
    return counts if found == (counts["prompts"], counts["prompt_errors"]) else None


def _write_prompts(folder: Path, rows: list[dict[str, Any]], errors: list[dict[str, Any]], skipped: int,
          self_made: int = 0) -> dict[str, int]:
    """Write prompts, error rows and counts, the prompts last; returns the counts.

    `self_made`: number of prompts that the base wrote in addition to those of a file.
    """
    for part in ("errors/prompts", "prompts"):
        shutil.rmtree(folder / part, ignore_errors=True)
    if errors:
        write_part(folder / "errors" / "prompts", errors, ERRORS)
    counts = {"prompts": len(rows), "prompt_errors": len(errors), "prompts_skipped": skipped, "self_made": self_made}
    write_text(folder / COUNTS, json.dumps(counts))
    write_part(folder / "prompts", rows, PROMPTS, key="prompt_id")
    return counts


def _self_made(config: RunConfig, folder: Path) -> dict[str, int]:
    """Sample candidates in waves of consecutive seeds until enough are distinct, then add them to a file's prompts."""
    prompts = config.prompts
    wanted = prompts.self_made or prompts.count or 640
    settings = replace(_settings(config, folder, prompts.max_tokens, prompts.temperature), starts=prompts.starts)
    tried, rejected = 0, 0
    for _ in range(MOST_WAVES):
        have = _distinct(folder, wanted)
        if len(have) >= wanted:
            break
        # seeds whose rows an earlier, killed run has written are not sampled again
        known = {int(source.split("/")[1]) for source in
                 read_parts(folder / "candidates", PROMPTS, ["source"])["source"].to_pylist()}
        size = int((wanted - len(have)) * 1.3) + 16
        first = prompts.seed * 1_000_000
        seeds = [seed for seed in range(first + tried, first + tried + size) if seed not in known]
        tried += size
        table = pa.table({"index": pa.array(seeds, pa.int64())})
        block = min(config.distill.max_batch_size * BLOCK_BATCHES, 256)
        rejected += _run(config, PromptWriter, settings, _blocks(table, block)).get("rejected", 0)
    rows = _distinct(folder, wanted)
    if len(rows) < wanted:
        raise InputError(f"prompts.source={prompts.source}: the base wrote only {len(rows)} usable prompts of {wanted} in "
                         f"{tried} tries: raise prompts.max_tokens under another name, or bring prompts of your own")
    counts = _write_prompts(folder, *_with_those_of_a_file(folder, rows, rejected), self_made=prompts.self_made)
    shutil.rmtree(folder / "candidates", ignore_errors=True)
    return counts


def _with_those_of_a_file(folder: Path, rows: list[dict[str, Any]],
                   rejected: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Prompts, error rows and the number of rows left out, together with those of a file that is read already."""
    read = _written(folder)
    if read is None:
        return rows, [], rejected
    before = read_parts(folder / "prompts", PROMPTS).to_pylist()
    known = {row["prompt_id"] for row in before}
    fresh = [row for row in rows if row["prompt_id"] not in known]
    errors = read_parts(folder / "errors" / "prompts", ERRORS).to_pylist()
    return before + fresh, errors, read["prompts_skipped"] + rejected + len(rows) - len(fresh)


def _distinct(folder: Path, wanted: int) -> list[dict[str, Any]]:
    """The first `wanted` distinct candidates, in the order of their seeds."""
    rows = sorted(read_parts(folder / "candidates", PROMPTS).to_pylist(), key=lambda row: row["source"])
    return list({row["prompt_id"]: row for row in reversed(rows)}.values())[::-1][:wanted]


def _read_prompts(config: RunConfig, folder: Path) -> None:
    """Read the user's prompts unless they are written already. Raises InputError, and writes nothing, for too many bad rows."""
    if _written(folder) is not None:
        return
    tokenizer = load_tokenizer(resolve_base(config.base.model, RunPaths.of(config).cache).folder)
    rows, errors, skipped = file_prompts(config.prompts, tokenizer, config.distill.held_out)
    hint = f"{errors[0]['message']}; mend the file or raise distill.max_error_share" if errors else ""
    read = len(rows) + len(errors) + skipped
    if config.prompts.source != "datasets":
        read = min(count_rows(str(config.prompts.path)), config.prompts.count or read)
    check_counts(f"prompts.path={config.prompts.path}", read, len(rows), len(errors), skipped, config.distill.max_error_share,
                 hint)
    _write_prompts(folder, rows, errors, skipped)


# -- responses and features --------------------------------------------------------------------------------------------

def _tasks(config: RunConfig, folder: Path) -> Iterator[dict[str, Any]]:
    """A response row without its answer for each prompt and temperature. Its id is a digest of all that decides the answer."""
    resolved = resolve_base(config.base.model, RunPaths.of(config).cache)
    base = str(BaseIdentity(resolved.name, resolved.digest, config.base.dtype))
    limits = [config.distill.max_new_tokens, config.base.context_limit]
    for prompt in read_parts(folder / "prompts", PROMPTS).to_pylist():
        for sample, temperature in enumerate(config.distill.temperatures):
            seed = config.distill.seed + int(content_id(prompt["prompt_id"], sample)[:8], 16)
            yield {"id": content_id(prompt["prompt_id"], temperature, seed, sample, base, limits),
                   "prompt_id": prompt["prompt_id"], "prompt_ids": prompt["prompt_ids"], "response_ids": None,
                   "finish_reason": None, "temperature": temperature, "seed": seed, "source": prompt["source"],
                   "split": prompt["split"], "base": base}


def _responses(config: RunConfig, folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Answer every prompt that has no answer yet; returns figures, and counts of the hidden states that came with them."""
    tasks = list(_tasks(config, folder))
    finished_before = finished_ids(folder / "responses", RESPONSES)
    missing = [task for task in tasks if task["id"] not in finished_before]
    table = pa.Table.from_pylist(missing, schema=RESPONSES.remove_metadata())
    stored = finished_ids(folder / "features", FEATURES)  # of answers that were lost since: the answers come out the same
    table = table.append_column("has_features", pa.array([task["id"] in stored for task in missing], pa.bool_()))
    settings = _settings(config, folder, config.distill.max_new_tokens)
    blocks = _blocks(table, _block_rows(len(table), config.distill))
    totals = _run(config, ResponseWriter, settings, blocks)
    _keep_once(folder / "responses", RESPONSES)
    rows = read_parts(folder / "responses", RESPONSES, ["response_ids"])
    tokens = sum(len(ids) for ids in rows["response_ids"].to_pylist())
    errors = totals.get("errors", 0)
    say("distill", f"answers {len(tasks)} = {len(rows)} ok + {errors} errors ({len(finished_before)} from an earlier run), "
                   f"{tokens} tokens")
    check_counts("distill answers", len(tasks), len(rows), errors, 0, config.distill.max_error_share,
                 f"see {folder / 'errors' / 'answers'}; shorten those prompts or raise distill.max_error_share")
    return {"responses": len(rows), "response_tokens": tokens, "errors": errors, "resumed": len(finished_before)}, totals


def _keep_once(part: Path, contract: pa.Schema) -> None:
    """Leave out rows that stand twice: a killed job's workers may have gone on writing."""
    if removed := deduplicate(part, contract):
        say("distill", f"{removed} rows of {part.name} stood twice, from a job that was killed: kept once")


def _block_rows(rows: int, distill: DistillSection) -> int:
    """Number of rows in one block of answers: `BLOCK_BATCHES` full batches. With several workers the blocks are smaller, so that
    each gets several blocks of a batch or more, or at least one."""
    workers, most = distill.workers.count, distill.max_batch_size * BLOCK_BATCHES
    if workers == 1:
        return most
    fair, share = (max(1, -(-rows // parts)) for parts in (workers * BLOCKS_EACH, workers))
    return min(most, max(distill.max_batch_size, fair), share)


def _tokens(rows: pa.Table) -> int:
    """Number of tokens of prompts and answers."""
    return sum(pa.compute.sum(pa.compute.list_value_length(rows[name])).as_py() or 0 for name in ("prompt_ids", "response_ids"))


def _features(config: RunConfig, folder: Path, counts: dict[str, int]) -> dict[str, Any]:
    """Compute the hidden states that are missing; `counts`: of those that the workers stored with their answers."""
    distill, stored = config.distill, finished_ids(folder / "features", FEATURES)
    rows = read_parts(folder / "responses", RESPONSES)
    if distill.features == "held_out":
        rows = rows.filter(pa.compute.equal(rows["split"], "held_out"))
    missing = rows.take(pa.array([at for at, row_id in enumerate(rows["id"].to_pylist()) if row_id not in stored], pa.int64()))
    wide = hidden_width(config.base.model, cache=RunPaths.of(config).cache)
    size = _tokens(rows) * wide * (2 if distill.feature_dtype == "bf16" else 4)
    say("distill", f"hidden states of {len(rows)} rows ({len(missing)} to compute), {_tokens(rows)} tokens x {wide} wide in "
                   f"{distill.feature_dtype}: {size / 2**30:.2f} GiB in {folder / 'features'}")
    more = _run(config, FeatureWriter, _settings(config, folder, 1), _blocks(missing, FEATURE_ROWS)) if len(missing) else {}
    _keep_once(folder / "features", FEATURES)
    made = len(rows) - len(missing) + more.get("features", 0)
    if made < len(rows):
        raise RuntimeError(f"distill: {made} rows have hidden states, but {len(rows)} answers need them")
    agreed, compared = (counts.get(name, 0) + more.get(name, 0) for name in ("agreed", "compared"))
    share = agreed / compared if compared else None
    if share is not None and share < LEAST_AGREEMENT[config.base.dtype]:
        raise RuntimeError(f"hidden states reproduce only {share:.3f} of the greedy tokens: the answers do not follow from them")
    return {"feature_rows": made, "feature_tokens": _tokens(rows),
            "greedy_reproduced": None if share is None else round(share, 4)}
