"""What `curve` shows: the answer in words, a table for each drafter, and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipelines.curve.cost import Cost, duration
from pipelines.curve.power_law import CannotFit, Foretold, PowerLaw
from pipelines.curve.results import BackTest, Curve, Measured
from pipelines.runtime.figures import new_figure, save_figure
from pipelines.runtime.tables import Table

COLUMNS = ("share", "rows", "response tokens", "steps", "tokens per step", "seeds", "training")


def answers(name: str, curve: Curve) -> list[str]:
    """What more rows would bring, and whether the curve has foretold its last point: a sentence for each."""
    if isinstance(curve.law, CannotFit):
        return [f"{name}: no curve: {curve.law.why}."]
    last = curve.points[-1]
    lines = []
    if not curve.law.rises:
        lines.append(f"{name}: tokens per step do not rise with the rows by more than the noise of a training "
                     f"({curve.law.noise:.3f}): more rows are not shown to help.")
    lines += [f"{name}: {one.rows / last.rows:g} x the rows ({one.rows:,.0f}) would bring {_interval(one)} tokens per step; the "
              f"{last.rows:,} rows bring {last.tokens_per_step:.3f}." for one in curve.ahead]
    return [*lines, f"{name}: {_backtest(curve)}"]


def _backtest(curve: Curve) -> str:
    if isinstance(curve.backtest, CannotFit):
        return f"no back-test: {curve.backtest.why}."
    told, verdict = curve.backtest.foretold, "inside" if curve.backtest.held else "OUTSIDE"
    return (f"back-test: the curve through the smaller shares foretells {_interval(told)} tokens per step for {told.rows:,.0f} "
            f"rows; {curve.backtest.measured:.3f} were measured, {verdict} the interval.")


def markdown(curves: Mapping[str, Curve], cost: Cost) -> str:
    """The report's page."""
    parts = ["# Learning curve\n", *(f"- {line}" for name, curve in curves.items() for line in answers(name, curve)),
             f"- {cost.sentence}.", "", "![tokens per step over training rows](curve.png)"]
    for name, curve in curves.items():
        parts += ["", f"## {name}\n", Table(COLUMNS, [_row(point) for point in curve.points]).markdown()]
        if isinstance(curve.law, PowerLaw):
            parts.append(f"{_formula(curve.law)} A training's tokens per step deviate from it by {curve.law.noise:.4f}.")
    parts += ["", "Tokens per step are of the best validation of each training, on the same held-out rows, with trees of 16 "
                  "nodes fitted to them. A larger share holds the rows of every smaller one. Intervals "
                  "(95 %) are of a mean over as many seeds."]
    return "\n".join(parts) + "\n"


def terminal_table(curves: Mapping[str, Curve]) -> Table:
    """All points, for the terminal."""
    return Table(("drafter", *COLUMNS), [(name, *_row(point)) for name, curve in curves.items() for point in curve.points],
                 "Learning curve, on held-out rows")


def plot_curves(path: Path, curves: Mapping[str, Curve]) -> None:
    """Write a PNG of tokens per step over training rows: single trainings, the curve with its intervals, and the back-test."""
    figure = new_figure(8, 5)
    axis = figure.subplots()
    for number, (name, curve) in enumerate(curves.items()):
        color = f"C{number}"
        axis.plot([point.rows for point in curve.points for _ in point.values],
                  [value for point in curve.points for value in point.values], ".", color=color, label=name)
        if isinstance(curve.law, PowerLaw):
            most = max([point.rows for point in curve.points] + [one.rows for one in curve.ahead])
            rows = np.geomspace(curve.points[0].rows, most, 100)
            axis.plot(rows, [curve.law.at(at) for at in rows], color=color, linewidth=1)
        for one in curve.ahead:
            _whisker(axis, one, color, "D")
        if isinstance(curve.backtest, BackTest):
            _whisker(axis, curve.backtest.foretold, color, "x")
    axis.set_xscale("log")
    axis.grid(alpha=0.4)
    axis.set(xlabel="training rows", ylabel="tokens per step on held-out rows",
             title="dots: trainings; diamonds: foretold; crosses: the last share, foretold by the smaller ones")
    axis.title.set_fontsize(9)
    axis.legend()
    save_figure(figure, path)


def _whisker(axis: object, one: Foretold, color: str, marker: str) -> None:
    spread = [[one.tokens_per_step - one.low], [one.high - one.tokens_per_step]]
    axis.errorbar([one.rows], [one.tokens_per_step], yerr=spread, fmt=marker, color=color, capsize=3)  # type: ignore[attr-defined]


def _interval(one: Foretold) -> str:
    return f"{one.tokens_per_step:.2f} ({one.low:.2f} - {one.high:.2f})"


def _formula(law: PowerLaw) -> str:
    return (f"Tokens per step = {law.ceiling:.3f} - {law.scale:.3f} x (rows / {law.unit:,.0f})^-{law.exponent:.3f}.")


def _row(point: Measured) -> tuple[str, ...]:
    spread = f" ({min(point.values):.3f} - {max(point.values):.3f})" if len(point.values) > 1 else ""
    return (f"{point.share:g}", f"{point.rows:,}", f"{point.response_tokens:,}", f"{point.steps:,}",
            f"{point.tokens_per_step:.3f}{spread}", str(len(point.values)), duration(point.seconds))
