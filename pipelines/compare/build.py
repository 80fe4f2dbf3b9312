"""Builds a comparison from what MLflow and the folders of runs have recorded."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.bench.plan import Row, read_rows
from pipelines.compare.choice import Subject, find_subjects
from pipelines.compare.costs import cost_of, hardware_of, machine_of
from pipelines.compare.curves import learning_curve
from pipelines.compare.figures import bench_tables, figure_tables, method_rows
from pipelines.compare.headline import fastest_contender, headline
from pipelines.compare.paired import adjusted, paired_results
from pipelines.compare.records import ComparedRun, Comparison, Curve, MethodRow, PairedResult
from pipelines.compare.settings import setting_rows
from pipelines.config import RunConfig
from pipelines.tracking import RunReader

COMMIT = ("mlflow.source.git.commit", "hydra_heads.commit")
"""Tags that may hold the commit of the code."""
SHOWN = 10
"""Digits of a commit that are shown."""
SAME_WORK = ("bench.prompts", "bench.max_new_tokens", "bench.temperature", "bench.turns")
"""Settings that two benches must share for their questions to be the same work."""


def build_comparison(reader: RunReader, config: RunConfig) -> Comparison:
    """Compare `compare.runs`. Raises InputError as `find_subjects` does."""
    stage, subjects = find_subjects(reader, config)
    runs = tuple(_compared(subject) for subject in subjects)
    notes = _notes_on_hardware(runs)
    methods: tuple[MethodRow, ...] = ()
    pairs: tuple[PairedResult, ...] = ()
    if stage == "bench":
        benches = [subject.runs[0] for subject in subjects]
        methods, figures = method_rows(reader, benches), bench_tables(reader, benches)
        pairs, why_not = _pairs(reader, subjects, runs, methods)
        notes += why_not
    else:
        figures = figure_tables(reader, stage, [subject.compared for subject in subjects])
    return Comparison(
        stage, headline(stage, runs, methods, pairs, figures), runs, tuple(notes),
        setting_rows([subject.stages for subject in subjects]), methods, pairs, _curves(reader, subjects), figures,
        tuple(cost_of(subject.label, one) for subject in subjects for one in subject.stages))


def _compared(subject: Subject) -> ComparedRun:
    first = subject.compared[0]
    tags = subject.runs[0].tags
    return ComparedRun(subject.label, subject.chain.name, tuple(run.run_id for run in subject.runs), subject.chain.parent_id,
                       hardware_of(first), machine_of(first), subject.runs[0].started,
                       _commit(tags))


def _commit(tags: Mapping[str, str]) -> str | None:
    """The commit of the code, with a `+` behind its first digits where the code differed from it."""
    found = next((tags[name] for name in COMMIT if tags.get(name, "unknown") != "unknown"), None)
    return f"{found[:SHOWN]}{'+' if tags.get('hydra_heads.changed') == 'yes' else ''}" if found else None


def _notes_on_hardware(runs: Sequence[ComparedRun]) -> list[str]:
    """What a reader must know of the machines before believing a time."""
    unknown = [run.label for run in runs if run.machine is None]
    notes = []
    if unknown:
        notes.append(f"The machine of {', '.join(unknown)} was not recorded, so it is not known whether times can be compared.")
    if len({run.machine for run in runs if run.machine is not None}) > 1:
        machines = "; ".join(f"{run.label} on {run.hardware or run.machine}" for run in runs if run.machine is not None)
        notes.append(f"The runs were measured on machines that differ: {machines}. Times of one say nothing about the other.")
    return notes


def _curves(reader: RunReader, subjects: Sequence[Subject]) -> tuple[Curve, ...]:
    """One curve for each training, although several subjects may come from the same one."""
    found: dict[str, Curve | None] = {}
    for subject in subjects:
        for one in subject.stages:
            if one.stage == "train" and one.run is not None and one.run.run_id not in found:
                found[one.run.run_id] = learning_curve(reader, subject.label, one)
    return tuple(curve for curve in found.values() if curve is not None)


# -- pairs of benches --------------------------------------------------------------------------------------------------

def _pairs(reader: RunReader, subjects: Sequence[Subject], runs: Sequence[ComparedRun],
           methods: Sequence[MethodRow]) -> tuple[tuple[PairedResult, ...], list[str]]:
    """Each other bench against the first one, and notes on those of which no pair can be made."""
    found: list[PairedResult] = []
    notes = []
    rows: dict[int, list[Row]] = {}
    for place in range(1, len(subjects)):
        if why := _why_no_pair(subjects, runs, place):
            notes.append(f"No paired test of {runs[place].label} against {runs[0].label}: {why}.")
            continue
        for one in (0, place):
            if one not in rows:
                rows[one] = _rows(reader, subjects[one].runs[0].run_id)
        made = paired_results(runs[0].label, runs[place].label, (rows[0], rows[place]),
                              (fastest_contender(methods, 0), fastest_contender(methods, place)))
        if not made:
            notes.append(f"No paired test of {runs[place].label} against {runs[0].label}: they have no two questions in common "
                         "that one contender decoded in both (rows.jsonl).")
        found += made
    return adjusted(found), notes


def _why_no_pair(subjects: Sequence[Subject], runs: Sequence[ComparedRun], place: int) -> str | None:
    machines = runs[0].machine, runs[place].machine
    if None in machines:
        return "the machine of one of them was not recorded"
    if machines[0] != machines[1]:
        return "they were measured on machines that differ"
    first, other = (subjects[one].runs[0] for one in (0, place))
    contents = [next((given.digest for given in run.inputs if given.name == "prompts"), None) for run in (first, other)]
    held_out = [run.params.get("bench.prompts", "None") == "None" for run in (first, other)]
    if not all(held_out) and contents[0] is not None and contents[0] == contents[1]:
        differ = [name for name in SAME_WORK[1:] if first.params.get(name) != other.params.get(name)]  # one file in two places
    else:
        differ = [name for name in SAME_WORK if first.params.get(name) != other.params.get(name)]
        if not differ and not all(held_out):
            return "their files of questions differ"
    return f"they differ in {', '.join(differ)}" if differ else None


def _rows(reader: RunReader, run_id: str) -> list[Row]:
    """The rows of a bench, none where they were not kept."""
    text = reader.text(run_id, "rows.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text(text or "", encoding="utf-8")
        return read_rows(path)
