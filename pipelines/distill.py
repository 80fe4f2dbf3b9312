"""`distill`: prompts in, the base model's own answers and hidden states out.

    prompts/     part files of contracts.PROMPTS     self-made, or read from JSONL, Parquet or a data set
    responses/   part files of contracts.RESPONSES   one answer per prompt and temperature
    features/    part files of contracts.FEATURES    responses with the hidden states that training reads
    errors/      part files of contracts.ERRORS
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from hydra_core.base import BaseIdentity, load_tokenizer, load_vocabulary, resolve_base
from hydra_core.decoding import check_heads
from pipelines.cluster import ensure_ray, run_blocks
from pipelines.config import RunConfig
from pipelines.contracts import ERRORS, FEATURES, PROMPTS, RESPONSES, check_counts, content_id
from pipelines.distill_workers import FeatureWriter, PromptWriter, ResponseWriter, WorkerSettings
from pipelines.parts import known_ids, part_files, read_parts, sweep, write_part
from pipelines.prompts import file_prompts
from pipelines.stage import RunPaths, StageResult, fingerprint, finished, stage_folder
from pipelines.tracking import Tracker

BLOCK_BATCHES = 8   # running batches in one block of work: long enough that a draining end costs little
FEATURE_ROWS = 128  # rows in one feature part
LEAST_AGREEMENT = {"fp32": 0.99, "bf16": 0.9}  # share of greedy tokens that their own hidden states must reproduce
MOST_WAVES = 6


def distill_fingerprint(config: RunConfig) -> str:
    """What a `distill` folder is the answer to."""
    resolved = resolve_base(config.base.model, RunPaths.of(config).cache)
    settings = {"prompts": config.prompts.model_dump(), "distill": config.distill.model_dump(exclude={"workers", "heads"}),
                "base": config.base.model_dump(exclude={"device", "model"})}
    return fingerprint("distill", settings, {"base": resolved.digest})


def run_distill(config: RunConfig) -> StageResult:
    """Run the stage, or take up where a killed one stopped. Raises InputError for the user's mistakes."""
    paths = RunPaths.of(config)
    folder, wanted = paths.stage("distill"), distill_fingerprint(config)
    if (done := finished(folder, wanted)) is not None:
        return done
    if config.distill.heads:
        check_heads(config.distill.heads, load_vocabulary(config.base.model, dtype=config.base.dtype, cache=paths.cache))
    with stage_folder(config, "distill", folder, wanted) as stage, ensure_ray(config):
        tracker = Tracker.open(config)
        with tracker.start("distill", params=config.model_dump(mode="json"), fingerprint=wanted) as run:
            for part in ("candidates", "prompts", "responses", "features"):
                sweep(folder / part)
            shutil.rmtree(folder / "errors", ignore_errors=True)  # failed rows are tried again
            figures = _prompts(config, folder)
            figures |= _responses(config, folder)
            figures |= _features(config, folder)
            files = [path for part in ("prompts", "responses", "features", "errors") for path in part_files(folder / part)]
            outputs = {part: str(folder / part) for part in ("prompts", "responses", "features")}
            result = stage.finish(StageResult("distill", run.run_id, outputs, figures), files)
            run.log_metrics({name: value for name, value in figures.items() if isinstance(value, (int, float))})
            run.log_dataset("responses", stage.fingerprint, str(folder / "responses"), "distill")
            run.log_artifact(folder / "manifest.json")
            return result


def _settings(config: RunConfig, folder: Path, max_new_tokens: int, temperature: float = 0.0) -> WorkerSettings:
    distill = config.distill
    return WorkerSettings(config.base, str(RunPaths.of(config).cache), str(folder), distill.workers.threads,
                          distill.running_batch, distill.rows_per_file, max_new_tokens, temperature, distill.held_out,
                          distill.feature_dtype, distill.heads)


def _run(config: RunConfig, actor: type, settings: WorkerSettings, blocks: list[pa.Table]) -> dict[str, int]:
    workers = config.distill.workers
    return run_blocks(actor, settings, blocks, actors=workers.count, cpus=workers.cpus, gpus=workers.gpus)


def _blocks(table: pa.Table, rows: int) -> list[pa.Table]:
    return [table.slice(start, rows) for start in range(0, len(table), rows)]


# -- prompts -----------------------------------------------------------------------------------------------------------

def _prompts(config: RunConfig, folder: Path) -> dict[str, Any]:
    if not part_files(folder / "prompts"):  # written at once and last, so that a part stands for all of them
        made = _self_made(config, folder) if config.prompts.source == "self" else _read_from_files(config, folder)
        return {"prompts": made[0], "prompt_errors": made[1], "prompts_skipped": made[2]}
    rows = read_parts(folder / "prompts", PROMPTS, ["prompt_id"])
    return {"prompts": len(rows)}


