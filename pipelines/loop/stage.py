"""The `loop` stage: recorded answers -> rows -> heads, from the champion on -> trees -> benches -> the gates of `promote`.

It is the chain of the other stages with settings of its own (`turn.py`), so a turn that was killed goes on where it was. An
endpoint that follows the registry takes the new champion by itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydra_core.errors import InputError
from hydra_core.storage import as_path
from pipelines.bench.plan import PLAIN
from pipelines.bench.stage import run_bench
from pipelines.config import RunConfig
from pipelines.distill.stage import run_distill
from pipelines.loop.turn import Turn, plan_turn, turn_name
from pipelines.promote.stage import run_promote
from pipelines.runtime.artifacts import RunPaths, StageResult
from pipelines.runtime.console import say
from pipelines.runtime.files import write_text
from pipelines.runtime.lock import only_run
from pipelines.runtime.ray_cluster import ensure_ray
from pipelines.tracking import NotRegistered, Tracker
from pipelines.tracking.lookup import Model, find_model
from pipelines.train.deepspeed_config import check_toolchain
from pipelines.train.stage import run_train
from pipelines.tree.stage import run_tree

STAGE = "loop"
BEGUN = "loop.json"
"""Of a turn's run: the champion that it began with."""
CHAMPION = "@champion"
"""The contender of a bench that decodes as the champion does."""


def run_loop(config: RunConfig) -> StageResult:
    """One turn. It ends without other heads, and without an error, where too little was recorded, where new heads lose something
    on the standing set, and where the gates do not let them pass.

    Raises InputError for the user's mistakes, as the stages do, and if another turn of this name works now.
    """
    tracker = Tracker.open(config)
    run = RunPaths(as_path(config.storage), turn_name(config)).run
    with only_run(run / STAGE, as_path(config.storage)):
        champion = _champion_of_turn(config, run / BEGUN)
        turn = plan_turn(config, champion)
        check_toolchain(config.train.workers.gpus > 0)
        with ensure_ray(config):
            figures = _run(config, turn, champion)
    say(STAGE, figures["why"])
    return StageResult(STAGE, tracker.parent(), {"run": str(RunPaths.of(turn.chain).run)}, figures)


def _champion_of_turn(config: RunConfig, path: Path) -> Model | None:
    """The champion with which this turn began: it may have made another one since. `path`: where it is remembered."""
    if path.exists():
        values = json.loads(path.read_text(encoding="utf-8"))
        return None if values is None else Model(**values | {"folder": values["folder"] and as_path(values["folder"])})
    found = _champion(config)
    write_text(path, json.dumps(None if found is None else {
        "folder": None if found.folder is None else str(found.folder), "label": found.label, "version": found.version}))
    return found


def _champion(config: RunConfig) -> Model | None:
    """What the endpoint decodes with; None where nothing is promoted and no heads are bundled."""
    try:
        return find_model(config, config.serve.model)
    except NotRegistered:
        if config.serve.model is not None:
            raise
        return None


def _run(config: RunConfig, turn: Turn, champion: Model | None) -> dict[str, Any]:
    """Run the stages as far as they lead; returns the figures of the turn."""
    rows = run_distill(turn.chain).figures
    figures: dict[str, Any] = {"partition": config.loop.turn(), "answers": rows["answers"], "promoted": False,
                               "started_from": champion.label if champion else None}
    if rows["answers"] < config.loop.min_answers:
        return figures | {"why": f"{rows['answers']} new answers are fewer than loop.min_answers={config.loop.min_answers}: "
                                 "nothing is trained"}
    run_train(turn.chain)
    run_tree(turn.chain)
    standing = run_bench(turn.standing).figures["methods"]
    figures["standing"] = brief(standing)
    kept, lost = pass_standing(standing, config.loop.max_drop)
    if not kept:
        return figures | {"why": f"the champion stays: on the standing set {'; '.join(lost)}"}
    traffic = turn.chain.model_copy(update={"bench": turn.chain.bench.model_copy(update={
        "methods": tuple(name for name in turn.chain.bench.methods if name not in standing or name in kept)})})
    figures["traffic"] = brief(run_bench(traffic).figures["methods"])
    promoted = run_promote(traffic)
    now = _champion(config)
    changed = now is not None and (champion is None or now.folder != champion.folder)
    why = "; ".join([str(promoted.figures.get("why", "")), *lost]).strip("; ")
    return figures | {"promoted": changed, "why": why, **{name: promoted.figures.get(name) for name in ("champion", "version")}}


def pass_standing(methods: dict[str, Any], max_drop: float) -> tuple[list[str], list[str]]:
    """The contenders that lose nothing there, and one line for each of the others.

    A contender passes if it gives at least `1 - max_drop` of the champion's tokens per step. Where the champion was not timed,
    the gates of `promote` alone decide. Raises InputError for a bench without contenders.
    """
    own = {name: figures for name, figures in methods.items() if name not in (PLAIN, CHAMPION)}
    if not own:
        raise InputError("bench.methods: names no contender besides plain decoding: leave it empty")
    if CHAMPION not in methods:
        return list(own), []
    least = (1 - max_drop) * (methods[CHAMPION]["tokens_per_step"] or 0.0)
    kept = [name for name, figures in own.items() if (figures["tokens_per_step"] or 0.0) >= least]
    return kept, [f"{name} gives {figures['tokens_per_step'] or 0.0:.2f} tokens per step, the champion "
                  f"{methods[CHAMPION]['tokens_per_step']:.2f}" for name, figures in own.items() if name not in kept]


def brief(methods: dict[str, Any]) -> dict[str, Any]:
    """Tokens per step and speed of each contender."""
    return {name: {key: figures[key] for key in ("tokens_per_step", "speed_vs_plain")} for name, figures in methods.items()}
