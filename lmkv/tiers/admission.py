"""Which chunks a tier takes at all: those of prompts that never come again only wear a device."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import xxhash

from ..chunks import ChunkKey

__all__ = ["ADMISSIONS", "SeenOnce", "seen_size"]

#: ``all``: every chunk; ``second``: a chunk that was stored or used before.
ADMISSIONS = ("all", "second")
_WAYS = 4
_LEAST, _MOST = 4096, 1 << 20


def seen_size(chunks: int) -> int:
    """How many chunks a tier that holds ``chunks`` remembers: as many, from 4,096 (32 KiB) to 1,048,576 (8 MiB)."""
    return max(_LEAST, min(_MOST, chunks))


class SeenOnce:
    """Remembers keys in a table of fixed size, 8 bytes a key: a new one takes the place of the oldest of four.

    Keys are told apart by a hash of 64 bits; taking one for another only means that a chunk is admitted early.
    Not thread-safe by itself.

    Args:
        size: keys that it remembers, at least 1; rounded up to whole fours.
    """

    def __init__(self, size: int) -> None:
        self._sets = -(-size // _WAYS)
        self._marks = array("Q", bytes(8 * _WAYS * self._sets))

    def _place(self, key: ChunkKey) -> tuple[int, int]:
        mark = xxhash.xxh3_64_intdigest(key) or 1
        return mark % self._sets * _WAYS, mark

    def __contains__(self, key: ChunkKey) -> bool:
        begin, mark = self._place(key)
        return mark in self._marks[begin : begin + _WAYS]

    def add(self, key: ChunkKey) -> None:
        """Remember a key, as the newest of its four."""
        begin, mark = self._place(key)
        four = self._marks[begin : begin + _WAYS]
        if mark in four:
            four.remove(mark)
        four.insert(0, mark)
        self._marks[begin : begin + _WAYS] = four[:_WAYS]

    def discard(self, key: ChunkKey) -> None:
        """Forget a key; nothing happens if it is not remembered."""
        begin, mark = self._place(key)
        four = self._marks[begin : begin + _WAYS]
        if mark in four:
            four.remove(mark)
            four.append(0)
            self._marks[begin : begin + _WAYS] = four

    def admit(self, keys: Sequence[ChunkKey]) -> int:
        """How many leading chunks of a text are to be admitted: all up to the last one that is remembered.

        Those are forgotten, the others remembered. A chunk without those before it can't be found, so they go together.
        """
        count = next((i for i in range(len(keys), 0, -1) if keys[i - 1] in self), 0)
        for key in keys[:count]:
            self.discard(key)
        for key in keys[count:]:
            self.add(key)
        return count

    def _check(self) -> None:
        for begin in range(0, len(self._marks), _WAYS):
            held = [mark for mark in self._marks[begin : begin + _WAYS] if mark]
            assert len(held) == len(set(held)), "a key is remembered twice"
