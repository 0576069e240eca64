"""Chain-aware eviction: a chunk goes only after those that extend it.

A chunk whose predecessor is gone can't be found any more, so evicting a parent first wastes the room of all its children.
:class:`ChainAware` puts that rule around any policy; :class:`ChainTable` is the memory of who extends whom for tiers that
keep no index of prefixes in RAM.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator
from itertools import islice
from typing import ClassVar, Protocol, runtime_checkable

from ..chunks import ChunkKey
from .base import ChainLinks, EvictionPolicy

__all__ = ["ChainAware", "ChainTable", "Deferring"]


@runtime_checkable
class Deferring(Protocol):
    """What a policy may offer beside its contract, so that old parents don't stand in the way of every later choice."""

    def defer(self, key: ChunkKey) -> None:
        """A held key's turn came, but others that are held extend it: place it so that it is asked about after them.

        Keys come in an order in which each stands before those that it extends. Never called for a pinned key.
        """


class _HeldBack:
    """The ``pinned`` of one question to a policy: the caller's own, what is chosen already, and parents of held chunks.

    Nearly every policy asks about its keys in the order of its choice and takes each one that is free. So a key that is
    offered counts as chosen at once (``hopeful``), which frees its parent within the same question. Whether that was right
    shows in the answer.
    """

    __slots__ = ("_chosen", "_gone", "_hopeful", "_links", "_pinned", "held", "offered")

    def __init__(self, links: ChainLinks, pinned: Container[ChunkKey], chosen: Iterable[ChunkKey], hopeful: bool) -> None:
        self._links = links
        self._pinned = pinned
        self._chosen = set(chosen)
        self._hopeful = hopeful
        self._gone: dict[ChunkKey, int] = {}  # parent -> children that are chosen
        self.offered: dict[ChunkKey, None] = {}  # in the order of asking
        self.held: dict[ChunkKey, None] = {}
        for key in self._chosen:
            self._count(key)

    def _count(self, key: ChunkKey) -> None:
        parent = self._links.parent_of(key)
        if parent is not None:
            self._gone[parent] = self._gone.get(parent, 0) + 1

    def is_parent(self, key: ChunkKey) -> bool:
        """Whether a held chunk that is not chosen extends ``key``."""
        return self._links.children_count(key) > self._gone.get(key, 0)

    def __contains__(self, key: object) -> bool:
        assert isinstance(key, bytes)
        name = ChunkKey(key)
        if name in self.offered:
            return False
        if name in self._chosen or name in self._pinned:
            return True
        if self.is_parent(name):
            self.held[name] = None
            return True
        self.offered[name] = None
        if self._hopeful:
            self._count(name)
        return False


class ChainAware:
    """Any policy, with parents kept until their last held child goes.

    A key that is pinned keeps its whole chain up to the first chunk. Victims come in an order in which every chunk stands
    before the one that it extends. Costs two questions to ``links`` a victim; parents that are met on the way are deferred
    where the policy is :class:`Deferring`, and passed over again and again where it is not.

    Args:
        policy: whose order it is; from now on it is used through this object only.
        links: who extends whom among the keys of this policy; kept by the tier, and complete whenever victims are asked for.
            A child that is counted there but not held here keeps its parent for good.
    """

    newest_first: ClassVar[bool] = False

    def __init__(self, policy: EvictionPolicy, links: ChainLinks) -> None:
        self._policy = policy
        self._links = links
        self._deferring = policy if isinstance(policy, Deferring) else None
        self.newest_first = policy.newest_first  # type: ignore[misc]  # a wrapper's answer is that of its policy

    def insert(self, key: ChunkKey) -> None:
        """Admit a key that is not held."""
        self._policy.insert(key)

    def touch(self, key: ChunkKey) -> None:
        """Count one use of a held key."""
        self._policy.touch(key)

    def remove(self, key: ChunkKey) -> None:
        """Forget a held key."""
        self._policy.remove(key)

    def victims(self, n: int, pinned: Container[ChunkKey]) -> list[ChunkKey] | None:
        """As :meth:`EvictionPolicy.victims`, each key after all held keys that extend it."""
        if n > len(self._policy):
            return None
        chosen: list[ChunkKey] = []
        hopeful = True
        while True:
            view = _HeldBack(self._links, pinned, chosen, hopeful)
            answer = self._policy.victims(n - len(chosen), view)
            if answer is None:  # fewer than wanted are free, so all of them go, and those that only they held back are next
                answer = list(view.offered)
            elif hopeful and answer != list(islice(view.offered, len(answer))):
                hopeful = False  # it asks about more keys than it takes, so a parent may be among them without its child
                continue
            self._defer(view)
            chosen += answer
            if len(chosen) >= n:
                return chosen
            if not answer:
                return None

    def _defer(self, view: _HeldBack) -> None:
        """Move the parents that were met and still have children, each after those of them that extend it."""
        if self._deferring is None:
            return
        order: dict[ChunkKey, None] = {}  # parents first
        for key in reversed(view.held):
            line: list[ChunkKey] = []
            up: ChunkKey | None = key
            while up in view.held and up not in order:
                line.append(up)
                up = self._links.parent_of(up)
            order.update(dict.fromkeys(reversed(line)))
        for key in reversed(order):
            if view.is_parent(key):
                self._deferring.defer(key)

    def __len__(self) -> int:
        return len(self._policy)

    def __contains__(self, key: object) -> bool:
        return key in self._policy

    def __iter__(self) -> Iterator[ChunkKey]:
        return iter(self._policy)

    def _check(self) -> None:
        self._policy._check()


class ChainTable:
    """Who extends whom among held chunks, and nothing else: 75 to 150 bytes a chunk, where parents are given as the same
    key objects as the chunks themselves.

    A child may come before its parent; the link counts from when both are there. A parent may also go before its child.
    """

    __slots__ = ("_children", "_parents")

    def __init__(self) -> None:
        self._parents: dict[ChunkKey, ChunkKey | None] = {}
        self._children: dict[ChunkKey, int] = {}  # also of parents that are not held; no zeros

    def add(self, key: ChunkKey, parent: ChunkKey | None) -> None:
        """Note a chunk and the one that it extends, ``None`` for the first of a text. A chunk that is known stays as it is."""
        if key in self._parents:
            return
        self._parents[key] = parent
        if parent is not None:
            self._children[parent] = self._children.get(parent, 0) + 1

    def discard(self, key: ChunkKey) -> None:
        """Forget a chunk; nothing happens if it is not known."""
        parent = self._parents.pop(key, None)
        if parent is None:
            return
        left = self._children[parent] - 1
        if left:
            self._children[parent] = left
        else:
            del self._children[parent]

    def parent_of(self, key: ChunkKey) -> ChunkKey | None:
        """The held chunk that ``key`` extends; ``None`` if it extends none that is held."""
        parent = self._parents.get(key)
        return parent if parent in self._parents else None

    def children_count(self, key: ChunkKey) -> int:
        """How many held chunks extend ``key`` directly."""
        return self._children.get(key, 0)

    def __len__(self) -> int:
        return len(self._parents)

    def __contains__(self, key: object) -> bool:
        return key in self._parents

    def _check(self) -> None:
        counted = Counter(parent for parent in self._parents.values() if parent is not None)
        assert counted == self._children, "the numbers of children are not those of the parents on record"
