"""A server of lm:// with shared memory for tests, and a client of it that does what it is told to."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import lm_servers
import numpy as np
import servers

from lmkv.adapters.lmcache.lm_server import LmServer, ServerLimits
from lmkv.backends import Backend
from lmkv.backends.lm_shared import LENT, join
from lmkv.backends.lm_wire import Answer, Command, Request, local_name
from lmkv.chunks import ChunkKey

__all__ = ["FREE", "KEYS", "MIB", "NAMES", "READY", "Raw", "at_rest", "fetch", "page_of", "running", "shares", "some"]

KEYS = [ChunkKey(bytes([i]) * 16) for i in range(1, 17)]
NAMES = [b"lmkv@1@0@%b@uint8" % key.hex().encode() for key in KEYS]
MIB = 1 << 20
READY, FREE = b"\xfe", b"\xff"


def some(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def shares(backend: Backend) -> list[bool]:
    return [connection.shared is not None for connection in backend._resting]  # type: ignore[attr-defined]


def fetch(backend: Backend, keys: list[ChunkKey], room: int = 9 * MIB) -> list[bytes | None]:
    buffers = [memoryview(bytearray(room)) for _ in keys]
    sizes = backend.read_many(keys, buffers)
    return [None if size is None else bytes(buffer[:size]) for size, buffer in zip(sizes, buffers, strict=True)]


@contextlib.contextmanager
def running(size: int = 2 * MIB, capacity: int = 192 * MIB, limits: ServerLimits | None = None) -> Iterator[LmServer]:
    """A server with rooms of one size ready in shared memory."""
    with lm_servers.running(capacity, limits=limits, ahead=64 * MIB) as server:
        spares = server.shelf._spares
        for _ in range(8):
            spares.take(size)
        servers.until(lambda: (len(spares._ready) + len(spares._back)) == 64 * MIB // size)
        yield server


def at_rest(server: LmServer) -> None:
    """Nothing is promised any more, once all clients have gone."""
    servers.until(lambda: server.connections() == 0)
    servers.until(lambda: server.shelf._promised == 0)
    server.shelf._check()


def page_of(server: LmServer, number: int) -> int | None:
    """Where a value lies in shared memory."""
    value = server.shelf.get(NAMES[number])
    assert value is not None
    return server._page(value.data)


class Raw:
    """A client on the Unix socket, which does what it is told to."""

    def __init__(self, server: LmServer, joined: bool = True) -> None:
        shape = Answer.unpack(server._greeting).shape
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(local_name((shape[2], shape[3])))
        self.shared = join(self.sock) if joined else None

    def ask(self, command: Command, name: bytes, size: int = 0, shape: tuple[int, int, int] = (0, 0, 0)) -> Answer:
        self.sock.sendall(Request(command, name, size, LENT, 0, (size, *shape)).pack())
        return Answer.unpack(self.exact(36))

    def exact(self, size: int) -> bytes:
        found = bytearray()
        while len(found) < size and (piece := self.sock.recv(size - len(found))):
            found += piece
        return bytes(found)

    def part(self, answer: Answer) -> np.ndarray:  # type: ignore[type-arg]
        assert self.shared is not None
        assert answer.fmt == LENT
        return self.shared.part(answer.shape[0], answer.length)

    def ended(self) -> bool:
        with contextlib.suppress(ConnectionError):
            while self.sock.recv(4096):
                pass
        return True

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
