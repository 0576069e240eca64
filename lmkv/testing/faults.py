"""Backends that misbehave on purpose: slow, failing, damaged. Each wraps a real one, whose data stay as they are.

A wrapper offers the optional Protocols of :mod:`lmkv.backends.base` that the wrapped backend offers, so a tier treats it as
the same kind. To put one behind a store, register a factory for it under the entry point group ``lmkv.backends``, as for any
backend.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ..backends.base import Backend, Bounded, Clearable, Entry, LocalIndex, Syncing
from ..chunks import ChunkKey
from ..errors import BackendUnavailableError, StoreClosedError

__all__ = ["DelayedBackend", "FlakyBackend", "FlippingBackend", "flip_bit", "truncate"]

Result = TypeVar("Result")


class _Wrapper:
    """Passes every call on through :meth:`_around`. What ``inner`` can do beside the Backend Protocol is mixed in."""

    inner: Any

    def __new__(cls, inner: Backend, *args: Any, **options: Any) -> Any:
        del args, options  # for __init__
        offers = tuple(mixin for protocol, mixin in _MIXINS.items() if isinstance(inner, protocol))
        return object.__new__(type(cls.__name__, (cls, *offers), {"__doc__": cls.__doc__, "__module__": cls.__module__}))

    def _around(self, operation: str, call: Callable[[], Result]) -> Result:
        """Make the call, badly. ``operation`` is the method's name."""
        raise NotImplementedError

    def contains_many(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """See :class:`lmkv.backends.base.Backend`."""
        return self._around("contains_many", lambda: self.inner.contains_many(keys))

    def read_many(self, keys: Sequence[ChunkKey], out: Sequence[memoryview]) -> list[int | None]:
        """See :class:`lmkv.backends.base.Backend`."""
        return self._around("read_many", lambda: self.inner.read_many(keys, out))

    def write_many(self, keys: Sequence[ChunkKey], data: Sequence[memoryview]) -> None:
        """See :class:`lmkv.backends.base.Backend`."""
        self._around("write_many", lambda: self.inner.write_many(keys, data))

    def delete_many(self, keys: Sequence[ChunkKey]) -> None:
        """See :class:`lmkv.backends.base.Backend`."""
        self._around("delete_many", lambda: self.inner.delete_many(keys))

    def close(self) -> None:
        """Close the wrapped backend; never delayed, never failing by itself."""
        self.inner.close()

    def _check(self) -> None:
        check = getattr(self.inner, "_check", None)
        if check is not None:
            check()


class _LocalIndexMixin(_Wrapper):
    def match_prefix(self, keys: Sequence[ChunkKey], pieces: Sequence[bytes]) -> int:
        """See :class:`lmkv.backends.base.LocalIndex`."""
        return self._around("match_prefix", lambda: int(self.inner.match_prefix(keys, pieces)))

    def best_child(self, parent: ChunkKey, tokens: bytes) -> tuple[ChunkKey, bytes, int] | None:
        """See :class:`lmkv.backends.base.LocalIndex`."""
        found: tuple[ChunkKey, bytes, int] | None = self._around("best_child", lambda: self.inner.best_child(parent, tokens))
        return found

    def covered_siblings(self, parent: ChunkKey, tokens: bytes) -> list[ChunkKey]:
        """See :class:`lmkv.backends.base.LocalIndex`."""
        return self._around("covered_siblings", lambda: self.inner.covered_siblings(parent, tokens))


class _BoundedMixin(_Wrapper):
    @property
    def capacity(self) -> int:
        """See :class:`lmkv.backends.base.Bounded`."""
        return int(self.inner.capacity)

    def used_bytes(self) -> int:
        """See :class:`lmkv.backends.base.Bounded`."""
        return self._around("used_bytes", lambda: int(self.inner.used_bytes()))

    def count(self) -> int:
        """See :class:`lmkv.backends.base.Bounded`."""
        return self._around("count", lambda: int(self.inner.count()))

    def cost(self, record_bytes: int) -> int:
        """See :class:`lmkv.backends.base.Bounded`; pure arithmetic, so never disturbed."""
        return int(self.inner.cost(record_bytes))

    def entries(self, after: int) -> Iterator[Entry]:
        """See :class:`lmkv.backends.base.Bounded`."""
        return self._around("entries", lambda: iter(list(self.inner.entries(after))))

    def touch_many(self, keys: Sequence[ChunkKey]) -> None:
        """See :class:`lmkv.backends.base.Bounded`."""
        self._around("touch_many", lambda: self.inner.touch_many(keys))

    def tokens_of(self, key: ChunkKey) -> bytes | None:
        """See :class:`lmkv.backends.base.Bounded`."""
        tokens: bytes | None = self._around("tokens_of", lambda: self.inner.tokens_of(key))
        return tokens


class _SyncingMixin(_Wrapper):
    def sync(self) -> None:
        """See :class:`lmkv.backends.base.Syncing`."""
        self._around("sync", lambda: self.inner.sync())


class _ClearableMixin(_Wrapper):
    def clear(self) -> None:
        """See :class:`lmkv.backends.base.Clearable`."""
        self._around("clear", lambda: self.inner.clear())


_MIXINS: dict[type, type[_Wrapper]] = {
    LocalIndex: _LocalIndexMixin,
    Bounded: _BoundedMixin,
    Syncing: _SyncingMixin,
    Clearable: _ClearableMixin,
}


class DelayedBackend(_Wrapper):
    """A backend that is far away, or hangs.

    Args:
        inner: the backend that does the work, after the delay.
        seconds: how long every call waits first. May be changed at any time; ``threading.TIMEOUT_MAX`` hangs.
        operations: names of the methods that are slow; all of them if empty.
    """

    def __init__(self, inner: Backend, seconds: float, operations: Sequence[str] = ()) -> None:
        self.inner = inner
        self.seconds = seconds
        self.operations = frozenset(operations)
        self._closed = threading.Event()

    def _around(self, operation: str, call: Callable[[], Result]) -> Result:
        slow = not self.operations or operation in self.operations
        if slow and self.seconds > 0 and self._closed.wait(self.seconds):
            raise StoreClosedError(f"expected an open backend for {operation}; it was closed during the delay")
        return call()

    def close(self) -> None:
        """Close the wrapped backend; calls that still wait end with a StoreClosedError."""
        self._closed.set()
        self.inner.close()


class FlakyBackend(_Wrapper):
    """A backend that fails on a schedule.

    Args:
        inner: the backend that does the work when it is not time to fail.
        fails: ``fails(operation, n)`` tells whether the call number ``n`` (from 0, over all operations) fails; it then has no
            effect on ``inner``. May be replaced at any time.
        error: makes the exception, from a message; ``BackendUnavailableError`` by default.
    """

    def __init__(
        self,
        inner: Backend,
        fails: Callable[[str, int], bool],
        error: Callable[[str], Exception] = BackendUnavailableError,
    ) -> None:
        self.inner = inner
        self.fails = fails
        self.error = error
        self.calls = 0
        self._lock = threading.Lock()

    def _around(self, operation: str, call: Callable[[], Result]) -> Result:
        with self._lock:
            number = self.calls
            self.calls += 1
        if self.fails(operation, number):
            raise self.error(f"{operation}: this call was meant to fail")
        return call()


class FlippingBackend(_Wrapper):
    """A backend whose values come back damaged; what it stores is whole.

    Args:
        inner: the backend that holds the values.
        damage: changes a value that was read, in place, and returns its new size, at most the old one; see :func:`flip_bit` and
            :func:`truncate`. May be replaced at any time; ``None`` leaves values alone.
    """

    def __init__(self, inner: Backend, damage: Callable[[memoryview], int] | None) -> None:
        self.inner = inner
        self.damage = damage

    def _around(self, operation: str, call: Callable[[], Result]) -> Result:
        return call()

    def read_many(self, keys: Sequence[ChunkKey], out: Sequence[memoryview]) -> list[int | None]:
        """See :class:`lmkv.backends.base.Backend`; what arrives is damaged."""
        sizes: list[int | None] = list(self.inner.read_many(keys, out))
        damage = self.damage
        if damage is not None:
            sizes = [size if size is None else damage(buffer[:size].cast("B")) for size, buffer in zip(sizes, out, strict=True)]
        return sizes


def flip_bit(bit: int) -> Callable[[memoryview], int]:
    """Damage for :class:`FlippingBackend`: invert one bit, counted from the value's first byte (from its end if negative)."""

    def damage(value: memoryview) -> int:
        at = bit % (len(value) * 8)
        value[at // 8] ^= 1 << at % 8
        return len(value)

    return damage


def truncate(size: int) -> Callable[[memoryview], int]:
    """Damage for :class:`FlippingBackend`: keep only the first ``size`` bytes."""
    return lambda value: min(size, len(value))
