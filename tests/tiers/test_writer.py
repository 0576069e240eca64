"""Writing behind: in order, in batches, bounded, and told of what is given up."""

from __future__ import annotations

import threading

import pytest

from lmkv.tiers.writer import Budget, WriteBehind


class Log:
    """What was written and given up; writing waits while ``go`` is not set."""

    def __init__(self, limit: int = 100, batch: int = 4) -> None:
        self.written: list[list[int]] = []
        self.dropped: list[tuple[int, str]] = []
        self.go, self.begun = threading.Event(), threading.Event()
        self.writer: WriteBehind[int] = WriteBehind("test-writer", limit, batch, self.write, self.give_up)

    def write(self, items: list[int]) -> None:
        self.begun.set()
        assert self.go.wait(30)
        self.written.append(items)

    def give_up(self, items: list[int], reason: str) -> None:
        self.dropped += [(item, reason) for item in items]

    def flat(self) -> list[int]:
        return [item for items in self.written for item in items]


def test_in_order_and_in_batches() -> None:
    log = Log()
    log.writer.put([0])
    assert log.begun.wait(30)
    log.writer.put(list(range(1, 11)))
    assert len(log.writer) == 11
    log.go.set()
    assert log.writer.flush(30)
    assert log.written == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert len(log.writer) == 0
    assert log.writer.close(30)
    assert not log.dropped


def test_the_oldest_go_when_it_is_full() -> None:
    log = Log(limit=3)
    log.writer.put([0])
    assert log.begun.wait(30)
    log.writer.put([1, 2, 3])
    log.writer.put([4, 5])
    assert [item for item, _ in log.dropped] == [1, 2]
    assert "more than 3 chunks" in log.dropped[0][1]
    log.go.set()
    assert log.writer.flush(30)
    assert log.flat() == [0, 3, 4, 5]
    assert log.writer.close(30)


def test_giving_up_on_demand() -> None:
    log = Log()
    log.writer.put([0])
    assert log.begun.wait(30)
    log.writer.put([1, 2, 3])
    assert log.writer.drop_oldest(2, "room") == 2
    assert log.writer.drop_oldest(9, "room") == 1
    assert log.writer.drop_oldest(1, "room") == 0, "what is being written stays"
    assert log.dropped == [(1, "room"), (2, "room"), (3, "room")]
    log.go.set()
    assert log.writer.close(30)
    assert log.flat() == [0]


def test_flush_gives_up_waiting() -> None:
    log = Log()
    log.writer.put([0])
    assert not log.writer.flush(0.01)
    log.go.set()
    assert log.writer.flush(30)
    assert log.writer.flush(0)
    assert log.writer.close(30)


def test_closing_writes_what_waits() -> None:
    log = Log()
    log.go.set()
    log.writer.put(list(range(20)))
    assert log.writer.close(30)
    assert log.flat() == list(range(20))
    log.writer.put([99])
    assert log.dropped == [(99, "the store was closed")]


def test_closing_in_time_gives_up_the_rest() -> None:
    log = Log()
    log.writer.put([0])
    assert log.begun.wait(30)
    log.writer.put([1, 2])
    assert not log.writer.close(0.01)
    assert [item for item, _ in log.dropped] == [1, 2]
    assert "closed" in log.dropped[0][1]
    log.go.set()


def test_closing_without_ever_writing() -> None:
    before = threading.active_count()
    log = Log()
    assert threading.active_count() == before
    assert log.writer.flush(0)
    assert log.writer.close(1)


def test_many_threads_put() -> None:
    log = Log(limit=10_000, batch=7)
    log.go.set()
    threads = [threading.Thread(target=lambda n=n: [log.writer.put([n * 100 + i]) for i in range(100)]) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.writer.close(60)
    assert sorted(log.flat()) == list(range(800))
    for n in range(8):
        mine = [item for item in log.flat() if item // 100 == n]
        assert mine == sorted(mine), "one thread's items stay in order"
    assert all(1 <= len(items) <= 7 for items in log.written)


@pytest.mark.parametrize("limit", [1, 5])
def test_everything_is_written_or_given_up(limit: int) -> None:
    log = Log(limit=limit, batch=2)
    log.go.set()
    for i in range(0, 300, 3):
        log.writer.put([i, i + 1, i + 2])
    assert log.writer.close(30)
    assert sorted(log.flat() + [item for item, _ in log.dropped]) == list(range(300))


def test_a_budget_holds_in_the_long_run() -> None:
    now = 100.0
    budget = Budget(1000, clock=lambda: now)
    written, paused = 0, 0
    for _ in range(20_000):
        if budget.pause() > 0:
            paused += 1
        else:
            budget.spend(70)
            written += 70
        now += 0.01
    assert 200_000 - 1000 <= written <= 200_000 + 1000 + 70, (
        "200 seconds at 1000 bytes each, and what was saved up or overdrawn"
    )
    assert paused
    now += 3600
    budget.spend(5000)
    assert budget.pause() == pytest.approx(4.0), "an hour of rest saves up no more than a second's worth"


def test_who_has_to_wait_can_still_be_given_up_and_who_flushes_does_not_wait() -> None:
    log = Log()
    log.go.set()
    pauses = []

    def pace() -> float:
        pauses.append(1)
        return 3600.0

    log.writer = WriteBehind("test-writer", 100, 4, log.write, log.give_up, pace)
    log.writer.put([1, 2, 3])
    for _ in range(200):
        if pauses:
            break
        threading.Event().wait(0.01)
    assert pauses
    assert not log.written
    assert log.writer.drop_oldest(1, "their slots were needed") == 1
    assert [item for item, _ in log.dropped] == [1]
    assert log.writer.flush(30)
    assert log.flat() == [2, 3]
    log.writer.put([4])
    assert log.writer.close(30), "what waits is written at the end"
    assert log.flat() == [2, 3, 4]
