"""A server of LMCache's ``lm://`` protocol: what its clients store they find again, bit for bit or not at all.

One thread a connection, as LMCache's connector keeps one connection and asks one question at a time. What a client may do
wrong costs at most its own connection: an unknown command or a header that makes no sense is answered with 400 and ends it; a
value that contradicts its own description, or does not fit, is received and dropped, so that the connection stays in step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import secrets
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lmkv.backends.lm_shared import LEAST_BYTES, LENT, MARKS, READY, SHARED_KEY, give
from lmkv.backends.lm_wire import (
    BINARY,
    GREETING,
    REQUEST_BYTES,
    TOKEN_KEY,
    Answer,
    Code,
    Command,
    HeaderError,
    Request,
    is_local,
    local_name,
    prepare,
)
from lmkv.backends.redis.wire import Wire, WireError

from .behind import Behind
from .shelf import Shelf, Value

__all__ = ["LmServer", "ServerLimits"]

#: How long a connection that says nothing may last: for ever, as LMCache's connector never connects again.
_FOREVER = 10 * 365 * 86400.0
_PARTING_SECONDS = 1.0
#: What the system waits for at most; about 24 days, in milliseconds, are an int.
_LONGEST_WAIT = 20 * 86400.0
_LOCKS = 64
#: Rooms, and values, that one client has at a time.
_MOST_LENT = 2
_FAIL = Answer(Code.FAIL).pack()
_FOUND = Answer(Code.SUCCESS).pack()
_HEALTHY = Answer(Code.SUCCESS, shape=(GREETING, 1, 0, 0)).pack()


@dataclass(frozen=True)
class ServerLimits:
    """What clients may ask for.

    Args:
        token: what a connection has to show first; ``b""`` for nothing. LMCache's own clients have none to show.
        most_bytes: of one value.
        most_connections: at once; further ones are ended.
        patience_seconds: how long a request that has begun, or an answer, may take.
    """

    token: bytes = field(default=b"", repr=False)
    most_bytes: int = 1024**3
    most_connections: int = 256
    patience_seconds: float = 30.0


def _beside(port: int) -> tuple[socket.socket | None, bytes]:
    """A Unix socket for clients of this machine, and the answer to HEALTH that says where it is."""
    if sys.platform != "linux":
        return None, _HEALTHY
    numbers = (secrets.randbits(31), secrets.randbits(31) | 1)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(local_name(numbers))
        sock.listen(128)
    except OSError:  # no abstract names here: TCP does as well
        sock.close()
        return None, _HEALTHY
    return sock, Answer(Code.SUCCESS, shape=(GREETING, port, *numbers)).pack()


class _Line(Wire):
    """One client's connection, and what it has of the shelf's memory, if it may write and read there."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock, _FOREVER)
        self.sock = sock
        self.shared = False
        #: Rooms that the client fills, oldest first.
        self.filling: deque[tuple[Request, memoryview]] = deque()
        #: Values that the client reads, oldest first.
        self.reading: deque[Value] = deque()

    def begin(self, view: memoryview, filled: Callable[[Request, memoryview], None]) -> int:
        """Receive the begin of a header; how many bytes. Marks in front of it are acted on.

        Raises:
            HeaderError: a mark for what is not lent.
        """
        while True:
            got = self._take_ready(view) or self._receive([view], 0)
            came = bytes(view[:got])
            rest = came.lstrip(MARKS) if self.shared else came
            for mark in came[: got - len(rest)]:
                lent: deque[Any] = self.filling if mark == READY[0] else self.reading
                if not lent:
                    raise HeaderError("expected no mark, as nothing is lent")
                found = lent.popleft()
                if mark == READY[0]:
                    filled(*found)
            if rest:
                view[: len(rest)] = rest
                return len(rest)


