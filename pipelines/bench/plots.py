"""The figures of `bench`: speed by method, speed by method and category, accepted drafts of a step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.bench.report import category_names
from pipelines.bench.step_breakdown import by_speed
from pipelines.runtime.figures import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPEED, CATEGORIES, ACCEPTED = "report.png", "categories.png", "accepted.png"
COLOURS = ("#4878a8", "#6aa84f", "#e0883a", "#b85450", "#8566a8", "#7a6a58", "#c77cab", "#7f7f7f", "#b5a642", "#4aa8b0")
GROUP = 0.8
"""Width of a group of bars; the distance between groups is 1."""


def draw(figures: dict[str, Any], folder: Path) -> list[Path]:
    """Write every figure for which there are values, as a PNG; returns the files."""
    made = {SPEED: speed_plot(figures), CATEGORIES: category_plot(figures), ACCEPTED: accepted_plot(figures)}
    for name, figure in made.items():
        (folder / name).unlink(missing_ok=True)
        if figure is not None:
            save_figure(figure, folder / name)
    return [folder / name for name, figure in made.items() if figure is not None]


def speed_plot(figures: dict[str, Any]) -> Figure:
    """Speed against plain with its interval, and tokens per step."""
    names = by_speed(figures)
    figure = new_figure(9, 0.6 * len(names) + 1.6)
    left, right = figure.subplots(1, 2, sharey=True)
    speeds = [figures[name]["speed_vs_plain"] or 0 for name in names]
    spreads = [figures[name]["spread"] or [speed, speed] for name, speed in zip(names, speeds, strict=True)]
    errors = np.array([[max(0, speed - low), max(0, high - speed)]
                       for speed, (low, high) in zip(speeds, spreads, strict=True)]).T
    left.barh(names, speeds, xerr=errors, color="#4878a8")
    left.axvline(1.0, color="black", linewidth=0.8)
    left.set_xlabel("speed against plain decoding")
    right.barh(names, [figures[name]["tokens_per_step"] or 0 for name in names], color="#6aa84f")
    right.set_xlabel("tokens per step")
    left.invert_yaxis()
    return figure


def category_plot(figures: dict[str, Any]) -> Figure | None:
    """Speed against plain, one group of bars a category, one bar a contender; None where there is only one category."""
    categories = category_names(figures)
    bars = {name: [(figures[name]["categories"].get(category) or {}).get("speed_vs_plain") or 0 for category in categories]
            for name in by_speed(figures)}
    if len(categories) < 2:
        return None
    figure = _grouped(bars, categories, "speed against plain decoding")
    figure.axes[0].axhline(1.0, color="black", linewidth=0.8)
    return figure


def accepted_plot(figures: dict[str, Any]) -> Figure | None:
    """Share of steps by accepted drafts, for the contenders that draft; None where there is none."""
    lengths = {name: figures[name]["accepted_lengths"] for name in by_speed(figures)
               if len(figures[name]["accepted_lengths"]) > 1}
    if not lengths:
        return None
    most = max(len(counts) for counts in lengths.values())
    bars = {name: [count / sum(counts) for count in counts] + [0.0] * (most - len(counts)) for name, counts in lengths.items()}
    figure = _grouped(bars, [str(length) for length in range(most)], "share of steps")
    figure.axes[0].set_xlabel("drafts accepted")
    return figure


def _grouped(bars: dict[str, list[float]], labels: list[str], what: str) -> Figure:
    """One group of bars a label, one bar a name."""
    figure = new_figure(max(6.0, 1.2 + len(labels) * (0.4 + 0.16 * len(bars))), 4)
    axis = figure.subplots()
    width, places = GROUP / len(bars), np.arange(len(labels))
    for number, (name, heights) in enumerate(bars.items()):
        axis.bar(places - GROUP / 2 + width * (number + 0.5), heights, width, label=name, color=COLOURS[number % len(COLOURS)])
    axis.set_xticks(places, labels)
    axis.set_ylabel(what)
    axis.legend(fontsize=8)
    return figure
