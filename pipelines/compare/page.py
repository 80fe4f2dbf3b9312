"""A comparison as one HTML page that needs nothing else: it opens offline, and its own policy forbids it to load anything."""

from __future__ import annotations

import re
from pathlib import Path

from pipelines.compare.charts import charts, plotly_script
from pipelines.compare.records import Comparison
from pipelines.compare.sections import Section, sections

TEMPLATE = Path(__file__).with_name("page.html")


def page(comparison: Comparison) -> str:
    """The page, about 5 MB, nearly all of it Plotly's script, which a page without any chart leaves out."""
    from jinja2 import Environment
    from markupsafe import Markup

    drawn = {name: Markup(element) for name, element in charts(comparison).items()}
    parts = sections(comparison)
    template = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=comparison.title, comparison=comparison, sections=parts, charts=drawn,
        script=Markup(plotly_script() if drawn else ""), numbers={part.title: _numbers(part) for part in parts})


def _numbers(section: Section) -> set[int]:
    """Places of the columns that hold numbers, which are aligned to the right."""
    columns = list(zip(*section.table.rows, strict=True))
    return {place for place, cells in enumerate(columns) if place and all(map(_NUMBER.fullmatch, cells))}


_NUMBER = re.compile(r"[-+\d.,x%e ]*|.*\d ± \d.*")
"""Digits, and what stands between and behind them: intervals, `1.50x`, `50 %`, `4.8e-07`, a dash for nothing."""