def _self_made(config: RunConfig, folder: Path) -> tuple[int, int, int]:
    """Sample candidates in waves of consecutive seeds until enough distinct ones stand."""
    prompts = config.prompts
    wanted = prompts.count or 640
    settings = _settings(config, folder, prompts.max_tokens, prompts.temperature)
    tried, rejected = 0, 0
    for _ in range(MOST_WAVES):
        have = _distinct(folder, wanted)
        if len(have) >= wanted:
            break
        # seeds that an earlier, killed run already turned into rows are not sampled again
        known = {int(source.split("/")[1]) for source in
                 read_parts(folder / "candidates", PROMPTS, ["source"])["source"].to_pylist()}
        size = int((wanted - len(have)) * 1.3) + 16
        first = prompts.seed * 1_000_000
        seeds = [seed for seed in range(first + tried, first + tried + size) if seed not in known]
        tried += size
        table = pa.table({"index": pa.array(seeds, pa.int64())})
        block = min(config.distill.running_batch * BLOCK_BATCHES, 256)
        rejected += _run(config, PromptWriter, settings, _blocks(table, block)).get("rejected", 0)
    rows = _distinct(folder, wanted)
    if len(rows) < wanted:
        raise RuntimeError(f"the base wrote only {len(rows)} usable prompts of {wanted} in {tried} tries: "
                           "raise prompts.max_tokens or bring prompts of your own")
    write_part(folder / "prompts", rows, PROMPTS, key="prompt_id")
    shutil.rmtree(folder / "candidates", ignore_errors=True)
    print(f"distill: {len(rows)} prompts made, {rejected} candidates rejected", file=sys.stderr)
    return len(rows), 0, rejected


def _distinct(folder: Path, wanted: int) -> list[dict[str, Any]]:
    """The first `wanted` candidates by seed, each text once."""
    rows = sorted(read_parts(folder / "candidates", PROMPTS).to_pylist(), key=lambda row: row["source"])
    return list({row["prompt_id"]: row for row in reversed(rows)}.values())[::-1][:wanted]


def _read_from_files(config: RunConfig, folder: Path) -> tuple[int, int, int]:
    tokenizer = load_tokenizer(resolve_base(config.base.model, RunPaths.of(config).cache).folder)
    rows, errors, skipped = file_prompts(config.prompts, tokenizer, config.distill.held_out)
    if errors:
        write_part(folder / "errors", errors, ERRORS)
    total = len(rows) + len(errors) + skipped
    print(f"distill: prompts read {total} = {len(rows)} ok + {len(errors)} errors + {skipped} skipped", file=sys.stderr)
    check_counts("distill prompts", total, len(rows), len(errors), skipped, config.distill.max_error_share)
    write_part(folder / "prompts", rows, PROMPTS, key="prompt_id")
    return len(rows), len(errors), skipped


# -- responses and features --------------------------------------------------------------------------------------------

def _tasks(config: RunConfig, folder: Path) -> Iterator[dict[str, Any]]:
    """One response to be made for each prompt and temperature; the id says everything it depends on."""
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


def _responses(config: RunConfig, folder: Path) -> dict[str, Any]:
    tasks = list(_tasks(config, folder))
    known = known_ids(folder / "responses", RESPONSES)
    missing = [task for task in tasks if task["id"] not in known]
    table = pa.Table.from_pylist(missing, schema=RESPONSES.remove_metadata())
    settings = _settings(config, folder, config.distill.max_new_tokens)
    blocks = _blocks(table, config.distill.running_batch * BLOCK_BATCHES)
    totals = _run(config, ResponseWriter, settings, blocks)
    rows = read_parts(folder / "responses", RESPONSES, ["response_ids"])
    tokens = sum(len(ids) for ids in rows["response_ids"].to_pylist())
    errors = totals.get("errors", 0)
    print(f"distill: answers {len(tasks)} = {len(rows)} ok + {errors} errors ({len(known)} stood already), "
          f"{tokens} tokens", file=sys.stderr)
    check_counts("distill answers", len(tasks), len(rows), errors, 0, config.distill.max_error_share)
    return {"responses": len(rows), "response_tokens": tokens, "errors": errors, "resumed": len(known)}


def _features(config: RunConfig, folder: Path) -> dict[str, Any]:
    known = known_ids(folder / "features", FEATURES)
    rows = read_parts(folder / "responses", RESPONSES)
    keep = [index for index, row_id in enumerate(rows["id"].to_pylist()) if row_id not in known]
    width = 2 if config.distill.feature_dtype == "bf16" else 4
    tokens = sum(len(a) + len(b) for a, b in zip(rows["prompt_ids"].to_pylist(), rows["response_ids"].to_pylist(), strict=True))
    print(f"distill: hidden states of {tokens} tokens, {width} bytes x model width each", file=sys.stderr)
    blocks = _blocks(rows.take(pa.array(keep, pa.int64())), FEATURE_ROWS)
    totals = _run(config, FeatureWriter, _settings(config, folder, 1), blocks)
    compared = totals.get("compared", 0)
    share = totals.get("agreed", 0) / compared if compared else None
    if share is not None and share < LEAST_AGREEMENT[config.base.dtype]:
        raise RuntimeError(f"hidden states reproduce only {share:.3f} of the greedy tokens: they are not the ones the "
                           "answers came from")
    return {"feature_rows": len(known) + totals.get("ok", 0), "feature_tokens": tokens,
            "greedy_reproduced": None if share is None else round(share, 4)}
