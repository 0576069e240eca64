"""The memory backend: the contract of backends, and a byte limit."""

from __future__ import annotations

import pytest

import lmkv
from lmkv.backends import Backend, BackendSettings, open_backend
from lmkv.backends.base import Clearable
from lmkv.backends.memory import MemoryBackend
from lmkv.chunks import ChunkKey
from lmkv.errors import CapacityError, StoreClosedError
from lmkv.testing import BackendSuite

LAYOUT = lmkv.KVLayout.dense(layers=1, heads=1, head_size=4, dtype="float32", chunk_tokens=16)


def key(i: int) -> ChunkKey:
    return ChunkKey(i.to_bytes(16, "big"))


class TestMemoryBackend(BackendSuite):
    offers = (Clearable,)

    def make(self, settings: BackendSettings) -> Backend:
        return MemoryBackend(settings)


def test_opens_by_name() -> None:
    assert isinstance(open_backend("memory", BackendSettings("m", LAYOUT)), MemoryBackend)
    assert isinstance(open_backend("Memory", BackendSettings("m", LAYOUT)), MemoryBackend)


def test_a_limit_of_bytes_counts_what_is_replaced_once() -> None:
    backend = MemoryBackend(BackendSettings("m", LAYOUT, capacity=100))
    backend.write_many([key(1)], [memoryview(bytes(60))])
    backend.write_many([key(1)], [memoryview(bytes(100))])
    with pytest.raises(CapacityError, match="100"):
        backend.write_many([key(2)], [memoryview(bytes(1))])
    backend.delete_many([key(1)])
    backend.write_many([key(2)], [memoryview(bytes(100))])
    assert backend.contains_many([key(1), key(2)]) == [False, True]
    backend._check()


def test_without_a_limit_it_takes_what_comes() -> None:
    backend = MemoryBackend(BackendSettings("m", LAYOUT))
    backend.write_many([key(i) for i in range(64)], [memoryview(bytes(1 << 16))] * 64)
    assert all(backend.contains_many([key(i) for i in range(64)]))


def test_a_closed_one_says_so() -> None:
    backend = MemoryBackend(BackendSettings("m", LAYOUT))
    backend.close()
    with pytest.raises(StoreClosedError, match="closed"):
        backend.contains_many([key(1)])
