"""Answers and their hidden states: one flow of rows from `prompts/` to `responses/`, `features/` and `errors/answers/`.

    prompts/    -> tasks without an answer yet        -> the base answers, and records its hidden states -> parts
    responses/  -> rows that lack their hidden states -> the base computes them                          -> parts
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from hydra_core.base import BaseIdentity, hidden_width, resolve_base
from pipelines.config import DistillSection, RunConfig
from pipelines.distill.actors import FEATURE_ROWS, VALUE_BYTES, Answerer, WorkerSettings
from pipelines.distill.tasks import ANSWERED, TO_ANSWER, PartWriter, TaskReader, parts_to_read, wants_features
from pipelines.rows.parquet_parts import deduplicate, iter_parts, number_of_rows, part_files, stored_ids
from pipelines.rows.row_ids import among, row_digests
from pipelines.rows.schemas import ERRORS, FEATURES, PROMPTS, RESPONSES, check_counts
from pipelines.runtime.artifacts import RunPaths
from pipelines.runtime.console import Progress, say
from pipelines.runtime.files import remove_tree
from pipelines.runtime.ray_cluster import environment_options
from pipelines.runtime.row_flow import Pool, run_flow
from pipelines.runtime.vllm import VLLM, vllm_settings

BLOCK_BATCHES = 8   # full batches in one block of work: the end of a block, where the batch is not full, costs little
BLOCKS_EACH = 4     # blocks for each of several workers if there are enough rows: Ray Data assigns two at a time
LEAST_AGREEMENT = {"fp32": 0.99, "bf16": 0.9, "int4": 0.9}  # share of greedy tokens that their own hidden states must reproduce
ATTEMPTS = 3
"""Flows before missing rows are an error: a net below what the flow promises of an actor that dies."""


@dataclass
class Standing:
    """What stands in the folder of the stage: answers, their tokens, and among them rows whose hidden states are wanted, with the
    tokens of prompt and answer; `lacking`: those without hidden states, `parts`: where they stand; `features`: ids of the
    rows that have them, as `stored_ids` gives them."""

    responses: int
    errors: int
    tokens: int
    wanted: int
    wanted_tokens: int
    lacking: int
    parts: list[Path]
    features: np.ndarray


def worker_settings(config: RunConfig, max_new_tokens: int, temperature: float = 0.0, decodes: bool = True) -> WorkerSettings:
    """Settings of the actors; `temperature`: of self-made prompts; `decodes`: False where they compute hidden states alone."""
    distill, cache = config.distill, RunPaths.of(config).cache
    return WorkerSettings(config.base, str(cache), distill.workers.threads, distill.max_batch_size, distill.rows_per_file,
                          max_new_tokens, temperature, distill.held_out, distill.feature_dtype, distill.features,
                          distill.check_share, hidden_width(config.base.model, cache=cache), distill.heads if decodes else None,
                          vllm=vllm_settings(config, "distill.workers", distill.workers) if decodes else None)


def pool_of(config: RunConfig) -> Pool:
    """The actors of both flows."""
    workers = config.distill.workers
    return Pool(workers, workers.count, most_workers(config.distill), environment_options(config))


def most_workers(distill: DistillSection) -> int:
    """Actors that there are at most."""
    return max(distill.workers.count, distill.max_workers or 0)


def answer_prompts(config: RunConfig, folder: Path, total: int | None = None) -> dict[str, Any]:
    """Answer every prompt that has no answer yet, and compute the hidden states that are missing; returns figures.

    `total`: number of answers, all of which stand already; None: one for each prompt and temperature.

    Raises InputError for too many errors, RuntimeError for rows that are lost or answers that do not follow from their hidden
    states.
    """
    if total is None:
        total = number_of_rows(folder / "prompts", PROMPTS) * len(config.distill.temperatures)
    first = now = _standing(config, folder)
    counts: Counter[str] = Counter()
    for attempt in range(ATTEMPTS):
        if now.responses + now.errors == total and not now.lacking:
            break
        if attempt:
            say("distill", f"{total - now.responses - now.errors} answers and {now.lacking} hidden states were lost with a "
                           "worker: they are computed again")
        missing = total - now.responses
        if missing and config.engine == VLLM:  # vLLM and the base that computes hidden states do not share a worker's memory
            counts += _flow(config, folder, replace(now, parts=[], lacking=0), missing)
            now, missing = _standing(config, folder), 0
        if missing or now.lacking:
            counts += _flow(config, folder, now, missing)
            now = _standing(config, folder)
    say("distill", f"answers {total} = {now.responses} ok + {now.errors} errors ({first.responses} from an earlier run), "
                   f"{now.tokens} tokens")
    check_counts("distill answers", total, now.responses, now.errors, 0, config.distill.max_error_share,
                 f"see {folder / 'errors' / 'answers'}; shorten those prompts or raise distill.max_error_share")
    figures = {"responses": now.responses, "response_tokens": now.tokens, "errors": now.errors, "resumed": first.responses}
    return figures | _feature_figures(config, folder, now, counts)


def _feature_figures(config: RunConfig, folder: Path, now: Standing, counts: Mapping[str, int]) -> dict[str, Any]:
    wide, kind = hidden_width(config.base.model, cache=RunPaths.of(config).cache), config.distill.feature_dtype
    size = now.wanted_tokens * wide * VALUE_BYTES[kind]
    say("distill", f"hidden states of {now.wanted} rows ({counts['features']} computed now), {now.wanted_tokens} tokens x {wide} "
                   f"wide in {kind}: {size / 2**30:.2f} GiB in {folder / 'features'}")
    if now.lacking:
        raise RuntimeError(f"distill: {now.wanted - now.lacking} rows have hidden states, but {now.wanted} answers need them")
    share = counts["agreed"] / counts["compared"] if counts["compared"] else None
    if share is not None and share < LEAST_AGREEMENT[config.base.dtype]:
        raise _refused(folder, f"hidden states reproduce only {share:.3f} of the greedy tokens: answers do not follow from them")
    if counts["checked"] and (close := counts["close"] / counts["checked"]) < LEAST_AGREEMENT[config.base.dtype]:
        raise _refused(folder, f"only {close:.3f} of the hidden states that decoding recorded are those of a second forward")
    return {"feature_rows": now.wanted, "feature_tokens": now.wanted_tokens,
            "greedy_reproduced": None if share is None else round(share, 4)}


def _refused(folder: Path, why: str) -> RuntimeError:
    """The error for hidden states that fail a check. They go: the next run would take them for done."""
    remove_tree(folder / "features")
    return RuntimeError(f"{why}; they are removed")


def _standing(config: RunConfig, folder: Path) -> Standing:
    """What stands, each row once. Reads one part at a time."""
    for part, contract in (("responses", RESPONSES), ("features", FEATURES), ("errors/answers", ERRORS)):
        if removed := deduplicate(folder / part, contract):
            say("distill", f"{removed} rows of {part} stood twice, from a worker that was killed: kept once")
    features = stored_ids(folder / "features", FEATURES)
    found = Standing(0, number_of_rows(folder / "errors" / "answers", ERRORS), 0, 0, 0, 0, [], features)
    for path, rows in iter_parts(folder / "responses", RESPONSES, ["id", "split", "prompt_ids", "response_ids"]):
        wanted = wants_features(rows, config.distill.features == "held_out")
        lacking = int((wanted & ~among(row_digests(rows["id"].to_pylist()), features)).sum())
        answers, prompts = (pa.compute.list_value_length(rows[name]).to_numpy() for name in ("response_ids", "prompt_ids"))
        found.responses += len(rows)
        found.tokens += int(answers.sum())
        found.wanted += int(wanted.sum())
        found.wanted_tokens += int((answers + prompts)[wanted].sum())
        found.lacking += lacking
        found.parts += [path] if lacking else []
    return found


def _flow(config: RunConfig, folder: Path, now: Standing, missing: int) -> Counter[str]:
    """One flow of what is not finished; returns its counts."""
    if missing:
        remove_tree(folder / "errors" / "answers")  # failed answers are tried again
    distill = config.distill
    resolved = resolve_base(config.base.model, RunPaths.of(config).cache)
    reader = TaskReader(str(BaseIdentity(resolved.name, resolved.digest, config.base.dtype)),
                        [distill.max_new_tokens, config.base.context_limit, *engine_of(config)], distill.temperatures,
                        distill.seed, block_rows(missing, distill), FEATURE_ROWS, stored_ids(folder / "responses", RESPONSES),
                        now.features, distill.features == "held_out")
    source = parts_to_read(ANSWERED, now.parts)
    if missing:
        source = parts_to_read(TO_ANSWER, part_files(folder / "prompts")) + source
    blocks = -(-missing // reader.block_rows) + -(-now.lacking // FEATURE_ROWS)
    what, counted = ("answers", ("responses", "errors/answers")) if missing else ("hidden states", ("features",))
    with Progress("distill", what, missing or now.lacking) as progress:
        # hidden states alone are computed by the base's own forward, whatever decodes
        settings = worker_settings(config, distill.max_new_tokens, decodes=bool(missing))
        return run_flow(source, reader, Answerer, settings, PartWriter(folder), storage=folder,
                        pool=pool_of(config).at_most(blocks),
                        done=lambda counts: progress.advance(sum(counts.get(name, 0) for name in counted)))


def engine_of(config: RunConfig) -> list[Any]:
    """What an answer's id and the stage's fingerprint say of the engine: vLLM's answers are other ones where rounding decides,
    and where tokens are drawn. Nothing for our own engine, whose answers have stood without it."""
    if config.engine != VLLM:
        return []
    return [VLLM, *([config.vllm.arguments] if config.vllm.arguments else [])]


def block_rows(rows: int, distill: DistillSection) -> int:
    """Number of rows in one block of answers: `BLOCK_BATCHES` full batches. With several workers the blocks are smaller, so that
    each gets several blocks of a batch or more, or at least one."""
    workers, most = most_workers(distill), distill.max_batch_size * BLOCK_BATCHES
    if workers == 1:
        return most
    fair, share = (max(1, -(-rows // parts)) for parts in (workers * BLOCKS_EACH, workers))
    return min(most, max(distill.max_batch_size, fair), share)
