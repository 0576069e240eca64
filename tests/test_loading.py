"""Waiting for slow tiers ends in time, however late the machine wakes who waits."""

from __future__ import annotations

import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

import pytest

from lmkv.loading import Waits


class Late(Future[int]):
    """A future whose waits last longer than asked for, on a clock of its own."""

    def __init__(self, clock: list[float], late: float) -> None:
        super().__init__()
        self.clock, self.late = clock, late

    def result(self, timeout: float | None = None) -> int:
        assert timeout is not None
        self.clock[0] += timeout + self.late
        raise FutureTimeoutError


def waited(waits: Waits, clock: list[float], late: float, seconds: float = 0.25) -> float:
    begun = clock[0]
    with pytest.raises(FutureTimeoutError):
        waits.result(Late(clock, late), seconds)
    return clock[0] - begun


def test_it_asks_for_less_by_what_it_was_late_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    waits = Waits()
    assert waited(waits, clock, 0.004) < 0.25, "what is usual is expected from the beginning"
    assert waited(waits, clock, 0.01) > 0.25
    for _ in range(3):
        assert waited(waits, clock, 0.014) <= 0.25
    assert waited(waits, clock, 0.0) >= 0.225
    for _ in range(Waits.REMEMBERED):
        waited(waits, clock, 0.0)
    assert waited(waits, clock, 0.0) == pytest.approx(0.245), "and forgotten again"
    assert waited(waits, clock, 5.0) > 5
    assert waited(waits, clock, 0.0) >= 0.9 * 0.25 - 1e-9, "a wait is never cut short by more than a tenth"


def test_what_comes_in_time_is_returned() -> None:
    future: Future[int] = Future()
    future.set_result(7)
    assert Waits().result(future, 1.0) == 7
    assert Waits().result(future, 0.0) == 7
