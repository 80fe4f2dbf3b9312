"""`compare`: benches that MLflow recorded, side by side, and the settings in which they differ."""

from __future__ import annotations

from typing import Any

from hydra_core.errors import InputError
from pipelines.bench.plan import contender
from pipelines.config import RunConfig, present_name
from pipelines.runtime.artifacts import StageResult
from pipelines.runtime.tables import Table
from pipelines.tracking import RunRecord, find_benches

NOT_A_RECIPE = ("name", "storage", "ray_address", "tracking.", "compare.", "serve.", "batch.", "promote.", "load.", "generate.",
                "ablate.")
FIGURES = ("tokens_per_step", "speed_vs_plain", "spread_low", "spread_high", "speed_vs_transformers", "identical")


def run_compare(config: RunConfig) -> StageResult:
    """Print one table over `compare.runs`. Raises InputError for fewer than two, or for one that has no bench."""
    if len(config.compare.runs) < 2:
        raise InputError("compare.runs: name two runs or more, by MLflow run id or by the run's name")
    benches = find_benches(config, config.compare.runs)
    differences, methods = recipe_differences(benches), [_methods(bench) for bench in benches]
    _print(benches, differences, methods)
    figures = {"runs": [{"run_id": bench.run_id, "name": bench.name, "methods": found}
                        for bench, found in zip(benches, methods, strict=True)], "differences": differences}
    return StageResult("compare", None, {}, figures)


def recipe_differences(benches: list[RunRecord]) -> dict[str, list[str | None]]:
    """Setting -> its value in each bench, for the settings that influence results and are not the same in all. Settings that
    were renamed are compared under their present names."""
    params = [_present_names(bench.params) for bench in benches]
    names = sorted({name for found in params for name in found if not name.startswith(NOT_A_RECIPE)})
    values = {name: [found.get(name) for found in params] for name in names}
    return {name: found for name, found in values.items() if len(set(found)) > 1}


def _present_names(params: dict[str, str]) -> dict[str, str]:
    """`params` of a bench that an earlier version may have recorded, with the names that settings and heads have now."""
    return {present_name(name): contender(value) for name, value in params.items()}


def _methods(bench: RunRecord) -> dict[str, dict[str, float]]:
    """Contender -> its figures, fastest first."""
    found: dict[str, dict[str, float]] = {}
    for key, value in bench.metrics.items():
        method, _, figure = key.rpartition(".")
        if figure in FIGURES:
            found.setdefault(contender(method), {})[figure] = value
    return dict(sorted(found.items(), key=lambda item: -item[1].get("speed_vs_plain", 0.0)))


def _print(benches: list[RunRecord], differences: dict[str, list[str | None]],
           methods: list[dict[str, dict[str, float]]]) -> None:
    heads = [f"{bench.name} ({bench.run_id[:8]})" for bench in benches]
    if differences:
        Table(("setting", *heads), [(name, *("-" if value is None else value for value in values))
                                    for name, values in differences.items()], "Settings that differ").show()
    Table(("method", *heads), [(method, *(_cell(found.get(method)) for found in methods))
                               for method in dict.fromkeys(name for found in methods for name in found)],
          "Tokens per step, speed against plain (95 % interval), against transformers").show()


def _cell(figures: dict[str, Any] | None) -> str:
    if not figures:
        return "-"
    parts = [f"{figures['tokens_per_step']:.2f}" if "tokens_per_step" in figures else "-",
             f"{figures['speed_vs_plain']:.2f}x" if "speed_vs_plain" in figures else "-"]
    if "spread_low" in figures:
        parts.append(f"({figures['spread_low']:.2f} - {figures['spread_high']:.2f})")
    if "speed_vs_transformers" in figures:
        parts.append(f"{figures['speed_vs_transformers']:.2f}x")
    return "  ".join(parts)
