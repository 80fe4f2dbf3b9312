"""The page of a data card."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.runtime.tables import Table

LENGTHS = ("count", "mean", "min", "p5", "p25", "p50", "p75", "p95", "max")
OTHERS = "all others"


def markdown(card: Mapping[str, Any], most: int) -> str:
    """`card`: what `card_of` has made; `most`: sources, and tasks, that have a line."""
    rows, split = card["rows"], card["rows"]["prompts_by_split"]
    lines = ["# Data card", "", f"Answers of {card['base']} to {sum(split.values()):,} prompts ({split.get('train', 0):,} to "
             f"learn from, {split.get('held_out', 0):,} held out).", "",
             f"- Answers: {rows['answers']:,} with {rows['response_tokens']:,} tokens; they ended by "
             f"{', '.join(f'{name} ({count:,})' for name, count in rows['finish_reasons'].items()) or 'nothing yet'}.",
             f"- Left out: {rows['prompts_skipped']:,} prompts as duplicates, {rows['prompt_errors']:,} rows that are no prompt, "
             f"{rows['answer_errors']:,} answers that failed.",
             f"- Answers that stand more than once, word for word: {rows['repeated_answers']:,}.",
             *(f"- Error, {count:,} times: {message}" for message, count in rows["errors"]),
             *(f"- {note}." for note in card["notes"]), "", "## Lengths, in tokens", "", _lengths(card["lengths"]),
             "## What the draft vocabulary holds", "",
             *(f"- {size} tokens: {share:.1%} of the tokens to learn from" for size, share in card["coverage"].items())]
    if card["languages"]:
        lines += ["", "## Languages of prompts", "", _languages(card["languages"])]
    for kind in ("sources", "tasks"):
        if set(card[kind]) != {"none given"}:
            lines += ["", f"## {kind.capitalize()}", "", _groups(kind[:-1], card[kind], most)]
    if card["drafters"]:
        lines += ["", f"Tokens per step are of {', '.join(card['drafters'])} on {card['acceptance_rows']:,} held-out rows, "
                      "with one tree of 16 nodes for all of them; a group of few rows says little."]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines).rstrip() + "\n")


def _lengths(lengths: Mapping[str, Mapping[str, float]]) -> str:
    return Table(("", *LENGTHS), [(name, *(f"{found[column]:,.0f}" for column in LENGTHS))
                                  for name, found in lengths.items() if found]).markdown()


def _languages(found: Mapping[str, int]) -> str:
    total = sum(found.values())
    return Table(("language", "prompts", "share"), [(name, f"{count:,}", f"{count / total:.1%}")
                                                    for name, count in list(found.items())[:12]]).markdown()


def _groups(kind: str, groups: Mapping[str, Mapping[str, Any]], most: int) -> str:
    """The groups with the most prompts, and one line for the others."""
    sizes = sorted({size for group in groups.values() for size in group["coverage"]}, key=int)
    drafters = list(dict.fromkeys(name for group in groups.values() for name in group["tokens_per_step"]))
    ordered = sorted(groups.items(), key=lambda pair: -pair[1]["prompts"])
    rows = [_row(name, group, sizes, drafters) for name, group in ordered[:most]]
    if rest := [group for _, group in ordered[most:]]:
        whole = {key: sum(group[key] for group in rest) for key in ("prompts", "response_tokens", "acceptance_rows")}
        rows.append(_row(f"{OTHERS} ({len(rest)})", whole | {"coverage": {}, "tokens_per_step": {}}, sizes, drafters))
    columns = (kind, "prompts", "response tokens", *(f"in {size}" for size in sizes), *drafters, "rows measured")
    return Table(columns, rows).markdown()


def _row(name: str, group: Mapping[str, Any], sizes: Sequence[str], drafters: Sequence[str]) -> tuple[str, ...]:
    held = [f"{group['coverage'][size]:.1%}" if size in group["coverage"] else "" for size in sizes]
    accepted = [f"{group['tokens_per_step'][one]:.2f}" if one in group["tokens_per_step"] else "" for one in drafters]
    return (name, f"{group['prompts']:,}", f"{group['response_tokens']:,}", *held, *accepted, f"{group['acceptance_rows']:,}")
