"""A switch that takes a failing tier out of the way for a while (Nygard, *Release It!*, circuit breaker).

Each time that it opens anew without a success in between it rests twice as long, with jitter, so that a short outage costs
little and many clients of one storage do not all come back at the same moment.
"""

from __future__ import annotations

import random
import threading
import time

from ..events import Emitter

__all__ = ["Breaker"]


class Breaker:
    """Counts failures in a row; opens at ``failures`` of them; after a while lets one call through to try.

    Args:
        tier: named in events.
        seconds: the longest rest.
        first_seconds: the first one, give or take a fifth; ``None`` rests for exactly ``seconds`` each time.
        emit: gets ``tier_failed``, ``tier_disabled`` and ``tier_enabled``.
    """

    def __init__(self, tier: str, failures: int, seconds: float, emit: Emitter, *, first_seconds: float | None = None) -> None:
        self._tier = tier
        self._limit = failures
        self._seconds = seconds
        self._first = first_seconds
        self._opened = 0
        self._emit = emit
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._open_until = 0.0
        self._trial = False

    @property
    def open(self) -> bool:
        """Whether the tier is left out now."""
        return self._in_a_row >= self._limit

    @property
    def resting(self) -> bool:
        """Whether a call would be refused now. Unlike :meth:`allows` it does not take the one call that is let through."""
        return self.open and (self._trial or time.monotonic() < self._open_until)

    def allows(self) -> bool:
        """Whether a call may go to the tier; every allowed one is answered by :meth:`success` or :meth:`failure`."""
        if self._in_a_row < self._limit:
            return True
        with self._lock:
            if self._trial or time.monotonic() < self._open_until:
                return False
            self._trial = True
            return True

    def success(self) -> None:
        """A call went well."""
        if self._in_a_row == 0:
            return
        with self._lock:
            was_open = self.open
            self._in_a_row = self._opened = 0
            self._trial = False
        if was_open:
            self._emit("tier_enabled", self._tier)

    def failure(self, operation: str, reason: str) -> None:
        """A call failed or came too late."""
        with self._lock:
            self._in_a_row += 1
            # late failures of calls that were begun before it opened neither prolong the rest nor are told as a new one
            opened = self.open and (self._trial or time.monotonic() >= self._open_until)
            if opened:
                seconds = self._rest()
                self._open_until = time.monotonic() + seconds
            self._trial = False
        self._emit("tier_failed", self._tier, operation=operation, reason=reason)
        if opened:
            self._emit("tier_disabled", self._tier, seconds=seconds, reason=reason)

    def _rest(self) -> float:
        if self._first is None:
            return self._seconds
        self._opened += 1
        return min(self._seconds, self._first * float(1 << min(self._opened - 1, 32)) * random.uniform(0.8, 1.2))
