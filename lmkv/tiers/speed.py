"""How long a tier will take for so many bytes, by what it took before."""

from __future__ import annotations

import itertools
import statistics
import threading
from collections import deque

__all__ = ["ReadSpeed"]

#: Loads that are remembered, the last ones.
_KEPT = 24
#: As many loads must be known before anything is said.
_ENOUGH = 3
#: Of so many decisions against a tier one is not followed: it may have become faster.
_TRY_AGAIN = 16
#: Two loads tell latency from bandwidth if one is larger than the other by at least this factor.
_APART = 1.25


class ReadSpeed:
    """Latency and bandwidth of loads from one tier: the median line through the last ones (Theil and Sen), which a few that
    were held up do not move. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._loads: deque[tuple[int, float]] = deque(maxlen=_KEPT)
        self._lock = threading.Lock()
        self._line: tuple[float, float] | None = None
        self._refused = 0

    def add(self, size: int, seconds: float) -> None:
        """So many bytes came within so many seconds."""
        if size > 0 and seconds > 0:
            with self._lock:
                self._loads.append((size, seconds))
                self._line = None

    def seconds(self, size: int) -> float | None:
        """How long so many bytes will take; ``None`` while too little is known."""
        with self._lock:
            if len(self._loads) < _ENOUGH:
                return None
            if self._line is None:
                self._line = self._fit()
            latency, per_byte = self._line
        return latency + per_byte * size

    def refused(self) -> bool:
        """Note that the tier would be passed over; ``True`` if it should be read this once, to see."""
        with self._lock:
            self._refused += 1
            return self._refused % _TRY_AGAIN == 0

    def _fit(self) -> tuple[float, float]:
        slopes = [
            (b[1] - a[1]) / (b[0] - a[0])
            for a, b in itertools.combinations(self._loads, 2)
            if max(a[0], b[0]) >= _APART * min(a[0], b[0])
        ]
        per_byte = statistics.median(slopes) if slopes else 0.0
        if per_byte <= 0.0:  # loads of one size say nothing of others: as if there were no latency
            return 0.0, statistics.median(seconds / size for size, seconds in self._loads)
        return max(0.0, statistics.median(seconds - per_byte * size for size, seconds in self._loads)), per_byte
