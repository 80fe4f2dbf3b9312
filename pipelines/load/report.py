"""What `load` shows: a table, Markdown and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.config.load import LoadSection
from pipelines.runtime.figures import new_figure, save_figure
from pipelines.runtime.tables import Table

COLUMNS = ("times capacity", "requests/s", "sent", "answered", "refused", "failed", "lost", "tokens/s", "goodput",
           "first token p50 / p99 ms", "between pieces p50 / p99 ms", "whole p50 / p99 s")


def rate_table(figures: dict[str, Any]) -> Table:
    """One row for each rate."""
    rows = [(f"{f['share']:g}", f"{f['rate']:.2f}", *(str(f[name]) for name in ("sent", "ok", "refused", "failed", "lost")),
             f"{f['tokens_per_second']:.0f}", f"{f['goodput']:.0f}", _pair(f, "first_token"), _pair(f, "between_pieces"),
             _pair(f, "whole", 1e3, 1)) for f in figures["rates"]]
    return Table(COLUMNS, rows, f"Requests at a constant rate: {figures['label']}")


def _pair(figures: dict[str, Any], name: str, unit: float = 1.0, digits: int = 0) -> str:
    found = [figures[f"{name}_p{share}_ms"] for share in (50, 99)]
    return " / ".join("-" if value is None else f"{value / unit:.{digits}f}" for value in found)


def markdown(figures: dict[str, Any], section: LoadSection) -> str:
    """The report: a paragraph and one table."""
    capacity = figures["capacity"]
    return (f"# Load: {figures['label']}\n\n"
            f"Capacity, with a full batch always in flight: {capacity['requests_per_second']:.2f} requests/s, "
            f"{capacity['tokens_per_second']:.0f} tokens/s. Then requests at a constant rate for {section.seconds:g} s each, of "
            f"at most {section.max_new_tokens} new tokens; goodput counts answers whose first token came within "
            f"{section.first_token_seconds:g} s.\n\n{rate_table(figures).markdown()}")


def draw(figures: dict[str, Any], path: Path) -> None:
    """Write a PNG with three figures over the offered load: latencies, tokens per second, and outcomes of requests."""
    rates = figures["rates"]
    loads = [rate["share"] for rate in rates]
    figure = new_figure(13, 4)
    waits, speeds, fates = figure.subplots(1, 3)
    for name, label in (("first_token", "first token"), ("between_pieces", "between pieces")):
        for share, style in ((50, "-o"), (99, "--o")):
            waits.plot(loads, [rate[f"{name}_p{share}_ms"] or float("nan") for rate in rates], style, label=f"{label} p{share}")
    waits.set(yscale="log", ylabel="milliseconds", title="Latency")
    speeds.plot(loads, [rate["tokens_per_second"] for rate in rates], "-o", label="answered")
    speeds.plot(loads, [rate["goodput"] for rate in rates], "--o", label="goodput: first token in time")
    speeds.axhline(figures["capacity"]["tokens_per_second"], color="grey", linewidth=0.8, label="capacity")
    speeds.set(ylabel="tokens/s", title="Throughput", ylim=(0, None))
    bottom = [0.0] * len(rates)
    for name, colour in (("ok", "tab:green"), ("refused", "tab:orange"), ("failed", "tab:red"), ("lost", "black")):
        values = [100 * rate[name] / rate["sent"] for rate in rates]
        fates.bar([f"{load:g}" for load in loads], values, bottom=bottom, label=name, color=colour)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    fates.set(ylabel="% of requests", title="Outcomes")
    for axis in (waits, speeds, fates):
        axis.set_xlabel("offered load, times capacity")
        axis.legend(fontsize=8)
    save_figure(figure, path)
