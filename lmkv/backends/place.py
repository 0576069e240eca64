"""Where a value is received to by threads that nobody waits for after the deadline: late bytes must not land there."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

__all__ = ["Place"]


class Place:
    """Where a value is to go, until its owner wants the memory back."""

    def __init__(self, view: memoryview) -> None:
        self._lock = threading.Lock()
        self._view: memoryview | None = view
        self.room = len(view)

    def put(self, begin: int, size: int, body: Any) -> bool:
        """Copy ``body``, which must have that size; ``False`` if it has not, or the place was withdrawn."""
        piece = memoryview(body)
        with self._lock:
            if self._view is None or len(piece) != size:
                return False
            if size:  # by numpy, which lets other threads run meanwhile
                np.copyto(np.frombuffer(self._view[begin : begin + size], np.uint8), np.frombuffer(piece, np.uint8))
            return True

    def withdraw(self) -> None:
        """After this nothing is written there any more."""
        with self._lock:
            self._view = None
