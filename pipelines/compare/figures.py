"""Figures of the runs that are compared, read from their reports; an old run without one is read from its metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.bench.plan import contender
from pipelines.compare.lineage import StageRun
from pipelines.compare.records import CategoryResult, FigureTable, Interval, MethodResult, MethodRow
from pipelines.compare.reports import report_of
from pipelines.tracking import RunReader, RunRecord
from pipelines.tracking.search import metric_method

Figure = float | str | None
Read = Callable[[RunReader, StageRun], dict[str, Figure]]
METRICS_SHOWN = 40
"""Most rows of a stage of which nothing is known but its metrics."""
METHOD_FIGURES = ("tokens_per_step", "speed_vs_plain", "speed_vs_transformers", "tokens_per_second", "identical", "spread_low",
                  "spread_high")


# -- bench -------------------------------------------------------------------------------------------------------------

def method_rows(reader: RunReader, benches: Sequence[RunRecord]) -> tuple[MethodRow, ...]:
    """Every contender of any bench, those of the first bench first, the fastest first."""
    found = [methods_of(report_of(reader, bench), bench.metrics) for bench in benches]
    return tuple(MethodRow(name, tuple(methods.get(name) for methods in found))
                 for name in dict.fromkeys(name for methods in found for name in methods))


def methods_of(report: Mapping[str, Any], metrics: Mapping[str, float]) -> dict[str, MethodResult]:
    """Contender -> what its bench measured of it, the fastest first."""
    methods = report.get("methods")
    found = {contender(name): _from_report(values) for name, values in methods.items()} if methods else _from_metrics(metrics)
    return dict(sorted(found.items(), key=lambda item: -(item[1].speed_vs_plain or 0.0)))


def _from_report(values: Mapping[str, Any]) -> MethodResult:
    categories = {name: CategoryResult(one.get("tokens_per_step"), one.get("speed_vs_plain"), _interval(one.get("spread")))
                  for name, one in (values.get("categories") or {}).items()}
    return MethodResult(
        values.get("tokens_per_step"), values.get("speed_vs_plain"), _interval(values.get("spread")),
        values.get("speed_vs_transformers"), values.get("tokens_per_second"), values.get("questions"), values.get("identical"),
        tuple(values.get("accepted_at_least") or ()), categories)


def _from_metrics(metrics: Mapping[str, float]) -> dict[str, MethodResult]:
    found: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        method, _, figure = key.rpartition(".")
        if method and figure in METHOD_FIGURES:
            found.setdefault(contender(metric_method(method)), {})[figure] = value
    return {name: MethodResult(
        one.get("tokens_per_step"), one.get("speed_vs_plain"), _interval((one.get("spread_low"), one.get("spread_high"))),
        one.get("speed_vs_transformers"), one.get("tokens_per_second"), None, one.get("identical"))
        for name, one in found.items() if "tokens_per_step" in one or "speed_vs_plain" in one}


def _interval(values: Any) -> Interval | None:
    return (values[0], values[1]) if values and None not in values else None


def bench_tables(reader: RunReader, benches: Sequence[RunRecord]) -> tuple[FigureTable, ...]:
    """Throughput of batches and of closed-loop load, where benches measured them: tokens per second."""
    reports = [report_of(reader, bench) for bench in benches]
    batches = [{f"{contender(name)}, {workload} limits": one.get("tokens_per_second")
                for workload, methods in (report.get("batch") or {}).items() for name, one in methods.items()}
               for report in reports]
    loads = [{f"{contender(name)}, {level} in flight": one.get("tokens_per_second")
              for level, methods in (report.get("load") or {}).items() for name, one in methods.items()} for report in reports]
    return tables({"Tokens per second of a batch": batches, "Tokens per second by requests in flight": loads})


# -- other stages ------------------------------------------------------------------------------------------------------

def figure_tables(reader: RunReader, stage: str, runs: Sequence[Sequence[StageRun]]) -> tuple[FigureTable, ...]:
    """The figures of each compared run, which may have a stage run for each drafter."""
    read = READERS.get(stage, _metrics)
    several = any(len(ones) > 1 for ones in runs)
    found: list[dict[str, Figure]] = []
    for ones in runs:
        found.append({f"{one.part}: {name}" if several and one.part else name: value
                      for one in ones for name, value in read(reader, one).items()})
    if stage not in READERS:  # of metrics only those that say something
        found = _differing(found)
    return tables({f"Figures of `{stage}`": found})


def tables(parts: Mapping[str, Sequence[Mapping[str, Figure]]]) -> tuple[FigureTable, ...]:
    """Title -> figures of each run, as tables; a figure that no run has is left out, and a table without any."""
    made = []
    for title, found in parts.items():
        rows = [(name, tuple(figures.get(name) for figures in found))
                for name in dict.fromkeys(name for figures in found for name in figures)]
        rows = [(name, values) for name, values in rows if any(value is not None for value in values)]
        made += [FigureTable(title, tuple(rows))] if rows else []
    return tuple(made)


def _train(reader: RunReader, one: StageRun) -> dict[str, Figure]:
    run = one.run
    if run is None:
        return {}
    tops = sorted(name for name in run.metrics if name.startswith("best.head") and name.endswith("_top1"))
    result = (one.manifest.get("result") or {}).get("figures") or {}
    best = run.metrics.get("best.tokens_per_step", run.metrics.get("tokens_per_step"))
    return {"tokens per step, held-out rows": result.get("tokens_per_step") if best is None else best,
            "best step": run.metrics.get("best.step", result.get("best_step")),
            "top-1 by head": " / ".join(f"{run.metrics[name]:.3f}" for name in tops) or None,
            "coverage of the draft vocabulary": run.metrics.get("draft_vocab_coverage", result.get("coverage")),
            "steps": result.get("steps"), "response tokens": result.get("response_tokens")}


def _tree(reader: RunReader, one: StageRun) -> dict[str, Figure]:
    metrics = one.run.metrics if one.run is not None else {}
    names = {"tokens_per_step": "tokens per step", "gain": "gain over plain", "nodes": "nodes", "step_ms": "step, ms"}
    return {f"batch {key.removeprefix('batch').split('.')[0]}: {names[key.split('.')[1]]}": value
            for key, value in sorted(metrics.items()) if key.startswith("batch") and key.partition(".")[2] in names}


def _ablate(reader: RunReader, one: StageRun) -> dict[str, Figure]:
    variants = report_of(reader, one.run).get("variants", {}) if one.run is not None else {}
    return {f"{name}: tokens per step": f"{v['tokens_per_step']:.3f}" + (f" ± {v['spread']:.3f}" if v.get("spread") else "")
            for name, v in variants.items()}


def _load(reader: RunReader, one: StageRun) -> dict[str, Figure]:
    report = report_of(reader, one.run) if one.run is not None else {}
    found: dict[str, Figure] = {"serves": report.get("label")}
    capacity = report.get("capacity") or {}
    found |= {"capacity: requests/s": capacity.get("requests_per_second"),
              "capacity: tokens/s": capacity.get("tokens_per_second")}
    names = {"tokens_per_second": "tokens/s", "goodput": "goodput, tokens/s", "first_token_p50_ms": "first token p50, ms",
             "first_token_p99_ms": "first token p99, ms", "between_pieces_p99_ms": "between pieces p99, ms", "refused": "refused",
             "failed": "failed", "lost": "lost"}
    for rate in report.get("rates") or ():
        found |= {f"{rate['share']:g} x capacity: {label}": rate.get(name) for name, label in names.items()}
    return found if report else _metrics(reader, one)


def _batch(reader: RunReader, one: StageRun) -> dict[str, Figure]:
    report = report_of(reader, one.run) if one.run is not None else {}
    return {name.replace("_", " "): value for name, value in report.items()
            if isinstance(value, (int, float, str))} or _metrics(reader, one)


def _metrics(reader: RunReader, one: StageRun) -> dict[str, Figure]:
    metrics = one.run.metrics if one.run is not None else {}
    return {metric_method(name): value for name, value in sorted(metrics.items()) if not name.startswith("system/")}


def _differing(found: Sequence[Mapping[str, Figure]]) -> list[dict[str, Figure]]:
    names = [name for name in dict.fromkeys(name for figures in found for name in figures)
             if len({figures.get(name) for figures in found}) > 1][:METRICS_SHOWN]
    return [{name: figures[name] for name in names if name in figures} for figures in found]


READERS: dict[str, Read] = {"train": _train, "tree": _tree, "ablate": _ablate, "load": _load, "batch": _batch,
                            "distill": _metrics}
