"""`train`: weights, gradients and optimizer state by ZeRO stage, activations, checkpoints, reading and time."""

from __future__ import annotations

from hydra_core.base.formats import DTYPES
from hydra_core.heads.config import HeadsConfig
from hydra_core.training.losses import CHUNK
from pipelines.config import RunConfig, TrainSection
from pipelines.sizing.amounts import Range, StageSize, size_text
from pipelines.sizing.base import BaseShape
from pipelines.sizing.distilling import feature_rows_bytes, up_to
from pipelines.sizing.heads import HeadsShape, heads_shape
from pipelines.sizing.pace import TRAINING_STEP, Pace
from pipelines.sizing.processes import cuda_context, process, sharing, starting
from pipelines.sizing.rows import RowCounts

ROW_TOKENS, LEAST_PROMPT = 1024, 32
"""Tokens of a row that training reads, and of its prompt at least; longer prompts lose their beginning."""
PARTITION_ROWS = 512
"""Positions whose logits over the whole vocabulary are in memory at a time."""
BUCKET = 500_000_000
"""Elements of the buffer into which DeepSpeed 0.19 gathers gradients (`reduce_bucket_size`): allocated whole on a GPU."""
LIVE = 1_000_000_000
"""Parameters that ZeRO-3 gathers at a time, at most (`stage3_max_live_parameters`)."""
KEPT = 2
"""Checkpoints of a training: the best and the last one."""
INDEX_ROW_BYTES, TOKEN_BYTES = 200, 4
"""Of the index of rows: memory of a row, and bytes of a token in a temporary file (its id, or its log partition)."""
NETWORK = 3e9
"""Bytes a second between machines, at least, with which gradients are reckoned: 25 Gbit/s."""


def value_bytes(train: TrainSection) -> int:
    """Bytes of a weight while it trains."""
    return DTYPES[train.precision].itemsize


def state_bytes(parameters: int, train: TrainSection, world: int, gpu: bool) -> dict[str, Range]:
    """Bytes that each of `world` ranks keeps of `parameters` trained ones, by ZeRO stage and precision."""
    stage, item = train.zero_stage, value_bytes(train)
    own = parameters / world
    transient: float
    if stage == 0:
        masters = 4 * parameters if item == 2 else 0
        parts: dict[str, float] = {"weights": item * parameters, "gradients": item * parameters,
                                   "optimizer": 8 * parameters + masters}
        transient = (4 * parameters if item == 2 else 0) + (item * min(parameters, BUCKET) if world > 1 else 0)
    else:
        parts = {"weights": item * (own if stage == 3 else parameters),
                 "gradients": item * (parameters if stage == 1 else own), "optimizer": 12 * own}
        bucket = BUCKET if gpu else min(parameters, BUCKET)
        transient = 4 * own + item * bucket + (item * min(parameters, LIVE) if stage == 3 else 0)
    sizes = {name: Range.of(value) for name, value in parts.items()}
    if transient:
        least = item * BUCKET if gpu and stage else 0
        sizes["buffers of a step"] = Range(least, max(transient, least))
    if train.ema:
        sizes["averaged weights"] = Range(4 * parameters, 4 * parameters + item * parameters)
    return sizes


def checkpoint_bytes(heads: HeadsShape, train: TrainSection) -> int:
    """Bytes of one checkpoint, all ranks' files together: float32 weights and two moments, and the loadable heads beside them."""
    parameters = heads.parameters
    return 12 * parameters + heads.saved_bytes(value_bytes(train)) + (4 * parameters if train.ema else 0)


