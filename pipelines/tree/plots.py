"""A picture of what the tree stage found: expected speed by tree size, and the chosen trees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra_core.tree.draft_tree import DraftTree
from hydra_core.tree.search import Choice
from pipelines.profiling.report import save_figure


def plot_choices(path: Path, name: str, scored: Mapping[int, Sequence[Choice]], best: Mapping[int, Choice]) -> None:
    """Write a PNG: left, gain over plain decoding by nodes, one line a batch size; right, the chosen trees."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 + 4 * (1 + len(best)), 4), layout="constrained")
    axes = figure.subplots(1, 1 + len(best), squeeze=False)[0]
    for batch, choices in scored.items():
        nodes, gains = [choice.tree.size for choice in choices], [choice.gain for choice in choices]
        axes[0].plot(nodes, gains, label=f"batch {batch}")
        axes[0].plot(best[batch].tree.size, best[batch].gain, "k.")
    axes[0].axhline(1.0, color="grey", linewidth=0.8)
    axes[0].set(title=f"{name}: expected speed against plain", xlabel="nodes, root included", ylabel="times")
    axes[0].legend()
    for axis, (batch, choice) in zip(axes[1:], best.items(), strict=True):
        _draw(axis, choice.tree)
        axis.set_title(f"batch {batch}: {choice.tree.size} nodes, {choice.tokens_per_step:.2f} tokens per step")
    save_figure(figure, path, FigureCanvasAgg)


def plot_tree(path: Path, name: str, choice: Choice) -> None:
    """Write a PNG of one tree by itself, wide enough to read its ranks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tree = choice.tree
    leaves = tree.size - len({path[:-1] for path in tree.paths})
    figure = Figure(figsize=(max(6.0, 0.45 * leaves), 1.5 + 0.9 * max(1, tree.depth)), layout="constrained")
    axis = figure.subplots()
    _draw(axis, tree)
    axis.set_title(f"{name}, batch {choice.batch}: {tree.size} nodes, {choice.tokens_per_step:.2f} tokens per step")
    save_figure(figure, path, FigureCanvasAgg)


def _draw(axis: Any, tree: DraftTree) -> None:
    """Nodes by depth downwards, leaves side by side, parents over the middle of their children; ranks as labels."""
    paths = [(), *tree.paths]
    children = {path: [child for child in tree.paths if child[:-1] == path] for path in paths}
    place: dict[tuple[int, ...], float] = {}
    leaves = 0

    def settle(path: tuple[int, ...]) -> float:
        nonlocal leaves
        if not children[path]:
            place[path] = float(leaves)
            leaves += 1
        else:
            below = [settle(child) for child in children[path]]
            place[path] = sum(below) / len(below)
        return place[path]

    settle(())
    for path in tree.paths:
        axis.plot([place[path[:-1]], place[path]], [1 - len(path), -len(path)], color="grey", linewidth=0.8, zorder=1)
    axis.scatter(list(place.values()), [-len(path) for path in place], s=90, color="white", edgecolor="black", zorder=2)
    for path, x in place.items():
        axis.text(x, -len(path), str(path[-1]) if path else "", ha="center", va="center", fontsize=7, zorder=3)
    axis.set_axis_off()
