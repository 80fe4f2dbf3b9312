"""What `ablate` shows: a table and a panel of a figure for every question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.runtime.figures import new_figure, save_figure
from pipelines.runtime.tables import Table

if TYPE_CHECKING:
    from pipelines.ablate.results import Measured

COLUMNS = ("variant", "tokens per step", "against the first", "top-1 by head", "seeds", "response tokens", "minutes")


def tokens_cell(one: Measured) -> str:
    """Tokens per step, with half the interval where there are several seeds."""
    return f"{one.tokens_per_step:.3f}" + ("" if one.spread is None else f" ± {one.spread:.3f}")


def markdown(studies: Mapping[str, Sequence[str]], measured: Mapping[str, Measured]) -> str:
    """One table for each question; every variant is compared with the first of its table."""
    parts = []
    for question, names in studies.items():
        first = measured[names[0]]
        rows = [_row(name, measured[name], first) for name in names]
        parts.append(f"## {question}\n\n{Table(COLUMNS, rows).markdown()}")
    return "\n".join(parts)


def terminal_table(measured: Mapping[str, Measured]) -> Table:
    """All variants, for the terminal."""
    return Table(("variant", "tokens per step", "top-1 by head", "response tokens", "minutes"), [
        (name, tokens_cell(one), " ".join(f"{top:.3f}" for top in one.top1), f"{one.response_tokens:,}",
         f"{one.seconds / 60:.1f}") for name, one in measured.items()], "Held-out rows")


def _row(name: str, one: Measured, first: Measured) -> tuple[str, ...]:
    return (name, tokens_cell(one), f"{one.tokens_per_step / first.tokens_per_step:.3f}x",
            " / ".join(f"{top:.3f}" for top in one.top1), str(one.seeds), f"{one.response_tokens:,}", f"{one.seconds / 60:.1f}")


def plot_studies(path: Path, studies: Mapping[str, Sequence[str]], measured: Mapping[str, Measured]) -> None:
    """Write a PNG of tokens per step on held-out rows: a panel for each question, one scale for all of them.

    A point has its interval where the variant was trained with several seeds.
    """
    rows = sum(len(names) for names in studies.values())
    figure = new_figure(8, 1 + 0.5 * len(studies) + 0.25 * rows)
    panels = figure.subplots(len(studies), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": [
        1 + len(names) for names in studies.values()]})[:, 0]
    for axis, (question, names) in zip(panels, studies.items(), strict=True):
        for row, name in enumerate(names):
            one = measured[name]
            # points, not bars, as the scale does not start at zero; one seed has no known spread, so it has no whiskers
            axis.errorbar(one.tokens_per_step, row, xerr=one.spread, fmt="o", color="tab:blue", capsize=3)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.4)
        axis.set_title(question, fontsize=9, loc="left")
    panels[-1].set_xlabel("tokens per step on held-out rows, trees of 16 nodes fitted to them")
    save_figure(figure, path)
