"""Chains as MLflow keeps them, made in a moment: the real Tracker on SQLite, and figures that are drawn instead of measured."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.bench.plan import Row, append_row, read_rows
from pipelines.bench.report import metrics_of, summarise
from pipelines.config import RunConfig, load_config
from pipelines.tracking import Run, Tracker
from pipelines.tracking.client import open_client

MACHINE = "2 cores of Some CPU (AMX)"
CATEGORIES = ("conversation", "math", "translation")
QUESTIONS = 24


def config_for(storage: Path, **settings: object) -> RunConfig:
    """`a__b=1` sets `a.b`."""
    return load_config(None, {"storage": str(storage), **{key.replace("__", "."): value for key, value in settings.items()}})


def record_chain(storage: Path, name: str, gain: float = 1.3, *, drafter: str = "hydra++", machine: str | None = MACHINE,
                 seed: int = 0, **settings: object) -> dict[str, str]:
    """Stage -> run id of a chain that was distilled, trained (one drafter), and benched; `gain`: speed against plain, about.

    The pace of the machine changes with `seed`, and the difficulty of a question does not.
    """
    config = config_for(storage, name=name, **settings)
    tracker, ids = Tracker.open(config), {"chain": Tracker.open(config).parent()}
    with tracker.start("distill", fingerprint=f"d{name}") as run:
        _tag(tracker, run, machine)
        run.log_metrics({"responses": 90, "response_tokens": 12345, "cpu_seconds": 80.5, "device_seconds": 60.0})
        ids["distill"] = run.run_id
    with tracker.start("train", part=drafter, fingerprint=f"t{name}") as run:
        _tag(tracker, run, machine)
        log_training(run, storage / f"{name}.curve", seed, gain)
        ids["train"] = run.run_id
    with tracker.start("bench", fingerprint=f"b{name}{seed}") as run:
        _tag(tracker, run, machine)
        log_bench(run, storage / f"{name}.bench", {"plain": 1.0, drafter: gain, "ngram": 1.1}, seed)
        ids["bench"] = run.run_id
    return ids


def log_training(run: Run, folder: Path, seed: int, level: float) -> None:
    """A curve of 40 steps by two workers, a second each, and four validations."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    records = [{"step": step, "loss": 6 / (1 + step / 10) + draw.random() / 5, "positions": 1000, "workers": 2, "padding": 0.1,
                "lr": 1e-3, "time": 1000.0 + step} for step in range(40)]
    (folder / "curve.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    run.log_curve([(step, {"held_out.tokens_per_step": level * step / (step + 10)}) for step in (10, 20, 30, 40)])
    run.log_metrics({"best.tokens_per_step": 0.8 * level, "best.step": 40, "draft_vocab_coverage": 0.97})
    run.log_artifact(folder / "curve.jsonl")


def log_bench(run: Run, folder: Path, speeds: Mapping[str, float], seed: int, questions: int = QUESTIONS) -> dict[str, Any]:
    """Rows and report as `bench` writes them; a contender of speed s makes about s tokens a step."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    path.unlink(missing_ok=True)
    pace, hardness = 0.02 * (1 + seed), random.Random(7)
    for number in range(questions):
        ease = hardness.uniform(0.7, 1.3)
        noise = random.Random(f"{seed} {number}")
        for method, speed in speeds.items():
            steps = 60 if method == "plain" else max(20, round(60 / (1 + (speed - 1) * ease)))
            accepted = (steps, 0, 0) if method == "plain" else (steps // 2, steps // 4, steps - steps // 2 - steps // 4)
            append_row(path, Row(round=0, question=f"q{number}", category=CATEGORIES[number % 3], method=method,
                                 token_ids=tuple(range(61)), steps=steps, prefill_seconds=pace,
                                 decode_seconds=steps * pace * noise.uniform(0.98, 1.02), accepted_lengths=accepted))
    figures = summarise(read_rows(path), [])
    (folder / "report.json").write_text(json.dumps({"methods": figures}), encoding="utf-8")
    run.log_metrics(metrics_of(figures))
    for file in (path, folder / "report.json"):
        run.log_artifact(file)
    return figures


def _tag(tracker: Tracker, run: Run, machine: str | None) -> None:
    client = open_client(tracker.uri)
    if machine is not None:
        client.set_tag(run.run_id, "hydra_heads.hardware", machine)
    else:  # as runs of an earlier version
        client.delete_tag(run.run_id, "hydra_heads.hardware")
    client.delete_tag(run.run_id, "hydra_heads.hardware_digest")  # of the machine that the tests run on
