"""Drawing a figure without a window or global state, into a file that appears whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.runtime.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float, **settings: Any) -> Figure:
    """An empty figure of `width` x `height` inches; `settings`: further arguments of matplotlib's `Figure`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), **{"layout": "constrained", **settings})


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` to `path` as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with atomic_file(path) as temporary, temporary.open("wb") as file:
        FigureCanvasAgg(figure).print_png(file)
