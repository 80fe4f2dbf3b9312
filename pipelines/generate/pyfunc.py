"""MLflow's way to these models: `mlflow.pyfunc.load_model("models:/hydra-heads@champion").predict(["What is a draft tree?"])`.

MLflow imports this module and calls `_load_pyfunc`, as the model's `MLmodel` says. Nothing is unpickled: heads are safetensors.

The base is not part of the model. It is looked for where HYDRA_HEADS_BASE says, then where `base_model` says (where it lay when
the heads were made, unless `model_config` of `mlflow.pyfunc.load_model` says another place), then under its own name. It must be
the same one, by its digest.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydra_core.base import Base, resolve_base
from hydra_core.base.resolve import default_cache
from hydra_core.decoding import Engine, load_heads
from hydra_core.decoding.configuration import ANY_FORMAT
from hydra_core.errors import InputError
from hydra_core.proposers import Drafter
from hydra_core.tree import TreeSet
from pipelines.config import BaseSection
from pipelines.profiling.cost_cache import machine_costs

BASE_VARIABLE = "HYDRA_HEADS_BASE"
MOST_TOGETHER = 8
"""Prompts that are decoded together."""


@dataclass
class Generator:
    """What MLflow asks for predictions. `lock`: MLflow's server calls from several threads, and an engine is of one."""

    base: Base
    drafter: Drafter | None
    trees: TreeSet | None
    lock: threading.Lock

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """Answers to prompts, in order: texts in a list, a column of a table or an array. `params`: max_new_tokens (default 256),
        temperature (0: greedy) and seed. Raises InputError for an input that holds anything but texts."""
        prompts, asked = texts_of(model_input), dict(params or {})
        if not prompts:
            return []
        most = int(asked.pop("max_new_tokens", 256))
        with self.lock:
            room = max(len(self.base.encode_prompt(prompt)) for prompt in prompts) + most
            engine = Engine(self.base, self.drafter, self.trees, max_batch_size=min(len(prompts), MOST_TOGETHER),
                            context_limit=min(room, self.base.context_limit))
            return engine.answer(prompts, max_new_tokens=most, **asked)


def texts_of(model_input: Any) -> list[str]:
    """The prompts of any input that MLflow hands on: a text, a list, an array, or a table with one column."""
    if isinstance(model_input, str):
        return [model_input]
    if hasattr(model_input, "columns"):  # a table of pandas
        if len(model_input.columns) != 1:
            raise InputError(f"predict: a table of {len(model_input.columns)} columns: give one column, of prompts")
        model_input = model_input.iloc[:, 0]
    found = model_input.tolist() if hasattr(model_input, "tolist") else list(model_input)
    for row, prompt in enumerate(found):
        if not isinstance(prompt, str):
            raise InputError(f"predict: row {row}: is {type(prompt).__name__}, not a text: give prompts")
    return found


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> Generator:
    """Load the heads or the configuration in the folder `path`, and their base. Raises InputError if there is no such base."""
    folder, options = Path(path), dict(model_config or {})
    identity = _identity(folder)
    base = find_base(identity, options)
    drafter, trees = load_heads(folder, base, partial(machine_costs, base, default_cache()))
    return Generator(base, drafter, trees, threading.Lock())


def find_base(identity: Mapping[str, str], options: Mapping[str, Any]) -> Base:
    """The base with the digest of `identity`, loaded. Raises InputError, which names the places that were looked at."""
    asked = [os.environ.get(BASE_VARIABLE), options.get("base_model"), identity["name"]]
    places, faults = [str(place) for place in dict.fromkeys(asked) if place], []
    for place in places:
        try:
            digest = resolve_base(place, default_cache()).digest
        except InputError as error:
            faults.append(str(error).removeprefix("base.model="))
            continue
        if digest == identity["digest"]:
            written = identity["weight_format"]
            dtype = options.get("base_dtype", "bf16") if written == ANY_FORMAT else written
            return BaseSection.model_validate({"model": place, "dtype": dtype}).load(default_cache())
        faults.append(f"{place}: is another model ({digest[:16]})")
    raise InputError(f"base {identity['name']} ({identity['digest'][:16]}): is not available here ({'; '.join(faults)}): set "
                     f"{BASE_VARIABLE} to its folder, or load with model_config={{'base_model': FOLDER}}")


def _identity(folder: Path) -> dict[str, str]:
    for name in ("configuration.json", "config.json"):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))["base"]
            return {key: str(found[key]) for key in ("name", "digest", "weight_format")}
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder / name}: names no base ({error}): it is not a configuration of hydra-heads") from None
    raise InputError(f"{folder}: holds neither a configuration nor heads")

