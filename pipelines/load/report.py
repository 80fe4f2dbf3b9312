"""What `load` shows: a table, Markdown and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.config.load import LoadSection
from pipelines.profiling.report import save_figure

COLUMNS = ("times capacity", "requests/s", "sent", "answered", "refused", "failed", "lost", "tokens/s", "goodput",
           "first token p50 / p99 ms", "between pieces p50 / p99 ms", "whole p50 / p99 s")


def rate_table(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of each rate."""
    return [(f"{f['share']:g}", f"{f['rate']:.2f}", *(str(f[name]) for name in ("sent", "ok", "refused", "failed", "lost")),
             f"{f['tokens_per_second']:.0f}", f"{f['goodput']:.0f}", _pair(f, "first_token"), _pair(f, "between_pieces"),
             _pair(f, "whole", 1e3, 1)) for f in figures["rates"]]


def _pair(figures: dict[str, Any], name: str, unit: float = 1.0, digits: int = 0) -> str:
    found = [figures[f"{name}_p{share}_ms"] for share in (50, 99)]
    return " / ".join("-" if value is None else f"{value / unit:.{digits}f}" for value in found)


def markdown(figures: dict[str, Any], section: LoadSection) -> str:
    """The report in words and one table."""
    capacity = figures["capacity"]
    lines = [f"# Load: {figures['label']}", "",
             f"Capacity, a full batch always in flight: {capacity['requests_per_second']:.2f} requests/s, "
             f"{capacity['tokens_per_second']:.0f} tokens/s. Then requests at a constant rate for {section.seconds:g} s each, of "
             f"at most {section.max_new_tokens} new tokens; goodput counts answers whose first token came within "
             f"{section.first_token_seconds:g} s.", "",
             "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS),
             *("| " + " | ".join(cells) + " |" for cells in rate_table(figures))]
    return "\n".join(lines) + "\n"


def print_rates(figures: dict[str, Any], stream: Any) -> None:
    """The same table on a terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Requests at a constant rate: {figures['label']}")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for cells in rate_table(figures):
        table.add_row(*cells)
    Console(file=stream, width=150).print(table)


def draw(figures: dict[str, Any], path: Path) -> None:
    """Write a PNG over the offered load: waiting times, tokens a second, and what became of requests."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rates = figures["rates"]
    loads = [rate["share"] for rate in rates]
    figure = Figure(figsize=(13, 4), layout="constrained")
    waits, speeds, fates = figure.subplots(1, 3)
    for name, label in (("first_token", "first token"), ("between_pieces", "between pieces")):
        for share, style in ((50, "-o"), (99, "--o")):
            waits.plot(loads, [rate[f"{name}_p{share}_ms"] or float("nan") for rate in rates], style, label=f"{label} p{share}")
    waits.set(yscale="log", ylabel="milliseconds", title="How long it takes")
    speeds.plot(loads, [rate["tokens_per_second"] for rate in rates], "-o", label="answered")
    speeds.plot(loads, [rate["goodput"] for rate in rates], "--o", label="goodput: began in time")
    speeds.axhline(figures["capacity"]["tokens_per_second"], color="grey", linewidth=0.8, label="capacity")
    speeds.set(ylabel="tokens/s", title="What comes out", ylim=(0, None))
    bottom = [0.0] * len(rates)
    for name, colour in (("ok", "tab:green"), ("refused", "tab:orange"), ("failed", "tab:red"), ("lost", "black")):
        values = [100 * rate[name] / rate["sent"] for rate in rates]
        fates.bar([f"{load:g}" for load in loads], values, bottom=bottom, label=name, color=colour)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    fates.set(ylabel="% of requests", title="What became of them")
    for axis in (waits, speeds, fates):
        axis.set_xlabel("offered load, times capacity")
        axis.legend(fontsize=8)
    save_figure(figure, path, FigureCanvasAgg)
