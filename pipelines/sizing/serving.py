"""Stages that decode: `serve`, `batch`, `load`, `generate`, `bench` and `tree`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipelines.config import RunConfig
from pipelines.config.bench import VLLM, is_vllm
from pipelines.config.serve import PLAIN
from pipelines.profiling.cost_cache import groups_to_time
from pipelines.runtime.dry_run import HELD_OUT
from pipelines.sizing.amounts import Parts, Range, StageSize, time_text
from pipelines.sizing.base import BaseShape
from pipelines.sizing.distilling import DRAFTED, HOSTED, up_to
from pipelines.sizing.engines import answers_bytes, engine_parts, loading, ngram_bytes, weights_on
from pipelines.sizing.heads import HeadsShape, heads_of_model, heads_shape
from pipelines.sizing.pace import Pace
from pipelines.sizing.processes import cuda_context, process, sharing, starting
from pipelines.sizing.rows import ANSWER_SHARE, lines_of, rows_of

SLOTS = 64
"""Slots for draft nodes that an endpoint gives each sequence."""
TEXT_BYTES, TOKEN_TEXT = (150, 900), (2.0, 6.0)
"""Of a row of answers of `batch`, and of a token in it."""
FOREIGN = Range(1.0, 6.0)
"""Seconds of transformers' own loop, in those of plain decoding."""
VLLM_PROCESS = Range(0.7e9, 1.5e9)
"""Bytes of a process of vLLM without the base: libraries, and what it computes with."""
SPEED_CONTEXT = 1024
"""Tokens of context at which an endpoint's speed is told."""
CHUNKS = 2
"""Rounds of measuring that a load test has besides its rates, in those of one rate."""


def _placed(base: BaseShape, parts: dict[str, Range], gpu: bool, **more: Range) -> tuple[Parts, Parts]:
    """Bytes on the device, and in the machine's memory; `more`: memory of the machine in either case."""
    weights = weights_on(base, gpu)
    host = {"process": process(gpu), **more}
    if gpu:
        return {"process": cuda_context(), **weights, **parts}, {**host, **loading(base)}
    return {}, {**host, **weights, **parts}


def serve_size(config: RunConfig, base: BaseShape, pace: Pace | None, why: str, gpu: bool, name: str = "serve") -> StageSize:
    """A replica of the endpoint, and how many tokens a second it makes."""
    serve = config.serve
    heads, note = heads_of_model(config, base, serve.model)
    rows = serve.max_batch_size
    placed = _placed(base, engine_parts(base, heads, rows, base.limit, slots=SLOTS, kept=serve.prefix_cache_tokens), gpu,
                     **({"n-gram indexes": ngram_bytes(config.ngram, rows, base.limit)} if heads else {}),
                     **({"earlier answers": answers_bytes(serve.shared_answers, rows, base.limit)}
                        if heads and serve.shared_answers else {}))
    most = max(serve.replicas, serve.max_replicas or 0)
    notes = [text for text in (note, up_to(serve.replicas, most)) if text]
    if pace is not None:
        notes.append(_speed(base, pace, rows, heads))
    return StageSize(name, serve.replicas, *placed, driver={"process": process(False)},
                     network={"the base, to each replica": Range(0, most * base.weight_bytes())},
                     by="it runs until it is stopped" if pace is not None else why, notes=tuple(notes),
                     per_gpu=sharing(serve.workers.gpus))


def _speed(base: BaseShape, pace: Pace, rows: int, heads: HeadsShape | None) -> str:
    found = []
    for count in sorted({1, rows}):
        step = pace.step(base, count, min(base.limit, SPEED_CONTEXT))
        speed = tokens_a_second(base, pace, count, heads is not None)
        found.append(f"{count} sequence{'s' if count > 1 else ''}: {speed} tokens/s, a plain step {_step_text(step)}")
    return f"{'; '.join(found)} ({pace.by})"


