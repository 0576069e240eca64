"""S3-FIFO: a small queue for newcomers, a main queue for what was used again, and a memory of what left too early.

Yang, Zhang, Qiu, Yue, Vinayak: "FIFO queues are all you need for cache eviction", SOSP 2023. Differs from the paper in that
one use in the small queue is enough for the main queue, not two: a chunk's use is a whole request, not one memory access.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator
from itertools import chain
from typing import ClassVar

from ..chunks import ChunkKey

__all__ = ["S3FIFO"]

#: The small queue's share of the capacity is one in so many (section 4 of the paper).
_SMALL_SHARE = 10
#: Uses beyond this many don't count.
_MAX_USES = 3


class S3FIFO:
    """Small queue 10 % of the capacity, ghost queue as long as the main queue.

    Every operation is amortised O(1): a use pays for at most one more round in the main queue. About 90 bytes a key beside
    the key itself, and 140 for each key in the ghost queue.

    Args:
        capacity: chunks the tier holds.
    """

    newest_first: ClassVar[bool] = False

    def __init__(self, capacity: int) -> None:
        self._small_size = max(1, capacity // _SMALL_SHARE)
        self._ghost_size = max(0, capacity - self._small_size)
        self._small: OrderedDict[ChunkKey, int] = OrderedDict()  # key -> uses since it came into the queue
        self._main: OrderedDict[ChunkKey, int] = OrderedDict()
        self._ghost: OrderedDict[ChunkKey, None] = OrderedDict()
        # Victims that the small queue gives although it is not too long, one for each deferred key of the main queue: else a
        # main queue full of keys that can't go would be searched in vain for every victim.
        self._owed = 0

    def insert(self, key: ChunkKey) -> None:
        """Put a new key into the small queue, or into the main queue if it left the small one not long ago."""
        if key in self._ghost:
            del self._ghost[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def touch(self, key: ChunkKey) -> None:
        """Count a use."""
        queue = self._small if key in self._small else self._main
        queue[key] = min(queue[key] + 1, _MAX_USES)

    def defer(self, key: ChunkKey) -> None:
        """Put a key that can't go yet last in the main queue; if it was there already, the small queue owes one victim."""
        if key in self._small:
            self._main[key] = self._small.pop(key)
        else:
            self._main.move_to_end(key)
            self._owed = min(self._owed + 1, len(self._small))

    def remove(self, key: ChunkKey) -> None:
        """Forget a key; the ghost queue remembers it if it was in the small one."""
        if key in self._main:
            del self._main[key]
            return
        del self._small[key]
        self._owed = max(0, self._owed - 1)
        self._ghost[key] = None
        if len(self._ghost) > self._ghost_size:
            self._ghost.popitem(last=False)

    def victims(self, n: int, pinned: Container[ChunkKey]) -> list[ChunkKey] | None:
        """The ``n`` keys to evict next, or ``None`` if fewer are not pinned; used keys met on the way move on."""
        small, main = self._small, self._main
        if n > len(small) + len(main):
            return None
        chosen: list[ChunkKey] = []
        aside: list[tuple[OrderedDict[ChunkKey, int], ChunkKey]] = []  # chosen or pinned: to be put back where they were
        owed = self._owed
        try:
            while len(chosen) < n and (small or main):
                queue = small if small and (len(small) > self._small_size or owed or not main) else main
                key, uses = queue.popitem(last=False)
                if uses:
                    main[key] = 0 if queue is small else uses - 1
                    continue
                aside.append((queue, key))
                if key not in pinned:
                    chosen.append(key)
                    owed = max(0, owed - 1) if queue is small else owed
        finally:
            for queue, key in reversed(aside):
                queue[key] = 0
                queue.move_to_end(key, last=False)
        return chosen if len(chosen) == n else None

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def __contains__(self, key: object) -> bool:
        return key in self._small or key in self._main

    def __iter__(self) -> Iterator[ChunkKey]:
        return chain(self._small, self._main)

    def _check(self) -> None:
        small, main, ghost = set(self._small), set(self._main), set(self._ghost)
        assert not small & main, "a key is in both queues"
        assert not ghost & (small | main), "a held key is in the ghost queue"
        assert len(ghost) <= self._ghost_size, "the ghost queue is too long"
        assert all(0 <= uses <= _MAX_USES for uses in chain(self._small.values(), self._main.values())), "uses out of range"
