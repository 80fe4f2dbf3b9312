"""`distill`: rows and hidden states on storage, memory of an actor, time."""

from __future__ import annotations

from pathlib import Path

from hydra_core.base.formats import DTYPES
from hydra_core.decoding.memory import workspace_bytes
from hydra_core.storage import is_remote
from pipelines.config import RunConfig
from pipelines.runtime.artifacts import RunPaths
from pipelines.sizing.amounts import Range, StageSize
from pipelines.sizing.base import BaseShape
from pipelines.sizing.engines import engine_parts, loading, weights_on
from pipelines.sizing.heads import HeadsShape, heads_of_model
from pipelines.sizing.pace import Pace
from pipelines.sizing.processes import cuda_context, process, sharing, starting
from pipelines.sizing.rows import ANSWER_SHARE, RowCounts

PART_BYTES, PART_ROWS, FORWARD_TOKENS = 64 << 20, 128, 4096
"""Of hidden states: bytes and rows of one part, and padded tokens of one forward that computes them."""
COMPRESSED = (0.75, 1.02)
"""Share of the bytes of hidden states that Parquet writes: random bits do not shrink, exponents do."""
ROW_BYTES, IDS_BYTES = (120, 700), (0.8, 4.5)
"""Of a row beside its hidden states: texts and numbers, and each token id."""
PROMPT_ROW_BYTES = (150, 700)
DIGEST_BYTES = 16
"""Of the id of a row, which the driver keeps."""
IN_FLIGHT = (1, 5)
"""Parts of hidden states between an actor and the task that writes them."""
LONGEST = 3
"""Tokens of a file's longest prompts, in those of the mean, that memory is reckoned with."""
CANDIDATES = (1.1, 2.5)
"""Self-made prompts that are tried for each that is kept."""
HOSTED = 1.5
"""Time of a running batch, at most, in that of its steps: sampling, rows that join, and an end that is not full."""
DRAFTED = 2.5
"""Tokens of a step with heads, at most, that times reckon with."""


def feature_rows_bytes(config: RunConfig, base: BaseShape, rows: RowCounts) -> Range:
    """Bytes of `features/` for these rows: hidden states and the rows that they belong to."""
    values = rows.tokens * (base.width * DTYPES[config.distill.feature_dtype].itemsize)
    return Range(COMPRESSED[0] * values.low, COMPRESSED[1] * values.high) + answer_rows_bytes(rows)


def answer_rows_bytes(rows: RowCounts) -> Range:
    """Bytes of `responses/` for these rows."""
    return rows.answers.times(Range(*ROW_BYTES)) + rows.tokens.times(Range(*IDS_BYTES))


def driver_bytes(rows: RowCounts) -> Range:
    """Memory of the driver that grows with the rows: two lists of 16 bytes for each answer, held twice while they are merged, and
    one for each prompt. It sees no row."""
    lists = 2 * DIGEST_BYTES * rows.answers.high + DIGEST_BYTES * rows.prompts.high
    return Range(DIGEST_BYTES * rows.prompts.low, 3 * lists)


def features_share(config: RunConfig) -> float:
    """Share of the answers whose hidden states are stored."""
    return 1.0 if config.distill.features == "all" else config.distill.held_out


