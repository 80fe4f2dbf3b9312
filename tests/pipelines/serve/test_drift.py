"""The alarm: an hour of steps that give less than the champion's own interval."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.serve.drift import FILE, HOUR, LEAST_STEPS, DriftWatch, interval_low


def test_the_last_hour_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    watch = DriftWatch(lambda: now[0])
    caplog.set_level("WARNING", "ray.serve")
    watch.expect(2.0)
    for _ in range(LEAST_STEPS - 1):
        watch.step(1)
    assert watch.look().tokens_per_step is None  # too few steps say nothing
    watch.step(1)
    found = watch.look()
    assert found.drifted and (found.tokens_per_step, found.low) == (1.0, 2.0)
    assert watch.look().drifted and len(caplog.records) == 1 and "a step gave 1.00 tokens in the last hour" in caplog.text
    now[0] += HOUR / 2
    for _ in range(LEAST_STEPS):
        watch.step(4)
    assert watch.look().tokens_per_step == 2.5 and not watch.look().drifted
    now[0] += HOUR / 2 + 120  # the first half hour is forgotten
    assert watch.look().tokens_per_step == 4.0
    now[0] += HOUR
    assert watch.look().tokens_per_step is None
    for _ in range(LEAST_STEPS):
        watch.step(1)
    assert watch.look().drifted and len(caplog.records) == 2


def test_other_heads_begin_anew() -> None:
    watch = DriftWatch(lambda: 0.0)
    watch.expect(2.0)
    for _ in range(LEAST_STEPS):
        watch.step(1)
    watch.expect(None)
    assert watch.look().tokens_per_step is None
    for _ in range(LEAST_STEPS):
        watch.step(1)
    assert watch.look().tokens_per_step == 1.0 and not watch.look().drifted  # nobody knows what is to be expected


def test_where_the_interval_stands(tmp_path: Path) -> None:
    assert interval_low(None) is None and interval_low(str(tmp_path)) is None
    (tmp_path / FILE).write_text(json.dumps({"tokens_per_step": 2.4, "low": 2.25, "high": 2.5, "questions": 24}), "utf-8")
    assert interval_low(str(tmp_path)) == 2.25
    (tmp_path / FILE).write_text("{", "utf-8")
    assert interval_low(str(tmp_path)) is None
