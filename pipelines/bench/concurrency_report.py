"""What `bench` shows of its load: a table for people, Markdown, metrics and a plot."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pipelines.bench.plan import PLAIN

COLUMNS = ("at once", "method", "tokens/s", "vs plain", "range over rounds", "first token p50 / p99 ms",
           "between tokens p50 / p99 ms", "rows", "tokens/step", "identical")


def load_table(load: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of `summarise_load`'s figures, level by level, fastest first."""
    return [(level, method, f"{f['tokens_per_second']:.0f}", _cell(f["speed_vs_plain"], 2, "x"),
             "-" if f["range"] is None else f"{f['range'][0]:.2f} - {f['range'][1]:.2f}",
             *(f"{_cell(f[f'{name}_p50_ms'], 1)} / {_cell(f[f'{name}_p99_ms'], 1)}"
               for name in ("first_token", "between_tokens")),
             _cell(f["rows_running"], 1), _cell(f["tokens_per_step"], 2),
             "-" if f["identical"] is None else f"{100 * f['identical']:.0f} %")
            for level, methods in load.items()
            for method, f in sorted(methods.items(), key=lambda item: -item[1]["tokens_per_second"])]


def _cell(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def load_markdown(load: dict[str, Any]) -> str:
    """A section of the report, or nothing where no load was measured."""
    if not load:
        return ""
    lines = ["", "## Requests at once, a new one sent when one ends", "", "| " + " | ".join(COLUMNS) + " |",
             "|" + "---|" * len(COLUMNS), *("| " + " | ".join(cells) + " |" for cells in load_table(load)), "",
             "First token: from sending a request to the end of the step that brought it. Between tokens: a step that brings",
             "k tokens of an answer at once, dt after the last ones, counts as k times dt / k. Rows: decoding in a mean step."]
    return "\n".join(lines) + "\n"


def print_load(load: dict[str, Any], stream: Any) -> None:
    """The same table on a terminal; nothing where no load was measured."""
    from rich.console import Console
    from rich.table import Table

    if not load:
        return
    table = Table(title="Requests at once, a new one sent when one ends")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "method" else "right")
    for cells in load_table(load):
        table.add_row(*cells)
    Console(file=stream, width=150).print(table)


def load_metrics(load: dict[str, Any]) -> dict[str, float]:
    """`load.LEVEL.METHOD.FIGURE` -> value, for MLflow."""
    metrics: dict[str, float] = {}
    for level, methods in load.items():
        for method, figures in methods.items():
            spread = dict(zip(("spread_low", "spread_high"), figures["range"] or (), strict=False))
            metrics |= {f"load.{level}.{method}.{name}": value for name, value in (figures | spread).items()
                        if isinstance(value, (int, float))}
    return metrics


def plot_load(load: dict[str, Any], path: Path) -> None:
    """Write a PNG: left, speed against plain by requests at once, with the range over rounds; right, time to first token,
    the 50th percentile as a line and the 99th dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, method in enumerate(dict.fromkeys(method for methods in load.values() for method in methods)):
        points = [(int(level), methods[method]) for level, methods in load.items() if method in methods]
        levels, colour = [level for level, _ in points], f"C{number % 10}"
        compared = [(level, f["speed_vs_plain"], f["range"]) for level, f in points if f["range"]]
        if method != PLAIN and compared:
            errors = [[max(0.0, speed - low) for _, speed, (low, _) in compared],
                      [max(0.0, high - speed) for _, speed, (_, high) in compared]]
            left.errorbar([level for level, *_ in compared], [speed for _, speed, _ in compared], yerr=errors, marker="o",
                          capsize=3, color=colour, label=method)
        right.plot(levels, [f["first_token_p50_ms"] for _, f in points], marker="o", color=colour, label=method)
        right.plot(levels, [f["first_token_p99_ms"] for _, f in points], marker="o", linestyle="--", color=colour)
    left.axhline(1.0, color="black", linewidth=0.8, label=PLAIN)
    left.set(ylabel="tokens/s against plain")
    right.set(ylabel="time to first token, ms (dashed: 99th percentile)", yscale="log")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks([int(level) for level in load], list(load))
        axis.set_xlabel("requests at once")
        axis.legend()
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, dpi=120, format="png")
    os.replace(temporary, path)
