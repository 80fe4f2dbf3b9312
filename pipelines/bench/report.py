"""From bench rows to figures and tables. Counts first, ratios last."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from pipelines.bench.losslessness import LosslessnessRow
from pipelines.bench.plan import PLAIN, TRANSFORMERS, BenchPlan, Row, reference_of
from pipelines.bench.step_breakdown import by_speed, step_figures
from pipelines.config.bench import VLLM
from pipelines.runtime.tables import Table

RESAMPLES = 2000


def summarise(rows: list[Row], identity: list[LosslessnessRow], champion: str | None = None) -> dict[str, Any]:
    """`methods.<name>` -> figures, as the stage's JSON line holds them.

    `tokens_per_step`: tokens after the first over base forwards after prefill, pooled. `speed_vs_*`: ratio of mean
    per-question tokens/s, turns and rounds of a question pooled, prefill included; `decode_speed_vs_plain`: without prefill.
    `spread`: 95 % interval of `speed_vs_plain` over resampled questions (bootstrap); `questions`: how many they are;
    `questions_faster`: those with more tokens/s than plain's; `speed_at_plain_steps`: the speed against plain that the steps
    taken explain, see `_at_plain_steps`; `vs_champion`: the same figures against `champion`, the contender that is the
    registry's champion, without one None; `vs_vllm`: the same against vLLM alone. `identical`: share of answers, of all
    turns, with the same token ids as plain's; `differing`: the verdicts on the others; `fp32`: verdicts against the naive
    loop, `naive`: the same in every format that was checked; what drafts in vLLM is compared with vLLM alone in all three;
    `categories`: tokens per step and ratios of each. And the figures of `step_figures`.
    """
    methods = list(dict.fromkeys(row.method for row in (*rows, *identity)))
    by = {method: [row for row in rows if row.method == method] for method in methods}
    answers = {(row.method, row.round, row.question, row.turn): row.token_ids
               for name in (PLAIN, VLLM) for row in by.get(name, [])}
    figures = {}
    for method in methods:
        own = by[method]
        steps = sum(row.steps for row in own)
        figures[method] = {
            "rows": len(own),
            "tokens": sum(len(row.token_ids) for row in own),
            "tokens_per_step": _round(sum(len(row.token_ids) - 1 for row in own) / steps if steps else None),
            "tokens_per_second": _round(float(np.mean(list(_rates(own).values()))), 2) if own else None,
            "speed_vs_plain": _ratio(own, by.get(PLAIN, [])),
            "speed_vs_transformers": _ratio(own, by.get(TRANSFORMERS, [])),
            "decode_speed_vs_plain": _ratio(own, by.get(PLAIN, []), prefill=False),
            "spread": _spread(own, by.get(PLAIN, [])),
            **_questions(own, by.get(PLAIN, [])),
            "speed_at_plain_steps": _at_plain_steps(own, by.get(PLAIN, [])),
            "vs_champion": _against(own, by[champion]) if champion in by else None,
            **({"vs_vllm": _against(own, by[VLLM])} if VLLM in by else {}),
            "rounds": [_ratio([row for row in own if row.round == number],
                              [row for row in by.get(PLAIN, []) if row.round == number])
                       for number in sorted({row.round for row in own})],
            "identical": _round(_share(answers.get((reference_of(method), row.round, row.question, row.turn)) == row.token_ids
                                       for row in own)),
            **step_figures(own),
            "differing": _verdicts([row for row in identity if row.rows == 0], method),
            "fp32": _verdicts([row for row in identity if row.rows and row.dtype == "fp32"], method),
            "naive": {dtype: _verdicts([row for row in identity if row.rows and row.dtype == dtype], method)
                      for dtype in dict.fromkeys(row.dtype for row in identity if row.rows)},
            "categories": _categories(own, by.get(PLAIN, []), by.get(TRANSFORMERS, [])),
        }
    return figures


CATEGORIES = "By category: speed against plain, its 95 % interval (tokens per step)"


def _categories(rows: list[Row], plain: list[Row], transformers: list[Row]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for category in dict.fromkeys(row.category for row in rows):
        own, *others = ([row for row in part if row.category == category] for part in (rows, plain, transformers))
        steps = sum(row.steps for row in own)
        found[category] = {"questions": len({row.question for row in own}),
                           "tokens_per_step": _round(sum(len(row.token_ids) - 1 for row in own) / steps if steps else None),
                           "speed_vs_plain": _ratio(own, others[0]), "spread": _spread(own, others[0]),
                           "decode_speed_vs_plain": _ratio(own, others[0], prefill=False),
                           "speed_vs_transformers": _ratio(own, others[1])}
    return found


def _rates(rows: list[Row], prefill: bool = True) -> dict[str, float]:
    """Tokens per second of each question, turns and rounds pooled. Without prefill, first tokens do not count."""
    totals: dict[str, list[float]] = {}
    for row in rows:
        seconds = row.decode_seconds + (row.prefill_seconds if prefill else 0.0)
        tokens = len(row.token_ids) - (0 if prefill else 1)
        entry = totals.setdefault(row.question, [0.0, 0.0])
        entry[0] += tokens
        entry[1] += seconds
    return {question: tokens / seconds for question, (tokens, seconds) in totals.items() if tokens and seconds}


def _ratio(rows: list[Row], against: list[Row], prefill: bool = True) -> float | None:
    ours, theirs = _rates(rows, prefill), _rates(against, prefill)
    shared = ours.keys() & theirs.keys()
    if not shared:
        return None
    return _round(sum(ours[question] for question in shared) / sum(theirs[question] for question in shared))


def _spread(rows: list[Row], against: list[Row]) -> list[float] | None:
    ours, theirs = _rates(rows), _rates(against)
    shared = sorted(ours.keys() & theirs.keys())
    if len(shared) < 2:
        return None
    pairs = np.array([[ours[question], theirs[question]] for question in shared])
    draws = np.random.default_rng(0).integers(0, len(shared), (RESAMPLES, len(shared)))
    sums = pairs[draws].sum(axis=1)
    low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
    return [round(float(low), 3), round(float(high), 3)]


def _questions(rows: list[Row], against: list[Row]) -> dict[str, int]:
    ours, theirs = _rates(rows), _rates(against)
    shared = ours.keys() & theirs.keys()
    return {"questions": len(shared), "questions_faster": sum(ours[question] > theirs[question] for question in shared)}


def _against(rows: list[Row], other: list[Row]) -> dict[str, Any]:
    """Speed against another contender: ratio, 95 % interval over resampled questions, and how many questions were faster."""
    return {"speed": _ratio(rows, other), "spread": _spread(rows, other), **_questions(rows, other)}


def _at_plain_steps(rows: list[Row], plain: list[Row]) -> float | None:
    """The speed against plain if each step had taken as long as plain's on the same question, and the prefill as well.

    A step verifies at least the one token that a plain step computes, so none is shorter: this is the most that the steps which
    were saved explain. None where no question can be compared.
    """
    taken, theirs = _totals(rows), _totals(plain)
    gained = {}
    for question in taken.keys() & theirs.keys():
        (tokens, steps, _, _), (plain_tokens, plain_steps, prefill, decode) = taken[question], theirs[question]
        seconds = prefill + steps * (decode / plain_steps if plain_steps else 0.0)
        if tokens and plain_tokens and seconds > 0 and prefill + decode > 0:
            gained[question] = tokens / seconds, plain_tokens / (prefill + decode)
    if not gained:
        return None
    return _round(sum(ours for ours, _ in gained.values()) / sum(against for _, against in gained.values()))


def _totals(rows: list[Row]) -> dict[str, tuple[int, int, float, float]]:
    """Question -> tokens, steps, seconds of prefill and of decoding, turns and rounds together."""
    totals: dict[str, tuple[int, int, float, float]] = {}
    for row in rows:
        tokens, steps, prefill, decode = totals.get(row.question, (0, 0, 0.0, 0.0))
        totals[row.question] = (tokens + len(row.token_ids), steps + row.steps, prefill + row.prefill_seconds,
                                decode + row.decode_seconds)
    return totals


def _verdicts(identity: list[LosslessnessRow], method: str) -> dict[str, int] | None:
    own = [row for row in identity if row.method == method]
    if not own:
        return None
    return {"answers": len(own)} | {name.replace("-", "_"): sum(row.verdict == name for row in own)
                                    for name in ("identical", "near-tie", "different")}


def _share(flags: Iterable[bool]) -> float | None:
    values = list(flags)
    return sum(values) / len(values) if values else None


def _round(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(value, digits)


AGAINST = {"vs champion": "vs_champion", "vs vllm": "vs_vllm"}
"""Column -> figures of `_against`, where they are there."""
COLUMNS = ("method", "tokens/step", "vs plain", "95 % interval", "decode only", "vs transformers", "identical (bf16)")


def metrics_of(figures: dict[str, Any]) -> dict[str, float]:
    """`METHOD.FIGURE` -> number, for MLflow: the two by which people sort; all others are in report.json."""
    return {f"{method}.{key}": values[key] for method, values in figures.items() for key in ("tokens_per_step", "speed_vs_plain")
            if values[key] is not None}


def method_table(figures: dict[str, Any], title: str, dtype: str) -> Table:
    """The contenders, the fastest first; no rows where no single request was decoded. A quantised base was compared with the
    naive loop in its own format instead of fp32."""
    ordered = [(name, figures[name]) for name in by_speed(figures)]
    own = not any(f["fp32"] for f in figures.values()) and any(dtype in f["naive"] for f in figures.values())
    proof = dtype if own else "fp32"
    compared = {label: key for label, key in AGAINST.items() if any(f.get(key) for f in figures.values())}
    columns = [column.replace("bf16", dtype) for column in COLUMNS]
    return Table([*columns[:4], *compared, *columns[4:], f"{proof} lossless"],
                 [(name, _cell(f["tokens_per_step"], 2), _cell(f["speed_vs_plain"], 2, "x"),
                   "-" if f["spread"] is None else f"{f['spread'][0]:.2f} - {f['spread'][1]:.2f}",
                   *(_against_cell(f.get(key)) for key in compared.values()),
                   _cell(f["decode_speed_vs_plain"], 2, "x"), _cell(f["speed_vs_transformers"], 2, "x"),
                   _identical_cell(f), _losslessness_cell(f["naive"].get(dtype) if own else f["fp32"])) for name, f in ordered],
                 title)


def _cell(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def _against_cell(found: dict[str, Any] | None) -> str:
    """Speed against another contender and its 95 % interval."""
    if found is None:
        return "-"
    spread = found["spread"]
    return _cell(found["speed"], 2, "x") + (f" ({spread[0]:.2f} - {spread[1]:.2f})" if spread else "")


def _identical_cell(figures: dict[str, Any]) -> str:
    """The share of identical answers, and how many of the others differ by more than a near-tie."""
    if figures["identical"] is None:
        return "-"
    wrong = (figures["differing"] or {}).get("different", 0)
    return f"{100 * figures['identical']:.0f} %" + (f", {wrong} not near-ties" if wrong else "")


def _losslessness_cell(verdicts: dict[str, int] | None) -> str:
    if verdicts is None:
        return "-"
    ties = f" + {verdicts['near_tie']} near-ties" if verdicts["near_tie"] else ""
    return f"{verdicts['identical']}{ties} of {verdicts['answers']}"


def markdown(figures: dict[str, Any], title: str, dtype: str) -> str:
    """The table of single requests under its title, or the title alone where none was decoded."""
    return f"# {title}\n" + (f"\n{method_table(figures, title, dtype).markdown()}" if figures else "")


def category_table(figures: dict[str, Any]) -> Table:
    """Speed against plain and tokens per step of each category; no rows where there is only one category."""
    names = category_names(figures)
    rows = [(method, *(_category_cell(values["categories"].get(name, {})) for name in names))
            for method, values in figures.items()]
    return Table(("method", *names), rows if len(names) > 1 else (), CATEGORIES)


def category_markdown(figures: dict[str, Any]) -> str:
    """A section of the report, or nothing where there is only one category."""
    table = category_table(figures)
    if not table.rows:
        return ""
    text = f"\n## {CATEGORIES}\n\n{table.markdown()}"
    if any(len(values["rounds"]) > 1 for values in figures.values()):
        text += "\nAgainst plain, round by round: " + "; ".join(
            f"{method} {', '.join(_cell(value, 2) for value in values['rounds'])}" for method, values in figures.items()
            if method != PLAIN) + ".\n"
    return text


def category_names(figures: dict[str, Any]) -> list[str]:
    """The categories of all contenders, in the order in which they occur."""
    return list(dict.fromkeys(name for values in figures.values() for name in values["categories"]))


def _category_cell(found: dict[str, Any]) -> str:
    low, high = found.get("spread") or (None, None)
    between = "" if low is None or low == high else f" {low:.2f} - {high:.2f}"
    return f"{_cell(found.get('speed_vs_plain'), 2, 'x')}{between} ({_cell(found.get('tokens_per_step'), 2)})"


def batch_markdown(batches: dict[str, Any], plan: BenchPlan) -> str:
    """The throughput table, or nothing where it was not measured."""
    if not batches:
        return ""
    prompts = max(figures["prompts"] for methods in batches.values() for figures in methods.values())
    rows = []
    for workload, methods in batches.items():
        for name, f in methods.items():
            low, high = f["range"] or (None, None)
            rows.append((workload, name, f"{f['tokens_per_second']:.0f}", _cell(f["speed_vs_transformers"], 2, "x"),
                         f"{_cell(low, 2)} - {_cell(high, 2)}", _cell(f.get("speed_vs_engine"), 2, "x")))
    columns = ("limits", "method", "tokens/s", "vs transformers", "range over rounds", "vs the engine called directly")
    return f"\n## {prompts} prompts, batches of {plan.max_batch_size}\n\n{Table(columns, rows).markdown()}"