def distill_size(config: RunConfig, base: BaseShape, rows: RowCounts, pace: Pace | None, why: str, gpu: bool) -> StageSize:
    """What the stage takes."""
    distill = config.distill
    running = round(min(distill.max_batch_size, max(rows.answers.high, 1)))
    heads, note = heads_of_model(config, base, distill.heads) if distill.heads else (None, "")
    parts, longest = _engine(config, base, rows, running, heads), rows.longest
    part = min(PART_BYTES, PART_ROWS * longest * base.width * DTYPES[distill.feature_dtype].itemsize)
    memory = {"process": process(gpu), "rows on their way": Range(IN_FLIGHT[0] * part, IN_FLIGHT[1] * part)}
    features = feature_rows_bytes(config, base, rows) * features_share(config)
    storage = {"prompts": rows.prompts.times(Range(*PROMPT_ROW_BYTES)), "answers": answer_rows_bytes(rows),
               "hidden states": features}
    weights, most = weights_on(base, gpu), max(distill.workers.count, distill.max_workers or 0)
    network = {"the base, to each worker": Range(0, most * base.weight_bytes()),
               "rows to the storage": Range(sum(amount.low for amount in storage.values()),
                                            2 * sum(amount.high for amount in storage.values()))}
    seconds = None if pace is None else _seconds(config, base, rows, pace, most, running, heads is not None)
    notes = tuple(filter(None, (rows.note, note, up_to(distill.workers.count, most))))
    return StageSize("distill", distill.workers.count, {"process": cuda_context(), **weights, **parts} if gpu else {},
                     {**memory, **loading(base)} if gpu else {**memory, **weights, **parts}, {},
                     {"process": process(False), "ids": driver_bytes(rows)}, storage,
                     written_bytes(config, "distill"), network, seconds, pace.by if pace else why, notes,
                     per_gpu=sharing(distill.workers.gpus))


def _engine(config: RunConfig, base: BaseShape, rows: RowCounts, running: int, heads: HeadsShape | None) -> dict[str, Range]:
    """Bytes of an actor's engine, whose slots are those of a block's longest prompt and answer; a file's prompts may differ much.
    The forward that computes hidden states takes the place of its step."""
    most = config.distill.max_new_tokens
    spread = 1 if config.prompts.source == "self" else LONGEST
    ends = []
    prompts = rows.prompt_tokens.low / max(rows.answers.low, 1), spread * rows.prompt_tokens.high / max(rows.answers.high, 1)
    for prompt in prompts:
        slots = min(base.limit, round(prompt) + most)
        parts = engine_parts(base, heads, running, slots)
        forward = workspace_bytes(base.planned(), FORWARD_TOKENS // max(slots, 1) + 1, slots, 1)
        ends.append(parts | {"a step": Range(parts["a step"].low, max(parts["a step"].high, forward))})
    return {name: Range(ends[0][name].low, ends[1][name].high) for name in ends[0]}


def up_to(least: int, most: int) -> str:
    """A note where workers are added as there is work."""
    return f"numbers in all are for {least} worker{'s' if least > 1 else ''}; up to {most} are started" if most > least else ""


def written_bytes(config: RunConfig, stage: str) -> int:
    """Bytes that a run which goes on has in the folder of `stage` already."""
    if is_remote(config.storage):
        return 0
    folder: Path = RunPaths.of(config).stage(stage)
    return sum(path.stat().st_size for path in folder.rglob("*.parquet")) if folder.is_dir() else 0


def _seconds(config: RunConfig, base: BaseShape, rows: RowCounts, pace: Pace, most: int, running: int, drafts: bool) -> Range:
    """Decoding in running batches, prompts, and the rows whose hidden states are computed once more as a check; with `most`
    workers, or with the least."""
    least, shared = config.distill.workers.count, _slowed(config)
    made = rows.answer_tokens
    if config.prompts.source == "self" or config.prompts.self_made:
        count = config.prompts.self_made if config.prompts.source != "self" else rows.prompts.high
        made = made + Range(CANDIDATES[0] * ANSWER_SHARE, CANDIDATES[1]) * (count * config.prompts.max_tokens)
    step = pace.step(base, running, rows.longest / 2)
    batches = Range(made.low / (most * running), made.high / (least * running))
    decoding = batches.times(Range(step.low / (DRAFTED if drafts else 1), HOSTED * step.high * shared))
    checked = config.distill.check_share * features_share(config)
    forwards = Range(pace.forward(base, rows.prompt_tokens.low / most).low,
                     2 * shared * pace.forward(base, (rows.prompt_tokens.high + checked * rows.tokens.high) / least).high)
    return starting(base.weight_bytes()) + decoding + forwards


def _slowed(config: RunConfig) -> float:
    """How many times slower an actor may be because others share its GPU, or the processors of its machine."""
    gpus, workers = config.distill.workers.gpus, config.distill.workers.count
    if gpus:
        return max(1.0, min(workers, int(1 / gpus))) if gpus < 1 else 1.0
    return float(workers) if not config.ray_address and "cluster" not in config.model_fields_set else 1.0
