"""The trials of a search: values drawn from `ablate.space`, as configurations of trainings.

Values are drawn by Ray Tune's distributions, each trial with a generator of its own: with more `ablate.trials` the earlier ones
stay the same. The first trial has the settings as they are given, so that the report says what the search has gained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hydra_core.errors import InputError
from pipelines.config import Distribution, RunConfig, load_config, nearest_setting
from pipelines.config.ablate import folder_name
from pipelines.runtime.artifacts import fingerprint
from pipelines.train.stage import EXECUTION_FIELDS

UNUSED = {*EXECUTION_FIELDS, "validation_rows", "validation_seed", "seed", "share"} - {"drafters"}
"""Settings of `train` that change nothing, or what trials are compared by."""
DIGITS = 8
"""Of the search's fingerprint, in the names of its trainings."""


@dataclass(frozen=True)
class Trial:
    """One training of a search. `values`: setting -> drawn value, none for the settings as they are; `label`: its name as a
    drafter and as a folder."""

    label: str
    values: dict[str, Any]


def searched_drafter(config: RunConfig) -> str:
    """The one drafter of a search. Raises InputError if there are several and none is chosen."""
    if config.train.only is None and len(config.train.drafters) > 1:
        raise InputError(f"ablate.space: a search is of one drafter, and train.drafters has {', '.join(config.train.drafters)}: "
                         "set train.only")
    return config.train.only or next(iter(config.train.drafters))


def draw_trials(config: RunConfig, data_digest: str) -> list[Trial]:
    """The trials of `ablate.space`. Raises InputError for a setting that is unknown or cannot be searched."""
    drafter = searched_drafter(config)
    for setting in config.ablate.space:
        _check_setting(setting, drafter)
    prefix = search_name(config, data_digest)
    trials = [Trial(f"{prefix}.trial{number:03d}", _drawn(config, number) if number else {})
              for number in range(config.ablate.trials)]
    for trial in trials:
        trial_config(config, trial, trial.label)
    return trials


def search_name(config: RunConfig, data_digest: str) -> str:
    """The name of the search: how the names of its trainings begin. It holds a digest of all that decides the trials and what
    they are compared by, other than their number."""
    drafter = searched_drafter(config)
    ablate = config.ablate.model_dump(mode="json", include={"space", "seed", "reduction", "least_steps"})
    train = config.train.model_dump(mode="json", exclude=EXECUTION_FIELDS)
    heads = config.train.drafters[drafter].model_dump(mode="json")
    digest = fingerprint("search", {"ablate": ablate, "train": train, "heads": heads}, {"distill": data_digest})
    return f"{folder_name(drafter)}.search-{digest[:DIGITS]}"


def trial_config(config: RunConfig, trial: Trial, label: str, seed: int | None = None) -> RunConfig:
    """The configuration of a run that trains with the trial's values alone, under the name `label`.

    Every trial is validated on the same held-out rows, whatever its `seed`. Raises InputError for a value that a setting does not
    take.
    """
    drafter = searched_drafter(config)
    held_out = config.train.seed if config.train.validation_seed is None else config.train.validation_seed
    given: dict[str, Any] = config.model_dump(mode="json", by_alias=True)
    try:
        made = load_config(None, {**given, **trial.values})
    except InputError as error:
        raise InputError(f"ablate.space: {trial.label}: {error}") from None
    train = made.train.model_copy(update={
        "drafters": {label: made.train.drafters[drafter]}, "only": None, "start": {}, "validation_seed": held_out,
        "seed": config.train.seed if seed is None else seed})
    return made.model_copy(update={"train": train})


def _check_setting(setting: str, drafter: str) -> None:
    parts = setting.split(".")
    of_heads = parts[:3] == ["train", "drafters", drafter] and len(parts) == 4
    if parts[0] != "train" or not (of_heads or (len(parts) == 2 and parts[1] != "drafters")):
        raise InputError(f"ablate.space: {setting}: only settings `train.NAME` and `train.drafters.{drafter}.NAME` can be "
                         "searched")
    if parts[1] in UNUSED:
        raise InputError(f"ablate.space: {setting}: cannot be searched: it does not change the heads, or it changes what they "
                         "are compared by")
    names = RunConfig.model_fields["train"].annotation.model_fields  # type: ignore[union-attr]
    known = {info.alias or name for name, info in names.items()} | set(names)
    if not of_heads and parts[1] not in known:
        near = nearest_setting(setting, RunConfig)
        raise InputError(f"ablate.space: {setting}: is no setting{f': did you mean {near}?' if near else ''}")


def _drawn(config: RunConfig, number: int) -> dict[str, Any]:
    """The values of trial `number`, in the order of the names, whatever the order of the file."""
    random = np.random.default_rng([config.ablate.seed, number])
    return {setting: _value(config.ablate.space[setting], random) for setting in sorted(config.ablate.space)}


def _value(distribution: Distribution, random: np.random.Generator) -> Any:
    from ray import tune

    if distribution.choice is not None:
        return distribution.choice[int(random.integers(len(distribution.choice)))]
    domain: Any
    if distribution.randint is not None:
        domain = tune.randint(distribution.randint[0], distribution.randint[1] + 1)
    elif distribution.uniform is not None:
        domain = tune.uniform(*distribution.uniform)
    else:
        assert distribution.loguniform is not None
        domain = tune.loguniform(*distribution.loguniform)
    value = domain.sample(random_state=random)
    return int(value) if distribution.randint is not None else float(f"{value:.6g}")


def shown(values: Mapping[str, Any]) -> str:
    """Drawn values for a person."""
    return ", ".join(f"{name} {f'{value:.3g}' if isinstance(value, float) else value}" for name, value in values.items()) or (
        "the settings as they are")
