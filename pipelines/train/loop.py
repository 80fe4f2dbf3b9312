"""The loop of every training worker: the same steps on all ranks, with validation and a checkpoint at the same steps.

The rows, learning rate and dropout seed of a step are functions of its number, so a checkpoint needs no other position.
A step is logged after the checkpoint that holds it: after a kill, the steps since the last checkpoint are computed again
from its state, and the curve has every step once.
"""

from __future__ import annotations

import logging
import re
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hydra_core.base import BaseVocabulary, load_vocabulary
from hydra_core.errors import InputError, StoppedError
from hydra_core.heads import DraftVocab, HeadsConfig, build_drafter
from hydra_core.heads.eagle import eagle_taps
from hydra_core.storage import as_path
from hydra_core.training.metrics import HeadCounts
from hydra_core.training.model import HeadTraining
from hydra_core.tree.search import reference_tokens_per_step
from hydra_core.tree.simulation import RankRows
from pipelines.config import RunConfig, TrainSection
from pipelines.distill.union import other_rows
from pipelines.rows.batch_order import BatchOrder
from pipelines.rows.feature_store import FeatureStore
from pipelines.rows.online_features import OnlineStore
from pipelines.rows.packed_reader import ProcessGroup, RowReader, load_log_partitions
from pipelines.rows.row_index import RowStore
from pipelines.rows.schemas import content_id
from pipelines.runtime.artifacts import RunPaths
from pipelines.runtime.console import say
from pipelines.runtime.faults import first_line, one_line
from pipelines.runtime.files import write_array
from pipelines.runtime.ray_access import CHECKPOINT
from pipelines.train.async_eval import is_due
from pipelines.train.batches import Batch, StepBatches, valid_counts, validation_groups
from pipelines.train.context import LoopSettings, TrainContext
from pipelines.train.deepspeed_config import deepspeed_settings, learning_rate, prepare_environment
from pipelines.train.divergence import why_not_keep, why_stop, write_stop
from pipelines.train.ema import WeightAverage
from pipelines.train.halving import must_halt
from pipelines.train.notice import WORDS, LeavingError, Notice, agreed_notice
from pipelines.train.position import load_position, save_position
from pipelines.train.reporting import StepLines, log_curve, read_curve_and_figures, save_curve_and_heads, watched
from pipelines.train.warm_start import load_start

LOST = re.compile(r"gloo/transport|Connection (closed|reset) by peer|NCCL")
"""In the error of an exchange whose other side has died: Ray starts all workers again."""
NOT_VALIDATED = {"tokens_per_step": 0.0}
"""What Ray compares checkpoints by: any validated one has at least 1."""


def train_loop(settings: dict[str, Any]) -> None:
    """Train one drafter on this rank until its last step, resuming from Ray's checkpoint if there is one. Raises StoppedError for
    a disk that takes no more."""
    try:
        with one_line(as_path(settings["folder"])), watched(LoopSettings(**settings)):
            _train(settings)
    except (InputError, StoppedError, LeavingError):
        _quieten(logging.CRITICAL)  # Ray Train would print a traceback, and the driver prints the line
        raise
    except RuntimeError as error:
        if LOST.search(str(error)):
            _quieten(logging.CRITICAL)
            say(f"train {settings['drafter']}", f"another worker is gone ({first_line(error)[-120:]})")
        raise


def _train(settings: dict[str, Any]) -> None:
    import ray.train

    worker = ray.train.get_context()
    context = set_up(LoopSettings(**settings), ProcessGroup(worker.get_world_rank(), worker.get_world_size()))
    restore(context, ray.train.get_checkpoint())
    train = context.train
    order = BatchOrder.of(context.learn.store, train.rows_per_step, train.seed, train.cache_mb << 20, context.lanes)
    context.lanes = order.lanes
    counts = valid_counts(context.learn.store, context.draft_vocab, context.heads)
    batches = StepBatches(context.learn, order, counts, context.group, context.train.accumulate)
    progress = StepLines(context)
    why: str | None = None
    last = context.next_step if must_halt(context) else context.total  # a trial that was stopped, and killed before it had ended
    for batch in batches.between(context.next_step, last):
        record = train_step(context, batch)
        why = why_stop(context.curve, record, context.train.stop_ratio)
        if why is None:
            context.curve.append(record)
            context.next_step, context.validated = batch.step + 1, None
            progress.after(record)
            if context.next_step % context.train.validate_every == 0 or context.next_step == context.total:
                why = _validate_and_report(context, progress)
        if why is not None:
            if context.first:
                write_stop(as_path(context.settings.folder), why, record)
            dist.barrier()
            break  # on every rank, as all have the same figures
        if must_halt(context):
            break
        if context.next_step < context.total and (notice := agreed_notice(context.device)) is not Notice.NONE:
            _leave(context, progress, notice)


