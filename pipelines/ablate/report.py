"""What `ablate` shows: a table and a panel for every question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.profiling.report import save_figure

if TYPE_CHECKING:
    from pipelines.ablate.results import Measured


def tokens_cell(one: Measured) -> str:
    """Tokens per step, with half the interval where there are several seeds."""
    return f"{one.tokens_per_step:.3f}" + ("" if one.spread is None else f" ± {one.spread:.3f}")


def markdown(studies: Mapping[str, Sequence[str]], measured: Mapping[str, Measured]) -> str:
    """One table a question; the first variant is what the others are compared with."""
    parts = []
    for question, names in studies.items():
        base = measured[names[0]]
        lines = ["| variant | tokens per step | against the first | top-1 by head | seeds | response tokens | minutes |",
                 "|---|---|---|---|---|---|---|"]
        for name in names:
            one = measured[name]
            lines.append(f"| {name} | {tokens_cell(one)} | {one.tokens_per_step / base.tokens_per_step:.3f}x | "
                         f"{' / '.join(f'{top:.3f}' for top in one.top1)} | {one.seeds} | {one.response_tokens:,} | "
                         f"{one.seconds / 60:.1f} |")
        parts.append(f"## {question}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def plot_studies(path: Path, studies: Mapping[str, Sequence[str]], measured: Mapping[str, Measured]) -> None:
    """Write a PNG: tokens per step on held-out rows, a panel a question on one scale; intervals where there are several seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sum(len(names) for names in studies.values())
    figure = Figure(figsize=(8, 1 + 0.5 * len(studies) + 0.25 * rows), layout="constrained")
    panels = figure.subplots(len(studies), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": [
        1 + len(names) for names in studies.values()]})[:, 0]
    for axis, (question, names) in zip(panels, studies.items(), strict=True):
        for row, name in enumerate(names):
            one = measured[name]
            # points, not bars: the scale does not start at nothing; no whiskers for one seed, whose spread nobody knows
            axis.errorbar(one.tokens_per_step, row, xerr=one.spread, fmt="o", color="tab:blue", capsize=3)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.4)
        axis.set_title(question, fontsize=9, loc="left")
    panels[-1].set_xlabel("tokens per step on held-out rows, trees of 16 nodes fitted to them")
    save_figure(figure, path, FigureCanvasAgg)
