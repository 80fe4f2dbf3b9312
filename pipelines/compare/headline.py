"""The one sentence that a comparison comes to."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.bench.plan import PLAIN, is_foreign
from pipelines.compare.paired import SPEED, paired_name
from pipelines.compare.records import ComparedRun, FigureTable, MethodRow, PairedResult

FIRST_FIGURE = {"train": "tokens per step", "ablate": "tokens per step", "tree": "gain", "load": "capacity: tokens/s",
                "batch": "tokens per second", "distill": "response"}
"""Stage -> what the name of the figure begins or ends with that the sentence tells."""


def headline(stage: str, runs: Sequence[ComparedRun], methods: Sequence[MethodRow], pairs: Sequence[PairedResult],
             figures: Sequence[FigureTable]) -> str:
    """The fastest contender of each bench and what the paired test says of these; of another stage its first figure."""
    if stage == "bench":
        fastest = [fastest_contender(methods, place) for place in range(len(runs))]
        told = "; ".join(_of_bench(run.label, methods, name, place) for place, (run, name) in enumerate(
            zip(runs, fastest, strict=True)))
        return " ".join([f"{told}.", *(_of_pair(pairs, run.label, paired_name(fastest[0], name))
                                       for run, name in zip(runs[1:], fastest[1:], strict=True) if fastest[0] and name)]).strip()
    wanted = FIRST_FIGURE.get(stage, "")
    for table in figures:
        for name, values in table.rows:
            if wanted in name and any(value is not None for value in values):
                each = [f"{run.label} {_shown(value)}" for run, value in zip(runs, values, strict=True)]
                return f"{name}: {'; '.join(each)}."
    return f"`{stage}` of {', '.join(run.label for run in runs)}."


def fastest_contender(methods: Sequence[MethodRow], place: int) -> str | None:
    """The fastest contender of one bench that is this project's own and drafts."""
    speeds = {row.method: result.speed_vs_plain for row in methods
              if row.method != PLAIN and not is_foreign(row.method) and (result := row.results[place]) and result.speed_vs_plain}
    return max(speeds, key=lambda name: speeds[name] or 0.0, default=None)


def _of_bench(label: str, methods: Sequence[MethodRow], name: str | None, place: int) -> str:
    best = next((row.results[place] for row in methods if row.method == name), None)
    if name is None or best is None:
        return f"{label}: nothing that drafts was timed"
    between = f" ({best.interval[0]:.2f} - {best.interval[1]:.2f})" if best.interval else ""
    steps = f", {best.tokens_per_step:.2f} tokens a step" if best.tokens_per_step else ""
    return f"{label}: {name} {best.speed_vs_plain:.2f}x plain{between}{steps}"


def _of_pair(pairs: Sequence[PairedResult], second: str, method: str) -> str:
    """What the paired test says of the fastest contenders; nothing where there was none."""
    found = [pair for pair in pairs if (pair.second, pair.quantity, pair.method) == (second, SPEED, method)]
    return "".join(
        f"On the same {pair.questions} questions the speed of {second} against plain is {pair.ratio:.2f} "
        f"({pair.interval[0]:.2f} - {pair.interval[1]:.2f}) times that of {pair.first} ({pair.method}): {pair.verdict}."
        for pair in found)


def _shown(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