def set_up(settings: LoopSettings, group: ProcessGroup) -> TrainContext:
    """Load data, vocabulary and heads, and start DeepSpeed in the process group that Ray has made."""
    config = RunConfig.model_validate(settings.config)
    train, heads = config.train, config.train.drafters[settings.drafter]
    uses_gpu = train.workers.gpus > 0
    prepare_environment(uses_gpu)
    _quieten()
    torch.set_num_threads(train.workers.threads)
    device = _device(uses_gpu)
    learn = RowReader(training_rows(config, as_path(settings.rows)))
    held_out = RowReader(held_out_rows(config, heads, as_path(settings.rows), as_path(settings.held_out)))
    vocabulary = _open_base(config, heads, (learn.store, held_out.store), device)
    counts = learn.store.response_counts(vocabulary.size)
    draft_vocab = DraftVocab.rank(counts, heads.draft_vocab_size, vocabulary.stop_ids)
    torch.manual_seed(train.seed)
    drafter = build_drafter(heads, vocabulary, draft_vocab)
    load_start(drafter, config, settings.drafter, vocabulary)
    model = HeadTraining(drafter, vocabulary, train.plain_losses)
    engine = start_engine(model, train, group)
    context = TrainContext(settings, train, heads, group, device, vocabulary, draft_vocab, learn, held_out,
                    total_steps(train, learn.store), engine, WeightAverage.asked_for(model, train))
    if heads.reads_teacher and not train.plain_losses:
        # where hidden states are computed in each step, one more pass over all rows would cost as much
        for reader in [reader for reader in (learn, held_out) if not isinstance(reader.store, OnlineStore)]:
            # the ids are in the order of the rows, which may change when rows are distilled again
            rows = content_id(str(vocabulary.identity), settings.provenance["data_digest"], reader.store.index.ids)
            cache = RunPaths.of(config).cache
            earlier = cache / "normalisers" / f"{rows}.npy"  # where an earlier version kept the same array
            _ensure_log_partitions(context, reader, earlier if earlier.exists() else cache / "log_partitions" / f"{rows}.npy")
    return context


def training_rows(config: RunConfig, folder: Path) -> RowStore:
    """The rows that heads learn from, of `folder` and of the runs in `train.also`: with stored hidden states, or answers whose
    hidden states are computed while training."""
    train = config.train
    if train.features == "online":
        return OnlineStore.open(folder, "train", train.share, other_rows(config, "responses"))
    return FeatureStore.open(folder, "train", cache_bytes=train.cache_mb << 20, share=train.share, also=other_rows(config))


def held_out_rows(config: RunConfig, heads: HeadsConfig, answers: Path, features: Path) -> RowStore:
    """The held-out rows: with stored hidden states, or, for heads that read inside the base, answers whose states are computed at
    each validation."""
    if heads.reads_taps:
        return OnlineStore.open(answers, "held_out", also=other_rows(config, "responses"))
    return FeatureStore.open(features, "held_out", cache_bytes=config.train.cache_mb << 20, also=other_rows(config))


def _open_base(config: RunConfig, heads: HeadsConfig, stores: Sequence[RowStore], device: torch.device) -> BaseVocabulary:
    """The base's embedding and output head. For online features the whole base is loaded, and given to `stores`."""
    base, cache = config.base, RunPaths.of(config).cache
    online = [store for store in stores if isinstance(store, OnlineStore)]
    if not online:
        return load_vocabulary(base.model, dtype=base.dtype, device=str(device), cache=cache)
    whole = base.load(cache, device=str(device))
    for store in online:
        store.use(whole, eagle_taps(heads, whole.vocabulary.config.num_hidden_layers))
    return whole.vocabulary


