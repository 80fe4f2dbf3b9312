"""The answers that a quickstart shows first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hydra_core.base import Base
from hydra_core.decoding import Engine, naive_generate
from hydra_core.sampling import Request
from pipelines.config import BaseSection, load_config
from pipelines.quickstart.first_answers import _table, answer_twice, show_first_answers
from tests.trained import overfit_heads

PROMPTS = [(5, 6, 7), (9, 8, 7, 6)]


def test_both_answers_are_the_plain_loops(tiny_base: Base) -> None:
    heads = overfit_heads(tiny_base, "hydra", PROMPTS, tokens=24)
    requests = [Request(f"question {number}", prompt, 24) for number, prompt in enumerate(PROMPTS)]
    answers = answer_twice(Engine(tiny_base, max_batch_size=1), Engine(tiny_base, heads, max_batch_size=1), requests)
    for request, one in zip(requests, answers, strict=True):
        assert one.question == request.id
        assert one.plain.token_ids == one.drafted.token_ids == naive_generate(tiny_base, request).token_ids
        assert one.plain.drafted == 0 and one.plain.tokens_per_step == 1.0
        assert one.drafted.tokens_per_step > 1.5 and one.drafted.accepted > 0
    rows = _table(answers, "tiny").rows
    assert [row[0] for row in rows] == ["question 0", "question 1"] and {row[-1] for row in rows} == {"yes"}
    for row, one in zip(rows, answers, strict=True):
        speeds = [(len(result.token_ids) - 1) / result.decode_seconds for result in (one.plain, one.drafted)]
        assert row[1:5] == (*(f"{speed:.1f}" for speed in speeds), f"{speeds[1] / speeds[0]:.2f}x",
                            f"{one.drafted.tokens_per_step:.2f}")


def test_a_base_without_bundled_heads_shows_nothing(tiny_base_dir: Path, storage: Path, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    def load(*_: object) -> None:
        raise AssertionError("nothing is to be loaded")

    monkeypatch.setattr(BaseSection, "load", load)
    threads = torch.get_num_threads()
    assert show_first_answers(load_config(None, {"storage": str(storage), "base.model": str(tiny_base_dir)})) == []
    assert capsys.readouterr().err == "" and torch.get_num_threads() == threads
