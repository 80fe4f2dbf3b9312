"""What every training worker runs: the same steps on all ranks, validation and a checkpoint at the same steps.

A step's rows, learning rate and dropout seed are functions of its number, so the only position to save is that number.
Nothing is logged before the checkpoint that holds it: after a kill, the steps done since the last checkpoint are done
again from its state, and the curve has every step once.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hydra_core.base import BaseVocabulary, load_vocabulary
from hydra_core.drafters import DraftVocab, HeadsConfig, build_drafter
from hydra_core.training.metrics import HeadCounts
from hydra_core.training.model import HeadTraining
from hydra_core.tree.search import reference_tokens_per_step
from hydra_core.tree.walk import RankRows
from pipelines.config import RunConfig, TrainSection
from pipelines.contracts import content_id
from pipelines.deepspeed_setup import deepspeed_settings, learning_rate, prepare_environment
from pipelines.features import BatchOrder, FeatureStore
from pipelines.stage import RunPaths, write_text
from pipelines.train_data import (
    Batch,
    RowReader,
    Share,
    StepBatches,
    load_normalisers,
    valid_counts,
    validation_groups,
)
from pipelines.train_report import Progress, log_curve, read_curve_and_figures, save_curve_and_heads

DIVERGED = "diverged.json"
STATE_TAG = "state"


@dataclass(frozen=True)
class LoopSettings:
    """What the driver hands each worker; plain values only, since they are sent over the wire."""

    config: dict[str, Any]
    drafter: str
    features: str
    folder: str
    tracking_uri: str | None
    run_id: str | None
    provenance: dict[str, Any]


@dataclass
class Workshop:
    """Everything a worker has at hand once it is set up."""

    settings: LoopSettings
    train: TrainSection
    heads: HeadsConfig
    share: Share
    device: torch.device
    vocabulary: BaseVocabulary
    draft_vocab: DraftVocab
    learn: RowReader
    held_out: RowReader
    total: int
    engine: Any
    curve: list[dict[str, Any]] = field(default_factory=list)
    next_step: int = 0

    @property
    def first(self) -> bool:
        return self.share.rank == 0

    @property
    def model(self) -> HeadTraining:
        module: HeadTraining = self.engine.module
        return module


def train_loop(settings: dict[str, Any]) -> None:
    """Train one drafter on this rank until its last step, resuming from Ray's checkpoint if there is one."""
    import ray.train

    context = ray.train.get_context()
    shop = set_up(LoopSettings(**settings), Share(context.get_world_rank(), context.get_world_size()))
    restore(shop, ray.train.get_checkpoint())
    order = BatchOrder.of(shop.learn.store, shop.train.rows_per_step, shop.train.seed)
    batches = StepBatches(shop.learn, order, valid_counts(shop.learn.store, shop.draft_vocab, shop.heads), shop.share)
    progress = Progress(shop)
    for batch in batches.between(shop.next_step, shop.total):
        record = train_step(shop, batch)
        if not math.isfinite(record["loss"]):
            _stop_diverged(shop, record)
            return  # every rank sees the same sum and returns: raising would make Ray retry what must fail again
        shop.curve.append(record)
        shop.next_step = batch.step + 1
        progress.after(record)
        if shop.next_step % shop.train.validate_every == 0 or shop.next_step == shop.total:
            _validate_and_report(shop, progress)


def set_up(settings: LoopSettings, share: Share) -> Workshop:
    """Load data, vocabulary and heads, and start DeepSpeed in the process group that Ray made."""
    config = RunConfig.model_validate(settings.config)
    train, heads = config.train, config.train.drafters[settings.drafter]
    uses_gpu = train.workers.gpus > 0
    prepare_environment(uses_gpu)
    _quieten()
    torch.set_num_threads(train.workers.threads)
    device = _device(uses_gpu)
    vocabulary = load_vocabulary(config.base.model, dtype=config.base.dtype, device=str(device),
                                 cache=RunPaths.of(config).cache)
    learn = RowReader(FeatureStore.open(Path(settings.features), "train"))
    held_out = RowReader(FeatureStore.open(Path(settings.features), "held_out"))
    counts = learn.store.response_counts(vocabulary.size)
    draft_vocab = DraftVocab.rank(counts, heads.draft_vocab_size, vocabulary.stop_ids)
    torch.manual_seed(train.seed)
    model = HeadTraining(build_drafter(heads, vocabulary, draft_vocab), vocabulary)
    engine = start_engine(model, train, share)
    shop = Workshop(settings, train, heads, share, device, vocabulary, draft_vocab, learn, held_out,
                    total_steps(train, learn.store), engine)
    if heads.loss == "teacher":
        for name, reader in (("train", learn), ("held_out", held_out)):
            # by the order of the rows too: rows that were distilled again may stand elsewhere
            kept = f"normalisers-{name}-{content_id(reader.store.index.ids)[:12]}.npy"
            _know_normalisers(shop, reader, Path(settings.folder) / kept)
    return shop


def total_steps(train: TrainSection, store: FeatureStore) -> int:
    """Optimizer steps of the whole run."""
    steps = BatchOrder.of(store, train.rows_per_step, train.seed).total_steps(train.epochs)
    return min(steps, train.max_steps) if train.max_steps else steps


def start_engine(model: HeadTraining, train: TrainSection, share: Share) -> Any:
    """A DeepSpeed engine around the model, with a fused AdamW (one pass over memory, on a CPU too)."""
    import deepspeed

    optimizer = torch.optim.AdamW(model.parameters(), lr=train.learning_rate, weight_decay=train.weight_decay,
                                  fused=True)
    deepspeed.logger.setLevel("WARNING")
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_settings(train, share.world))
    return engine