def total_steps(train: TrainSection, store: RowStore) -> int:
    """Optimizer steps of the whole run."""
    steps = BatchOrder.of(store, train.rows_per_step, train.seed).total_steps(train.epochs)
    return min(steps, train.max_steps) if train.max_steps else steps


def start_engine(model: HeadTraining, train: TrainSection, group: ProcessGroup) -> Any:
    """A DeepSpeed engine around the model, with a fused AdamW, which passes over the memory once, on a CPU too."""
    import deepspeed

    optimizer = torch.optim.AdamW(model.parameters(), lr=train.learning_rate, betas=train.betas, eps=train.eps,
                                  weight_decay=train.weight_decay, fused=True)
    deepspeed.logger.setLevel("WARNING")
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_settings(train, group.world_size))
    return engine


def train_step(context: TrainContext, batch: Batch) -> dict[str, Any]:
    """Do one optimizer step; returns its record for the curve, equal on every rank except for the time and the padding."""
    engine, world_size = context.engine, context.group.world_size
    # The dropout mask is a function of the step, so that a resumed run needs no generator state.
    torch.manual_seed((context.train.seed * 1_000_003 + batch.step) * world_size + context.group.rank)
    rate = learning_rate(context.train, batch.step, context.total)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    engine.train()
    counts = batch.counts.clamp(min=1).to(context.device)
    # The loss is a sum over pieces and ranks, divided by the counts of the whole step. DeepSpeed averages over both: hence the
    # product.
    divisors = counts / (world_size * len(batch.pieces))
    totals = torch.zeros(len(counts), dtype=torch.float64, device=context.device)
    for number, piece in enumerate(batch.pieces):
        counted = number < batch.counted
        loss, sums = engine(piece.to(context.device), divisors if counted else torch.full_like(divisors, torch.inf))
        engine.backward(loss)
        engine.step()  # the optimizer steps after the last piece alone
        totals += sums if counted else 0
    dist.all_reduce(totals)
    per_head = (totals / counts).tolist()
    if context.average is not None:
        context.average.update(batch.step)
    record = {"step": batch.step, "loss": sum(per_head) / len(per_head), "lr": rate,
              "positions": int(batch.counts.max()), "padding": round(batch.padding, 4), "workers": world_size,
              "time": round(time.time(), 3)}
    norm = engine.get_global_grad_norm()
    record |= {} if norm is None else {"gradient": float(norm)}
    return record | {f"head{head}_loss": value for head, value in enumerate(per_head)}


