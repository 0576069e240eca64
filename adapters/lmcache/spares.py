"""Memory for values to come, touched before they come.

The first write to a page of fresh memory is a page fault, and where the machine is a virtual one perhaps another in its host: a
value received into fresh memory was seen to take several times as long as into touched memory (docs/benchmarks.md).
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import Any

import numpy as np

__all__ = ["Spares"]

_PAGE = 4096
#: Smaller values come out of memory that the allocator keeps.
_LEAST = 256 * 1024

Room = np.ndarray[Any, np.dtype[np.uint8]]


class Spares:
    """Rooms of the sizes that were asked for last, made ready beside the caller.

    Args:
        most_bytes: that are ready at a time; 0 for none.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._ready: list[Room] = []
        self._size = 0
        self._held = 0
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None

    def take(self, size: int) -> Room:
        """Room for a value, ready or fresh.

        Raises:
            MemoryError: there is none.
        """
        if size < _LEAST or size > self._most:
            return np.empty(size, np.uint8)
        with self._change:
            if size != self._size:  # values of one model are mostly of one size
                self._size = size
                self._ready.clear()
                self._held = 0
            room = self._ready.pop() if self._ready else None
            self._held -= size if room is not None else 0
            if self._thread is None:
                self._thread = threading.Thread(target=self._make, name="lmkv-serve-spares", daemon=True)
                self._thread.start()
            self._change.notify()
        return np.empty(size, np.uint8) if room is None else room

    def _make(self) -> None:
        if sys.platform == "linux":  # where this is the thread's own: it is for processors that have nothing else to do
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        while True:
            with self._change:
                while not self._size or self._held + self._size > self._most:
                    self._change.wait()
                size = self._size
            try:
                room: Room = np.empty(size, np.uint8)
            except MemoryError:
                with self._change:
                    self._size = 0  # until a value comes again
                continue
            room[::_PAGE] = 0
            with self._change:
                if size == self._size and self._held + size <= self._most:
                    self._ready.append(room)
                    self._held += size
