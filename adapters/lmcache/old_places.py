"""Where LMCache 0.3 kept values: a disk directory, or a Redis. Only read, never written to.

- Disk: one file a chunk, ``<directory>/<key with / as ->.pt``, the tensor's bytes and nothing else.
- Redis: ``<key>metadata`` (native int32: length, format, element type, four dimensions), and the bytes in ``<key>kv_bytes``.

There is no checksum. Formats: ``local_disk_backend.py``, ``redis_connector.py`` and ``protocol.py`` of LMCache 0.3.
"""

from __future__ import annotations

import os
import stat
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lmkv.backends import BackendSettings
from lmkv.backends.redis.nodes import open_nodes
from lmkv.backends.redis.target import RedisTarget
from lmkv.backends.redis.wire import ErrorReply, Wire, command
from lmkv.errors import BackendUnavailableError, ConfigError
from lmkv.layout import KVLayout

__all__ = ["Expected", "Place", "open_place"]

_METADATA = struct.Struct("=7i")
#: LMCache's numbers of element types; it has two for float16.
_DTYPES = {
    "float16": (1, 2),
    "bfloat16": (3,),
    "float32": (4,),
    "float64": (5,),
    "uint8": (6,),
    "float8_e4m3fn": (7,),
    "float8_e5m2": (8,),
}
_KV_2LTD, _KV_MLA = 1, 6
_FORMATS = ("undefined", "KV_2LTD", "KV_T2D", "KV_2TD", "BINARY", "BINARY_BUFFER", "KV_MLA_FMT")
#: Names that are asked for before their replies are received.
_QUESTIONS = 256


@dataclass(frozen=True)
class Expected:
    """What a value has to be.

    Args:
        shape: keys and values (2) or one latent (1), layers, tokens, numbers a token and layer.
        dtype: a name out of :data:`lmkv.layout.DTYPES`.
        size: its bytes.
    """

    shape: tuple[int, int, int, int]
    dtype: str
    size: int

    def wrong_size(self, size: int) -> str:
        """Why a value of ``size`` bytes is not it, or ``""``."""
        return "" if size == self.size else f"expected {self.size} bytes for {self.shape} of {self.dtype}; got {size}"

    def wrong_metadata(self, data: bytes) -> str:
        """Why a value that is described by these bytes is not it, or ``""``."""
        if len(data) != _METADATA.size:
            return f"expected {_METADATA.size} bytes of metadata; got {len(data)}"
        length, fmt, dtype, *shape = _METADATA.unpack(data)
        wanted = _KV_2LTD if self.shape[0] == 2 else _KV_MLA
        if fmt != wanted:
            shown = _FORMATS[fmt] if 0 <= fmt < len(_FORMATS) else str(fmt)
            return f"expected the format {_FORMATS[wanted]}; got {shown}"
        if dtype not in _DTYPES.get(self.dtype, ()):
            return f"expected {self.dtype}; got LMCache's element type {dtype}"
        if tuple(shape) != self.shape:
            return f"expected the shape {self.shape}; got {tuple(shape)}"
        return self.wrong_size(length)


class Place(Protocol):
    """Values under LMCache's names."""

    shown: str

    def present(self, names: Sequence[str]) -> list[bool]:
        """Which of these are there.

        Raises:
            BackendUnavailableError: nobody answers.
        """

    def read(self, name: str, expected: Expected, out: memoryview) -> str:
        """Read a value into ``out``, ``expected.size`` bytes long; why that was not possible, or ``""``.

        Raises:
            BackendUnavailableError: nobody answers.
        """

    def some(self, count: int) -> list[str]:
        """Up to ``count`` of the names that are there, for people to compare theirs with.

        Raises:
            BackendUnavailableError: nobody answers.
        """

    def close(self) -> None:
        """Let go of it."""


