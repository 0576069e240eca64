"""Priorities around any policy: chunks of a lower one go first, those of one priority by the policy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator
from typing import ClassVar

from ..chunks import ChunkKey
from .base import ChainLinks, EvictionPolicy
from .chain import ChainAware

__all__ = ["PRIORITIES", "ByPriority"]

#: What a priority may be; 0 is the usual one.
PRIORITIES = range(256)


class _Also:
    """``pinned``, and what is chosen already."""

    __slots__ = ("_chosen", "_pinned")

    def __init__(self, pinned: Container[ChunkKey], chosen: set[ChunkKey]) -> None:
        self._pinned = pinned
        self._chosen = chosen

    def __contains__(self, key: object) -> bool:
        return key in self._chosen or key in self._pinned


class _Left:
    """Who extends whom among the keys that are held and not chosen yet."""

    def __init__(self, links: ChainLinks) -> None:
        self._links = links
        self.chosen_children: Counter[ChunkKey] = Counter()

    def parent_of(self, key: ChunkKey) -> ChunkKey | None:
        """See :class:`lmkv.eviction.base.ChainLinks`."""
        return self._links.parent_of(key)

    def children_count(self, key: ChunkKey) -> int:
        """See :class:`lmkv.eviction.base.ChainLinks`."""
        return self._links.children_count(key) - self.chosen_children[key]


class ByPriority:
    """A policy for each priority that is in use. As long as that is one, it costs one look at a dictionary.

    Args:
        make: a fresh, empty policy.
        priority_of: asked once for each key, when it is inserted; one of :data:`PRIORITIES`.
        links: who extends whom, for chain-aware eviction: a chunk stays with what extends it, whatever its own priority.
            ``None`` for the policies alone.
    """

    newest_first: ClassVar[bool] = False

    def __init__(
        self, make: Callable[[], EvictionPolicy], priority_of: Callable[[ChunkKey], int], links: ChainLinks | None = None
    ) -> None:
        self._make = make
        self._priority_of = priority_of
        self._left = None if links is None else _Left(links)
        self._usual = self._level()
        self._levels: dict[int, EvictionPolicy] = {0: self._usual}
        self._raised: dict[ChunkKey, EvictionPolicy] = {}  # those of other priorities than 0
        self.newest_first = self._usual.newest_first  # type: ignore[misc]  # the answer of its policies

    def _level(self) -> EvictionPolicy:
        policy = self._make()
        return policy if self._left is None else ChainAware(policy, self._left)

    def insert(self, key: ChunkKey) -> None:
        """Admit a key that is not held."""
        level = self._priority_of(key)
        if not level:
            self._usual.insert(key)
            return
        if level not in self._levels:
            self._levels[level] = self._level()
        policy = self._raised[key] = self._levels[level]
        policy.insert(key)

    def touch(self, key: ChunkKey) -> None:
        """Count one use of a held key."""
        self._raised.get(key, self._usual).touch(key)

    def remove(self, key: ChunkKey) -> None:
        """Forget a held key."""
        self._raised.pop(key, self._usual).remove(key)

    def victims(self, n: int, pinned: Container[ChunkKey]) -> list[ChunkKey] | None:
        """As :meth:`EvictionPolicy.victims`, lower priorities first.

        A chunk that is free only once others of a higher priority are chosen is chosen after those.
        """
        if not self._raised:
            return self._usual.victims(n, pinned)
        if n > len(self):
            return None
        chosen: list[ChunkKey] = []
        try:
            while len(chosen) < n:
                before = len(chosen)
                for level in sorted(self._levels):
                    self._choose(self._levels[level], n, pinned, chosen)
                if len(chosen) == before:
                    return None
        finally:
            if self._left is not None:
                self._left.chosen_children.clear()
        return chosen

    def _choose(self, policy: EvictionPolicy, n: int, pinned: Container[ChunkKey], chosen: list[ChunkKey]) -> None:
        """Add to ``chosen`` as many victims as there are, until it has ``n``."""
        ask = min(n - len(chosen), len(policy))
        while ask > 0:
            found = policy.victims(ask, _Also(pinned, set(chosen)) if chosen else pinned)
            if found is None:
                ask //= 2
                continue
            chosen += found
            if self._left is not None:
                parents = (self._left.parent_of(key) for key in found)
                self._left.chosen_children.update(parent for parent in parents if parent is not None)
            ask = min(ask, n - len(chosen))

    def __len__(self) -> int:
        return sum(map(len, self._levels.values()))

    def __contains__(self, key: object) -> bool:
        return key in self._usual or key in self._raised

    def __iter__(self) -> Iterator[ChunkKey]:
        yield from self._usual
        yield from self._raised

    def _check(self) -> None:
        for policy in self._levels.values():
            policy._check()
        assert all(key in policy for key, policy in self._raised.items())
        assert len(self) == len(self._usual) + len(self._raised)
