"""Training the same Hydra++ heads our way and the usual one, by turns, on the same rows:
`python -m tests.train_speed --config FILE`.

The usual way is the official repository's: the base runs in every step, every head has the softmax of its own logits and the
teacher's over the whole vocabulary, in float32, kept whole. Ours: stored hidden states, one table of the teacher's
probabilities a step over a draft vocabulary, losses in chunks, bf16 with float32 masters. Both are configurations of the `train`
stage; here they share one process, so that they meet the same machine. One JSON line: positions a second of each, their ratio.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from hydra_core.base import Base, load_base
from hydra_core.heads import DraftVocab, HeadDrafter, HeadsConfig, build_drafter
from hydra_core.training.losses import log_partition
from hydra_core.training.model import HeadTraining
from jobs.runner import read_config
from pipelines.config import RunConfig
from pipelines.distill.stage import answered, distilled
from pipelines.rows.batch_order import BatchOrder
from pipelines.rows.feature_store import FeatureStore
from pipelines.rows.online_features import OnlineStore
from pipelines.rows.packed_reader import RowReader
from pipelines.rows.row_index import RowStore
from pipelines.runtime.artifacts import RunPaths
from pipelines.train.batches import valid_counts

ROUNDS, STEPS = 5, 4
USUAL = HeadsConfig(kind="hydra++", draft_vocab_size=0)
OURS = HeadsConfig(kind="hydra++")  # the same blocks and norms


def main(words: list[str]) -> None:
    path = words[words.index("--config") + 1] if "--config" in words else None
    config = read_config("train", path, [word for word in words if "=" in word])
    torch.set_num_threads(2)
    base = load_base(config.base.model, dtype=config.base.dtype, cache=RunPaths.of(config).cache)
    contenders = {"usual": usual_way(config, base), "ours": our_way(config, base)}
    for step in contenders.values():
        step(0)  # what is set up at first use
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(ROUNDS):
        for name, step in contenders.items():
            started = time.perf_counter()
            positions = sum(step(1 + number * STEPS + at) for at in range(STEPS))
            speeds[name].append(positions / (time.perf_counter() - started))
            print(f"round {number + 1}: {name} {speeds[name][-1]:.0f} positions/s", file=sys.stderr, flush=True)
    ratios = [fast / slow for fast, slow in zip(speeds["ours"], speeds["usual"], strict=True)]
    found = {name: statistics.median(values) for name, values in speeds.items()}
    found |= {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    print(json.dumps({name: round(value, 2) for name, value in found.items()}))


def usual_way(config: RunConfig, base: Base) -> Callable[[int], int]:
    """float32, the base in every step, whole softmaxes."""
    store = OnlineStore.open(answered(config)[0], "train")
    store.use(base)
    model = HeadTraining(drafter_of(USUAL, base, store), base.vocabulary, plain=True)
    return optimizer_steps(config, RowReader(store), model.float())


def our_way(config: RunConfig, base: Base) -> Callable[[int], int]:
    """bf16 with float32 masters, hidden states from disk, log partitions that were made once."""
    store = FeatureStore.open(distilled(config)[0], "train")
    reader, offsets = RowReader(store), store.index.offsets
    reader.log_partitions = np.zeros(len(store.index.tokens), np.float32)
    order = BatchOrder.of(store, config.train.rows_per_step, config.train.seed)
    for row in {int(row) for step in range(1 + ROUNDS * STEPS) for row in order.rows(step)}:
        known = log_partition(store.read(row).hidden, base.vocabulary.head)
        reader.log_partitions[offsets[row]:offsets[row + 1]] = known.numpy()
    return optimizer_steps(config, reader, HeadTraining(drafter_of(OURS, base, store), base.vocabulary).to(torch.bfloat16))


def drafter_of(heads: HeadsConfig, base: Base, store: RowStore) -> HeadDrafter:
    counts = store.response_counts(base.vocab_size)
    return build_drafter(heads, base.vocabulary, DraftVocab.rank(counts, heads.draft_vocab_size, base.stop_ids))


def optimizer_steps(config: RunConfig, reader: RowReader, model: HeadTraining) -> Callable[[int], int]:
    """A step by its number; returns the positions that the first head learned from."""
    masters = [parameter.detach().float().clone().requires_grad_(True) for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=config.train.learning_rate, fused=True)
    counts = valid_counts(reader.store, model.drafter.draft_vocab, model.drafter.config)
    order = BatchOrder.of(reader.store, config.train.rows_per_step, config.train.seed)

    def step(number: int) -> int:
        rows = order.rows(number)
        positions = torch.from_numpy(counts[rows].sum(0))
        loss, _ = model(reader.pack(rows), positions.clamp(min=1))
        loss.backward()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters(), strict=True):
                parameter.copy_(master)
        return int(positions.max())

    return step


if __name__ == "__main__":
    main(sys.argv[1:])
