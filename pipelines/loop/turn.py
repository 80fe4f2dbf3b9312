"""One turn of the loop: the settings of its stages, which follow from those of the user and from the champion."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_core.errors import InputError
from hydra_core.heads import HeadsConfig
from hydra_core.storage import as_path
from pipelines.config import RunConfig
from pipelines.rows.parquet_parts import read_parts
from pipelines.rows.schemas import PROMPTS
from pipelines.runtime.artifacts import RunPaths, read_manifest, require_manifest
from pipelines.runtime.files import write_text
from pipelines.tracking.lookup import Model
from pipelines.train.warm_start import SHAPE

STANDING = "standing.jsonl"
QUESTIONS = 24
"""Of the standing set where neither `bench.limit` nor a file says how many."""


@dataclass(frozen=True)
class Turn:
    """The settings of the stages of one turn. `chain`: of all of them, and of the bench of held-out traffic; `standing`: of the
    bench of the prompts on which nothing may be lost; `drafters`: names of what is trained."""

    chain: RunConfig
    standing: RunConfig
    drafters: tuple[str, ...]


def turn_name(config: RunConfig) -> str:
    """The name of the run in which the turn's stages lie."""
    return f"{config.name}-{config.loop.turn()}"


def plan_turn(config: RunConfig, champion: Model | None) -> Turn:
    """The turn that `config` asks for. `champion`: whose heads training starts from; None, or one without heads: the drafters of
    `train.drafters` are trained from the start.

    Raises InputError where there are no prompts for the standing set.
    """
    drafters, start = _training(config, champion)
    also = config.train.also or tuple(one for one in (config.name,) if _has_distilled(config, one))
    methods = config.bench.methods or ("ngram", *drafters, "combined")
    chain = _with(config, name=turn_name(config), prompts={"source": "served", "path": config.prompts.path if
                                              config.prompts.source == "served" else None, "self_made": 0},
                  train={"drafters": drafters, "start": start, "only": None, "also": also, "dry_run": False},
                  bench={"prompts": None, "heads": None, "methods": methods, "single": True})
    given = config.loop.standing or config.bench.prompts
    prompts = given or str(RunPaths.of(chain).run / STANDING)
    if given is None:
        _write_standing(config, as_path(prompts))
    return Turn(chain, _with(chain, bench={"prompts": prompts}), tuple(drafters))


def _with(config: RunConfig, **changes: Any) -> RunConfig:
    """`config` with other settings, of which those of a section are a mapping, checked again."""
    values = config.model_dump(by_alias=True)
    for name, value in changes.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    return RunConfig.model_validate(values)


def _has_distilled(config: RunConfig, name: str) -> bool:
    return read_manifest(RunPaths(as_path(config.storage), name).stage("distill")) is not None


def _training(config: RunConfig, champion: Model | None) -> tuple[dict[str, HeadsConfig], dict[str, str]]:
    """What is trained, and from which weights: the champion's heads, under the name that `train.drafters` has for their shape."""
    heads = _heads_of(champion)
    if heads is None:
        return dict(config.train.drafters), dict(config.train.start)
    folder, shape = heads
    same = [name for name, known in config.train.drafters.items()
            if all(getattr(known, one) == getattr(shape, one) for one in SHAPE)]
    name = same[0] if same else shape.kind
    return {name: config.train.drafters[name] if same else shape}, {name: folder}


def _heads_of(champion: Model | None) -> tuple[str, HeadsConfig] | None:
    """Folder and shape of the champion's heads, None where it has none. Raises InputError for heads that cannot be read."""
    if champion is None or champion.folder is None:
        return None
    inside = champion.folder / "heads"
    folder = inside if (inside / "config.json").exists() else champion.folder
    if not (folder / "config.json").exists():
        return None
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))["heads"]
        return str(folder), HeadsConfig.model_validate(values)
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder}: the champion's heads cannot be read: promote again, or name others in serve.model") from None


def _write_standing(config: RunConfig, path: Path) -> None:
    """Held-out prompts of the run `name` as a file, once: the same in every attempt at this turn."""
    folder = RunPaths.of(config).stage("distill")
    if path.exists():
        return
    try:
        require_manifest(folder, "distill")
    except InputError:
        raise InputError("loop.standing: there are no prompts on which nothing may be lost: name a JSONL file, or `name=` of a "
                         f"run that has distilled ({folder} has not)") from None
    rows = [row for row in read_parts(folder / "prompts", PROMPTS).to_pylist() if row["split"] == "held_out"]
    rows = sorted(rows, key=lambda row: str(row["prompt_id"]))[:config.bench.limit or QUESTIONS]
    if not rows:
        raise InputError(f"loop.standing: {folder} has no held-out prompt: name a JSONL file")
    lines = [{"messages": json.loads(row["messages"])} if row["messages"] else {"prompt": row["prompt"]} for row in rows]
    write_text(path, "".join(f"{json.dumps(line)}\n" for line in lines))
