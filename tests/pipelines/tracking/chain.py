"""A chain in MLflow as the stages record it, without their work: through the real Tracker, in a real store."""

from __future__ import annotations

from pathlib import Path

from hydra_core.base import Base
from hydra_core.decoding import DecodingConfiguration, save_configuration
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.tree import DraftTree, TreeSet
from pipelines.config import RunConfig
from pipelines.tracking import Tracker, record_champion, register
from pipelines.tracking.models import finish_model, heads_model
from tests.trained import random_heads

QUESTIONS = ("spec-bench", "0123456789abcdef" * 4)
TREE = TreeSet({1: DraftTree(((0,), (0, 0)))})


def record_chain(config: RunConfig, base: Base, folder: Path, speeds: dict[str, float]) -> str:
    """Record a chain whose drafters, `medusa` and `hydra`, have `speeds` on `QUESTIONS`, and whose fastest one is promoted;
    returns the run id of its bench. Heads are untrained ones of `base`; `folder`: where they lie."""
    tracker = Tracker.open(config)
    with tracker.start("distill", fingerprint="d") as run:
        run.log_dataset("prompts", "a" * 64, "/data/prompts.jsonl", "distill")
        run.log_headline({"rows": 1200})
        run.describe("1,200 answers of the base")
    models = {}
    for name, speed in speeds.items():
        save_checkpoint(folder / name, random_heads(base, name), base.identity, TREE, {"made": "by a test"})
        with tracker.start("train", part=name, fingerprint=name) as run, heads_model(run, config, name) as model:
            run.log_dataset("features", "f" * 64, "/data/features", "training")
            run.log_curve([(step, {"train.loss": 4.0 / (1 + step), "held_out.tokens_per_step": speed}) for step in range(5)])
            run.log_model_metrics(model.model_id, {"tokens_per_step": speed}, "features", "f" * 64)
            finish_model(model, config, folder / name)
            run.describe(f"{name}: {speed:.3f} tokens per step on held-out rows", "| steps |\n|---|\n| 40 |\n")
            run.log_headline({"training_tokens": 96_000})
            models[name] = model.model_id
    best = max(speeds, key=lambda name: speeds[name])
    with tracker.start("bench", fingerprint="b") as run:
        run.log_dataset(QUESTIONS[0], QUESTIONS[1], "/data/spec-bench.jsonl", "bench", of_chain=True)
        for name, speed in speeds.items():
            run.log_model_metrics(models[name], {"tokens_per_step": 1.2 * speed, "speed_vs_plain": speed}, *QUESTIONS)
        figures = {"tokens_per_step": 1.2 * speeds[best], "speed_vs_plain": speeds[best],
                   "speed_vs_plain_low": speeds[best] - 0.1, "speed_vs_plain_high": speeds[best] + 0.1}
        run.log_metrics(figures)
        run.log_headline(figures, {"fastest": best})
        run.describe(f"{best}: {speeds[best]:.2f}x plain decoding", "| method | vs plain |\n|---|---|\n" + "".join(
            f"| {name} | {speed:.2f}x |\n" for name, speed in speeds.items()))
        bench = run.run_id
    configuration = folder / "configuration"
    save_configuration(configuration, DecodingConfiguration(best, "heads", base.identity, heads=folder / best))
    with tracker.start("promote", fingerprint="p") as run:
        run.log_artifact(configuration, "configuration")
        version = register(config, config.promote.model_name, run, "configuration", config.promote.alias, {"drafter": best})
        record_champion(run, best, version, "the fastest of 2 lossless contenders", figures)
    return bench
