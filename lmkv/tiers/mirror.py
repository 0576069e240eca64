"""What a bounded slow tier holds, as far as eviction and search by content need it in RAM.

The storage itself knows best: it numbers every write and touch, and this view catches up by reading what has a higher number
than it has seen. So several processes on one directory agree without talking to each other, and opening a large directory costs
nothing until the first eviction.
"""

from __future__ import annotations

from collections.abc import Callable, Container

import numpy as np

from ..backends.base import Bounded, Renewing
from ..chunks import ChunkKey
from ..eviction.base import EvictionPolicy
from ..eviction.chain import ChainTable
from ..eviction.priority import ByPriority
from ..index import ContentIndex

__all__ = ["Mirror"]


class Mirror:
    """Order of eviction, chain links and content fingerprints of a tier. Not thread-safe by itself.

    Args:
        backend: where the truth is.
        make_policy: a fresh, empty policy.
        chain_aware: whether chunks go only after those that extend them.
    """

    def __init__(self, backend: Bounded, make_policy: Callable[[], EvictionPolicy], chain_aware: bool) -> None:
        self._backend = backend
        self._make_policy = make_policy
        self._chain_aware = chain_aware
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next :meth:`sync` reads all."""
        self._links = ChainTable()
        self._priorities: dict[ChunkKey, int] = {}  # those that are not 0
        links = self._links if self._chain_aware else None
        self.policy: EvictionPolicy = ByPriority(self._make_policy, lambda key: self._priorities.get(key, 0), links)
        self.content = ContentIndex()
        self._seen = 0
        self._generation = self._backends_generation()
        self._next = 0
        self._numbers: dict[ChunkKey, tuple[int, int]] = {}  # key -> number in the content index, fingerprint
        self._by_number: dict[int, tuple[ChunkKey, ChunkKey, int]] = {}  # number -> key, root, start

    def _backends_generation(self) -> int:
        return self._backend.generation if isinstance(self._backend, Renewing) else 0

    def sync(self) -> None:
        """Catch up with what this and other processes wrote and touched."""
        if self._generation != self._backends_generation():
            self.reset()
        for entry in self._backend.entries(self._seen):
            self._seen = entry.sequence
            if entry.key in self.policy:
                self.policy.touch(entry.key)
                continue
            if entry.priority:
                self._priorities[entry.key] = entry.priority
            self.policy.insert(entry.key)
            self._links.add(entry.key, entry.parent)
            if entry.fingerprint:
                number, self._next = self._next, self._next + 1
                self._numbers[entry.key] = (number, entry.fingerprint)
                self._by_number[number] = (entry.key, entry.root, entry.start)
                self.content.add(np.array([entry.fingerprint], dtype=np.uint64), [number])

    def key_of(self, number: int) -> tuple[ChunkKey, ChunkKey, int] | None:
        """Key, namespace root and start behind a value of the content index."""
        return self._by_number.get(number)

    def victims(self, n: int, protected: Container[ChunkKey]) -> list[ChunkKey]:
        """Up to ``n`` keys to evict next."""
        while n > 0:
            found = self.policy.victims(n, protected)
            if found is not None:
                return found
            n //= 2
        return []

    def remove(self, key: ChunkKey) -> None:
        """A key is gone."""
        if key not in self.policy:
            return
        self.policy.remove(key)
        self._links.discard(key)
        self._priorities.pop(key, None)
        number, fingerprint = self._numbers.pop(key, (-1, 0))
        if number >= 0:
            del self._by_number[number]
            self.content.discard(fingerprint, number)

    def _check(self) -> None:
        self.policy._check()
        self._links._check()
        self.content._check()
        assert {number for number, _ in self._numbers.values()} == set(self._by_number)
