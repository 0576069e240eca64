"""The breaker: failures in a row open it, one call at a time tries, a success closes it."""

from __future__ import annotations

import threading
import time

from lmkv.events import Emitter, Event
from lmkv.tiers.breaker import Breaker


def breaker(failures: int = 3, seconds: float = 3600.0) -> tuple[Breaker, list[Event]]:
    events: list[Event] = []
    return Breaker("remote", failures, seconds, Emitter(events.append)), events


def kinds(events: list[Event]) -> list[str]:
    return [event.kind for event in events]


def test_failures_in_a_row_open_it() -> None:
    b, events = breaker()
    for _ in range(2):
        b.failure("read", "no answer")
    assert b.allows()
    assert not b.open
    b.success()
    for _ in range(3):
        assert b.allows()
        assert not b.resting
        b.failure("read", "no answer")
    assert b.open
    assert b.resting
    assert not b.allows()
    assert kinds(events) == ["tier_failed"] * 5 + ["tier_disabled"]
    assert {event.tier for event in events} == {"remote"}
    assert events[0].detail == {"operation": "read", "reason": "no answer"}
    assert events[-1].detail == {"seconds": 3600.0, "reason": "no answer"}


def test_after_a_while_one_call_may_try() -> None:
    b, events = breaker(failures=1, seconds=0.02)
    b.failure("read", "x")
    assert not b.allows()
    time.sleep(0.05)
    assert not b.resting, "asking whether it rests takes nothing"
    assert not b.resting
    assert b.allows()
    assert b.resting
    assert not b.allows(), "one at a time"
    b.success()
    assert b.allows()
    assert b.allows()
    assert not b.open
    assert kinds(events) == ["tier_failed", "tier_disabled", "tier_enabled"]


def test_a_failed_try_opens_it_anew() -> None:
    b, events = breaker(failures=2, seconds=0.02)
    b.failure("read", "x")
    b.failure("read", "x")
    time.sleep(0.05)
    assert b.allows()
    b.failure("read", "still")
    assert b.open
    assert kinds(events) == ["tier_failed", "tier_failed", "tier_disabled", "tier_failed", "tier_disabled"]
    time.sleep(0.05)
    assert b.allows()
    b.success()
    assert not b.open


def test_of_many_threads_one_may_try() -> None:
    b, _ = breaker(failures=1, seconds=0.02)
    b.failure("read", "x")
    time.sleep(0.05)
    start = threading.Barrier(8)
    allowed: list[bool] = []

    def ask() -> None:
        start.wait(30)
        allowed.append(b.allows())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(allowed) == [False] * 7 + [True]


def test_each_failed_try_doubles_the_rest_up_to_the_longest() -> None:
    events: list[Event] = []
    b = Breaker("remote", 1, 0.08, Emitter(events.append), first_seconds=0.01)
    for _ in range(6):
        while not b.allows():
            time.sleep(0.001)
        b.failure("read", "x")
    rests = [float(str(event.detail["seconds"])) for event in events if event.kind == "tier_disabled"]
    assert len(rests) == 6
    for rest, wanted in zip(rests, (0.01, 0.02, 0.04, 0.08, 0.08, 0.08), strict=True):
        assert 0.79 * wanted <= rest <= min(0.08, 1.21 * wanted)
    while not b.allows():
        time.sleep(0.001)
    b.success()
    b.failure("read", "x")
    assert float(str(events[-1].detail["seconds"])) <= 0.0121, "a success begins anew"


def test_late_failures_do_not_prolong_the_rest() -> None:
    events: list[Event] = []
    b = Breaker("remote", 1, 3600.0, Emitter(events.append), first_seconds=0.05)
    for _ in range(20):
        b.failure("read", "begun before it opened")
    assert kinds(events).count("tier_disabled") == 1
    time.sleep(0.1)
    assert b.allows()