def train_step(shop: Workshop, batch: Batch) -> dict[str, Any]:
    """One optimizer step; the record of its curve, equal on every rank."""
    engine, world = shop.engine, shop.share.world
    # Dropout's draw is a function of the step, so a resumed run needs no generator state.
    torch.manual_seed((shop.train.seed * 1_000_003 + batch.step) * world + shop.share.rank)
    rate = learning_rate(shop.train, batch.step, shop.total)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    engine.train()
    counts = batch.counts.clamp(min=1).to(shop.device)
    # Divided by the whole step's counts and summed over ranks; DeepSpeed averages over ranks, hence times world.
    loss, sums = engine(batch.packed.to(shop.device), counts / world)
    engine.backward(loss)
    engine.step()
    dist.all_reduce(sums)
    per_head = (sums / counts).tolist()
    record = {"step": batch.step, "loss": sum(per_head) / len(per_head), "lr": rate,
              "positions": int(batch.counts.max()), "time": round(time.time(), 3)}
    return record | {f"head{head}_loss": value for head, value in enumerate(per_head)}


@torch.no_grad()
def validate(shop: Workshop) -> dict[str, float]:
    """Figures over the held-out rows, counts summed over ranks first; the same on every rank."""
    shop.engine.eval()
    train = shop.train
    groups = validation_groups(shop.held_out.store, train.validation_rows, train.rows_per_step // shop.share.world,
                               train.seed, shop.share)
    total = HeadCounts.zeros(shop.heads.num_heads)
    parts: list[tuple[np.ndarray, tuple[int, ...]]] = []
    with _gathered(shop):
        for rows, counts_here in groups:
            counts, ranks = shop.model.evaluate(shop.held_out.pack(rows).to(shop.device))
            if counts_here:
                total, parts = total + counts, [*parts, (ranks.ranks.numpy(), ranks.positions)]
    summed = total.to_tensor().to(shop.device)
    dist.all_reduce(summed)
    gathered: list[Any] = [None] * shop.share.world
    dist.all_gather_object(gathered, parts)
    everything = RankRows.concatenate(RankRows(torch.from_numpy(ranks), positions)
                                      for share in gathered for ranks, positions in share)
    return {"tokens_per_step": reference_tokens_per_step(everything)} | HeadCounts.from_tensor(summed.cpu()).ratios()


def restore(shop: Workshop, checkpoint: Any) -> None:
    """Go on from `checkpoint` (None: from the start)."""
    if checkpoint is None:
        return
    with checkpoint.as_directory() as folder:
        _, client = shop.engine.load_checkpoint(folder, tag=STATE_TAG)
        shop.curve, figures = read_curve_and_figures(Path(folder))
        dist.barrier()  # inside: the first to leave may delete the folder
    shop.next_step = int(client["next_step"])
    if shop.first:
        log_curve(shop, figures)  # a kill right after the checkpoint left it unlogged


def _validate_and_report(shop: Workshop, progress: Progress) -> None:
    import ray.train

    figures = validate(shop)
    metrics = {"step": shop.next_step, "loss": shop.curve[-1]["loss"], **figures}
    with tempfile.TemporaryDirectory() as folder:
        shop.engine.save_checkpoint(folder, tag=STATE_TAG, client_state={"next_step": shop.next_step})
        with _gathered(shop):
            if shop.first:
                save_curve_and_heads(shop, Path(folder), metrics)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
    if shop.first:
        log_curve(shop, figures)
    progress.validated(figures)


def _stop_diverged(shop: Workshop, record: dict[str, Any]) -> None:
    if shop.first:
        write_text(Path(shop.settings.folder) / DIVERGED, json.dumps({"step": record["step"], "lr": record["lr"]}))
    dist.barrier()


def _know_normalisers(shop: Workshop, reader: RowReader, kept: Path) -> None:
    """Compute the base's softmax normalisers once, each rank a part, and keep them for a restart."""
    found = load_normalisers(kept, len(reader.store.index.tokens))
    have = torch.tensor(found is not None, dtype=torch.int32, device=shop.device)
    dist.all_reduce(have, op=dist.ReduceOp.MIN)  # a file that only some ranks see must not split them
    if found is None or not int(have):
        rows = range(shop.share.rank, len(reader.store), shop.share.world)
        part = torch.from_numpy(reader.compute_normalisers(rows, shop.vocabulary.head)).to(shop.device)
        dist.all_reduce(part)
        found = part.cpu().numpy()
        if shop.first:
            _save_array(kept, found)
    reader.normalisers = found


def _save_array(path: Path, values: np.ndarray) -> None:
    temporary = path.with_suffix(".part.npy")
    np.save(temporary, values, allow_pickle=False)
    temporary.replace(path)


def _gathered(shop: Workshop) -> AbstractContextManager[Any]:
    """ZeRO-3 keeps parameters apart outside forward: bring them together to read them whole."""
    if shop.train.zero_stage < 3:
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(list(shop.model.parameters()))
    return gathered


def _quieten() -> None:
    """Ray Train tells of every report in full, torch of every old call in DeepSpeed: our progress lines would drown."""
    for name in list(logging.root.manager.loggerDict):  # some of Ray Train's loggers bear the name of their file
        if name.startswith("ray.train") or "/ray/train/" in name:
            logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)


def _device(uses_gpu: bool) -> torch.device:
    if not uses_gpu:
        return torch.device("cpu")
    import ray.train.torch

    device: torch.device = ray.train.torch.get_device()
    return device
