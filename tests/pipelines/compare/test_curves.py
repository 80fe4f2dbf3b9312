"""Learning curves: what a point counts, pauses, and long trainings."""

from __future__ import annotations

from typing import Any

from pipelines.compare.curves import POINTS, curve_of


def steps(times: list[float], **more: Any) -> list[dict[str, Any]]:
    return [{"step": number, "loss": float(number), "positions": 10, "workers": 2, "time": time, **more}
            for number, time in enumerate(times)]


def test_tokens_and_device_seconds_by_hand() -> None:
    curve = curve_of("one", "hydra", steps([100.0, 101.0, 102.0, 103.0]), [(2, 1.5), (4, 1.75)], devices=3)
    assert curve.tokens == (10, 20, 30, 40) and curve.loss == (0.0, 1.0, 2.0, 3.0)
    assert curve.device_seconds == (6.0, 12.0, 18.0, 24.0)  # a second, two workers, three GPUs each
    assert curve.held_out == ((20, 12.0, 1.5), (40, 24.0, 1.75))


def test_a_night_between_two_steps_is_not_charged() -> None:
    times = [100.0, 101.0, 102.0, 40000.0, 40001.0]
    assert curve_of("one", "hydra", steps(times), []).device_seconds[-1] == 10.0


def test_workers_that_come_and_go() -> None:
    records = steps([1.0, 2.0]) + steps([3.0, 4.0], workers=4)
    assert curve_of("one", "hydra", records, []).device_seconds == (2.0, 4.0, 8.0, 12.0)


def test_a_long_training_has_few_points_and_loses_no_step() -> None:
    count = 7 * POINTS + 3
    curve = curve_of("one", "hydra", steps([float(step) for step in range(count)]), [(count, 2.0), (0, 1.0)])
    assert len(curve.tokens) == POINTS and curve.tokens[-1] == 10 * count and curve.held_out == ((10 * count, 2.0 * count, 2.0),)
    ends = [0, *(tokens // 10 for tokens in curve.tokens)]
    for loss, start, end in zip(curve.loss, ends, ends[1:], strict=False):
        assert loss == (start + end - 1) / 2  # the mean of start, ..., end - 1


def test_a_training_of_one_step_or_without_times() -> None:
    assert curve_of("one", "hydra", steps([5.0]), []).device_seconds == (0.0,)
    records = [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 2.0}]
    assert curve_of("one", "hydra", records, [(9, 1.0)]).tokens == (0, 0)
