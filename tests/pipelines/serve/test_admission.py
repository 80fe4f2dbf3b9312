"""What the front accepts, and when who is refused may ask again."""

from __future__ import annotations

import pytest

from pipelines.serve.admission import LONGEST_RETRY, Admission
from pipelines.serve.openai.errors import ApiError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_room_is_held_and_given_back() -> None:
    admission = Admission(Clock())
    with admission.slots(3, room=4, decoding=2):
        assert admission.in_flight == 3
        with pytest.raises(ApiError) as full, admission.slots(2, room=4, decoding=2):
            pass
        assert (full.value.status, full.value.code, full.value.headers) == (429, "queue_full", {"Retry-After": "1"})
        with pytest.raises(RuntimeError), admission.slots(1, room=4, decoding=2):
            raise RuntimeError
        assert admission.in_flight == 3
    assert admission.in_flight == 0


def test_who_is_refused_comes_back_when_the_queue_has_been_answered() -> None:
    clock = Clock()
    admission = Admission(clock)
    for _ in range(10):  # one answer every two seconds
        with admission.slots(1, room=99, decoding=2):
            clock.now += 2
    admission.in_flight = 8
    assert admission.retry_seconds(decoding=2) == 11  # (8 - 2) x 18 s / 10 answers
    admission.in_flight = 2
    assert admission.retry_seconds(decoding=2) == 1
    admission.in_flight = 999
    assert admission.retry_seconds(decoding=2) == LONGEST_RETRY
    clock.now += 61
    assert admission.retry_seconds(decoding=2) == 1  # nothing is known about the last minute


def test_only_the_last_minute_is_remembered() -> None:
    """Where nobody is ever refused too."""
    clock = Clock()
    admission = Admission(clock)
    for _ in range(1000):
        with admission.slots(1, room=99, decoding=2):
            clock.now += 1
    assert len(admission._finished) == 61


def test_a_closing_one_accepts_nothing() -> None:
    admission = Admission(Clock())
    admission.check_open()
    admission.closing = True
    with pytest.raises(ApiError) as closing:
        admission.check_open()
    assert (closing.value.status, closing.value.code) == (503, "closing")
