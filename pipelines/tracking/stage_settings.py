"""Which settings a run in MLflow has as its parameters: those that its stage reads.

The whole configuration is its artifact `config.yaml`.
"""

from __future__ import annotations

from typing import Any

from pipelines.config import RunConfig

SECTIONS = {
    "distill": ("prompts", "distill"),
    "train": ("train",),
    "tree": ("tree",),
    "bench": ("bench", "ngram", "draft_model"),
    "ablate": ("ablate", "train"),
    "serve": ("serve",),
    "batch": ("batch", "serve"),
    "load": ("load", "serve"),
}
"""Stage -> the sections that it reads; of any other stage its own section alone."""
ANSWERING = ("distill", "serve", "batch", "load")
"""Stages whose answers are written by what `engine` names."""
OF_ALL_DRAFTERS = {"drafters", "only", "start"}
"""Settings of `train` that one drafter's run replaces by its own: `heads.*`, `train.start`."""
CHAIN = {
    "distill": ("prompts.source", "prompts.path", "prompts.count", "distill.max_new_tokens", "distill.temperatures"),
    "train": ("train.lr", "train.epochs", "train.rows_per_step", "train.share", "train.features", "train.precision"),
    "bench": ("bench.prompts", "bench.max_new_tokens", "bench.temperature"),
}
"""Stage -> the handful of its settings that people vary: the chain's run has them as parameters, besides name, base and
drafters."""


def stage_settings(config: RunConfig, stage: str, part: str | None = None) -> dict[str, Any]:
    """The parameters of the run of `stage`, nested, under the names that a user gives; `part`: of one drafter, whose architecture
    is `heads.*`."""
    values = config.model_dump(mode="json", by_alias=True)
    drafter = config.train.drafters.get(part) if part and stage in ("train", "tree") else None
    found = {name: values[name] for name in SECTIONS.get(stage, (stage,)) if name in values}
    if drafter is not None:
        if "train" in found:
            found["train"] = {name: value for name, value in found["train"].items() if name not in OF_ALL_DRAFTERS}
            found["train"]["start"] = config.train.start.get(str(part))
        found["heads"] = drafter.model_dump(mode="json")
    if config.engine != "own" and stage in ANSWERING:
        found |= {"engine": config.engine, "vllm": values["vllm"]}
    return _of_every_run(config) | found


def chain_settings(config: RunConfig, stage: str) -> dict[str, Any]:
    """The parameters that the chain's run gets when `stage` starts, by dotted name."""
    values = config.model_dump(mode="json", by_alias=True)
    found: dict[str, Any] = dict(_of_every_run(config))
    for name in CHAIN.get(stage, ()):
        section, _, setting = name.partition(".")
        if values[section][setting] is not None:
            found[name] = values[section][setting]
    if stage == "train":
        chosen = {name: heads for name, heads in config.train.drafters.items() if config.train.only in (None, name)}
        found["drafters"] = ", ".join(chosen)
    return found


def _of_every_run(config: RunConfig) -> dict[str, Any]:
    return {"name": config.name, "base": {"model": config.base.model, "dtype": config.base.dtype}}
