"""Counts of a data card: plain numbers over prompts and answers, gathered part by part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NONE_GIVEN = "none given"


@dataclass
class Group:
    """One source or task. `prompts`; `answers` to them, with `tokens`; `covered`: draft vocabulary's size -> how many of those
    tokens it holds; `held_out`: prompts of that split."""

    prompts: int = 0
    held_out: int = 0
    answers: int = 0
    tokens: int = 0
    covered: Counter[int] = field(default_factory=Counter)
    tokens_per_step: dict[str, float] = field(default_factory=dict)
    accepted_rows: int = 0

    def figures(self) -> dict[str, Any]:
        """As the card's JSON has it."""
        coverage = {str(size): round(count / max(self.tokens, 1), 4) for size, count in sorted(self.covered.items())}
        return {"prompts": self.prompts, "held_out": self.held_out, "answers": self.answers, "response_tokens": self.tokens,
                "coverage": coverage, "tokens_per_step": {name: round(value, 4) for name, value in self.tokens_per_step.items()},
                "acceptance_rows": self.accepted_rows}


def quantiles(lengths: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Count, mean, smallest, quantiles and largest of some lengths; empty for none."""
    values = np.asarray(lengths)
    if not len(values):
        return {}
    found = {f"p{round(100 * share)}": float(np.quantile(values, share)) for share in QUANTILES}
    return {"count": len(values), "mean": round(float(values.mean()), 1), "min": float(values.min()), **found,
            "max": float(values.max())}


def source_name(source: str) -> str:
    """The source of a prompt row for people: each prompt that the base wrote has a number of its own."""
    return "self-made" if source.startswith("self/") else source or NONE_GIVEN


def task_of(extra: dict[str, Any], fields: Sequence[str]) -> str:
    """The task that the other columns of a row name."""
    found = next((extra[name] for name in fields if extra.get(name) not in (None, "")), None)
    return NONE_GIVEN if found is None else str(found)


def most_frequent(messages: Iterable[str], most: int = 5) -> list[tuple[str, int]]:
    """The most frequent messages of errors, with how often each came; numbers in them do not count as differences."""
    shapes: Counter[str] = Counter()
    first: dict[str, str] = {}
    for message in messages:
        shape = "".join("#" if letter.isdigit() else letter for letter in message)
        shapes[shape] += 1
        first.setdefault(shape, message)
    return [(first[shape], count) for shape, count in shapes.most_common(most)]
