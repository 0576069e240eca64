"""Least frequently used since admission; among equals the least recently used goes first."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Container, Iterator
from itertools import chain, islice
from typing import ClassVar

from ..chunks import ChunkKey

__all__ = ["LFU"]


class LFU:
    """One queue for every number of uses.

    Operations are O(log c) for c different numbers of uses, at most the square root of twice the uses; ``victims`` is
    O(n + pinned keys met). About 90 bytes a key beside the key itself, 135 for one that was used again.

    Args:
        capacity: chunks the tier holds; this policy does not need it.
    """

    newest_first: ClassVar[bool] = False

    def __init__(self, capacity: int) -> None:
        self._uses: dict[ChunkKey, int] = {}  # of keys used again; most keys never are, and need no entry
        self._queues: dict[int, OrderedDict[ChunkKey, None]] = {}
        self._counts: list[int] = []  # keys of _queues, sorted
        self._held = 0

    def _put(self, key: ChunkKey, uses: int) -> None:
        queue = self._queues.get(uses)
        if queue is None:
            queue = self._queues[uses] = OrderedDict()
            insort(self._counts, uses)
        queue[key] = None

    def _take(self, key: ChunkKey, uses: int) -> None:
        queue = self._queues[uses]
        del queue[key]
        if not queue:
            del self._queues[uses]
            del self._counts[bisect_left(self._counts, uses)]

    def insert(self, key: ChunkKey) -> None:
        """Admit a key with one use: its admission."""
        self._put(key, 1)
        self._held += 1

    def _move(self, key: ChunkKey, uses: int, now: int) -> None:
        self._take(key, uses)
        self._uses[key] = now
        self._put(key, now)

    def touch(self, key: ChunkKey) -> None:
        """Count a use."""
        uses = self._uses.get(key, 1)
        self._move(key, uses, uses + 1)

    def defer(self, key: ChunkKey) -> None:
        """Double the uses of a key that can't go yet: it is worth what keeps it, and soon ranks behind that."""
        uses = self._uses.get(key, 1)
        self._move(key, uses, 2 * uses)

    def remove(self, key: ChunkKey) -> None:
        """Forget a key and its uses."""
        self._take(key, self._uses.pop(key, 1))
        self._held -= 1

    def victims(self, n: int, pinned: Container[ChunkKey]) -> list[ChunkKey] | None:
        """The ``n`` least used keys that are not pinned, or ``None`` if there are fewer."""
        if n > self._held:
            return None
        chosen = list(islice((key for key in self if key not in pinned), n))
        return chosen if len(chosen) == n else None

    def __len__(self) -> int:
        return self._held

    def __contains__(self, key: object) -> bool:
        return key in self._uses or key in self._queues.get(1, ())

    def __iter__(self) -> Iterator[ChunkKey]:
        return chain.from_iterable(map(self._queues.__getitem__, self._counts))

    def _check(self) -> None:
        assert self._counts == sorted(self._queues), "the sorted counts are not those of the queues"
        assert all(self._queues.values()), "an empty queue was kept"
        assert self._held == sum(map(len, self._queues.values())), "the number of keys is wrong"
        again = {key: uses for uses, queue in self._queues.items() for key in queue if uses > 1}
        assert again == self._uses, "a key stands in the queue of another number of uses"
