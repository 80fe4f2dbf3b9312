"""A comparison on a terminal and as Markdown."""

from __future__ import annotations

from pipelines.compare.records import Comparison
from pipelines.compare.sections import sections
from pipelines.runtime.console import say
from pipelines.runtime.tables import Table


def show(comparison: Comparison) -> None:
    """Print it to stderr: tables, then the notes and the headline, which a person reads last."""
    from rich.markup import escape

    for section in sections(comparison):
        table = section.table
        Table(table.columns, [[escape(cell) for cell in row] for row in table.rows], section.title.replace("`", "")).show()
    for note in comparison.notes:
        say("compare", note)
    say("compare", comparison.headline)


def markdown(comparison: Comparison) -> str:
    """The whole comparison, one section for each table."""
    parts = [f"# {comparison.title}\n", f"{comparison.headline}\n"]
    parts += ["".join(f"- **Note:** {note}\n" for note in comparison.notes)] if comparison.notes else []
    for section in sections(comparison):
        about = f"{section.about}\n\n" if section.about else ""
        parts.append(f"## {section.title}\n\n{about}{_escaped(section.table).markdown()}")
    return "\n".join(parts)


def _escaped(table: Table) -> Table:
    """The same cells, where a bar does not end a cell and a line break no row."""
    return Table([_cell(column) for column in table.columns], [[_cell(cell) for cell in row] for row in table.rows])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split("\n"))