class _Disk:
    """A directory of LMCache's ``local_disk``."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder).expanduser()
        self.shown = str(self._folder)
        if not self._folder.is_dir():
            raise ConfigError(f"expected a directory that LMCache wrote; got {folder!r}")

    def _path(self, name: str) -> Path:
        return self._folder / f"{name.replace('/', '-')}.pt"

    def present(self, names: Sequence[str]) -> list[bool]:
        return [self._path(name).is_file() for name in names]

    def read(self, name: str, expected: Expected, out: memoryview) -> str:
        try:
            with self._path(name).open("rb", buffering=0) as file:
                about = os.fstat(file.fileno())
                if not stat.S_ISREG(about.st_mode):
                    return "expected a regular file"
                wrong = expected.wrong_size(about.st_size)
                if wrong:
                    return wrong
                at = 0
                while at < expected.size:
                    count = file.readinto(out[at:])
                    if not count:
                        return f"expected {expected.size} bytes; it ended after {at}"
                    at += count
        except OSError as error:
            return f"it can't be read: {error.strerror}"
        return ""

    def some(self, count: int) -> list[str]:
        found: list[str] = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.endswith(".pt"):
                    found.append(entry.name)
                if len(found) == count:
                    break
        return found

    def close(self) -> None:
        pass


class _Redis:
    """A Redis of LMCache's ``remote_url``."""

    def __init__(self, url: str, deadline: float) -> None:
        layout = KVLayout.dense(layers=1, heads=1, head_size=1, dtype="uint8", chunk_tokens=1)  # of no meaning here
        target = RedisTarget.of(BackendSettings("lmcache", layout, url=url, deadline_seconds=deadline))
        self.shown = target.shown
        self._nodes = open_nodes(target, deadline)
        self._deadline = deadline

    def present(self, names: Sequence[str]) -> list[bool]:
        keys = [f"{name}metadata".encode() for name in names]
        there = [False] * len(keys)
        until = time.monotonic() + self._deadline
        for node, indices in self._nodes.group(keys, range(len(keys))).items():
            with self._nodes.wire(node, until) as wire:
                for at in range(0, len(indices), _QUESTIONS):
                    some = indices[at : at + _QUESTIONS]
                    wire.send(b"".join(command(b"EXISTS", keys[i]) for i in some))
                    for i, reply in zip(some, wire.statuses(len(some)), strict=True):
                        if isinstance(reply, ErrorReply):
                            raise BackendUnavailableError(f"{self.shown}: the server says: {reply}")
                        there[i] = reply == 1
        return there

    def read(self, name: str, expected: Expected, out: memoryview) -> str:
        keys = [f"{name}{part}".encode() for part in ("metadata", "kv_bytes")]
        reasons: list[str] = []

        def metadata(wire: Wire, size: int) -> str:
            if size != _METADATA.size:
                wire.skip(size)
                return f"expected {_METADATA.size} bytes of metadata; got {size}"
            data = bytearray(size)
            wire.take(memoryview(data))
            return expected.wrong_metadata(bytes(data))

        def values(wire: Wire, size: int) -> str:
            wrong = expected.wrong_size(size)
            if wrong:
                wire.skip(size)
                return wrong
            wire.take(out)
            return ""

        for key, receive in zip(keys, (metadata, values), strict=True):
            (node,) = self._nodes.group([key], [0])
            with self._nodes.wire(node, time.monotonic() + self._deadline) as wire:
                wire.send(command(b"GET", key))
                size = wire.size()
                if isinstance(size, ErrorReply):
                    raise BackendUnavailableError(f"{self.shown}: the server says: {size}")
                if size is None:
                    return f"its {'metadata' if receive is metadata else 'kv_bytes'} are gone"
                reasons.append(receive(wire, size))
                wire.end()
            if reasons[-1]:
                return reasons[-1]
        return ""

    def some(self, count: int) -> list[str]:
        import redis

        found: list[str] = []
        try:
            for client in self._nodes.masters():
                for key in client.scan_iter(match="*@*metadata", count=1000):
                    found.append(bytes(key).decode("utf-8", "replace").removesuffix("metadata"))
                    if len(found) == count:
                        return found
        except (redis.RedisError, OSError) as error:
            raise BackendUnavailableError(f"{self.shown}: {error}") from None
        return found

    def close(self) -> None:
        self._nodes.close()


def open_place(where: str, deadline_seconds: float = 10.0) -> Place:
    """A directory (``/path``, ``file:///path``), or a Redis (``redis://``, ``rediss://``, ``redis-sentinel://``, …).

    Raises:
        ConfigError: neither.
    """
    scheme, there, path = where.partition("://")
    if not there:
        return _Disk(where)
    if scheme == "file":
        return _Disk(path)
    if scheme.startswith(("redis", "valkey", "unix")):
        return _Redis(where, deadline_seconds)
    raise ConfigError(f"expected a directory or a redis:// url that LMCache wrote to; got {scheme}://…, which can't be read")
