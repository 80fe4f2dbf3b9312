"""A comparison as titled tables of text, which every renderer shows in its own way."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.bench.plan import PLAIN
from pipelines.compare.records import Comparison, Cost, Interval, MethodResult
from pipelines.runtime.tables import Table

DEPTHS = 6
"""Most depths of a table of acceptance."""
NONE = "-"


@dataclass(frozen=True)
class Section:
    """A part of a page. `about`: how its figures are to be read; `charts`: names of charts that belong to it."""

    title: str
    about: str
    table: Table
    charts: tuple[str, ...] = ()


def sections(comparison: Comparison) -> list[Section]:
    """All parts that have something to show, in the order in which they are read."""
    made = [_runs(comparison), _settings(comparison), _methods(comparison), _pairs(comparison), _depths(comparison),
            _categories(comparison), *_figures(comparison), _curves(comparison), _costs(comparison)]
    return [section for section in made if section is not None and section.table.rows]


def _runs(comparison: Comparison) -> Section:
    rows = [(run.label, ", ".join(run_id[:8] for run_id in run.run_ids), _when(run.started), run.hardware or "not recorded",
             run.commit or NONE) for run in comparison.runs]
    return Section(f"Runs of `{comparison.stage}`", "", Table(("run", "id", "started, UTC", "machine", "commit"), rows))


def _settings(comparison: Comparison) -> Section:
    rows = [(row.name, ", ".join(row.stages), *(NONE if value is None else value for value in row.values))
            for row in comparison.settings]
    about = "Of every stage that led to these runs, as each recorded them. All other recorded settings are the same."
    if not rows:
        rows = [("(none)", NONE, *(NONE for _ in comparison.runs))]
        about = "No recorded setting differs in any stage that led to these runs."
    return Section("Settings that differ", about, Table(("setting", "stages", *comparison.labels), rows))


def _methods(comparison: Comparison) -> Section:
    columns = ("method", "run", "tokens/step", "vs plain", "95 % interval", "vs transformers", "tokens/s", "questions",
               "identical")
    rows = [(row.method, label, *_cells(result)) for row in comparison.methods
            for label, result in zip(comparison.labels, row.results, strict=True) if result is not None]
    return Section("Speed", "Each run is compared with its own plain decoding, on its own questions and machine; the interval is "
                            "over questions. Identical: share of answers with the token ids of plain decoding.",
                   Table(columns, rows), ("speed", "steps"))


def _cells(result: MethodResult) -> tuple[str, ...]:
    return (_number(result.tokens_per_step), _number(result.speed_vs_plain, unit="x"),
            _between(result.interval), _number(result.speed_vs_transformers, unit="x"), _number(result.tokens_per_second, 1),
            NONE if result.questions is None else str(result.questions),
            NONE if result.identical is None else f"{100 * result.identical:.0f} %")


def _pairs(comparison: Comparison) -> Section:
    rows = [(one.method, one.quantity, f"{one.second} / {one.first}", str(one.questions), f"{one.ratio:.3f}",
             f"{one.interval[0]:.3f} - {one.interval[1]:.3f}", NONE if one.p is None else f"{one.p:.2g}", one.verdict)
            for one in comparison.pairs]
    columns = ("method", "quantity", "ratio of", "questions", "ratio", "95 % interval", "p", "verdict")
    return Section("The same questions in both runs", "Ratio of the second run to the first on the questions that both decoded, "
                   "on machines that are alike: a 95 % interval by resampling questions (bootstrap), and p of Wilcoxon's "
                   "signed-rank test over questions, adjusted for the number of tests (Holm).", Table(columns, rows), ("pairs",))


def _depths(comparison: Comparison) -> Section:
    drafting = [(row.method, label, result) for row in comparison.methods
                for label, result in zip(comparison.labels, row.results, strict=True)
                if row.method != PLAIN and result is not None and result.accepted]
    deepest = min(DEPTHS, max((len(result.accepted) for _, _, result in drafting), default=0))
    rows = [(method, label, *(f"{100 * share:.0f} %" for share in result.accepted[:deepest]),
             *(NONE for _ in range(deepest - len(result.accepted)))) for method, label, result in drafting]
    return Section("Acceptance by depth", "Share of steps that accepted at least so many drafts.",
                   Table(("method", "run", *(f"{depth}+" for depth in range(1, deepest + 1))), rows), ("depths",))


def _categories(comparison: Comparison) -> Section:
    found = [(row.method, label, result.categories or {}) for row in comparison.methods if row.method != PLAIN
             for label, result in zip(comparison.labels, row.results, strict=True) if result is not None and result.categories]
    names = list(dict.fromkeys(name for _, _, categories in found for name in categories))
    rows = [(method, label, *(f"{_number(one.speed_vs_plain, unit='x')}  {_number(one.tokens_per_step)}"
                              if (one := categories.get(name)) else NONE for name in names))
            for method, label, categories in found] if len(names) > 1 else []
    return Section("By category of question", "Speed against plain, and tokens per step.",
                   Table(("method", "run", *names), rows), ("category_steps", "category_speed"))


def _figures(comparison: Comparison) -> list[Section]:
    return [Section(table.title, "", Table(("figure", *comparison.labels), [
        (name, *map(_shown, values)) for name, values in table.rows])) for table in comparison.figures]


def _curves(comparison: Comparison) -> Section:
    rows = []
    for curve in comparison.curves:
        best = max(curve.held_out, key=lambda point: point[2], default=None)
        rows.append((curve.run, curve.drafter, f"{curve.tokens[-1]:,}", f"{curve.device_seconds[-1]:,.0f}",
                     f"{curve.loss[-1]:.3f}", NONE if best is None else f"{best[2]:.3f}",
                     NONE if best is None else f"{best[0]:,}"))
    return Section("Trainings", "Tokens: positions that the first head learned from. Device-seconds: seconds of training times "
                   "workers. Held out: tokens per step on rows that were not trained on.",
                   Table(("run", "drafter", "tokens", "device-seconds", "last loss", "best held out", "after tokens"), rows),
                   ("held_out_tokens", "held_out_seconds", "loss_tokens", "loss_seconds"))


def _costs(comparison: Comparison) -> Section:
    columns = ("run", "stage", "wall s", "device-s", "CPU-s", "GPU-s", "tokens", "kWh", "machine")
    rows = []
    for label in comparison.labels:
        own = [one for one in comparison.costs if one.run == label]
        rows += [_cost(one) for one in own] + ([_cost(_sum(own))] if len(own) > 1 else [])
    return Section("Cost", "As each stage recorded it; - where it did not, and for a sum that would lack a stage. A stage that "
                           "several runs share is counted with each.", Table(columns, rows))


def _sum(costs: Sequence[Cost]) -> Cost:
    """All stages of one run; what one of them has not recorded has no sum. Machines are named with the stages."""
    def total(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) if len(known) == len(values) else None

    seconds, devices, cpus, gpus, energy = (total([getattr(one, name) for one in costs]) for name in (
        "seconds", "device_seconds", "cpu_seconds", "gpu_seconds", "kwh"))
    machines = {one.hardware for one in costs}
    return Cost(costs[0].run, "(all)", machines.pop() if len(machines) == 1 else f"{len(machines)} machines", seconds, devices,
                cpus, gpus, None, energy)


def _cost(one: Cost) -> Sequence[str]:
    seconds = (NONE if value is None else f"{value:,.0f}"
               for value in (one.seconds, one.device_seconds, one.cpu_seconds, one.gpu_seconds))
    return (one.run, one.stage, *seconds, NONE if one.tokens is None else f"{one.tokens:,}",
            NONE if one.kwh is None else f"{one.kwh:.3g}", one.hardware or "not recorded")


# -- cells -------------------------------------------------------------------------------------------------------------

def _shown(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"


def _number(value: float | None, digits: int = 2, unit: str = "") -> str:
    return NONE if value is None else f"{value:.{digits}f}{unit}"


def _between(interval: Interval | None) -> str:
    return NONE if interval is None else f"{interval[0]:.2f} - {interval[1]:.2f}"


def _when(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M")
