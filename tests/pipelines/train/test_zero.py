"""DeepSpeed's stages and formats without Ray: two processes, a few steps, a checkpoint, and the same steps again."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hydra_core.base import Base, load_base
from hydra_core.heads import DraftVocab, HeadsConfig, build_drafter
from hydra_core.training.model import HeadTraining
from pipelines.config import TrainSection, TrainWorkers
from pipelines.rows.feature_store import BatchOrder, FeatureStore
from pipelines.rows.packed_reader import ProcessGroup, RowReader
from pipelines.train.batches import StepBatches, valid_counts
from pipelines.train.deepspeed_config import prepare_environment
from pipelines.train.loop import STATE_TAG, start_engine, train_step, validate
from tests.conftest import ROOT
from tests.pipelines.synthetic import feature_row, write_shard

CASES = [(stage, precision, accumulate) for stage in (0, 1, 2, 3) for precision, accumulate in (("fp32", 1), ("bf16", 2))]


def workshop(folder: Path, base: Base, stage: int, precision: str, accumulate: int) -> Any:
    """What `train_step` and `validate` read of a worker's workshop."""
    train = TrainSection(zero_stage=stage, precision=precision, accumulate=accumulate,  # type: ignore[arg-type]
                         rows_per_step=8, validation_rows=8, warmup_steps=0, workers=TrainWorkers(count=2))
    heads = HeadsConfig(kind="hydra++", draft_vocab_size=64, dropout=0.1, num_heads=2)
    learn, held_out = (RowReader(FeatureStore.open(folder, split)) for split in ("train", "held_out"))
    vocab = DraftVocab.rank(learn.store.response_counts(base.vocab_size), 64, base.stop_ids)
    group = ProcessGroup(dist.get_rank(), dist.get_world_size())
    torch.manual_seed(0)
    model = HeadTraining(build_drafter(heads, base.vocabulary, vocab), base.vocabulary)
    batches = StepBatches(learn, BatchOrder.of(learn.store, 8, 0), valid_counts(learn.store, vocab, heads), group, accumulate)
    return SimpleNamespace(engine=start_engine(model, train, group), train=train, heads=heads, group=group, model=model,
                           held_out=held_out, device=torch.device("cpu"), total=6, average=None, batches=batches)


def steps(context: Any, first: int, last: int) -> list[float]:
    return [train_step(context, batch)["loss"] for batch in context.batches.between(first, last)]


def worker(folder: Path) -> None:
    """One of two processes: a line of JSON a case."""
    prepare_environment(uses_gpu=False)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    base = load_base(str(folder / "base"), dtype="fp32", cache=folder / "cache")
    for stage, precision, accumulate in CASES:
        context = workshop(folder / "features", base, stage, precision, accumulate)
        losses, saved = steps(context, 0, 3), folder / f"{stage}-{precision}"
        context.engine.save_checkpoint(str(saved), tag=STATE_TAG, client_state={"next_step": 3})
        losses += steps(context, 3, 6)
        figures = validate(context)
        again = workshop(folder / "features", base, stage, precision, accumulate)
        again.engine.load_checkpoint(str(saved), tag=STATE_TAG)
        resumed = steps(again, 3, 6)
        if dist.get_rank() == 0:
            dtypes = sorted({str(tensor.dtype) for tensor in again.model.parameters()})
            print(json.dumps({"losses": losses, "resumed": resumed, "dtypes": dtypes, "same": validate(again) == figures}),
                  flush=True)
        else:
            validate(again)
        dist.barrier()


@pytest.fixture(scope="module")
def found(tiny_base: Base, tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("zero")
    (folder / "base").symlink_to(tiny_base_dir)
    write_shard(folder / "features" / "part-0.parquet",
                [feature_row(tiny_base, number, "held_out" if number % 4 == 0 else "train") for number in range(64)])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "import sys; from pathlib import Path; from tests.pipelines.train.test_zero import worker; "
                                     "worker(Path(sys.argv[1]))", str(folder)]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    pair = [subprocess.Popen(command, cwd=ROOT, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in range(2)]
    said = [process.communicate() for process in pair]
    assert not any(process.returncode for process in pair), said[0][1][-3000:] + said[1][1][-3000:]
    lines = [json.loads(line) for line in said[0][0].splitlines() if line.startswith("{")]
    return dict(zip(CASES, lines, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_stage_trains_and_resumes_to_the_last_bit(found: dict[Any, dict[str, Any]], case: tuple[int, str, int]) -> None:
    result = found[case]
    assert result["resumed"] == result["losses"][3:] and result["same"]
    assert result["losses"][-1] < result["losses"][0]
    assert result["dtypes"] == ["torch.float32" if case[1] == "fp32" else "torch.bfloat16"]


@pytest.mark.slow
def test_stages_and_pieces_do_not_change_the_first_loss(found: dict[Any, dict[str, Any]]) -> None:
    """Before any update there is nothing for a stage to change; bf16 and dropout's draws over pieces do, a little."""
    for precision in ("fp32", "bf16"):
        first = [result["losses"][0] for case, result in found.items() if case[1] == precision]
        assert first == pytest.approx([first[0]] * len(first), rel=1e-5)
