"""A switch that takes a failing tier out of the way for a while (Nygard, *Release It!*, circuit breaker)."""

from __future__ import annotations

import threading
import time

from ..events import Emitter

__all__ = ["Breaker"]


class Breaker:
    """Counts failures in a row; opens at ``failures`` of them; after ``seconds`` lets one call through to try.

    Args:
        tier: named in events.
        emit: gets ``tier_failed``, ``tier_disabled`` and ``tier_enabled``.
    """

    def __init__(self, tier: str, failures: int, seconds: float, emit: Emitter) -> None:
        self._tier = tier
        self._limit = failures
        self._seconds = seconds
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
            self._in_a_row = 0
            self._trial = False
        if was_open:
            self._emit("tier_enabled", self._tier)

    def failure(self, operation: str, reason: str) -> None:
        """A call failed or came too late."""
        with self._lock:
            self._in_a_row += 1
            opened = self.open
            if opened:
                self._open_until = time.monotonic() + self._seconds
                self._trial = False
        self._emit("tier_failed", self._tier, operation=operation, reason=reason)
        if opened:
            self._emit("tier_disabled", self._tier, seconds=self._seconds, reason=reason)
