"""Least recently used: what was not used for the longest time goes first."""

from __future__ import annotations

from ..chunks import ChunkKey
from .fifo import FIFO

__all__ = ["LRU"]


class LRU(FIFO):
    """A queue in which every use puts a key last."""

    def touch(self, key: ChunkKey) -> None:
        """Put a used key last."""
        self._order.move_to_end(key)
