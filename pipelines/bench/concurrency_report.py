"""What `bench` shows of its closed-loop part: a table, Markdown, metrics and a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.bench.plan import PLAIN
from pipelines.runtime.figures import new_figure, save_figure
from pipelines.runtime.tables import Table

TITLE = "By concurrency: requests in flight, a new one sent when one ends"
COLUMNS = ("concurrency", "method", "tokens/s", "vs plain", "range over rounds", "first token p50 / p99 ms",
           "between tokens p50 / p99 ms", "sequences", "tokens/step", "identical")


def concurrency_table(load: dict[str, Any]) -> Table:
    """The figures of `summarise_concurrency`, level by level, the fastest method first; no rows where it was not measured."""
    theirs = any("speed_vs_vllm" in f for methods in load.values() for f in methods.values())
    columns = (*COLUMNS[:4], *(["vs vllm"] if theirs else []), *COLUMNS[4:])
    return Table(columns, [(level, method, f"{f['tokens_per_second']:.0f}", _cell(f["speed_vs_plain"], 2, "x"),
                            *([_cell(f.get("speed_vs_vllm"), 2, "x")] if theirs else []),
                            "-" if f["range"] is None else f"{f['range'][0]:.2f} - {f['range'][1]:.2f}",
                            *(f"{_cell(f[f'{name}_p50_ms'], 1)} / {_cell(f[f'{name}_p99_ms'], 1)}"
                              for name in ("first_token", "between_tokens")),
                            _cell(f["rows_running"], 1), _cell(f["tokens_per_step"], 2),
                            "-" if f["identical"] is None else f"{100 * f['identical']:.0f} %")
                           for level, methods in load.items()
                           for method, f in sorted(methods.items(), key=lambda item: -item[1]["tokens_per_second"])], TITLE)


def _cell(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def concurrency_markdown(load: dict[str, Any]) -> str:
    """A section of the report, or nothing where it was not measured."""
    if not load:
        return ""
    return (f"\n## {TITLE}\n\n{concurrency_table(load).markdown()}\n"
            "First token: from sending a request to the end of the step that produced it. Between tokens: k tokens that one\n"
            "step produces, dt after the previous ones, count as k times dt / k. Sequences: decoding in an average step.\n")


def concurrency_metrics(load: dict[str, Any]) -> dict[str, float]:
    """`load.LEVEL.METHOD.FIGURE` -> value, for MLflow: throughput and the slowest first tokens; all others are in report.json."""
    return {f"load.{level}.{method}.{name}": figures[name]
            for level, methods in load.items() for method, figures in methods.items()
            for name in ("tokens_per_second", "first_token_p99_ms") if figures[name] is not None}


def plot_concurrency(load: dict[str, Any], path: Path) -> None:
    """Write a PNG. Left: speed against plain by concurrency, with the range over rounds. Right: time to first token, the 50th
    percentile as a solid line and the 99th as a dashed one."""
    figure = new_figure(11, 4)
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
        axis.set_xlabel("requests in flight")
        axis.legend()
    save_figure(figure, path)
