"""Every setting of the optimizer where it takes effect: steps of the real engine against an AdamW that is written out here."""

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
from safetensors.torch import load_file

from hydra_core.base import Base, load_base
from hydra_core.heads import DraftVocab, HeadsConfig, build_drafter
from hydra_core.training.model import HeadTraining
from pipelines.config import TrainSection, TrainWorkers
from pipelines.rows.batch_order import BatchOrder, share_of
from pipelines.rows.feature_store import FeatureStore
from pipelines.rows.packed_reader import ProcessGroup, RowReader
from pipelines.train.batches import StepBatches, valid_counts
from pipelines.train.context import HEADS
from pipelines.train.deepspeed_config import learning_rate, prepare_environment
from pipelines.train.ema import WeightAverage
from pipelines.train.loop import _eval_weights, start_engine, train_step
from pipelines.train.reporting import save_curve_and_heads
from tests.conftest import ROOT
from tests.pipelines.synthetic import feature_row, write_shard

STEPS, ROWS, TOTAL = 4, 8, 6
PLAIN: dict[str, Any] = {"learning_rate": 0.01, "warmup_steps": 2, "grad_clip": 100.0}
CASES: dict[str, dict[str, Any]] = {
    "plain": {}, "learning_rate": {"learning_rate": 0.02}, "betas": {"betas": (0.5, 0.7)}, "eps": {"eps": 0.1},
    "weight_decay": {"weight_decay": 0.5}, "grad_clip": {"grad_clip": 0.01}, "warmup_steps": {"warmup_steps": 0},
    "schedule": {"warmup_steps": 0, "schedule": "wsd", "decay_share": 0.9},
    "constant": {"warmup_steps": 0, "schedule": "constant"},
    "final_lr_share": {"warmup_steps": 0, "final_lr_share": 0.9}, "accumulate": {"accumulate": 4}, "seed": {"seed": 1},
    "ema": {"ema": 0.3}, "zero_stage": {"zero_stage": 2}}
HEAD_CASES: dict[str, dict[str, Any]] = {
    "head_decay": {"head_decay": 0.5}, "loss": {"loss": "data"}, "mask_lost": {"mask_lost": True}, "dropout": {"dropout": 0.5}}
SAME = {"plain", "accumulate", "ema", "zero_stage"}
"""Cases whose own weights come out as the plain one's: those of `ema` are other ones, which are saved."""


def context_of(folder: Path, base: Base, case: str) -> Any:
    """What a step reads of a worker, with one rank."""
    changes = PLAIN | CASES.get(case, {})
    train = TrainSection(**{"rows_per_step": ROWS, "workers": TrainWorkers(count=1), "zero_stage": 1, **changes})
    heads = HeadsConfig(**{"kind": "hydra++", "draft_vocab_size": 64, "num_heads": 2} | HEAD_CASES.get(case, {}))
    learn = RowReader(FeatureStore.open(folder, "train"))
    vocab = DraftVocab.rank(learn.store.response_counts(base.vocab_size), 64, base.stop_ids)
    torch.manual_seed(train.seed)
    model = HeadTraining(build_drafter(heads, base.vocabulary, vocab), base.vocabulary)
    order, group = BatchOrder.of(learn.store, ROWS, train.seed), ProcessGroup(0, 1)
    counts = valid_counts(learn.store, vocab, heads)
    return SimpleNamespace(
        train=train, heads=heads, model=model, group=group, device=torch.device("cpu"), total=TOTAL, order=order, counts=counts,
        learn=learn, average=WeightAverage.asked_for(model, train), curve=[], vocabulary=base.vocabulary, next_step=0,
        batches=StepBatches(learn, order, counts, group, train.accumulate), settings=SimpleNamespace(provenance={}))