def activation_bytes(base: BaseShape, heads: HeadsShape, item: int, tokens: float, learned: float, gpu: bool) -> Range:
    """Bytes that the forward of one piece keeps for its backward: `tokens` of all its rows, `learned` of their answers.

    Heads keep the input of each product and of each activation; what reads the teacher keeps a table of its probabilities.
    """
    config, width = heads.config, base.width
    depths = range(config.num_heads)
    inputs = sum((1 + (depth + 1 if config.sequential else 0)) * width for depth in depths)
    blocks = config.num_heads * config.num_blocks * width * (5 if config.mlp == "gated" else 3)
    ended = config.num_heads * width * (2 if config.final_norm else 1)
    kept = item * learned * (inputs + blocks + ended) + 2 * item * tokens * width
    if config.prefix_layer:
        qkv, gate_up = (heads.drafter.get_parameter(f"prefix.{name}.weight").shape[0] for name in ("qkv", "gate_up"))
        kept += item * (tokens * (3 * width + 2 * qkv) + learned * (4 * width + 2.5 * gate_up))
    if config.autoregressive:  # every step keeps what a decoder layer does, for all tokens, and its attention
        qkv, gate_up = (heads.drafter.get_parameter(f"layer.{name}.weight").shape[0] for name in ("qkv", "gate_up"))
        step = tokens * (5 * width + 2 * qkv + 2.5 * gate_up)
        kept = item * config.num_heads * (step + learned * width)
    table = 4 * learned * heads.draft_vocab if config.reads_teacher else 0
    chunk = 4 * 4 * CHUNK["cuda" if gpu else "cpu"] * heads.draft_vocab
    partitions = 2 * 4 * PARTITION_ROWS * base.vocab_size if config.reads_teacher else 0  # before the first step
    return Range(0.7 * kept + table, max(1.4 * kept + 1.3 * table + chunk, partitions))


def train_size(config: RunConfig, name: str, base: BaseShape, rows: RowCounts, pace: Pace | None,
               why: str, nodes: int = 1) -> StageSize:
    """What training the drafter `name` takes with its fewest workers; `nodes`: machines among which they are shared out."""
    train = config.train
    heads, world, gpu = heads_shape(base, train.drafters[name]), train.workers.least, train.workers.gpus > 0
    data = rows_of_training(config, rows)
    device = {"embedding and vocabulary projection": Range.of(base.vocabulary_bytes),
              "vocabulary rows of drafts": Range.of(heads.drafter.rows.weight.numel() * base.item),
              **state_bytes(heads.parameters, train, world, gpu), "activations": _activations(base, heads, train, data, gpu)}
    if train.features == "online":
        device["the whole base"] = Range.of(base.weight_bytes() - base.vocabulary_bytes)
    stored = feature_rows_bytes(config, base, data)
    budget = train.cache_mb << 20 if train.features == "stored" else 0
    cache = Range(min(budget, stored.low / world), min(budget, stored.high))
    memory = {"process": process(gpu), "rows in memory": cache + Range(0.1, 1.0) * cache.high,
              "index": data.answers * INDEX_ROW_BYTES}
    checkpoint = checkpoint_bytes(heads, train)
    storage = {f"{KEPT} checkpoints and one being written": Range(KEPT * checkpoint, (KEPT + 1) * checkpoint),
               "finished heads, best and last": Range.of(2 * heads.saved_bytes(value_bytes(train)))}
    scratch = {"its part of a checkpoint": Range(checkpoint / world, checkpoint),
               "token ids and log partitions": data.tokens * (TOKEN_BYTES * (2 if heads.config.reads_teacher else 1))}
    steps = steps_of(train, data)
    sent = reduced_bytes(heads.parameters, train, world).times(steps) * (1 if nodes > 1 else 0)
    read = stored.times(_passes(train)) * (1 if train.features == "stored" else 0)
    network = {"reading rows": read} | ({"gradients and weights": sent} if sent.high else {})
    seconds = None if pace is None else _seconds(base, heads, data, train, steps, pace, sent, gpu, nodes)
    return StageSize(f"train {name}", world, {"process": cuda_context(), **device} if gpu else {},
                     memory if gpu else {**memory, **device}, scratch, {"process": process(False),
                                                                      "index": data.answers * INDEX_ROW_BYTES},
                     storage, 0, network, seconds,
                     pace.by if pace else why, _notes(rows, base, train), per_gpu=sharing(train.workers.gpus))


