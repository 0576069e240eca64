"""The misbehaving backends: without a fault they are the backend they wrap, with one they misbehave as they say."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator

import pytest

import lmkv
from lmkv.backends import Backend, BackendSettings
from lmkv.backends.base import Bounded, Clearable, LocalIndex, Syncing
from lmkv.backends.lmdb_disk import LmdbBackend
from lmkv.backends.memory import MemoryBackend
from lmkv.chunks import ChunkKey
from lmkv.errors import BackendUnavailableError, StoreClosedError
from lmkv.testing import BackendSuite, DelayedBackend, FlakyBackend, FlippingBackend
from lmkv.testing.faults import flip_bit, truncate

LAYOUT = lmkv.KVLayout.dense(layers=1, heads=1, head_size=4, dtype="float32", chunk_tokens=16)
KEY = ChunkKey(bytes(16))


class _OnDisk(BackendSuite):
    offers = (LocalIndex, Bounded, Syncing, Clearable)
    persistent = True
    examples = 8

    def disk(self, settings: BackendSettings) -> LmdbBackend:
        options = {**settings.options, "path": str(self.directory / settings.name)}
        return LmdbBackend(dataclasses.replace(settings, options=options))


class TestDelayed(_OnDisk):
    def make(self, settings: BackendSettings) -> Backend:
        return DelayedBackend(self.disk(settings), 0.0)


class TestFlaky(_OnDisk):
    def make(self, settings: BackendSettings) -> Backend:
        return FlakyBackend(self.disk(settings), lambda operation, number: False)


class TestFlipping(_OnDisk):
    def make(self, settings: BackendSettings) -> Backend:
        return FlippingBackend(self.disk(settings), None)


@pytest.fixture
def memory() -> Iterator[MemoryBackend]:
    backend = MemoryBackend(BackendSettings("m", LAYOUT))
    yield backend
    backend.close()


def test_a_wrapper_offers_what_is_wrapped(memory: MemoryBackend) -> None:
    for wrapped in (DelayedBackend(memory, 0.0), FlakyBackend(memory, lambda o, n: False), FlippingBackend(memory, None)):
        assert isinstance(wrapped, (Backend, Clearable))
        assert not isinstance(wrapped, (LocalIndex, Bounded, Syncing))


def test_delays_what_it_is_told_to(memory: MemoryBackend) -> None:
    backend = DelayedBackend(memory, 3600.0, ["read_many"])
    backend.write_many([KEY], [memoryview(b"value")])
    assert backend.contains_many([KEY]) == [True]
    ended: list[str] = []

    def read() -> None:
        try:
            backend.read_many([KEY], [memoryview(bytearray(9))])
        except StoreClosedError as error:
            ended.append(str(error))

    reading = threading.Thread(target=read)
    reading.start()
    reading.join(0.05)
    assert reading.is_alive()
    backend.close()
    reading.join(60)
    assert ended == ["expected an open backend for read_many; it was closed during the delay"]


def test_fails_on_its_schedule(memory: MemoryBackend) -> None:
    backend = FlakyBackend(memory, lambda operation, number: operation == "write_many" and number < 2)
    for _ in range(2):
        with pytest.raises(BackendUnavailableError, match="write_many: this call was meant to fail"):
            backend.write_many([KEY], [memoryview(b"value")])
        assert not memory.contains_many([KEY])[0], "a failed call has no effect"
    backend.write_many([KEY], [memoryview(b"value")])
    assert memory.contains_many([KEY]) == [True]
    assert backend.calls == 3
    backend.fails, backend.error = (lambda operation, number: True), OSError
    with pytest.raises(OSError, match="contains_many"):
        backend.contains_many([KEY])


def test_damages_what_is_read(memory: MemoryBackend) -> None:
    memory.write_many([KEY], [memoryview(b"value")])
    for damage, wanted in (
        (flip_bit(0), b"walue"),
        (flip_bit(9), b"vclue"),
        (flip_bit(-1), b"valu\xe5"),
        (truncate(2), b"va"),
        (truncate(9), b"value"),
        (None, b"value"),
    ):
        backend = FlippingBackend(memory, damage)
        buffer = bytearray(b".......")
        (size,) = backend.read_many([KEY], [memoryview(buffer)])
        assert size is not None
        assert bytes(buffer[:size]) == wanted
        assert bytes(buffer[5:]) == b"..", "nothing behind the value is touched"
    assert FlippingBackend(memory, flip_bit(0)).read_many([ChunkKey(bytes(15) + b"1")], [memoryview(bytearray(9))]) == [None]
