"""Memory for values to come, touched before they come, and that of values that went.

The first write to a page of fresh memory is a page fault, and where the machine is a virtual one perhaps another in its host: a
value received into fresh memory was seen to take several times as long as into touched memory (docs/benchmarks.md).
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import weakref
from collections import deque
from typing import Any

import numpy as np

from lmkv.backends.lm_shared import LEAST_BYTES, Arena

__all__ = ["Spares"]

_PAGE = 4096
#: Values of other sizes that come one after the other before rooms are made ready for them.
_MOST_VOTES = 8

Room = np.ndarray[Any, np.dtype[np.uint8]]


class Spares:
    """Rooms of the size that is asked for most, made ready beside the caller, or given out before and not used any more.

    Args:
        most_bytes: that are ready at a time; 0 for none.
        arena: where they are, as long as it has places.
    """

    def __init__(self, most_bytes: int, arena: Arena | None = None) -> None:
        self._arena = arena
        self._most = most_bytes
        self._ready: list[Room] = []
        #: What came back since; without a lock, as the last use may end anywhere.
        self._back: deque[Room] = deque()
        self._size = self._votes = 0
        self._held = 0
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None

    def take(self, size: int) -> memoryview:
        """Room for a value, ready or fresh; it is given out again when nothing refers to it any more.

        Raises:
            MemoryError: there is none.
        """
        if size < LEAST_BYTES or size > self._most:
            return memoryview(np.empty(size, np.uint8))
        with self._change:
            if size == self._size:
                self._votes = min(self._votes + 1, _MOST_VOTES)
            elif self._votes:  # values of one model are mostly of one size, but for the last one of a text
                self._votes -= 1
                return memoryview(np.empty(size, np.uint8))
            else:
                self._size, self._votes = size, 1
                self._ready.clear()
                self._held = 0
            while self._back:
                self._keep(self._back.pop())
            memory = self._ready.pop() if self._ready else None
            self._held -= size if memory is not None else 0
            if self._thread is None:
                self._thread = threading.Thread(target=self._make, name="lmkv-serve-spares", daemon=True)
                self._thread.start()
            self._change.notify()
        if memory is None:  # in an arena, pages that nobody touched yet cost more than a client saves
            memory = np.empty(size, np.uint8)
            if self._arena is not None:
                return memoryview(memory)
        room = memory.view()
        weakref.finalize(room, self._return, memory).atexit = False
        return memoryview(room)  # whose parts keep it in use, as an array's would not: they refer to the memory

    def _return(self, memory: Room) -> None:
        """Called when the last use ends, with any lock held."""
        if len(memory) == self._size and self._wants(self._most):
            self._back.append(memory)

    def _wants(self, level: int) -> bool:
        ahead = self._held + len(self._back) * self._size
        return ahead <= level and ahead + self._size <= self._most

    def _keep(self, memory: Room) -> None:
        if len(memory) == self._size and self._held + self._size <= self._most:
            self._ready.append(memory)
            self._held += self._size

    def _make(self) -> None:
        if sys.platform == "linux":  # where this is the thread's own: it is for processors that have nothing else to do
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        level = self._most
        while True:
            with self._change:
                while not self._size or not self._wants(level):
                    level = self._most // 2  # where values are replaced, their memory comes back before that
                    self._change.wait()
                level = self._most
                size = self._size
            try:
                room = None if self._arena is None else self._arena.room(size)
                made: Room = np.empty(size, np.uint8) if room is None else room
            except MemoryError:
                with self._change:
                    self._size = self._votes = 0  # until a value comes again
                continue
            if self._arena is not None and room is not None:
                self._arena.touch(room)
            else:
                made[::_PAGE] = 0
            with self._change:
                self._keep(made)
