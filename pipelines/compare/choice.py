"""Which runs are compared: the stage, and of each chain the run or runs of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hydra_core.errors import InputError
from pipelines.compare.lineage import StageRun, stages_behind
from pipelines.config import RunConfig, Section
from pipelines.tracking import Chain, RunReader, RunRecord, flatten

PREFERRED = ("bench", "load", "batch", "ablate", "curve", "train", "tree", "distill")
"""What is compared where a chain has several stages and none is asked for."""
PER_DRAFTER = ("train", "tree")
"""Stages with a run for each drafter."""


@dataclass(frozen=True)
class Subject:
    """One of the compared: its complete runs of the stage, and all stages that led to them, themselves included."""

    label: str
    chain: Chain
    runs: tuple[RunRecord, ...]
    stages: tuple[StageRun, ...]

    @property
    def compared(self) -> list[StageRun]:
        ids = {run.run_id for run in self.runs}
        return [one for one in self.stages if one.run is not None and one.run.run_id in ids]


def find_subjects(reader: RunReader, config: RunConfig) -> tuple[str, list[Subject]]:
    """The stage that is compared, and the subjects in the order of `compare.runs`.

    Raises InputError for fewer than two runs, for what is not found, not finished or the same, and for runs that have no stage
    in common.
    """
    asked = config.compare.runs
    if len(asked) < 2:
        raise InputError("compare.runs: name two runs or more, by MLflow run id or by the run's name")
    chains = [reader.find(one) for one in asked]
    stage = choose_stage(config, asked, chains)
    runs = [_runs_of(reader, config, one, chain, stage) for one, chain in zip(asked, chains, strict=True)]
    seen: dict[str, str] = {}
    for one, found in zip(asked, runs, strict=True):
        if (other := seen.setdefault(found[0].run_id, one)) != one or asked.count(one) > 1:
            raise InputError(f"compare.runs: {other!r} and {one!r} are the same run: name two that differ")
    labels = _labels(chains, runs)
    return stage, [Subject(label, chain, found, stages_behind(reader, chain, found))
                   for label, chain, found in zip(labels, chains, runs, strict=True)]


def choose_stage(config: RunConfig, asked: Sequence[str], chains: Sequence[Chain]) -> str:
    """`compare.stage`, else that of the runs that are named by id, else the first of `PREFERRED` that all have finished."""
    if config.compare.stage:
        return config.compare.stage
    named = {chain.asked.stage: one for one, chain in zip(asked, chains, strict=True) if chain.asked is not None}
    if len(named) > 1:
        (first, one), (second, other) = list(named.items())[:2]
        raise InputError(f"compare.runs: {one!r} is a run of `{first}` and {other!r} of `{second}`: name runs of one stage, or "
                         "set compare.stage to compare that stage of their chains")
    if named:
        return next(iter(named))
    finished = [{run.stage for run in chain.runs if run.status == "FINISHED"} for chain in chains]
    for one, chain, stages in zip(asked, chains, finished, strict=True):
        if not stages:
            raise InputError(_nothing_finished(one, chain))
    common = set.intersection(*finished)
    for stage in (*PREFERRED, *sorted(common)):
        if stage in common:
            return stage
    told = "; ".join(f"{one!r} has {', '.join(sorted(stages))}" for one, stages in zip(asked, finished, strict=True))
    raise InputError(f"compare.runs: they have no finished stage in common: {told}")


def _runs_of(reader: RunReader, config: RunConfig, asked: str, chain: Chain, stage: str) -> tuple[RunRecord, ...]:
    """The runs of `stage` that count: the one that was asked for by id, the latest of each drafter, or of several the latest with
    the stage's settings in `config`, if those are given and one has them."""
    if chain.asked is not None and chain.asked.stage == stage:
        if chain.asked.status != "FINISHED":
            raise InputError(_unfinished(asked, chain, stage, chain.asked.status))
        return (reader.complete(chain.asked),)
    found = chain.finished(stage)
    if not found:
        begun = [run.status for run in chain.runs if run.stage == stage]
        raise InputError(_unfinished(asked, chain, stage, begun[0]) if begun else _without(asked, chain, stage))
    if stage in PER_DRAFTER:
        newest: dict[str | None, RunRecord] = {}
        for run in found:
            newest.setdefault(run.part, run)
        return tuple(reader.complete(newest[part]) for part in sorted(newest, key=str))
    section = getattr(config, stage, None)
    if len(found) > 1 and isinstance(section, Section) and section != type(section)():
        complete = [reader.complete(run) for run in found]
        return (next((run for run in complete if _fits(section, stage, run.params)), complete[0]),)
    return (reader.complete(found[0]),)


def _fits(section: Section, stage: str, params: Mapping[str, str]) -> bool:
    """Whether a run was made with the settings of `section`."""
    wanted = flatten({stage: section.model_dump(mode="json", by_alias=True)})
    return all(params.get(name) == value for name, value in wanted.items())


def _labels(chains: Sequence[Chain], runs: Sequence[tuple[RunRecord, ...]]) -> list[str]:
    """The chains' names; where two are the same, with a drafter or the beginning of a run's id."""
    names = [chain.name for chain in chains]
    with_parts = [f"{name} {found[0].part}" if found[0].part and len(found) == 1 else name
                  for name, found in zip(names, runs, strict=True)]
    with_ids = [f"{name} ({found[0].run_id[:8]})" for name, found in zip(with_parts, runs, strict=True)]
    labels = []
    for name, with_part, with_id in zip(names, with_parts, with_ids, strict=True):
        one_of = name if names.count(name) == 1 else with_part
        labels.append(one_of if names.count(name) == 1 or with_parts.count(with_part) == 1 else with_id)
    return labels


def _unfinished(asked: str, chain: Chain, stage: str, status: str) -> str:
    how = {"RUNNING": "is not finished", "SCHEDULED": "is not finished", "FAILED": "has failed", "KILLED": "was killed"}
    return (f"compare.runs: {asked!r} has no finished `{stage}`: it {how.get(status, 'is ' + status)}: run "
            f"`hydra-heads {stage} name={chain.name}` with the same settings until it is done")


def _without(asked: str, chain: Chain, stage: str) -> str:
    done = sorted({run.stage for run in chain.runs if run.status == "FINISHED"})
    return (f"compare.runs: {asked!r} is no finished `{stage}`, nor a run that has one: "
            + (f"it has {', '.join(done)} (choose with compare.stage)" if done else "see `mlflow ui`"))


def _nothing_finished(asked: str, chain: Chain) -> str:
    if chain.runs:
        return _unfinished(asked, chain, chain.runs[0].stage, chain.runs[0].status)
    return f"compare.runs: {asked!r} has no run of a stage: see `mlflow ui`"
