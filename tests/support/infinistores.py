"""Doubles of an InfiniStore server, which needs an RDMA device to start, for tests. They stand in for a server that nobody here
has run; what they do was read off the published server and client, version 0.2.35.

:class:`ControlDouble` answers the real client package where it asks over TCP: whether keys are there, and to delete some.
:class:`RdmaDouble` is handed out in place of that package and moves memory as RDMA would: as many bytes as it is told, from and
to registered memory only.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

_HEADER = struct.Struct("<IcI")
_MAGIC = 0xDEADBEEF
_FINISH = 200


class Values:
    """What a server holds, bounded."""

    def __init__(self, capacity: int = 1 << 30) -> None:
        self.held: dict[str, bytes] = {}
        self.capacity = capacity
        self.lock = threading.Lock()

    def put(self, key: str, value: bytes) -> bool:
        with self.lock:
            if sum(map(len, self.held.values())) + len(value) > self.capacity:
                return False
            self.held[key] = value
            return True


def _table(data: bytes, at: int) -> list[int]:
    """Places of a flatbuffers table's fields, 0 for absent ones."""
    vtable = at - int.from_bytes(data[at : at + 4], "little", signed=True)
    size = int.from_bytes(data[vtable : vtable + 2], "little")
    offsets = [int.from_bytes(data[vtable + i : vtable + i + 2], "little") for i in range(4, size, 2)]
    return [at + offset if offset else 0 for offset in offsets]


def _number(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")


def _text(data: bytes, at: int) -> str:
    at += _number(data, at)
    return data[at + 4 : at + 4 + _number(data, at)].decode()


class ControlDouble:
    """A server on loopback. ``stalled`` makes it take requests and answer none."""

    def __init__(self, values: Values | None = None) -> None:
        self.values = values or Values()
        self.stalled = threading.Event()
        self.port = 0
        self.requests = 0

    def __enter__(self) -> ControlDouble:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start, or start again with what it holds."""
        self._socket = socket.create_server(("127.0.0.1", self.port))
        self.port = self._socket.getsockname()[1]
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._accept, args=(self._socket,), daemon=True).start()

    def kill(self) -> None:
        """End it, and every connection with it."""
        self._socket.close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            self._connections.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            for reply in self._replies(connection):
                while self.stalled.is_set():
                    threading.Event().wait(0.02)
                connection.sendall(reply)
        except (OSError, EOFError):
            connection.close()

    @staticmethod
    def _take(connection: socket.socket, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = connection.recv(min(1 << 20, size - len(data)))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def _replies(self, connection: socket.socket) -> Iterator[bytes]:
        while True:
            magic, operation, size = _HEADER.unpack(self._take(connection, _HEADER.size))
            assert magic == _MAGIC
            body = self._take(connection, size)
            self.requests += 1
            if operation == b"C":
                yield struct.pack("<ii", _FINISH, 0 if body.decode() in self.values.held else 1)
            elif operation == b"X":
                yield struct.pack("<ii", _FINISH, self._delete(body))
            else:
                raise AssertionError(f"an operation that the double does not know: {operation!r}")

    def _delete(self, body: bytes) -> int:
        (at,) = _table(body, _number(body, 0))
        at += _number(body, at)
        names = [_text(body, at + 4 + 4 * i) for i in range(_number(body, at))]
        return sum(self.values.held.pop(name, None) is not None for name in names)


class RdmaDouble:
    """In place of the package ``infinistore``, with one server in this process. ``down`` refuses and breaks connections,
    ``stalled`` has transfers wait."""

    def __init__(self, values: Values | None = None) -> None:
        self.values = values or Values()
        self.down = False
        self.stalled = threading.Event()
        self.last: dict[str, Any] = {}
        self.registered: list[tuple[int, int]] = []
        self.url = ""
        double = self

        class InfiniStoreKeyNotFound(Exception):  # noqa: N818  the package's name
            pass

        class ClientConfig:
            def __init__(self, **settings: Any) -> None:
                self.settings = settings

        class InfinityConnection:
            def __init__(self, config: ClientConfig) -> None:
                self.config = config
                self._regions: list[tuple[int, int]] = []

            async def connect_async(self) -> None:
                self._alive()
                double.last = self.config.settings

            def close(self) -> None:
                pass

            @staticmethod
            def _alive() -> None:
                if double.down:
                    raise Exception("Failed to initialize remote connection")

            def register_mr(self, arg: int, size: int | None = None) -> int:
                self._alive()
                assert size
                self._regions.append((arg, size))
                double.registered.append((arg, size))
                return 0

            @staticmethod
            async def _answer() -> None:
                while double.stalled.is_set():
                    await asyncio.sleep(0.02)

            def _check(self, place: int, size: int) -> None:
                self._alive()
                if not any(begin <= place and place + size <= begin + length for begin, length in self._regions):
                    raise Exception("memory that is not registered")

            async def rdma_write_cache_async(self, blocks: Any, block_size: int, ptr: int) -> int:
                await self._answer()
                for key, offset in blocks:
                    self._check(ptr + offset, block_size)
                    if not double.values.put(key, ctypes.string_at(ptr + offset, block_size)):
                        raise Exception("Failed to write to infinistore, ret = 507")
                return _FINISH

            async def rdma_read_cache_async(self, blocks: Any, block_size: int, ptr: int) -> int:
                await self._answer()
                for key, offset in blocks:
                    self._check(ptr + offset, block_size)
                    if key not in double.values.held:
                        raise InfiniStoreKeyNotFound("some keys not found")
                    beyond = b"\xee" * max(0, block_size - len(double.values.held[key]))  # another's memory
                    ctypes.memmove(ptr + offset, double.values.held[key] + beyond, block_size)
                return _FINISH

            def check_exist(self, key: str) -> bool:
                self._alive()
                return key in double.values.held

            def delete_keys(self, keys: list[str]) -> int:
                self._alive()
                return sum(double.values.held.pop(key, None) is not None for key in keys)

        self.InfiniStoreKeyNotFound = InfiniStoreKeyNotFound
        self.ClientConfig, self.InfinityConnection = ClientConfig, InfinityConnection
