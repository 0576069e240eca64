"""Servers of the lm:// protocol on loopback for tests, and a client of nothing but sockets."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
from collections.abc import Iterator

import lmkv
from lmkv.adapters.lmcache.behind import Behind
from lmkv.adapters.lmcache.lm_server import LmServer, ServerLimits
from lmkv.adapters.lmcache.shelf import Shelf
from lmkv.backends import Backend, BackendSettings, open_backend
from lmkv.backends.lm_shared import Arena

__all__ = ["LAYOUT", "RawClient", "open_at", "running"]

LAYOUT = lmkv.KVLayout.dense(layers=1, heads=1, head_size=4, dtype="float32", chunk_tokens=16)

PUT, GET, EXIST, LIST, HEALTH = 1, 2, 3, 4, 5


@contextlib.contextmanager
def running(
    capacity: int = 64 << 20, policy: str = "lru", limits: ServerLimits | None = None, tier: str = "", ahead: int = 0
) -> Iterator[LmServer]:
    """A server of LMKV's in this process; ``told`` has what it said of its clients."""
    told: list[str] = []
    limits = limits or ServerLimits(most_bytes=1 << 20 if tier else 1 << 30)
    behind = Behind(tier, limits.most_bytes, told.append, 0.5) if tier else None
    shelf = Shelf(capacity, policy, ahead, Arena(capacity) if sys.platform == "linux" and ahead else None)
    server = LmServer(shelf, "127.0.0.1", 0, limits, told.append, behind)
    server.told = told  # type: ignore[attr-defined]
    server.start()
    try:
        yield server
        server.shelf._check()
    finally:
        server.close()


def open_at(port: int, deadline: float = 20.0, told: list[str] | None = None, **options: object) -> Backend:
    """LMKV's backend at a server; ``told`` is given what it reports."""

    def report(operation: str, reason: str) -> None:
        if told is not None:
            told.append(f"{operation}: {reason}")

    url = f"lm://127.0.0.1:{port}"
    settings = BackendSettings("remote", LAYOUT, url=url, options=options, deadline_seconds=deadline, report=report)
    return open_backend("lm", settings)


class RawClient:
    """Says what it is told to, written down here anew from the protocol's description."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=10)

    def head(self, command: int, key: bytes, length: int = 0, shape: tuple[int, ...] = (0, 0, 0, 0), dtype: int = 2) -> bytes:
        """A request's header; a key of more than 150 bytes makes it longer than it may be."""
        return struct.pack("iiiiiiiii", command, length, 1, dtype, 0, *shape) + key.ljust(150)

    def put(self, key: bytes, value: bytes) -> None:
        """Store half-precision numbers."""
        self.sock.sendall(self.head(PUT, key, len(value), (2, 1, 1, len(value) // 4)) + value)

    def exact(self, size: int) -> bytes:
        """That many bytes, or fewer where the server ends the connection."""
        found = b""
        with contextlib.suppress(ConnectionError):
            while len(found) < size and (piece := self.sock.recv(size - len(found))):
                found += piece
        return found

    def answer(self) -> tuple[int, ...]:
        """An answer's nine numbers; none if the server ended the connection."""
        data = self.exact(36)
        return struct.unpack("iiiiiiiii", data) if data else ()

    def ask(self, command: int, key: bytes) -> int:
        """The code that a question without a value is answered with."""
        self.sock.sendall(self.head(command, key))
        return self.answer()[0]

    def get(self, key: bytes) -> bytes | None:
        """A value."""
        self.sock.sendall(self.head(GET, key))
        code, length, *_ = self.answer()
        return self.exact(length) if code == 200 else None

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
