"""The interval of tokens per step that goes with a champion."""

from __future__ import annotations

import json
from pathlib import Path

from pipelines.bench.acceptance import acceptance, write_acceptance
from pipelines.bench.plan import Row
from pipelines.serve.drift import FILE, interval_low


def row(question: str, tokens: int, steps: int, method: str = "hydra", turn: int = 0) -> Row:
    return Row(round=0, question=question, category="x", method=method, turn=turn, token_ids=(1,) * (tokens + 1), steps=steps,
               drafted=0, accepted=0, prefill_seconds=0.1, decode_seconds=0.1)


def test_an_interval_over_questions(tmp_path: Path) -> None:
    rows = [row("a", 10, 10), row("a", 10, 10, turn=1), row("b", 30, 10), row("c", 20, 10), row("a", 99, 1, "plain")]
    found = acceptance(rows, "hydra")
    assert found is not None and found["tokens_per_step"] == 1.75 and found["questions"] == 3  # turns of a question are pooled
    assert 1.0 <= found["low"] < 1.75 < found["high"] <= 3.0
    assert acceptance(rows, "hydra") == found  # the same each time: the folder's digest must not change
    alike = acceptance([row(name, 20, 10) for name in "abcd"], "hydra")
    assert alike is not None and (alike["low"], alike["high"]) == (2.0, 2.0)
    write_acceptance(tmp_path, rows, "hydra")
    assert json.loads((tmp_path / FILE).read_text("utf-8")) == found and interval_low(str(tmp_path)) == found["low"]


def test_one_question_says_nothing(tmp_path: Path) -> None:
    assert acceptance([row("a", 10, 10), row("b", 0, 0)], "hydra") is None and acceptance([], "hydra") is None
    write_acceptance(tmp_path, [row("a", 10, 10)], "hydra")
    assert not (tmp_path / FILE).exists()
