"""How long rows wait: one that hangs is an error, a backend that is away is waited for, a job that ends waits for nobody."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hydra_core.errors import StoppedError
from pipelines.batch.retry import GivenUp, Overloaded, RetryPolicy, TooSlow


class Time:
    """Seconds that pass only where somebody waits."""

    def __init__(self, policy: RetryPolicy) -> None:
        self.now, policy.clock, policy.pause = 0.0, lambda: self.now, self.wait

    def wait(self, seconds: float) -> None:
        self.now += seconds


def raises(error: Exception, before: Callable[[], object] = lambda: None) -> Callable[[], object]:
    def ask() -> object:
        before()
        raise error

    return ask


@pytest.mark.parametrize("row_seconds", [600.0, 700.0, 3600.0, 1.0])
def test_a_row_that_hangs_alone_is_an_error_and_not_the_end(row_seconds: float) -> None:
    """The last row of a job has no others whose answers show that the backend is there."""
    policy = RetryPolicy("backend", row_seconds)
    time = Time(policy)
    with pytest.raises(GivenUp, match=r"batch\.row_seconds sets the limit"):
        policy.wait(raises(TooSlow("hangs"), lambda: time.wait(row_seconds)))
    assert time.now == 3 * row_seconds
    with pytest.raises(GivenUp, match="the endpoint's sets the limit"):
        policy.last_answer = None
        policy.wait(raises(TooSlow("hangs", "the endpoint's"), lambda: time.wait(row_seconds)))


@pytest.mark.parametrize(("row_seconds", "patience"), [(10.0, 600.0), (600.0, 2400.0)])
def test_a_backend_that_is_away_ends_the_job_and_makes_no_error_rows(row_seconds: float, patience: float) -> None:
    """However short the time for a row: that is counted only while others are answered."""
    policy = RetryPolicy("backend", row_seconds)
    time = Time(policy)
    with pytest.raises(StoppedError, match=rf"has answered nothing for {patience:.0f} s \(away\); a lower batch\.row_seconds"):
        policy.wait(raises(Overloaded("away")))
    assert patience < time.now <= patience + 5

    def others() -> None:
        policy.last_answer = time.now

    began = time.now
    with pytest.raises(GivenUp):
        policy.wait(raises(Overloaded("full"), others))
    assert 3 * row_seconds < time.now - began <= 3 * row_seconds + 5


def test_a_job_that_ends_asks_nothing_more() -> None:
    policy = RetryPolicy("backend")
    asked: list[int] = []

    def ask() -> None:
        asked.append(1)
        policy.stop()
        raise Overloaded("full")

    for _ in range(2):
        with pytest.raises(StoppedError, match="the job has ended"):
            policy.wait(ask)
    assert asked == [1]
