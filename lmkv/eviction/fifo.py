"""First in, first out: what came first goes first, however often it is used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator
from itertools import islice
from typing import ClassVar

from ..chunks import ChunkKey

__all__ = ["FIFO"]


class FIFO:
    """A queue; every operation is O(1), ``victims`` O(n + pinned keys met). About 90 bytes a key beside the key itself.

    Args:
        capacity: chunks the tier holds; this policy does not need it.
    """

    newest_first: ClassVar[bool] = False

    def __init__(self, capacity: int) -> None:
        self._order: OrderedDict[ChunkKey, None] = OrderedDict()

    def insert(self, key: ChunkKey) -> None:
        """Put a new key last."""
        self._order[key] = None

    def touch(self, key: ChunkKey) -> None:
        """Nothing: uses don't count here."""

    def defer(self, key: ChunkKey) -> None:
        """Put a key that can't go yet last."""
        self._order.move_to_end(key)

    def remove(self, key: ChunkKey) -> None:
        """Take a key out of the queue."""
        del self._order[key]

    def _candidates(self) -> Iterator[ChunkKey]:
        """All keys, first to go first."""
        return iter(self._order)

    def victims(self, n: int, pinned: Container[ChunkKey]) -> list[ChunkKey] | None:
        """The first ``n`` keys that are not pinned, or ``None`` if there are fewer."""
        if n > len(self._order):
            return None
        chosen = list(islice((key for key in self._candidates() if key not in pinned), n))
        return chosen if len(chosen) == n else None

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, key: object) -> bool:
        return key in self._order

    def __iter__(self) -> Iterator[ChunkKey]:
        return iter(self._order)

    def _check(self) -> None:
        assert len(list(self._candidates())) == len(self._order), "the queue's links and its table disagree"
