"""Asking a slow tier beside the caller, on threads that nobody has to wait for."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from ..errors import StoreClosedError

__all__ = ["Readers"]

Result = TypeVar("Result")


class Readers:
    """Up to ``limit`` threads, started as they are needed.

    Unlike those of ``concurrent.futures`` they are daemons and :meth:`close` takes a time limit: a backend that hangs must
    keep neither a store from closing nor the process from ending.

    Args:
        name: the threads' name.
        limit: calls that run at once; the others wait their turn.
    """

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._waiting: collections.deque[tuple[Future[Any], Callable[[], Any]]] = collections.deque()
        self._idle = 0
        self._closed = False
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def submit(self, call: Callable[[], Result]) -> Future[Result]:
        """Make the call on one of the threads.

        Raises:
            StoreClosedError: the threads were ended.
        """
        future: Future[Result] = Future()
        with self._changed:
            if self._closed:
                raise StoreClosedError("expected an open tier; it was closed")
            self._waiting.append((future, call))
            if self._idle < len(self._waiting) and len(self._threads) < self._limit:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._threads.append(thread)
                thread.start()
            self._changed.notify()
        return future

    def close(self, timeout: float | None) -> bool:
        """Cancel what waits and end the threads; ``False`` if a call still runs after ``timeout`` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for future, _ in waiting:
            future.cancel()
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                self._changed.wait_for(lambda: self._waiting or self._closed)
                self._idle -= 1
                if not self._waiting:
                    return
                future, call = self._waiting.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = call()
            except BaseException as error:  # whoever waits for the future has to learn of it
                future.set_exception(error)
            else:
                future.set_result(result)
            del future, call
