"""The order of asking pays: a system prompt that rows share is computed once and copied, and no token changes by it."""

from __future__ import annotations

import pytest

from hydra_core.base import Base
from hydra_core.decoding import Engine
from hydra_core.sampling import Request
from pipelines.batch.reader import BatchRow, ordered

SYSTEMS = [f"You are helper number {number}, who answers in few words and never asks back." for number in range(6)]


def rows() -> list[BatchRow]:
    """Six system prompts in turn, as in a file that nobody has sorted."""
    return [BatchRow(f"{place}", place, messages=[{"role": "system", "content": system},
                                                  {"role": "user", "content": f"question {place}"}])
            for place, system in enumerate(SYSTEMS * 4)]


def decode(base: Base, wanted: list[BatchRow], monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, tuple[int, ...]], int]:
    """Answers by id, and prompt tokens that were copied instead of computed."""
    engine, copied = Engine(base, max_batch_size=2), [0]
    copy = engine.cache.copy_prefix

    def counting(source: int, target: int, count: int) -> None:
        copied[0] += count
        copy(source, target, count)

    monkeypatch.setattr(engine.cache, "copy_prefix", counting)
    requests = [Request(row.id, tuple(base.encode_prompt(None, row.messages)), 4 + row.row % 3) for row in wanted]
    return {result.id: result.token_ids for result in engine.stream(requests)}, copied[0]


def test_rows_that_share_a_system_prompt_come_together(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = rows()
    in_order, copied = decode(tiny_base, list(ordered(wanted)), monkeypatch)
    as_they_stand, copied_then = decode(tiny_base, wanted, monkeypatch)
    assert in_order == as_they_stand
    system = len(SYSTEMS[0])  # one token a byte
    assert copied >= 12 * system  # of 18 rows whose system prompt occurred before
    assert copied > 2 * copied_then