def by_hand(context: Any, model: HeadTraining) -> dict[str, torch.Tensor]:
    """The averaged weights, or without an average the weights, after the same steps: all rows of a step at once, AdamW as its
    authors wrote it down."""
    train, weights = context.train, dict(model.named_parameters())
    first = {name: torch.zeros_like(one) for name, one in weights.items()}
    second = {name: torch.zeros_like(one) for name, one in weights.items()}
    average = {name: one.detach().clone() for name, one in weights.items()}
    model.train()
    for step in range(STEPS):
        torch.manual_seed(train.seed * 1_000_003 + step)  # of dropout
        rows = share_of(context.order.rows(step), context.learn.store.index.lengths, 0, 1)  # in the order of a piece
        divisors = torch.from_numpy(context.counts[rows].sum(0)).clamp(min=1)
        loss, _ = model(context.learn.pack(rows), divisors)
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True))
        norm = torch.stack([one.norm() for one in gradients.values() if one is not None]).norm()
        scale, rate = min(1.0, train.grad_clip / (float(norm) + 1e-6)), learning_rate(train, step, TOTAL)
        for name, one in weights.items():
            gradient = torch.zeros_like(one) if gradients[name] is None else gradients[name] * scale
            first[name] = train.betas[0] * first[name] + (1 - train.betas[0]) * gradient
            second[name] = train.betas[1] * second[name] + (1 - train.betas[1]) * gradient ** 2
            mean, square = (moment / (1 - beta ** (step + 1)) for moment, beta in zip(
                (first[name], second[name]), train.betas, strict=True))
            with torch.no_grad():
                one -= rate * train.weight_decay * one
                one -= rate * mean / (square.sqrt() + train.eps)
                kept = min(train.ema, (1 + step) / (10 + step))
                average[name] = kept * average[name] + (1 - kept) * one
    return average if train.ema else {name: one.detach() for name, one in weights.items()}


def worker(folder: Path) -> None:
    """A line of JSON for each case: how far the engine's weights are from those by hand, and from the plain case's."""
    prepare_environment(uses_gpu=False)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    base = load_base(str(folder / "base"), dtype="fp32", cache=folder / "cache")
    plain: dict[str, torch.Tensor] = {}
    for case in (*CASES, *HEAD_CASES):
        context = context_of(folder / "features", base, case)
        wanted = by_hand(context, context_of(folder / "features", base, case).model)
        start = {name: one.detach().clone() for name, one in context.model.named_parameters()}
        context.engine = start_engine(context.model, context.train, context.group)
        for batch in context.batches.between(0, STEPS):
            context.curve.append(train_step(context, batch))
        own = {name: one.detach().clone() for name, one in context.model.named_parameters()}
        with _eval_weights(context):
            save_curve_and_heads(context, folder / case, {"step": STEPS})
        saved = load_file(folder / case / HEADS / "model.safetensors")
        plain = plain or own
        moved = max(float((own[name] - start[name]).abs().max()) for name in own)
        away = {name.removeprefix("drafter."): float((saved[name.removeprefix("drafter.")] - one).abs().max())
                for name, one in wanted.items()}
        differs = {name: float((own[name] - one).abs().max()) for name, one in plain.items() if own[name].shape == one.shape}
        print(json.dumps({"case": case, "away": max(away.values()), "moved": moved, "from_plain": max(differs.values()),
                          "saved_from_own": max(float((saved[name.removeprefix("drafter.")] - one).abs().max())
                                                for name, one in own.items()),
                          "rates": [record["lr"] for record in context.curve],
                          "loss": context.curve[0]["loss"]}), flush=True)


@pytest.fixture(scope="module")
def found(tiny_base: Base, tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("optimizer")
    (folder / "base").symlink_to(tiny_base_dir)
    write_shard(folder / "features" / "part-0.parquet", [feature_row(tiny_base, number, "train") for number in range(40)])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = ("import sys; from pathlib import Path; from tests.pipelines.train.test_optimizer import worker; "
              "worker(Path(sys.argv[1]))")
    command = [sys.executable, "-c", script, str(folder)]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0",
                 "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["case"]: line for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *HEAD_CASES])
def test_steps_are_those_of_adamw_by_hand(found: dict[str, dict[str, Any]], case: str) -> None:
    """The weights that are saved: with `ema` the averaged ones."""
    one = found[case]
    assert one["away"] < 2e-5 < 1e-3 < one["moved"], one
    assert (one["saved_from_own"] > 1e-3) == (case == "ema"), one


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted({*CASES, *HEAD_CASES} - SAME))
def test_every_setting_changes_the_weights(found: dict[str, dict[str, Any]], case: str) -> None:
    assert found[case]["from_plain"] > 1e-4, found[case]


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(SAME - {"plain"}))
def test_settings_of_how_alone_do_not(found: dict[str, dict[str, Any]], case: str) -> None:
    assert found[case]["from_plain"] < 2e-5, found[case]


@pytest.mark.slow
def test_what_a_step_reports(found: dict[str, dict[str, Any]]) -> None:
    assert found["plain"]["rates"] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01 * (0.1 + 0.9 * 0.75)])
    assert found["constant"]["rates"] == pytest.approx([0.01] * STEPS)
    assert found["accumulate"]["loss"] == pytest.approx(found["plain"]["loss"], rel=1e-6)
