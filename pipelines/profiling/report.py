"""Step costs for people: tables for a terminal and for Markdown, and a figure of how the time of a step grows."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra_core.tree.costs import StepCosts
from pipelines.profiling.step_timing import Point
from pipelines.runtime.figures import new_figure, save_figure
from pipelines.runtime.tables import Table


def verify_tables(costs: StepCosts, weight_format: str) -> list[Table]:
    """The base's part of a step: nodes by batch size, with a further table for each longer context that was timed."""
    title = f"{weight_format}: the base's part of a step, ms, over {costs.context} tokens of context"
    tables = [_table(title, "nodes", {(nodes, batch): seconds for batch, points in costs.verify.items()
                                    for nodes, seconds in points.items()})]
    for context, table in sorted(costs.far.items()):
        tables.append(_table(f"{weight_format}: the same over {context} tokens", "nodes", {
            (nodes, batch): seconds for batch, points in table.items() for nodes, seconds in points.items()}))
    return tables


def draft_table(costs: StepCosts, name: str) -> Table:
    """The drafter's part of a step: depth of the tree by batch size."""
    return _table(f"{name}: drafting a tree of that depth, ms", "depth", {
        (depth, batch): seconds for batch, points in costs.draft.items() for depth, seconds in points.items()})


def curve_tables(points: Mapping[Point, float], weight_format: str) -> list[Table]:
    """One table for each batch size: context by nodes."""
    return [_table(f"{weight_format}, batch {batch}: a step in ms, by context and nodes", "context", {
        (context, nodes): seconds for (context, rows, nodes), seconds in points.items() if rows == batch}, "nodes")
        for batch in sorted({batch for _, batch, _ in points})]


def _table(title: str, row: str, seconds: Mapping[tuple[int, int], float], column: str = "batch") -> Table:
    rows, columns = sorted({at for at, _ in seconds}), sorted({at for _, at in seconds})
    cells = [(str(at), *(f"{1e3 * seconds[at, to]:.2f}" if (at, to) in seconds else "-" for to in columns)) for at in rows]
    return Table((row, *(f"{column} {at}" for at in columns)), cells, title)


def errors(costs: StepCosts, points: Mapping[Point, float]) -> dict[str, float | int]:
    """Relative errors of the times that `costs` predicts, against those measured: the median and the largest over all points."""
    off = [abs(costs.verify_seconds(batch, nodes, context) / seconds - 1) for (context, batch, nodes), seconds in points.items()]
    return {"points": len(off), "median_error": round(statistics.median(off), 4), "largest_error": round(max(off), 4)}


def markdown(title: str, lines: Iterable[str], tables: Iterable[Table]) -> str:
    """A Markdown page: a title, `lines`, and each table under its own title."""
    text = "\n".join([f"# {title}", "", *lines]) + "\n"
    return text + "".join(f"\n## {table.title}\n\n{table.markdown()}" for table in tables)


def plot_curves(path: Path, points: Mapping[Point, float], title: str) -> None:
    """Write a PNG with three panels: milliseconds of a step by nodes, by batch size (at the shortest context) and by context."""
    from matplotlib.colors import TABLEAU_COLORS
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    figure = new_figure(17, 4.5)
    figure.suptitle(title)
    near = min(context for context, _, _ in points)
    views: Sequence[tuple[str, Any, Any]] = (
        (f"nodes of a sequence, {near} tokens", lambda c, b, n: f"batch {b}" if c == near else None, lambda c, b, n: n),
        (f"sequences, {near} tokens", lambda c, b, n: f"{n} nodes" if c == near else None, lambda c, b, n: b),
        ("committed tokens of a sequence", lambda c, b, n: f"batch {b}, {n} nodes", lambda c, b, n: c))
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
    save_figure(figure, path)
