"""What a search shows: the best settings and their spread, a table of all trials, and a figure for each setting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines.ablate.results import Measured, Tried
from pipelines.ablate.trials import shown
from pipelines.runtime.figures import new_figure, save_figure
from pipelines.runtime.tables import Table

COLUMNS = ("trial", "settings", "tokens per step", "steps", "minutes")
WIDE = 4
"""Panels side by side."""


def markdown(tried: Sequence[Tried], best: Tried, seeds: Measured | None) -> str:
    """The report's page."""
    given = tried[0]
    lines = ["# Search", "", f"- Best: {shown(best.trial.values)}: {best.tokens_per_step:.3f} tokens per step on held-out rows; "
             f"the settings as they are: {given.tokens_per_step:.3f}{' when it was stopped' if given.stopped else ''}."]
    if seeds is not None:
        spread = "" if seeds.spread is None else f" ± {seeds.spread:.3f} (95 % interval of the mean)"
        lines.append(f"- With {seeds.seeds} other seed(s) the best settings make {seeds.tokens_per_step:.3f}{spread}: the "
                     "trial that was chosen among many was lucky too, and this is what to expect.")
    stopped = sum(one.stopped for one in tried)
    lines += [f"- {stopped} of {len(tried)} trials were stopped early, as they were behind the others after as many rows.", "",
              _table(tried, best).markdown(), "![tokens per step by setting](search.png)"]
    return "\n".join(lines) + "\n"


def terminal_table(tried: Sequence[Tried], best: Tried) -> Table:
    """All trials, best first, for the terminal."""
    return _table(tried, best)


def _table(tried: Sequence[Tried], best: Tried) -> Table:
    ordered = sorted(tried, key=lambda one: (one.stopped, -one.tokens_per_step))
    return Table(COLUMNS, [
        (one.trial.label.rpartition(".")[2] + (" (best)" if one is best else ""), shown(one.trial.values),
         f"{one.tokens_per_step:.3f}", f"{'stopped at ' if one.stopped else ''}{one.steps:,}", f"{one.seconds / 60:.1f}")
        for one in ordered], "Trials, on held-out rows")


def plot_trials(path: Path, tried: Sequence[Tried]) -> None:
    """Write a PNG: a panel for each setting, tokens per step over its values; trials that were stopped are hollow."""
    names = sorted({name for one in tried for name in one.trial.values})
    columns = min(WIDE, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(4 * columns, 3 * rows)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis in axes.flat[len(names):]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        drawn = [one for one in tried if name in one.trial.values]
        values = [one.trial.values[name] for one in drawn]
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        for stopped in (False, True):
            these = [(value, one) for value, one in zip(values, drawn, strict=True) if one.stopped == stopped]
            axis.plot([value if numbers else str(value) for value, _ in these], [one.tokens_per_step for _, one in these], "o",
                      color="tab:blue", fillstyle="none" if stopped else "full",
                      label="stopped early" if stopped else "trained to the end")
        if numbers and min(values) > 0 and max(values) > 20 * min(values):
            axis.set_xscale("log")
        axis.set_xlabel(name)
        axis.grid(alpha=0.4)
    axes[0, 0].set_ylabel("tokens per step")
    axes[0, 0].legend(fontsize=8)
    save_figure(figure, path)
