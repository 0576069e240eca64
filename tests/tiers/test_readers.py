"""Threads that ask a slow tier: as many as allowed, results and errors by future, and an end that does not wait for ever."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, Future

import pytest

from lmkv.errors import StoreClosedError
from lmkv.tiers.readers import Readers


def test_results_and_errors_come_by_future() -> None:
    readers = Readers("test", 2)
    futures = [readers.submit(lambda i=i: i * i) for i in range(50)]  # type: ignore[misc]
    assert [future.result(30) for future in futures] == [i * i for i in range(50)]

    def fail() -> int:
        raise KeyError("meant")

    with pytest.raises(KeyError, match="meant"):
        readers.submit(fail).result(30)
    assert readers.submit(lambda: 7).result(30) == 7, "a thread outlives a failed call"
    assert readers.close(30)


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_at_once_than_allowed(limit: int) -> None:
    readers = Readers("test", limit)
    lock = threading.Lock()
    full = threading.Barrier(limit)
    running = most = 0

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        full.wait(30)  # reached only if as many as allowed run at once
        with lock:
            running -= 1

    futures = [readers.submit(work) for _ in range(limit * 5)]
    for future in futures:
        future.result(30)
    assert most <= limit
    assert readers.close(30)


def test_no_threads_before_there_is_work() -> None:
    before = threading.active_count()
    readers = Readers("test", 4)
    assert threading.active_count() == before
    assert readers.close(30)


def test_what_waits_is_cancelled_at_the_end() -> None:
    readers = Readers("test", 1)
    go, begun = threading.Event(), threading.Event()
    told: list[Future[bool]] = []
    running = readers.submit(lambda: begun.set() or go.wait(30))  # type: ignore[func-returns-value]
    waiting = readers.submit(lambda: True)
    waiting.add_done_callback(told.append)
    assert begun.wait(30)
    assert not readers.close(0.01), "a call still runs"
    assert told == [waiting]
    with pytest.raises(CancelledError):
        waiting.result(30)
    with pytest.raises(StoreClosedError):
        readers.submit(lambda: True)
    go.set()
    assert running.result(30)
    assert readers.close(30)


def test_threads_do_not_keep_the_process_alive() -> None:
    readers = Readers("test", 1)
    readers.submit(lambda: None).result(30)
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "test")
    assert readers.close(None)