class LmServer:
    """Serves a shelf on one address, from :meth:`start` to :meth:`close`.

    Args:
        shelf: where values are kept.
        host, port: to listen on; port 0 picks a free one.
        limits: what clients may ask for.
        tell: is given a line about a client that was refused something.
        behind: a tier that also keeps every value, and is asked for those that memory lacks.

    Raises:
        OSError: the address can't be listened on.
    """

    def __init__(
        self,
        shelf: Shelf,
        host: str,
        port: int,
        limits: ServerLimits,
        tell: Callable[[str], None] = lambda line: None,
        behind: Behind | None = None,
    ) -> None:
        self.shelf, self.limits, self._tell, self._behind = shelf, limits, tell, behind
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listening = socket.create_server((host, port), family=family, backlog=128)
        self.address: tuple[str, int] = self._listening.getsockname()[:2]
        self._local, self._greeting = _beside(self.address[1])
        self._lock = threading.Lock()
        #: With a tier behind memory: who changes a key's value, or brings it from there, does so in both, one after the other.
        self._changing = [threading.Lock() for _ in range(_LOCKS)]
        self._open: set[socket.socket] = set()
        self._closed = False
        sockets = [self._listening] if self._local is None else [self._listening, self._local]
        self._threads = [threading.Thread(target=self._accept, args=(s,), name="lmkv-serve", daemon=True) for s in sockets]

    def start(self) -> None:
        """Accept connections from now on, beside the caller."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End all connections and listen no more."""
        with self._lock:
            self._closed = True
            ending = list(self._open)
        for listening in (self._listening, self._local):
            if listening is not None:
                with contextlib.suppress(OSError):
                    listening.shutdown(socket.SHUT_RDWR)
                listening.close()
        for sock in ending:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def connections(self) -> int:
        """How many there are now."""
        with self._lock:
            return len(self._open)

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                sock, address = listening.accept()
            except OSError as error:
                if self._closed:
                    return
                self._tell(f"a connection could not be accepted: {error}")
                time.sleep(0.1)  # out of file descriptors, most likely: others end meanwhile
                continue
            with self._lock:
                refused = self._closed or len(self._open) >= self.limits.most_connections
                if not refused:
                    self._open.add(sock)
            who = f"{address[0]}:{address[1]}" if listening is self._listening else "a local client"
            if refused:
                self._tell(f"{who}: refused: {self.limits.most_connections} connections are open")
                sock.close()
                continue
            threading.Thread(target=self._serve, args=(sock, who), name=f"lmkv-serve-{who}", daemon=True).start()

    def _serve(self, sock: socket.socket, who: str) -> None:
        wire = _Line(sock)
        try:
            with contextlib.suppress(OSError):
                prepare(sock, listened=True)
            self._talk(wire, who)
            self._part(sock)
        except (OSError, HeaderError) as error:
            if not self._closed:
                self._tell(f"{who}: {error}")
        finally:
            if wire.filling:  # nobody else may have these rooms while the client might write to them
                self._part(sock, _FOREVER)
            with self._lock:
                self._open.discard(sock)
            sock.close()
            for _, room in wire.filling:
                self.shelf.release(room)

    def _is_local(self, sock: socket.socket) -> bool:
        return self._local is not None and (sock.family == self._local.family or is_local(sock))

    @staticmethod
    def _part(sock: socket.socket, seconds: float = _PARTING_SECONDS) -> None:
        """Let the client receive what was said last: a connection that is closed over unread bytes takes that back."""
        end = time.monotonic() + seconds
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(min(seconds, _LONGEST_WAIT))
            while time.monotonic() < end and sock.recv(1 << 16):
                pass

    def _talk(self, wire: _Line, who: str) -> None:
        """Requests until the client ends the connection between two of them.

        Raises:
            WireError: it ended within one, or was too slow.
            HeaderError: it gives back what it does not have.
        """
        healthy = self._greeting if self._is_local(wire.sock) else _HEALTHY
        trusted = not self.limits.token
        head = memoryview(bytearray(REQUEST_BYTES))
        while True:
            wire.allow(time.monotonic() + _FOREVER)
            try:
                begun = wire.begin(head, self._keep)
            except WireError:
                return
            wire.allow(time.monotonic() + self.limits.patience_seconds)
            wire.take(head[begun:])
            try:
                request = Request.unpack(head)
            except HeaderError as error:
                self._tell(f"{who}: {error}; its connection is ended")
                wire.send(_FAIL)
                return
            if request.command == Command.HEALTH and request.key.startswith(TOKEN_KEY):
                shown = request.key.removeprefix(TOKEN_KEY)
                trusted = trusted or hmac.compare_digest(shown, self.limits.token)
                wire.send(healthy if trusted else _FAIL)
            elif not trusted:
                self._tell(f"{who}: showed no valid token; its connection is ended")
                wire.send(_FAIL)
                return
            elif request.command == Command.HEALTH and request.key == SHARED_KEY:
                if not self._share(wire):
                    wire.send(healthy)
            else:
                self._answer(wire, request, who, healthy)

    def _share(self, wire: _Line) -> bool:
        """Whether the client has the shelf's memory now, and had not before."""
        local = self._local is not None and wire.sock.family == self._local.family
        if wire.shared or not local or self.shelf.arena is None:
            return False
        wire.shared = give(wire.sock, self.shelf.arena)
        return wire.shared

    def _answer(self, wire: _Line, request: Request, who: str, healthy: bytes) -> None:
        if request.command == Command.PUT and request.fmt == LENT:
            self._lend(wire, request)
        elif request.command == Command.PUT:
            self._put(wire, request, who)
        elif request.command == Command.GET:
            value = self.shelf.get(request.key) or self._fetch(request.key)
            if value is None:
                wire.send(_FAIL)
            elif wire.shared and len(wire.reading) < _MOST_LENT and (page := self._page(value.data)) is not None:
                wire.reading.append(value)
                wire.send(Answer(Code.SUCCESS, len(value.data), LENT, 0, (page, 0, 0, 0)).pack())
            else:
                head = Answer(Code.SUCCESS, len(value.data), value.fmt, value.dtype, value.shape)
                wire.send(head.pack(), value.data)
        elif request.command == Command.EXIST:
            there = self.shelf.contains(request.key) or (self._behind is not None and self._behind.contains(request.key))
            wire.send(_FOUND if there else _FAIL)
        elif request.command == Command.HEALTH:
            wire.send(healthy)
        else:  # LIST, which LMCache's own server leaves without an answer
            wire.send(_FAIL)

    def _page(self, data: memoryview) -> int | None:
        return None if self.shelf.arena is None or len(data) < LEAST_BYTES else self.shelf.arena.page(data)

    def _lend(self, wire: _Line, request: Request) -> None:
        """Give a client room to fill, or refuse: it sends the value then, and is told why if it may not."""
        kept = dataclasses.replace(request, fmt=BINARY)
        room = None
        if wire.shared and len(wire.filling) < _MOST_LENT and LEAST_BYTES <= request.length <= self.limits.most_bytes:
            room = None if kept.mismatch() else self.shelf.reserve(request.length)
        page = self._page(room) if room is not None else None
        if room is None or page is None:
            if room is not None:
                self.shelf.release(room)
            wire.send(_FAIL)
            return
        wire.filling.append((kept, room))
        wire.send(Answer(Code.SUCCESS, request.length, LENT, 0, (page, 0, 0, 0)).pack())

    def _of(self, key: bytes) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._behind is None else self._changing[hash(key) % _LOCKS]

    def _fetch(self, key: bytes) -> Value | None:
        """A value of the tier behind, which memory keeps from now on if there is room."""
        if self._behind is None:
            return None
        with self._of(key):
            value = self._behind.read(key)
            room = self.shelf.reserve(len(value.data)) if value is not None else None
            if value is not None and room is not None:
                room[:] = value.data
                value = Value(room, value.fmt, value.dtype, value.shape)
                self.shelf.put(key, value)
            return value

    def _forget(self, key: bytes) -> None:
        with self._of(key):
            self.shelf.remove(key)
            if self._behind is not None:
                self._behind.remove(key)

    def _put(self, wire: _Line, request: Request, who: str) -> None:
        """Take a value, or let it pass. What stood under the key before is gone in both cases: it is out of date."""
        wrong = request.mismatch()
        if not wrong and request.length > self.limits.most_bytes:
            wrong = f"expected at most {self.limits.most_bytes} bytes; got {request.length}"
        if wrong or not request.length:
            if wrong:
                self._tell(f"{who}: a value is not kept: {wrong}")
                self.shelf.count("refused")
            self._forget(request.key)
            wire.skip(request.length)
            return
        room = self.shelf.reserve(request.length)
        if room is None:
            self._tell(f"{who}: a value is not kept: {request.length} bytes do not fit into {self.shelf.capacity}")
            self._forget(request.key)
            wire.skip(request.length)
            return
        try:
            wire.take(room)
            wire.acknowledge()  # LMCache's connector does not switch Nagle's gathering off: its next question would wait 40 ms
        except BaseException:
            self.shelf.release(room)
            raise
        self._keep(request, room)

    def _keep(self, request: Request, room: memoryview) -> None:
        """A value is there, in the room that was reserved for it."""
        value = Value(room, request.fmt, request.dtype, request.shape)
        with self._of(request.key):
            self.shelf.put(request.key, value)
            if self._behind is not None:
                self._behind.write(request.key, value)
