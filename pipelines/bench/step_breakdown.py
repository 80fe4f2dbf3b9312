"""What a step of each contender costs and yields: phases, acceptance by depth, predicted time, first token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from pipelines.bench.plan import PLAIN, Row
from pipelines.runtime.tables import Table

DEPTHS_SHOWN = 4
COLUMNS = ("method", "step", "draft", "verify", "accept, commit", "rest", "measured / predicted (of plain's)", "first token",
           *(f"{depth}+ drafts" for depth in range(1, DEPTHS_SHOWN + 1)))
TITLE = "Milliseconds of a step, and the share of steps by accepted drafts"


def step_figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Figures of one contender, None where they are unknown.

    `first_token_ms`: mean over prompts, from sending to the first token. For an average later step, in milliseconds:
    `step_ms`, and its parts `draft_ms`, `verify_ms`, `accept_commit_ms` and the rest, `overhead_ms`;
    `measured_vs_predicted`: seconds of steps over what a cost table predicts; `accepted_lengths`: number of steps that accepted
    0, 1, 2, ... drafts; `accepted_at_least`: share of steps that accepted at least 1, 2, ... drafts.
    """
    steps, decode = sum(row.steps for row in rows), sum(row.decode_seconds for row in rows)
    draft, verify, accept, commit = (sum(getattr(row, f"{name}_seconds") for row in rows)
                                     for name in ("draft", "verify", "accept", "commit"))
    known = steps > 0 and verify > 0
    parts = {"step_ms": decode, "draft_ms": draft, "verify_ms": verify, "accept_commit_ms": accept + commit,
             "overhead_ms": decode - draft - verify - accept - commit}
    predicted = [row for row in rows if row.predicted_seconds > 0]
    lengths = [sum(counts) for counts in zip_longest(*(row.accepted_lengths for row in rows), fillvalue=0)]
    first = 1000 * sum(row.prefill_seconds for row in rows) / len(rows) if rows else None
    ratio = sum(row.decode_seconds for row in predicted) / sum(row.predicted_seconds for row in predicted) if predicted else None
    return {"first_token_ms": None if first is None else round(first, 2),
            **{name: round(1000 * seconds / steps, 3) if known or (name == "step_ms" and steps) else None
               for name, seconds in parts.items()},
            "measured_vs_predicted": None if ratio is None else round(ratio, 3),
            "accepted_lengths": lengths,
            "accepted_at_least": [round(sum(lengths[depth:]) / sum(lengths), 4) for depth in range(1, len(lengths))]}


def by_speed(figures: dict[str, Any]) -> list[str]:
    """The contenders, fastest first."""
    return sorted(figures, key=lambda name: -(figures[name]["speed_vs_plain"] or 0))


def step_table(figures: dict[str, Any]) -> Table:
    """One row for each contender that was timed, the fastest first."""
    timed = [(name, figures[name]) for name in by_speed(figures) if figures[name]["first_token_ms"] is not None]
    return Table(COLUMNS, [
        (name, *(_cell(f[key], 1) for key in ("step_ms", "draft_ms", "verify_ms", "accept_commit_ms", "overhead_ms")),
         _prediction(f, figures), _cell(f["first_token_ms"], 0),
         *(f"{100 * share:.0f} %" for share in f["accepted_at_least"][:DEPTHS_SHOWN]),
         *("-" for _ in range(DEPTHS_SHOWN - len(f["accepted_at_least"])))) for name, f in timed], TITLE)


def steps_markdown(figures: dict[str, Any]) -> str:
    """A section of the report, or nothing where no contender was timed."""
    table = step_table(figures)
    if not table.rows:
        return ""
    return (f"\n## {TITLE}\n\n{table.markdown()}\n"
            "Rest: the step without draft, verify, accept and commit. Predicted: by this machine's measured step costs; in\n"
            "parentheses divided by the same ratio for plain decoding in this run, which removes how fast the machine is today.\n"
            "First token: mean time from sending a prompt.\n")


def _prediction(f: dict[str, Any], figures: dict[str, Any]) -> str:
    """Measured over predicted time, and that ratio over plain's."""
    own, plain = f["measured_vs_predicted"], figures.get(PLAIN, {}).get("measured_vs_predicted")
    return _cell(own, 2) + (f" ({own / plain:.2f})" if own and plain else "")


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
