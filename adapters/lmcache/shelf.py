"""The values of an ``lm://`` server: bytes in memory under LMCache's keys within a quota, the least useful ones going first."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from lmkv.backends.lm_shared import Arena
from lmkv.chunks import ChunkKey
from lmkv.eviction import make_policy

from .spares import Spares

__all__ = ["Shelf", "Value"]

#: What a key costs beside its value.
_ENTRY_BYTES = 512
#: Policies are told a number of values; sizes differ, so it is a guess of the usual one.
_USUAL_BYTES = 4 * 1024**2


@dataclass(frozen=True, slots=True)
class Value:
    """One value and LMCache's description of it.

    Args:
        data: its bytes.
        fmt, dtype, shape: as :class:`lmkv.backends.lm_wire.Request` has them.
    """

    data: memoryview
    fmt: int
    dtype: int
    shape: tuple[int, int, int, int]


class Shelf:
    """Values by key, held and promised ones together within ``capacity`` bytes. May be used by several threads at once.

    Args:
        capacity: bytes, each key counting 512 beside its value.
        policy: the eviction policy's name.
        ahead: bytes of the capacity that are memory made ready for values to come.
        arena: where larger values are kept, for clients that write and read them there.

    Raises:
        ConfigError: an unknown policy.
    """

    def __init__(self, capacity: int, policy: str, ahead: int = 0, arena: Arena | None = None) -> None:
        self.capacity, self.arena = capacity - ahead, arena
        self._spares = Spares(ahead, arena)
        self._policy = make_policy(policy, max(1, capacity // _USUAL_BYTES))
        self._values: dict[ChunkKey, Value] = {}
        self._used = self._promised = 0
        self._lock = threading.Lock()
        self.counts = dict.fromkeys(("puts", "refused", "hits", "misses", "evicted"), 0)

    def _cost(self, size: int) -> int:
        return size + _ENTRY_BYTES

    def count(self, name: str) -> None:
        """Add one to a count."""
        with self._lock:
            self.counts[name] += 1

    def reserve(self, size: int) -> memoryview | None:
        """Room for a value, whose bytes are to be filled in and given to :meth:`put` or :meth:`release`.

        Evicts until it fits; ``None`` where it can't, and then nothing was evicted.
        """
        cost = self._cost(size)
        with self._lock:
            if self._promised + cost > self.capacity:
                self.counts["refused"] += 1
                return None
            while self._used + self._promised + cost > self.capacity:
                (victim,) = self._policy.victims(1, ()) or [None]
                if victim is None:  # what is not promised is held, so there is one
                    raise AssertionError(f"expected a value to evict: {self._used} bytes are held")
                self._drop(victim)
                self.counts["evicted"] += 1
            self._promised += cost
        try:
            room = self._spares.take(size)
        except MemoryError:
            with self._lock:
                self._promised -= cost
                self.counts["refused"] += 1
            return None
        return room

    def release(self, room: memoryview) -> None:
        """Give room back unused."""
        with self._lock:
            self._promised -= self._cost(len(room))

    def put(self, key: bytes, value: Value) -> None:
        """Keep a value in the room that was reserved for it, in place of one of the same key."""
        name, cost = ChunkKey(key), self._cost(len(value.data))
        with self._lock:
            if name in self._values:
                self._drop(name)
            self._promised -= cost
            self._used += cost
            self._values[name] = value
            self._policy.insert(name)
            self.counts["puts"] += 1

    def _drop(self, key: ChunkKey) -> None:
        self._used -= self._cost(len(self._values.pop(key).data))
        self._policy.remove(key)

    def contains(self, key: bytes) -> bool:
        """Whether a value is there. Changes nothing."""
        with self._lock:
            return ChunkKey(key) in self._values

    def get(self, key: bytes) -> Value | None:
        """A value, which stays valid however long it is used."""
        name = ChunkKey(key)
        with self._lock:
            value = self._values.get(name)
            self.counts["misses" if value is None else "hits"] += 1
            if value is not None:
                self._policy.touch(name)
            return value

    def remove(self, key: bytes) -> None:
        """Drop a value, if it is there."""
        with self._lock:
            if ChunkKey(key) in self._values:
                self._drop(ChunkKey(key))

    def stats(self) -> dict[str, int]:
        """Counts since the start, and what is held now."""
        with self._lock:
            return {**self.counts, "values": len(self._values), "used_bytes": self._used, "capacity_bytes": self.capacity}

    def _check(self) -> None:
        assert self._used == sum(self._cost(len(value.data)) for value in self._values.values())
        assert set(self._policy) == set(self._values)
        assert self._promised >= 0
        assert self._used + self._promised <= self.capacity
        self._policy._check()