def _activations(base: BaseShape, heads: HeadsShape, train: TrainSection, data: RowCounts, gpu: bool) -> Range:
    """Of one piece of a worker's rows, from short rows to long ones."""
    rows, answers = train.rows_per_step / (train.workers.least * train.accumulate), max(data.answers.high, 1.0)
    kept = []
    for tokens, answer in ((data.tokens.low, data.answer_tokens.low), (data.tokens.high, data.answer_tokens.high)):
        length, learned = tokens / answers, answer / answers
        cropped = min(length, max(ROW_TOKENS, learned + LEAST_PROMPT))
        kept.append(activation_bytes(base, heads, value_bytes(train), rows * cropped, rows * learned, gpu))
    return Range(kept[0].low, kept[1].high)


def _notes(rows: RowCounts, base: BaseShape, train: TrainSection) -> tuple[str, ...]:
    beside = f"a task beside the training loads the whole base every {train.decode_every} steps: "  \
             f"{size_text(Range.of(base.weight_bytes()))} more" if train.decode_every else ""
    return tuple(filter(None, (rows.note, beside, up_to(train.workers.least, train.workers.most))))


def rows_of_training(config: RunConfig, rows: RowCounts) -> RowCounts:
    """The training split of `rows`, of which `train.share` is used."""
    share = (1 - config.distill.held_out) * config.train.share
    return RowCounts(rows.prompts * share, rows.answers * share, rows.prompt_tokens * share, rows.answer_tokens * share,
                     rows.note)


def steps_of(train: TrainSection, data: RowCounts) -> Range:
    """Optimizer steps of the whole training."""
    steps = data.answers * (train.epochs / train.rows_per_step)
    return Range(min(steps.low, train.max_steps), min(steps.high, train.max_steps)) if train.max_steps else steps


def _passes(train: TrainSection) -> Range:
    """How often all rows are read, by all workers together: once per epoch, some blocks by two of them, and once more for the
    log partitions."""
    return Range(train.epochs, 1.5 * train.epochs + 1)


def reduced_bytes(parameters: int, train: TrainSection, world: int) -> Range:
    """Bytes that all ranks send in one step: gradients are reduced and weights gathered, with ZeRO-3 twice."""
    rounds = 3 if train.zero_stage == 3 else 2
    item = value_bytes(train)
    each = rounds * item * parameters * (world - 1)
    return Range(each, each * (2 if item == 2 else 1))


def _seconds(base: BaseShape, heads: HeadsShape, data: RowCounts, train: TrainSection, steps: Range, pace: Pace, sent: Range,
             gpu: bool, nodes: int) -> Range:
    world = train.workers.least
    passes = Range(steps.low, steps.high) * (train.rows_per_step / max(data.answers.high, 1.0))
    learned = data.answer_tokens.times(passes)
    apart = world if gpu else nodes  # workers on one CPU share its cores
    operations = learned * (operations_of_position(base, heads) / apart)
    operations += data.answer_tokens * (2 * base.width * base.vocab_size / apart if heads.config.reads_teacher else 0)
    low, high = pace.training(operations.low), pace.training(operations.high)
    seconds = Range(low.low, high.high)
    if train.features == "online":
        forward = pace.forward(base, data.tokens.high * passes.high / world)
        seconds += Range(forward.low * data.tokens.low / max(data.tokens.high, 1.0), forward.high)
    seconds += steps.times(TRAINING_STEP) + starting(base.vocabulary_bytes)
    return seconds + Range(0.0, sent.high / world / NETWORK if world > 1 and gpu else 0.0)


def operations_of_position(base: BaseShape, heads: HeadsShape) -> float:
    """Floating-point operations of one position: six for each trained weight, four for each vocabulary row, which is frozen, and
    two for the teacher's."""
    config: HeadsConfig = heads.config
    reused = config.num_heads if config.recurrent else 1
    rows = heads.draft_vocab * base.width
    return 6 * heads.parameters * reused + 4 * rows * config.num_heads + (2 * rows if config.reads_teacher else 0)
