"""Memory of a training worker's data, measured with features several times larger than what it is given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hydra_core.heads import DraftVocab, HeadsConfig
from pipelines.rows.batch_order import BatchOrder
from pipelines.rows.feature_store import FeatureStore
from pipelines.rows.packed_reader import ProcessGroup, RowReader
from pipelines.rows.schemas import content_id
from pipelines.train.batches import StepBatches, valid_counts
from tests.conftest import ROOT
from tests.pipelines.synthetic import write_shard

WIDTH, TOKENS, SHARDS, ROWS = 576, 400, 15, 64
CACHE, ALLOWED = 24 << 20, 100 << 20


def anonymous() -> int:
    """Bytes of this process that no file stands behind: mapped pages of the index and of shards may be dropped at will."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


def write_features(folder: Path) -> int:
    """Shards of random rows; how many bytes of hidden states they hold."""
    random = np.random.default_rng(0)
    for shard in range(SHARDS):
        rows = []
        for number in range(ROWS):
            ids = random.integers(0, 1000, TOKENS).tolist()
            rows.append({"id": content_id(shard, number), "prompt_id": "p", "prompt_ids": ids[:50], "response_ids": ids[50:],
                         "finish_reason": "length", "temperature": 0.0, "seed": 0, "source": "test", "split": "train",
                         "base": "b@0:bf16", "hidden": random.bytes(TOKENS * WIDTH * 2), "hidden_dtype": "bf16",
                         "hidden_tokens": TOKENS, "hidden_width": WIDTH, "hidden_layer": "last"})
        write_shard(folder / f"part-{shard:02d}.parquet", rows, row_group_size=16)
    return SHARDS * ROWS * TOKENS * WIDTH * 2


def read_an_epoch(folder: Path) -> None:
    """What a worker does with its data, and how far its memory grew: one line of JSON."""
    before = most = anonymous()
    store = FeatureStore.open(folder, "train", cache_bytes=CACHE)
    vocab = DraftVocab.rank(store.response_counts(1000), 500)
    heads = HeadsConfig(kind="hydra", num_heads=2)
    order = BatchOrder.of(store, 8, 0, CACHE)
    batches = StepBatches(RowReader(store), order, valid_counts(store, vocab, heads), ProcessGroup(0, 1))
    rows = 0
    for batch in batches.between(0, order.total_steps(1)):
        rows, most = rows + batch.pieces[0].spans.rows, max(most, anonymous())
    print(json.dumps({"rows": rows, "grown": most - before}))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_features(tmp_path: Path) -> None:
    size = write_features(tmp_path)
    code = "import sys; from pathlib import Path; from tests.pipelines.train.test_memory import read_an_epoch; " \
           "read_an_epoch(Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{size >> 20} MiB of features, {found['grown'] >> 20} MiB of memory")
    assert found["rows"] == SHARDS * ROWS and size > 4 * ALLOWED
    assert found["grown"] < ALLOWED


def test_lines_of_usual_answers_hold_little_padding(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    rows = []
    for number in range(64):
        tokens = int(random.integers(40, 160))
        rows.append({"id": str(number), "prompt_id": "p", "prompt_ids": [1] * 20, "response_ids": [2] * (tokens - 20),
                     "finish_reason": "stop", "temperature": 0.0, "seed": 0, "source": "test", "split": "train",
                     "base": "b@0:bf16", "hidden": bytes(tokens * 8), "hidden_dtype": "bf16", "hidden_tokens": tokens,
                     "hidden_width": 4, "hidden_layer": "last"})
    write_shard(tmp_path / "part-0.parquet", rows)
    store = FeatureStore.open(tmp_path, "train")
    batches = StepBatches(RowReader(store), BatchOrder.of(store, 16, 0), np.ones((64, 1), np.int64), ProcessGroup(0, 1))
    found = [batch.padding for batch in batches.between(0, 4)]
    packed = batches.batch(0).pieces[0]
    assert found[0] == 1 - int(packed.spans.lengths.sum()) / packed.token_ids.numel()
    assert min(found) >= 0 and sum(found) / len(found) < 0.15
