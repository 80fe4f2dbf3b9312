"""Figures of what the tree stage found: expected speed by tree size, and the chosen trees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra_core.tree.draft_tree import DraftTree
from hydra_core.tree.search import Choice
from pipelines.runtime.figures import new_figure, save_figure


def plot_choices(path: Path, name: str, scored: Mapping[int, Sequence[Choice]], best: Mapping[int, Choice]) -> None:
    """Write a PNG: on the left the gain over plain decoding by nodes, one line for each batch size; then the chosen trees."""
    figure = new_figure(4 + 4 * (1 + len(best)), 4)
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
    save_figure(figure, path)


def plot_tree(path: Path, name: str, choice: Choice) -> None:
    """Write a PNG of one tree, wide enough for its ranks to be read."""
    tree = choice.tree
    leaves = tree.size - len({path[:-1] for path in tree.paths})
    figure = new_figure(max(6.0, 0.45 * leaves), 1.5 + 0.9 * max(1, tree.depth))
    axis = figure.subplots()
    _draw(axis, tree)
    axis.set_title(f"{name}, batch {choice.batch}: {tree.size} nodes, {choice.tokens_per_step:.2f} tokens per step")
    save_figure(figure, path)


def _draw(axis: Any, tree: DraftTree) -> None:
    """Draw the root at the top, leaves side by side and each parent over the middle of its children; labels are ranks."""
    paths = [(), *tree.paths]
    children = {path: [child for child in tree.paths if child[:-1] == path] for path in paths}
    place: dict[tuple[int, ...], float] = {}
    leaves = 0

    def place_of(path: tuple[int, ...]) -> float:
        nonlocal leaves
        if not children[path]:
            place[path] = float(leaves)
            leaves += 1
        else:
            below = [place_of(child) for child in children[path]]
            place[path] = sum(below) / len(below)
        return place[path]

    place_of(())
    for path in tree.paths:
        axis.plot([place[path[:-1]], place[path]], [1 - len(path), -len(path)], color="grey", linewidth=0.8, zorder=1)
    axis.scatter(list(place.values()), [-len(path) for path in place], s=90, color="white", edgecolor="black", zorder=2)
    for path, x in place.items():
        axis.text(x, -len(path), str(path[-1]) if path else "", ha="center", va="center", fontsize=7, zorder=3)
    axis.set_axis_off()
