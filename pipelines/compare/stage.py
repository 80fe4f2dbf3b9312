"""`compare`: benches that MLflow recorded, side by side, and the settings in which they differ."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from hydra_core.errors import InputError
from pipelines.config import RunConfig
from pipelines.runtime.artifacts import StageResult
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
    """Setting -> its value in each bench, for the settings that are not the same in all and say how results came about."""
    names = sorted({name for bench in benches for name in bench.params if not name.startswith(NOT_A_RECIPE)})
    values = {name: [bench.params.get(name) for bench in benches] for name in names}
    return {name: found for name, found in values.items() if len(set(found)) > 1}


def _methods(bench: RunRecord) -> dict[str, dict[str, float]]:
    """Contender -> its figures, fastest first."""
    found: dict[str, dict[str, float]] = {}
    for key, value in bench.metrics.items():
        method, _, figure = key.rpartition(".")
        if figure in FIGURES:
            found.setdefault(method, {})[figure] = value
    return dict(sorted(found.items(), key=lambda item: -item[1].get("speed_vs_plain", 0.0)))


def _print(benches: list[RunRecord], differences: dict[str, list[str | None]],
           methods: list[dict[str, dict[str, float]]]) -> None:
    console = Console(file=sys.stderr, width=max(80, 40 + 34 * len(benches)))
    heads = [f"{bench.name} ({bench.run_id[:8]})" for bench in benches]
    if differences:
        table = Table("setting", *heads, title="What differs")
        for name, values in differences.items():
            table.add_row(name, *("-" if value is None else value for value in values))
        console.print(table)
    table = Table("method", *heads, title="Tokens per step, speed against plain (95 % interval), against transformers")
    for method in dict.fromkeys(name for found in methods for name in found):
        table.add_row(method, *(_cell(found.get(method)) for found in methods))
    console.print(table)


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
