"""Several transfers in flight, on threads that nobody has to wait for at the end of the process."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

__all__ = ["IoQueue"]

Result = TypeVar("Result")


class _Batch:
    """Calls of one caller, taken by whichever thread is free."""

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self.results: list[object] = [None] * len(calls)
        self.errors: list[BaseException] = []
        self._calls = calls
        self._next = 0
        self._left = len(calls)
        self._lock = threading.Lock()
        self.done = threading.Event()

    def work(self) -> None:
        """Make calls until none is left to begin."""
        while True:
            with self._lock:
                if self._next == len(self._calls):
                    return
                number, self._next = self._next, self._next + 1
            try:
                self.results[number] = self._calls[number]()
            except BaseException as error:  # whoever waits has to learn of it
                self.errors.append(error)
            with self._lock:
                self._left -= 1
                last = not self._left
            if last:
                self.done.set()


class IoQueue:
    """Up to ``depth`` calls at once, the caller's own thread among them.

    Args:
        name: the threads' name.
        depth: how many calls of one batch run at once.
    """

    def __init__(self, name: str, depth: int) -> None:
        self._name = name
        self._helpers = depth - 1
        self._batches: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def run(self, calls: Sequence[Callable[[], Result]]) -> list[Result]:
        """Results in the order of the calls. Returns, or raises the first error, only when none of them runs any more."""
        if len(calls) < 2 or not self._helpers:
            return [call() for call in calls]
        batch = _Batch(calls)
        helpers = min(self._helpers, len(calls) - 1)
        with self._lock:
            while len(self._threads) < helpers:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._threads.append(thread)
                thread.start()
        for _ in range(helpers):
            self._batches.put(batch)
        batch.work()
        batch.done.wait()
        if batch.errors:
            raise batch.errors[0]
        return batch.results  # type: ignore[return-value]  # each is what its call returned

    def close(self) -> None:
        """End the threads, once they have nothing to do. Nobody waits for one that hangs."""
        with self._lock:
            for _ in self._threads:
                self._batches.put(None)
            self._threads.clear()

    def _run(self) -> None:
        while True:
            batch = self._batches.get()
            if batch is None:
                return
            batch.work()
            del batch