def tokens_a_second(base: BaseShape, pace: Pace, rows: int, drafts: bool, replicas: int = 1) -> str:
    """Of `rows` sequences in each of `replicas`, from plain decoding at its slowest to drafts that are accepted."""
    step = pace.step(base, rows, min(base.limit, SPEED_CONTEXT))
    ends = (rows * replicas / step.high, rows * replicas * (DRAFTED if drafts else 1.0) / step.low)
    return " to ".join(_count(end) for end in ends)


def _count(value: float) -> str:
    return f"{float(f'{value:.2g}'):,.0f}"


def _step_text(amount: Range) -> str:
    """In milliseconds below a second."""
    if amount.high >= 1:
        return time_text(amount)
    low, high = (f"{float(f'{1e3 * end:.2g}'):g}" for end in (amount.low, amount.high))
    return f"{low} ms" if low == high else f"{low} to {high} ms"


def batch_size(config: RunConfig, base: BaseShape, pace: Pace | None, why: str, gpu: bool) -> StageSize:
    """Answers of a file of prompts."""
    batch = config.batch
    rows, known = _rows_of_batch(config)
    answers = rows.times(Range(ANSWER_SHARE * batch.max_new_tokens, batch.max_new_tokens))
    storage = {"answers": rows.times(Range(*TEXT_BYTES)) + answers.times(Range(*TOKEN_TEXT))}
    note = () if known else ("the number of rows is not known: time and storage are for 1,000",)
    if batch.address:
        return StageSize("batch", driver={"process": process(False)}, storage=storage,
                         by=f"{batch.address} decides how fast it answers", notes=note)
    own = config.serve.model_copy(update={"shared_answers": config.batch.shared_answers})  # of the job's own engines
    served = serve_size(config.model_copy(update={"serve": own}), base, pace, why, gpu)
    flight = batch.concurrency or 2 * config.serve.max_batch_size * served.workers
    running = max(1, min(config.serve.max_batch_size, flight // served.workers))
    seconds = None
    if pace is not None:
        step = pace.step(base, running, batch.max_new_tokens)
        drafted = 1.0 if config.serve.model == PLAIN else DRAFTED
        seconds = (answers * (1 / (running * served.workers))).times(Range(step.low / drafted, HOSTED * step.high))
        seconds += starting(base.weight_bytes())
    return replace(served, name="batch", storage=storage, seconds=seconds, by=pace.by if pace else why,
                   notes=(*served.notes, *note))


def _rows_of_batch(config: RunConfig) -> tuple[Range, bool]:
    batch = config.batch
    count = rows_of(Path(batch.source))[0] if batch.source else None
    if count is None and batch.source is None:
        count = round(config.distill.held_out * (config.prompts.count or 640))
    if count is None:
        return Range.of(batch.limit or 1000), batch.limit is not None
    return Range.of(min(count, batch.limit or count)), True


def load_size(config: RunConfig, base: BaseShape, pace: Pace | None, why: str, gpu: bool) -> StageSize:
    """The endpoint that is started for a load test, and the time of its rates."""
    load = config.load
    served = serve_size(config, base, pace, why, gpu, "load")
    seconds = Range.of(load.seconds) * (len(load.rates) + CHUNKS)
    return replace(served, seconds=Range(seconds.low * 0.7, seconds.high * 2), by="from load.rates and load.seconds")


def generate_size(config: RunConfig, base: BaseShape, pace: Pace | None, why: str, gpu: bool) -> StageSize:
    """Answers in this process."""
    generate = config.generate
    heads, note = heads_of_model(config, base, generate.model)
    prompts = max(1, len(generate.prompts))
    placed = _placed(base, engine_parts(base, heads, 1, base.limit), gpu)
    seconds = None
    if pace is not None:
        step = pace.step(base, 1, generate.max_new_tokens)
        seconds = Range(ANSWER_SHARE * step.low / DRAFTED, step.high) * (prompts * generate.max_new_tokens)
        seconds += starting(base.weight_bytes())
    return StageSize("generate", 1, *placed, seconds=seconds, by=pace.by if pace else why, notes=(note,) if note else ())


def tree_size(config: RunConfig, base: BaseShape, pace: Pace | None, why: str, gpu: bool) -> StageSize:
    """Timing of steps, in one process."""
    tree = config.tree
    shapes = _drafters(config, base)
    groups = groups_to_time(tree, base.limit, None if gpu else 512)
    cache = max(base.planned().decoder.cache_bytes(batch, context + max(nodes)) for context, batch, nodes in groups)
    largest = max((shape.weight_bytes(base.item) for shape in shapes), default=0)
    placed = _placed(base, {"heads": Range(largest, 1.5 * largest), "keys and values while timing": Range(0, cache)}, gpu)
    seconds = None
    if pace is not None:
        rounds = (tree.repeats + 1) * (1 + len(shapes))
        points = [(batch, batch * count, context) for context, batch, nodes in groups for count in nodes]
        seconds = Range(sum(pace.step(base, batch, context).low for batch, _, context in points) * (tree.repeats + 1),
                        sum(pace.step(base, wide, context).high for _, wide, context in points) * rounds)
        seconds += starting(base.weight_bytes())
    return StageSize("tree", 1, *placed, seconds=seconds, by=pace.by if pace else why,
                     notes=("sizes whose keys and values take more than half of the free memory are not timed",))


def bench_size(config: RunConfig, base: BaseShape, pace: Pace | None, why: str, gpu: bool) -> StageSize:
    """Every way of decoding, one request at a time."""
    bench = config.bench
    shapes = _drafters(config, base)
    heads = max(shapes, key=lambda shape: shape.parameters, default=None)
    formats = {base.dtype, *(bench.identity_formats if bench.identity_prompts else ())}
    rows = max(bench.identity_batch if bench.identity_prompts else 1, bench.max_batch_size if bench.batch_prompts else 1, 1,
               *bench.concurrency)
    slots = min(base.limit, 1024 + bench.max_new_tokens)
    parts = engine_parts(base, heads, rows, slots)
    widest = max(base.weight_bytes(dtype) for dtype in formats)
    parts["weights in the widest format"] = Range.of(widest - base.weight_bytes())
    parts["weights in float64, to judge near-ties"] = Range(0, 8 * base.parameters)
    seconds = None
    if pace is not None:
        questions = bench.limit or (lines_of(Path(bench.prompts))[0] or HELD_OUT if bench.prompts else HELD_OUT)
        turns = bench.turns if bench.prompts else 1
        tokens = questions * bench.rounds * bench.max_new_tokens
        contenders = len(bench.methods) or 2 + len(shapes)  # vLLM's among them
        step = pace.step(base, 1, slots / 2)
        timed = Range((1 + contenders / DRAFTED) * step.low * ANSWER_SHARE, (1 + contenders) * turns * step.high) * tokens
        foreign = FOREIGN.times(Range(ANSWER_SHARE * step.low, turns * step.high)) * tokens
        checked = Range(step.low, 3 * step.high) * (bench.identity_prompts * bench.max_new_tokens * (contenders + 1))
        seconds = (timed if bench.single else Range.of(0)) + (foreign if not bench.methods else Range.of(0)) + checked
        seconds += starting(base.weight_bytes()) * 3  # its parts load the base for themselves
    vllm = len(dict.fromkeys((*([VLLM] if any(map(is_vllm, bench.methods)) else []), *filter(is_vllm, bench.methods))))
    if vllm:
        parts["vLLM: weights and keys and values"] = Range.of(vllm * (base.weight_bytes() + base.kv_bytes * rows * slots))
    more = {"vLLM's processes": VLLM_PROCESS * vllm} if vllm else {}
    return StageSize("bench", 1, *_placed(base, parts, gpu, **more), seconds=seconds, by=pace.by if pace else why)


def _drafters(config: RunConfig, base: BaseShape) -> list[HeadsShape]:
    return [heads_shape(base, heads) for name, heads in config.train.drafters.items() if config.train.only in (None, name)]
