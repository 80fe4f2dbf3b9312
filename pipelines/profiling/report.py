"""Step costs for people: tables on a terminal and in Markdown, and a picture of how steps grow."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_core.tree.costs import StepCosts
from pipelines.profiling.step_timing import Point


@dataclass(frozen=True)
class Grid:
    """A table of texts: `columns` with the rows' own heading first, and each row as long."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def verify_grids(costs: StepCosts, weight_format: str) -> list[Grid]:
    """The base's part of a step: nodes by batch size, and the points over longer contexts where there are any."""
    title = f"{weight_format}: the base's part of a step, ms, over {costs.context} tokens of context"
    grids = [_grid(title, "nodes", {(nodes, batch): seconds for batch, points in costs.verify.items()
                                    for nodes, seconds in points.items()})]
    for context, table in sorted(costs.far.items()):
        grids.append(_grid(f"{weight_format}: the same over {context} tokens", "nodes", {
            (nodes, batch): seconds for batch, points in table.items() for nodes, seconds in points.items()}))
    return grids


def draft_grid(costs: StepCosts, name: str) -> Grid:
    """The drafter's part: depth by batch size."""
    return _grid(f"{name}: drafting a tree of that depth, ms", "depth", {
        (depth, batch): seconds for batch, points in costs.draft.items() for depth, seconds in points.items()})


def curve_grids(points: Mapping[Point, float], weight_format: str) -> list[Grid]:
    """For each batch size, context by nodes."""
    return [_grid(f"{weight_format}, batch {batch}: a step in ms, by context and nodes", "context", {
        (context, nodes): seconds for (context, rows, nodes), seconds in points.items() if rows == batch}, "nodes")
        for batch in sorted({batch for _, batch, _ in points})]


def _grid(title: str, row: str, seconds: Mapping[tuple[int, int], float], column: str = "batch") -> Grid:
    rows, columns = sorted({at for at, _ in seconds}), sorted({at for _, at in seconds})
    return Grid(title, (row, *(f"{column} {at}" for at in columns)), tuple(
        (str(at), *(f"{1e3 * seconds[at, to]:.2f}" if (at, to) in seconds else "-" for to in columns)) for at in rows))


def errors(costs: StepCosts, points: Mapping[Point, float]) -> dict[str, float | int]:
    """How far `costs` lie off what was measured, as shares: the median and the largest over all points."""
    off = [abs(costs.verify_seconds(batch, nodes, context) / seconds - 1) for (context, batch, nodes), seconds in points.items()]
    return {"points": len(off), "median_error": round(statistics.median(off), 4), "largest_error": round(max(off), 4)}


def markdown(title: str, lines: Iterable[str], grids: Iterable[Grid]) -> str:
    """A page of `lines` and tables."""
    text = [f"# {title}", "", *lines]
    for grid in grids:
        text += ["", f"## {grid.title}", "", "| " + " | ".join(grid.columns) + " |", "|---" * len(grid.columns) + "|"]
        text += ["| " + " | ".join(row) + " |" for row in grid.rows]
    return "\n".join(text) + "\n"


def print_grids(grids: Iterable[Grid], stream: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=stream, width=140)
    for grid in grids:
        table = Table()
        for column in grid.columns:
            table.add_column(column, justify="right")
        for row in grid.rows:
            table.add_row(*row)
        console.print(grid.title, table, highlight=False)  # a table's own title would be broken to its width


def plot_curves(path: Path, points: Mapping[Point, float], title: str) -> None:
    """Write a PNG of three pictures: step milliseconds by nodes and by batch at the shortest context, and by context."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import TABLEAU_COLORS
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(17, 4.5), layout="constrained")
    figure.suptitle(title)
    near = min(context for context, _, _ in points)
    views: Sequence[tuple[str, Any, Any]] = (
        (f"nodes of a row, {near} tokens", lambda c, b, n: f"batch {b}" if c == near else None, lambda c, b, n: n),
        (f"rows, {near} tokens", lambda c, b, n: f"{n} nodes" if c == near else None, lambda c, b, n: b),
        ("committed tokens of a row", lambda c, b, n: f"batch {b}, {n} nodes", lambda c, b, n: c))
    for axis, (label, line_of, x_of) in zip(figure.subplots(1, 3), views, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for point, seconds in sorted(points.items()):
            if (name := line_of(*point)) is not None:
                lines.setdefault(name, []).append((x_of(*point), 1e3 * seconds))
        for number, (name, places) in enumerate(lines.items()):
            axis.plot(*zip(*sorted(places), strict=True), marker=".", label=name, color=list(TABLEAU_COLORS)[number % 10],
                      linestyle="-" if number < 10 else "--")
        axis.set(xlabel=label, ylabel="ms", yscale="log")
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(which="both", alpha=0.3)
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save_figure(figure, path, FigureCanvasAgg)


def save_figure(figure: Any, path: Path, canvas: Any) -> None:
    """A PNG, whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    canvas(figure).print_png(str(temporary))
    os.replace(temporary, path)
