"""What a stage would do, in words: `--plan` prints this and starts nothing."""

from __future__ import annotations

from pipelines.config import RunConfig
from pipelines.stage import RunPaths

BUDGET_MINUTES = {"distill": 8, "train": 12, "tree": 3, "bench": 7, "promote": 1, "serve": 1, "batch": 2}
"""Time each stage of the quickstart may take on two CPU cores."""
CHAIN = tuple(BUDGET_MINUTES)


def describe(config: RunConfig, stage: str) -> list[str]:
    """Lines for people: inputs, sizes and outputs of `stage`; for the quickstart one for each stage with its budget."""
    if stage != "quickstart":
        return [f"{stage}: {_TEXTS[stage](config)}"]
    lines = [f"{name} (at most {BUDGET_MINUTES[name]} min): {_TEXTS[name](config)}" for name in CHAIN]
    return [*lines, f"{sum(BUDGET_MINUTES.values())} minutes in all on two CPU cores, after installation"]


def _distill(config: RunConfig) -> str:
    source = "prompts the base writes itself" if config.prompts.source == "self" else f"prompts of {config.prompts.path}"
    count = config.prompts.count or (640 if config.prompts.source == "self" else "all")
    return (f"{count} {source}, answered at temperatures {list(config.distill.temperatures)} with at most "
            f"{config.distill.max_new_tokens} tokens, with hidden states -> {RunPaths.of(config).stage('distill')}")


def _train(config: RunConfig) -> str:
    train = config.train
    names = [train.only] if train.only else list(train.drafters)
    length = f"{train.max_steps} steps" if train.max_steps else f"{train.epochs:g} epochs"
    return (f"{', '.join(names)}: {length} each, {train.workers.count} workers, ZeRO-{train.zero_stage} -> "
            f"{RunPaths.of(config).stage('train')}")


def _tree(config: RunConfig) -> str:
    return (f"trees for batches of {list(config.tree.batch_sizes)}, from held-out ranks and step costs measured here -> "
            f"{RunPaths.of(config).stage('tree')}")


def _bench(config: RunConfig) -> str:
    prompts = config.bench.prompts or "held-out prompts"
    return (f"{config.bench.limit or 24} of {prompts} x {config.bench.max_new_tokens} tokens, {config.bench.rounds} round(s), "
            f"fp32 identity on {config.bench.identity_prompts} -> {RunPaths.of(config).stage('bench')}")


def _promote(config: RunConfig) -> str:
    return f"fastest lossless configuration -> models:/{config.promote.model_name}@{config.promote.alias}"


def _serve(config: RunConfig) -> str:
    model = config.serve.model or f"models:/{config.promote.model_name}@{config.promote.alias}"
    return f"{model} on http://{config.serve.host}:{config.serve.port}"


def _batch(config: RunConfig) -> str:
    prompts = config.batch.input or "held-out prompts of this run"
    return f"{config.batch.limit or 'all'} of {prompts} -> {config.batch.output or RunPaths.of(config).stage('batch')}"


_TEXTS = {"distill": _distill, "train": _train, "tree": _tree, "bench": _bench, "promote": _promote, "serve": _serve,
          "batch": _batch}
