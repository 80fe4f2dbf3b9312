"""Figures in rows and columns: as Markdown in a report, or as a table on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 1000
"""Most characters of a line where stderr is no terminal: a file has no width, and a path that is cut in two cannot be copied."""
_NUMERIC = {*"0123456789-+", ""}
"""First characters of a cell that holds a number, or nothing."""


@dataclass(frozen=True)
class Table:
    """Named columns and rows of text, one cell a column. Raises ValueError for a row of another length."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.title!r}: {len(row)} cells do not fit {len(self.columns)} columns")

    def markdown(self) -> str:
        """A Markdown table, without the title; ends with a line break."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        text = ["| " + " | ".join(cells) + " |" for cells in lines]
        text[1] = "|" + "|".join(lines[1]) + "|"
        return "\n".join(text) + "\n"

    def show(self) -> None:
        """Print it to stderr: the title on a line of its own, columns of numbers aligned to the right."""
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable()
        for place, column in enumerate(self.columns):
            numeric = all(row[place][:1] in _NUMERIC for row in self.rows)
            table.add_column(column, justify="right" if numeric else "left")
        for row in self.rows:
            table.add_row(*row)
        console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else WIDTH)
        # not the table's own title, which rich would wrap to the width of the table
        console.print(*([self.title] if self.title else []), table, highlight=False)
