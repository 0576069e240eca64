"""Writing behind: committed chunks go to a slow tier from a thread of its own, so that storing never waits for it.

The queue is bounded. When it is full, or RAM needs the slots, the oldest waiting chunks are given up with an event: they stay
readable in RAM, the slow tier just never gets them.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

__all__ = ["Budget", "GivenUp", "WriteBehind"]

Item = TypeVar("Item")


class Budget:
    """Bytes that may be written in the long run, so that one-off prompts do not wear a device; used by one thread.

    Up to a second's worth may be saved up, and a batch may overdraw it: the next one waits until that is made good.

    Args:
        rate: bytes a second.
        clock: seconds that only go forward.
    """

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._left = float(rate)
        self._seen = clock()

    def spend(self, size: int) -> None:
        """So many bytes were written."""
        self._refill()
        self._left -= size

    def pause(self) -> float:
        """Seconds until more may be written."""
        self._refill()
        return max(0.0, -self._left / self._rate)

    def _refill(self) -> None:
        now = self._clock()
        self._left = min(float(self._rate), self._left + (now - self._seen) * self._rate)
        self._seen = now


class GivenUp:
    """Counts what was given up, and how much of that flushes have told of. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.count = self.told = 0

    def add(self, n: int) -> None:
        """So many items more."""
        with self._lock:
            self.count += n

    def none_since(self, told: int) -> bool:
        """Whether nothing came to the first ``told``; that is told from now on."""
        with self._lock:
            self.told = self.count
            return self.count == told

    def forgive(self) -> None:
        """Nobody has to be told of what was given up so far."""
        with self._lock:
            self.told = self.count


class WriteBehind(Generic[Item]):
    """A bounded queue and the thread that empties it, started with the first item.

    Args:
        name: the thread's name.
        limit: items that may wait.
        batch: items handed over at once.
        write: stores a batch; must not raise.
        give_up: told of items that will not be written, and why.
        pace: seconds that the next batch has to wait, asked before each one; who flushes or closes is not kept waiting.
    """

    def __init__(
        self,
        name: str,
        limit: int,
        batch: int,
        write: Callable[[list[Item]], None],
        give_up: Callable[[Sequence[Item], str], None],
        pace: Callable[[], float] | None = None,
    ) -> None:
        self._name = name
        self._limit = limit
        self._batch = batch
        self._write = write
        self._give_up = give_up
        self._pace = pace
        self._hurried = 0  # who flush
        self._waiting: collections.deque[Item] = collections.deque()
        self._busy = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        """Items that wait or are being written."""
        return len(self._waiting) + self._busy

    def put(self, items: Sequence[Item]) -> None:
        """Queue items; the oldest go if there are too many."""
        with self._changed:
            if self._closed:
                dropped, reason = list(items), "the store was closed"
            else:
                self._waiting.extend(items)
                over = len(self._waiting) - self._limit
                dropped = [self._waiting.popleft() for _ in range(over)]
                reason = f"more than {self._limit} chunks were waiting"
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                    self._thread.start()
                self._changed.notify_all()
        if dropped:
            self._give_up(dropped, reason)

    def drop_oldest(self, n: int, reason: str) -> int:
        """Give up to ``n`` waiting items up; returns how many."""
        with self._changed:
            dropped = [self._waiting.popleft() for _ in range(min(n, len(self._waiting)))]
            self._changed.notify_all()
        if dropped:
            self._give_up(dropped, reason)
        return len(dropped)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything queued so far is written or given up; ``False`` if ``timeout`` seconds were not enough."""
        with self._changed:
            self._hurried += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout)
            finally:
                self._hurried -= 1

    def close(self, timeout: float | None = None) -> bool:
        """Write what waits, for at most ``timeout`` seconds, then give the rest up and end the thread."""
        deadline = None if timeout is None else time.monotonic() + timeout
        done = self.flush(timeout)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.drop_oldest(len(self._waiting), "the store was closed before they could be written")
        if self._thread is not None:
            self._thread.join(None if deadline is None else max(0.1, deadline - time.monotonic()))
            done = done and not self._thread.is_alive()
        return done

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                delay = self._pace() if self._pace is not None and not self._hurried and not self._closed else 0.0
                if delay > 0:
                    self._changed.wait(delay)
                    continue
                items = [self._waiting.popleft() for _ in range(min(self._batch, len(self._waiting)))]
                self._busy = len(items)
            try:
                self._write(items)
            finally:
                with self._changed:
                    self._busy = 0
                    self._changed.notify_all()
