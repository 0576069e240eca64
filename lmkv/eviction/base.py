"""What an eviction policy is, and what chain-aware eviction asks of the index.

A policy owns an order over keys and nothing else: no storage, no sizes, no clock. The tier that uses it guarantees that
``insert`` comes once before any ``touch`` of a key, that ``remove`` ends it (whether evicted or deleted), and that calls never
overlap. A policy registers under the entry point group ``lmkv.policies``; ``lmkv.testing.PolicySuite`` is its contract.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Protocol, runtime_checkable

from ..chunks import ChunkKey

__all__ = ["ChainLinks", "EvictionPolicy"]


@runtime_checkable
class EvictionPolicy(Protocol):
    """The order in which chunks go."""

    # Chunks of one text are inserted and touched last to first, so that an extension ranks as older than what it extends;
    # a policy that evicts the newest first (MRU) says so here and gets them first to last.
    @property
    def newest_first(self) -> bool:
        """Whether chunks of one text come first to last."""
        ...

    def insert(self, key: ChunkKey) -> None:
        """Admit a key that is not held. Amortised O(1) or O(log n)."""

    def touch(self, key: ChunkKey) -> None:
        """Count one use of a held key."""

    def remove(self, key: ChunkKey) -> None:
        """Forget a held key: it was evicted or deleted."""

    def victims(self, n: int, pinned: Container[ChunkKey]) -> list[ChunkKey] | None:
        """The ``n`` held keys to evict next, none of them in ``pinned``, first to go first; ``None`` if there are fewer.

        Forgets nothing by itself: the caller removes those it evicts, or changes its mind.
        """

    def __len__(self) -> int:
        """How many keys are held."""

    def __contains__(self, key: object) -> bool:
        """Whether a key is held."""

    def __iter__(self) -> Iterator[ChunkKey]:
        """All held keys, in no promised order."""

    def _check(self) -> None:
        """Assert every invariant of the structure; for tests."""


class ChainLinks(Protocol):
    """What chain-aware eviction must know of the index: who extends whom among the held chunks."""

    def parent_of(self, key: ChunkKey) -> ChunkKey | None:
        """The held chunk that ``key`` extends; ``None`` if it extends none that is held."""

    def children_count(self, key: ChunkKey) -> int:
        """How many held chunks extend ``key`` directly."""
