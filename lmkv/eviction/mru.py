"""Most recently used: what was used last goes first. Keeps a part of a loop that is longer than the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from ..chunks import ChunkKey
from .fifo import FIFO

__all__ = ["MRU"]


class MRU(FIFO):
    """A queue in which every use puts a key last, and the last go first."""

    newest_first: ClassVar[bool] = True

    def touch(self, key: ChunkKey) -> None:
        """Put a used key last: it is the next to go."""
        self._order.move_to_end(key)

    def defer(self, key: ChunkKey) -> None:
        """Put a key that can't go yet at the far end."""
        self._order.move_to_end(key, last=False)

    def _candidates(self) -> Iterator[ChunkKey]:
        return reversed(self._order)
