"""Values in this process's memory: a tier for tests and for composing with others."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ..chunks import ChunkKey
from ..errors import CapacityError, ConfigError, StoreClosedError
from .base import BackendSettings

__all__ = ["MemoryBackend"]


class MemoryBackend:
    """A dictionary of bytes behind a lock.

    Raises:
        ConfigError: it takes no options.
    """

    def __init__(self, settings: BackendSettings) -> None:
        if settings.options:
            raise ConfigError(f"tier {settings.name}: the memory backend takes no options; got {sorted(settings.options)}")
        self._limit = settings.capacity
        self._values: dict[ChunkKey, bytes] = {}
        self._used = 0
        self._lock = threading.Lock()
        self._closed = False

    def _open(self) -> None:
        if self._closed:
            raise StoreClosedError("expected an open memory backend; it was closed")

    def contains_many(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """See :class:`lmkv.backends.base.Backend`."""
        with self._lock:
            self._open()
            return [key in self._values for key in keys]

    def read_many(self, keys: Sequence[ChunkKey], out: Sequence[memoryview]) -> list[int | None]:
        """See :class:`lmkv.backends.base.Backend`."""
        with self._lock:
            self._open()
            values = [self._values.get(key) for key in keys]
        sizes: list[int | None] = []
        for value, buffer in zip(values, out, strict=True):
            if value is None or len(value) > len(buffer):
                sizes.append(None)
                continue
            buffer[: len(value)] = value
            sizes.append(len(value))
        return sizes

    def write_many(self, keys: Sequence[ChunkKey], data: Sequence[memoryview]) -> None:
        """See :class:`lmkv.backends.base.Backend`."""
        values = dict(zip(keys, (bytes(piece) for piece in data), strict=True))
        with self._lock:
            self._open()
            growth = sum(len(value) - len(self._values.get(key, b"")) for key, value in values.items())
            if self._limit and self._used + growth > self._limit:
                raise CapacityError(f"expected at most {self._limit} bytes; {self._used} are held and {growth} more came")
            self._values.update(values)
            self._used += growth

    def delete_many(self, keys: Sequence[ChunkKey]) -> None:
        """See :class:`lmkv.backends.base.Backend`."""
        with self._lock:
            self._open()
            for key in keys:
                self._used -= len(self._values.pop(key, b""))

    def clear(self) -> None:
        """See :class:`lmkv.backends.base.Clearable`."""
        with self._lock:
            self._open()
            self._values.clear()
            self._used = 0

    def close(self) -> None:
        """See :class:`lmkv.backends.base.Backend`."""
        with self._lock:
            self._closed = True
            self._values.clear()

    def _check(self) -> None:
        assert self._used == sum(map(len, self._values.values()))