@torch.no_grad()
def validate(context: TrainContext) -> dict[str, float]:
    """Figures over the held-out rows, from counts that are summed over ranks; the same on every rank."""
    context.engine.eval()
    train = context.train
    seed = train.seed if train.validation_seed is None else train.validation_seed
    groups = validation_groups(context.held_out.store, train.validation_rows,
                               max(1, train.rows_per_step // context.group.world_size), seed, context.group)
    total = HeadCounts.zeros(context.heads.num_heads)
    parts: list[tuple[np.ndarray, tuple[int, ...]]] = []
    with _eval_weights(context):
        for rows, counts_here in groups:
            counts, ranks = context.model.evaluate(context.held_out.pack(rows).to(context.device))
            if counts_here:
                total, parts = total + counts, [*parts, (ranks.ranks.numpy(), ranks.positions)]
    summed = total.to_tensor().to(context.device)
    dist.all_reduce(summed)
    gathered: list[Any] = [None] * context.group.world_size
    dist.all_gather_object(gathered, parts)
    everything = RankRows.concatenate(RankRows(torch.from_numpy(ranks), positions)
                                      for found in gathered for ranks, positions in found)
    return {"tokens_per_step": reference_tokens_per_step(everything)} | HeadCounts.from_tensor(summed.cpu()).ratios()


def restore(context: TrainContext, checkpoint: Any) -> None:
    """Continue from `checkpoint`; None: from the start."""
    if checkpoint is None:
        return
    with checkpoint.as_directory() as folder:
        position = load_position(context, Path(folder))
        context.curve, figures = read_curve_and_figures(Path(folder))
        if context.average is not None:
            context.average.load(Path(folder))
        dist.barrier()  # inside the block: the first rank that leaves it may delete the folder
    context.next_step, context.validated = int(position["next_step"]), figures.get("tokens_per_step")
    context.lanes = int(position.get("lanes", 1))  # an earlier version dealt rows by length, whatever they take to read
    if context.first:
        log_curve(context, figures)  # a kill right after the checkpoint leaves its steps unlogged


def _validate_and_report(context: TrainContext, progress: StepLines) -> str | None:
    """Validate and make a checkpoint. Returns why training must stop, in which case there is no checkpoint, else None."""
    figures = validate(context)
    if why := why_not_keep(figures):
        return why
    _report(context, figures, is_due(context.train, context.next_step))
    context.validated = figures["tokens_per_step"]
    progress.validated(figures)
    return None


def _leave(context: TrainContext, progress: StepLines, notice: Notice) -> None:
    """Make a checkpoint of the step, unless a validation has just done so, and end the workers by LeavingError.

    It is not validated: there may be seconds left.
    """
    import ray.train

    if context.next_step % context.train.validate_every:
        _report(context, {}, decoded=False)
    ray.train.get_all_reported_checkpoints(ray.train.CheckpointConsistencyMode.COMMITTED)  # an error would overtake the report
    if context.first:
        progress.say(f"{WORDS[notice]}: training goes on from this step's checkpoint")
    raise LeavingError(WORDS[notice])


def _report(context: TrainContext, figures: dict[str, float], decoded: bool) -> None:
    """Make a checkpoint, and log what is new since the last one.

    `figures`: of the validation, none without one; `decoded`: whether its heads are decoded with beside the training.
    """
    import ray.train

    metrics = {"step": context.next_step, "loss": context.curve[-1]["loss"], **figures}
    with tempfile.TemporaryDirectory(prefix=CHECKPOINT) as folder:
        save_position(context, Path(folder))
        with _eval_weights(context):
            if context.first:
                save_curve_and_heads(context, Path(folder), metrics)
        if context.first and context.average is not None:
            context.average.save(Path(folder))
        ray.train.report(NOT_VALIDATED | metrics, checkpoint=ray.train.Checkpoint.from_directory(folder), validation=decoded)
    if context.first:
        log_curve(context, figures)


def _ensure_log_partitions(context: TrainContext, reader: RowReader, cached: Path) -> None:
    """Compute the base's log partitions once, a part on each rank, and cache them for a restart and for other drafters."""
    found = load_log_partitions(cached, len(reader.store.index.tokens))
    have = torch.tensor(found is not None, dtype=torch.int32, device=context.device)
    dist.all_reduce(have, op=dist.ReduceOp.MIN)  # ranks that do not all see the file must all compute
    if found is None or not int(have):
        found = reader.compute_log_partitions(context.group, context.vocabulary.head, partial(_sum_over_ranks, context.device))
        if context.first:
            write_array(cached, found)
    reader.log_partitions = found


def _sum_over_ranks(device: torch.device, part: torch.Tensor) -> torch.Tensor:
    moved = part.to(device)
    dist.all_reduce(moved)
    return moved.cpu()


def _eval_weights(context: TrainContext) -> AbstractContextManager[Any]:
    """Give the model the weights that are validated and saved: with `train.ema` the averaged ones."""
    return _gathered(context) if context.average is None else context.average.applied()


def _gathered(context: TrainContext) -> AbstractContextManager[Any]:
    """Gather the parameters, which ZeRO-3 partitions outside of the forward, so that they can be read."""
    if context.train.zero_stage < 3:
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(list(context.model.parameters()))
    return gathered


def _quieten(level: int = logging.WARNING) -> None:
    """Silence Ray Train's line for every report and torch's warning for every deprecated call in DeepSpeed: they would hide the
    lines of progress."""
    for name in list(logging.root.manager.loggerDict):  # some loggers of Ray Train are named after their file
        if name.startswith("ray.train") or "/ray/train/" in name:
            logging.getLogger(name).setLevel(level)
    warnings.filterwarnings("ignore", category=FutureWarning)


def _device(uses_gpu: bool) -> torch.device:
    if not uses_gpu:
        return torch.device("cpu")
    import ray.train.torch

    device: torch.device = ray.train.torch.get_device()
    torch.cuda.set_device(device)  # collectives of Python objects, and DeepSpeed, use the current device
    return device
