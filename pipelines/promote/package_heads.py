"""Package a run's heads: bundle them with the project's own Python package.

    python -m pipelines.promote.package_heads --config FILE DRAFTER NAME [section.field=value ...]

    hydra_core/bundled/NAME/configuration.json, heads/    dynamic trees, for every weight format of the base
    hydra_core/bundled/NAME/recipe.yaml                   the run's configuration, without the paths of one machine
    hydra_core/bundled/NAME/recipe-1.yaml, ...            those of the trainings that it started from, the first one first
    hydra_core/bundled/NAME/curve.json                    held-out figures of every validation of each training, and the mean
                                                          loss since the one before
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from hydra_core.base import load_vocabulary
from hydra_core.bundled import FOLDER, is_bundled
from hydra_core.decoding import DecodingConfiguration, save_configuration
from hydra_core.decoding.configuration import ANY_FORMAT
from hydra_core.errors import InputError
from hydra_core.heads.checkpoint import load_checkpoint
from hydra_core.proposers import NgramDrafter
from hydra_core.storage import is_remote, local_copy
from pipelines.config import RunConfig, load_config, parse_override
from pipelines.runtime.artifacts import RunPaths
from pipelines.runtime.files import atomic_folder, write_text
from pipelines.tracking import Tracker
from pipelines.train.warm_start import start_folder

LARGEST = 40e6
"""Bytes by which heads may enlarge the package."""


def package(config: RunConfig, drafter: str, target: Path) -> Path:
    """Write the configuration folder `target`, in place of an older one. Raises InputError for heads that are missing, do not
    load, or are too large for the package."""
    heads = RunPaths.of(config).stage("tree", drafter) / "heads"
    vocabulary = load_vocabulary(config.base.model, dtype=config.base.dtype, cache=RunPaths.of(config).cache)
    load_checkpoint(heads, vocabulary)
    size = sum(path.stat().st_size for path in local_copy(heads).iterdir())
    if size > LARGEST:
        raise InputError(f"{heads}: {size / 1e6:.0f} MB, more than {LARGEST / 1e6:.0f}: train in bf16, or smaller heads")
    ngram = config.ngram
    configuration = DecodingConfiguration(
        target.name, "combined", replace(vocabulary.identity, weight_format=ANY_FORMAT),
        NgramDrafter(ngram.max_match, ngram.min_match, ngram.length))
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "heads"
        shutil.copytree(local_copy(heads), copy)
        provenance = json.loads((copy / "provenance.json").read_text(encoding="utf-8"))
        write_text(copy / "provenance.json", json.dumps(without_places(provenance), indent=2, sort_keys=True))
        made = Path(temporary) / target.name
        save_configuration(made, replace(configuration, heads=copy))
        *earlier, (recipe, _) = trainings = trainings_of(config, drafter, RunPaths.of(config).stage("train", drafter))
        for number, (older, _) in enumerate(earlier, 1):
            write_text(made / f"recipe-{number}.yaml", older)
        write_text(made / "recipe.yaml", recipe)
        curve = [{"training": number} | point for number, (_, points) in enumerate(trainings, 1) for point in points]
        write_text(made / "curve.json", json.dumps(curve, indent=1))
        with atomic_folder(target) as folder:
            shutil.copytree(made, folder, dirs_exist_ok=True)
    return target


def without_places(value: Any) -> Any:
    """The same value, where only the last part of each absolute path remains."""
    if isinstance(value, dict):
        return {name: without_places(inner) for name, inner in value.items() if name != "storage"}
    if isinstance(value, list | tuple):
        return [without_places(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if value.startswith("/") or is_remote(value):
        return Path(value).name
    return _PLACE.sub(lambda place: Path(place.group()).name, value)  # an override of the command line, paths in braces too


_PLACE = re.compile(r"(?<==)/.+|(?<=: )/[^,}\]]+")


Training = tuple[str, list[dict[str, float]]]
"""Its recipe and its learning curve."""


def trainings_of(config: RunConfig, drafter: str, folder: Path) -> list[Training]:
    """Every training that led to the heads in `folder`, the first one first: before each training the one whose heads it
    started from (`train.start`). Raises InputError where nothing but the heads is left of one."""
    start = start_folder(config, drafter)
    bundled = is_bundled(config.train.start.get(drafter))
    earlier = [] if start is None else _bundled_trainings(start.parent) if bundled else _trainings_behind(start)
    kept = config.model_dump(mode="json", by_alias=True, exclude={"storage": True, "train": {"start"}}, exclude_defaults=True)
    return [*earlier, (yaml.safe_dump(without_places(kept), sort_keys=False), learning_curve(config, drafter, folder))]


def _trainings_behind(heads: Path) -> list[Training]:
    file = heads.parent / "config.yaml"
    if not file.is_file():
        raise InputError(f"{heads}: lies in no folder of a training, so the recipe of these heads is unknown")
    config, drafter = load_config(str(file)), heads.parent.name
    if drafter not in config.train.drafters:
        raise InputError(f"{heads.parent}: its config.yaml trains {', '.join(config.train.drafters)}: give the folder its "
                         "drafter's name")
    return trainings_of(config, drafter, heads.parent)


def _bundled_trainings(folder: Path) -> list[Training]:
    curves: dict[int, list[dict[str, float]]] = {}
    for point in json.loads((folder / "curve.json").read_text(encoding="utf-8")):
        curves.setdefault(point.pop("training"), []).append(point)
    recipes = [*(folder / f"recipe-{number}.yaml" for number in range(1, len(curves))), folder / "recipe.yaml"]
    texts = [recipe.read_text(encoding="utf-8") for recipe in recipes]
    return [(text, points) for text, (_, points) in zip(texts, sorted(curves.items()), strict=True)]


def learning_curve(config: RunConfig, drafter: str, folder: Path) -> list[dict[str, float]]:
    """For each validation of the training in `folder`: its step, held-out figures, and the mean loss since the one before."""
    losses = [json.loads(line)["loss"] for line in (folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()]
    run_id = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["result"]["run_id"]
    figures = ("tokens_per_step", *(f"head{head}_top1" for head in range(config.train.drafters[drafter].num_heads)))
    history = Tracker.open(config).history(run_id, [f"held_out.{name}" for name in figures])
    points, before = [], 0
    for step in sorted(history):
        loss = statistics.fmean(losses[before:step])
        points.append({"step": step, "loss": round(loss, 4)} | {name: round(value, 4) for name, value in history[step].items()})
        before = step
    return points


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pipelines.promote.package_heads",
                                     description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", required=True)
    parser.add_argument("drafter")
    parser.add_argument("name")
    parser.add_argument("overrides", nargs="*")
    words = parser.parse_args(argv)
    try:
        config = load_config(words.config, dict(map(parse_override, words.overrides)))
        print(package(config, words.drafter, FOLDER / words.name))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
