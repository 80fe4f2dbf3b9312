"""Tables of a comparison: sums of costs, titles, cells."""

from __future__ import annotations

from dataclasses import replace

from pipelines.compare.records import Comparison, Cost
from pipelines.compare.sections import sections
from pipelines.compare.text import markdown
from tests.pipelines.compare.test_page import comparison


def table(made: Comparison, title: str) -> list[tuple[str, ...]]:
    return [tuple(row) for section in sections(made) if section.title == title for row in section.table.rows]


def cost(run: str, stage: str, seconds: float | None, devices: float | None, machine: str | None = "m") -> Cost:
    return Cost(run, stage, machine, seconds, devices, None, None, 10, 0.5)


def test_a_sum_of_costs_lacks_no_stage() -> None:
    costs = (cost("a", "distill", 10.0, 20.0), cost("a", "bench", 1.4, None), cost("b", "bench", 7.0, 7.0))
    rows = table(replace(comparison(), costs=costs), "Cost")
    assert rows == [("a", "distill", "10", "20", "-", "-", "10", "0.5", "m"),
                    ("a", "bench", "1", "-", "-", "-", "10", "0.5", "m"),
                    ("a", "(all)", "11", "-", "-", "-", "-", "1", "m"),
                    ("b", "bench", "7", "7", "-", "-", "10", "0.5", "m")]
    apart = table(replace(comparison(), costs=(costs[0], cost("a", "bench", 1.0, 1.0, None))), "Cost")
    assert apart[1][-1] == "not recorded" and apart[2][3] == "21" and apart[2][-1] == "2 machines"


def test_a_title_of_three() -> None:
    made = comparison()
    three = replace(made, runs=(*made.runs, replace(made.runs[0], label="c")), methods=(), settings=(), figures=())
    assert markdown(three).startswith("# Comparison of a, b and c\n")


def test_methods_stand_under_each_other_run_by_run() -> None:
    rows = table(comparison(), "Speed")
    assert [row[:5] for row in rows] == [("hydra++", "a", "1.65", "1.50x", "1.40 - 1.60"),
                                         ("hydra++", "b", "1.87", "1.70x", "1.60 - 1.80"),
                                         ("plain", "a", "1.10", "1.00x", "0.90 - 1.10")]
    assert table(comparison(), "Acceptance by depth") == [("hydra++", run, "60 %", "30 %", "10 %") for run in "ab"]
    assert table(comparison(), "By category of question")[0] == ("hydra++", "a", "1.30x  1.40", "-  1.50")
