"""Lending slots to other stores: what is in RAM here they read by NIXL, without this process copying anything.

The other side is :mod:`lmkv.backends.peer`. What it asks for is sealed as a record and pinned until it says that it has read
it, its connection ends, or the time of a lease has passed; a read that comes later than that may meet other bytes, which the
record's checksum tells.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import mmap
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from .backends.nixl_agent import Agent, address_of
from .backends.peer_wire import GREETING, MOST_KEYS, VERSION, receive, send
from .chunks import ChunkKey
from .config import StoreConfig, read_secret_source
from .errors import BackendUnavailableError, ConfigError
from .index import Node
from .layout import KVLayout
from .tiers import NewChunk, RamTier
from .tiers.packing import Packer

__all__ = ["PeerServer"]

_PATIENCE_SECONDS = 10.0
_MOST_CONNECTIONS = 256
#: Slots that one connection may have pinned.
_MOST_HELD = 256


class PeerServer:
    """Serves a store's RAM tier until closed.

    Args:
        lock: the store's.
        unpin: gives pins of nodes back; takes the lock.

    Raises:
        ConfigError: the address can't be listened on, is open to others without a token, or NIXL's UCX plugin does not load.
    """

    def __init__(
        self,
        config: StoreConfig,
        layout: KVLayout,
        lock: threading.RLock,
        ram: RamTier,
        unpin: Callable[[Sequence[Node]], None],
    ) -> None:
        host, port = _listening_address("peer_listen", config.peer_listen)
        self._token = read_secret_source("peer_token", config.peer_token)
        if not self._token and host not in ("127.0.0.1", "::1", "localhost"):
            raise ConfigError(
                f"peer_listen: expected a loopback address, or a peer_token (file:/path or env:NAME); got {host} without one"
            )
        self._layout = layout
        self._lock, self._ram, self._unpin = lock, ram, unpin
        self._packer = Packer(layout, "raw", ram.pool.view)
        self._seconds = config.lease_seconds
        try:
            self._agent = Agent(f"lmkv-peer-{os.getpid()}-{secrets.token_hex(8)}", "UCX", {}, progress=True)
        except BackendUnavailableError as error:
            raise ConfigError(f"peer_listen: expected NIXL's plugin UCX to load; it does not: {error}") from None
        self._registering = threading.Lock()
        self._metadata = b""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family)
        except OSError as error:
            raise ConfigError(f"peer_listen: expected an address to listen on; got {host}:{port}: {error}") from None
        #: Where it listens; the port that was picked where 0 was asked for.
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self._open: set[socket.socket] = set()
        self._closed = False
        threading.Thread(target=self._accept, name="lmkv-peers", daemon=True).start()

    def close(self) -> None:
        """Listen no more, end all connections, and let nobody read slots any more; a second call does nothing."""
        self._closed = True
        self._socket.close()
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        with self._registering:
            self._agent.close()  # before the slots are unmapped: it would end the process if it read there

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, _ = self._socket.accept()
            except OSError:
                return
            if len(self._open) >= _MOST_CONNECTIONS:
                sock.close()
                continue
            self._open.add(sock)
            threading.Thread(target=self._serve, args=(sock,), name="lmkv-peer", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        guest = _Guest(self._unpin)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._greet(sock)
            while not self._closed:
                # one that holds something has to come back soon; others may rest
                seconds = self._seconds if guest.held else 365 * 86400.0
                answer = self._answer(receive(sock, time.monotonic() + seconds), guest)
                if answer is not None:
                    send(sock, answer, time.monotonic() + _PATIENCE_SECONDS)
        except _RefusedError as error:
            with contextlib.suppress(OSError):
                send(sock, {"error": str(error)}, time.monotonic() + 1.0)
        except OSError:
            pass  # it went; what it held is given back
        finally:
            guest.release_all()
            self._open.discard(sock)
            sock.close()

    def _greet(self, sock: socket.socket) -> None:
        hello = receive(sock, time.monotonic() + _PATIENCE_SECONDS)
        if hello.get(GREETING) != VERSION:
            raise _RefusedError(f"expected a peer of version {VERSION}; got {hello.get(GREETING)!r}")
        if self._token and not hmac.compare_digest(str(hello.get("token", "")).encode(), self._token.encode()):
            raise _RefusedError("expected another token")
        if hello.get("layout") != self._layout.fingerprint.hex():
            raise _RefusedError(f"expected the layout {self._layout.fingerprint.hex()}; got {hello.get('layout')!r}")
        send(sock, {"agent": self._agent.name}, time.monotonic() + _PATIENCE_SECONDS)

    def _answer(self, message: dict[str, Any], guest: _Guest) -> dict[str, Any] | None:
        if "has" in message:
            keys = _keys(message["has"])
            with self._lock:
                there = [self._ram.index.get(key) is not None for key in keys]
            return {"has": "".join("01"[held] for held in there)}
        if "hold" in message:
            return self._hold(_keys(message["hold"]), guest)
        if "release" in message:
            guest.release(message["release"])
            return None
        raise _RefusedError(f"expected has, hold or release; got {', '.join(sorted(map(str, message)))[:80]!r}")

    def _hold(self, keys: Sequence[ChunkKey], guest: _Guest) -> dict[str, Any]:
        if len(keys) + sum(map(len, guest.held.values())) > _MOST_HELD:
            raise _RefusedError(f"expected at most {_MOST_HELD} chunks to be held at once")
        nodes: list[Node | None] = []
        chunks: list[NewChunk | None] = []
        with self._lock:
            if self._closed:
                raise _RefusedError("expected an open store; it was closed")
            for key in keys:
                node = self._ram.index.get(key)
                root = self._ram.root_of(node.slot) if node is not None else None
                if node is None or node.parent is None or root is None:
                    nodes.append(None)
                    chunks.append(None)
                    continue
                node.pins += 1
                nodes.append(node)
                start = self._ram.start_of(node.slot)
                chunks.append(NewChunk(node.key, node.parent.key, root, node.tokens, start, node.slot, node.priority))
        number = guest.take([node for node in nodes if node is not None])
        places: list[list[int] | None] = []
        for chunk in chunks:
            record = None if chunk is None else self._packer.pack(chunk)
            places.append(None if record is None else [address_of(record), len(record)])
            if record is not None:
                self._register(record)
        answer: dict[str, Any] = {"held": places, "hold": number}
        if guest.metadata != self._metadata:
            guest.metadata = self._metadata
            answer["metadata"] = base64.b64encode(self._metadata).decode()
        return answer

    def _register(self, record: memoryview) -> None:
        extent = record.obj
        assert isinstance(extent, mmap.mmap), "slots lie in mappings"
        with self._registering:
            if self._closed:
                raise _RefusedError("expected an open store; it was closed")
            if self._agent.keep_registered(extent):
                self._metadata = self._agent.api.get_agent_metadata()


class _RefusedError(Exception):
    """The other side is told why, and its connection ends."""


class _Guest:
    """What one connection holds."""

    def __init__(self, unpin: Callable[[Sequence[Node]], None]) -> None:
        self._unpin = unpin
        self.held: dict[int, list[Node]] = {}
        self.metadata = b""
        self._next = 0

    def take(self, nodes: list[Node]) -> int:
        """Note pinned nodes; returns the number of the hold."""
        self._next += 1
        self.held[self._next] = nodes
        return self._next

    def release(self, number: object) -> None:
        """Give a hold back; one that is none is ignored."""
        nodes = self.held.pop(number, None) if isinstance(number, int) else None
        if nodes:
            self._unpin(nodes)

    def release_all(self) -> None:
        """Give everything back."""
        for number in list(self.held):
            self.release(number)


def _keys(given: object) -> list[ChunkKey]:
    try:
        keys = [ChunkKey(bytes.fromhex(key)) for key in given]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        keys = []
        given = None
    if given is None or len(keys) > MOST_KEYS or any(len(key) != 16 for key in keys):
        raise _RefusedError(f"expected at most {MOST_KEYS} keys of 32 hexadecimal digits")
    return keys


def _listening_address(name: str, text: str) -> tuple[str, int]:
    """``host:port`` as a pair.

    Raises:
        ConfigError: it is something else.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{name}: expected host:port, such as 127.0.0.1:18300; got {text!r}")
    return host.strip("[]"), int(port)
