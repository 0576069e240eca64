"""A tier behind the memory of an ``lm://`` server, so that its values outlive evictions and restarts.

Any backend that takes bytes will do (a directory, Redis, S3, …). A value lies there as 256 bytes of head (a magic, LMCache's
description of it, length and checksum, the whole key) and its bytes, under the first 16 bytes of the key's sha256. What is
read is proved by all of it, or is absent.
"""

from __future__ import annotations

import hashlib
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import xxhash

from lmkv.backends import Backend, BackendSettings, open_backend
from lmkv.backends.base import shown_url
from lmkv.backends.lm_wire import MOST_KEY_BYTES
from lmkv.chunks import ChunkKey
from lmkv.errors import ConfigError, LMKVError
from lmkv.layout import KVLayout
from lmkv.tiers.breaker import Breaker

from .shelf import Value

__all__ = ["Behind"]

_MAGIC = b"LMKVLM1\0"
#: magic, bytes of the value, checksum of value and head, format, element type, four dimensions, bytes of the key, the key
_HEAD = struct.Struct(f"<8sQQ6iI{MOST_KEY_BYTES}s")
_HEAD_BYTES = 256
_FAILURES, _REST_SECONDS, _FIRST_REST = 3, 10.0, 0.5
_TELL_SECONDS = 10.0
#: Keys whose value there is known to be out of date.
_MOST_STALE = 1 << 16


class Behind:
    """Values in a backend; its failures cost a miss, a line, and after some in a row a rest.

    Args:
        url: of the tier, such as ``file:///var/cache/kv`` or ``redis://host:6379``.
        most_bytes: of one value.
        tell: is given a line about a failure, at most one in ten seconds.
        deadline_seconds: of one call.

    Raises:
        ConfigError: no such backend, or one that keeps records of KV only.
    """

    def __init__(self, url: str, most_bytes: int, tell: Callable[[str], None], deadline_seconds: float = 2.0) -> None:
        scheme, there, _ = url.partition("://")
        if not there or scheme in ("lmdb", "lm", "memory"):
            raise ConfigError(f"--tier: expected a url such as file:///path or redis://host:6379; got {shown_url(url)!r}")
        layout = KVLayout.dense(layers=1, heads=1, head_size=1, dtype="uint8", chunk_tokens=1)  # of no meaning to bytes
        settings = BackendSettings("tier", layout, url=url, deadline_seconds=deadline_seconds, report=self._failed)
        self._tell, self._told = tell, 0.0
        self._most = most_bytes
        self._breaker = Breaker("tier", _FAILURES, _REST_SECONDS, self._emit, first_seconds=_FIRST_REST)
        self._backend: Backend = open_backend(scheme, settings)
        self._lock = threading.Lock()
        self._stale: OrderedDict[ChunkKey, None] = OrderedDict()

    def _emit(self, kind: str, tier: str, **detail: object) -> None:
        if kind == "tier_failed":
            self._failed(str(detail["operation"]), str(detail["reason"]))

    def _failed(self, operation: str, reason: str) -> None:
        now = time.monotonic()
        if now - self._told >= _TELL_SECONDS:
            self._told = now
            self._tell(f"the tier behind failed to {operation}: {reason}")

    def _call(self, operation: str, call: Callable[[], None]) -> bool:
        """Whether it was done."""
        if not self._breaker.allows():
            return False
        try:
            call()
        except LMKVError as error:
            self._breaker.failure(operation, str(error))
            return False
        self._breaker.success()
        return True

    def _changed(self, name: ChunkKey, done: bool) -> None:
        """Remember what could not be replaced or deleted: what stands there is not to be found any more."""
        with self._lock:
            self._stale.pop(name, None)
            if not done:
                self._stale[name] = None
                if len(self._stale) > _MOST_STALE:
                    self._stale.popitem(last=False)

    def _is_stale(self, name: ChunkKey) -> bool:
        with self._lock:
            return name in self._stale

    @staticmethod
    def _name(key: bytes) -> ChunkKey:
        return ChunkKey(hashlib.sha256(key).digest()[:16])

    def contains(self, key: bytes) -> bool:
        """Whether something stands there that may be the value."""
        found, name = [False], self._name(key)
        if self._is_stale(name):
            return False

        def call() -> None:
            found[:] = self._backend.contains_many([name])

        self._call("look up", call)
        return found[0]

    def write(self, key: bytes, value: Value) -> None:
        """Keep a value, or not."""
        size = len(value.data)
        record = memoryview(np.empty(_HEAD_BYTES + size, np.uint8))
        record[_HEAD_BYTES:] = value.data
        _HEAD.pack_into(record, 0, _MAGIC, size, 0, value.fmt, value.dtype, *value.shape, len(key), key)
        record[_HEAD.size : _HEAD_BYTES] = bytes(_HEAD_BYTES - _HEAD.size)
        record[16:24] = xxhash.xxh3_64_intdigest(record).to_bytes(8, "little")
        name = self._name(key)
        self._changed(name, self._call("write", lambda: self._backend.write_many([name], [record])))

    def read(self, key: bytes) -> Value | None:
        """A value, proved to be the one that was written under this key; a damaged one is deleted."""
        name = self._name(key)
        if self._is_stale(name):
            return None
        try:
            room = memoryview(np.empty(_HEAD_BYTES + self._most, np.uint8))  # touched only as far as a value reaches
        except MemoryError:
            self._failed("read", f"there is no memory for {self._most} bytes: lower --max-value")
            return None
        sizes: list[int | None] = [None]

        def call() -> None:
            sizes[:] = self._backend.read_many([name], [room])

        self._call("read", call)
        if sizes[0] is None:
            return None
        value = self._proved(key, room[: sizes[0]])
        if value is None:
            self._failed("read", "a value is damaged and deleted")
            self.remove(key)
        return value

    @staticmethod
    def _proved(key: bytes, record: memoryview) -> Value | None:
        if len(record) < _HEAD_BYTES:
            return None
        magic, size, checksum, fmt, dtype, *shape, length, name = _HEAD.unpack_from(record)
        record[16:24] = bytes(8)
        if magic != _MAGIC or size != len(record) - _HEAD_BYTES or name[:length] != key:
            return None
        if xxhash.xxh3_64_intdigest(record) != checksum:
            return None
        return Value(record[_HEAD_BYTES:], fmt, dtype, (shape[0], shape[1], shape[2], shape[3]))

    def remove(self, key: bytes) -> None:
        """Drop what stands under a key."""
        name = self._name(key)
        self._changed(name, self._call("delete", lambda: self._backend.delete_many([name])))

    def close(self) -> None:
        """Release the backend."""
        self._backend.close()
