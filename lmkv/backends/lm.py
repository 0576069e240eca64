"""Values in a server that speaks LMCache's ``lm://`` protocol: LMCache's own ``lmcache_server``, or ``lmkv serve``.

The protocol knows neither deletion nor an answer to a write. A write is followed by the question whether the key is there,
which a server answers after it has taken the value, since it serves one connection's requests in order. A deletion writes a
value of no bytes, which counts as absent here; only ``lmkv serve`` frees the key then.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
import urllib.parse
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..chunks import ChunkKey
from ..config import read_secret
from ..errors import BackendUnavailableError, CapacityError, ConfigError, StoreClosedError
from .base import BackendSettings, shown_url
from .lm_shared import FREE, LEAST_BYTES, LENT, READY, MarkingWire, Shared, copy, join
from .lm_wire import (
    ANSWER_BYTES,
    BINARY,
    DEFAULT_PORT,
    GREETING,
    MOST_BYTES,
    MOST_KEY_BYTES,
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
from .redis.wire import WireError

__all__ = ["LmBackend"]

_KNOWN = ("prefix", "token", "token_env", "token_file")
#: Questions that are sent before their answers are received: few enough that neither side's buffers fill. LMCache's server
#: leaves it to the kernel to put its answers together, which then waits 40 ms for an acknowledgement: it is asked one by one.
_QUESTIONS = 64
#: Values that are asked for before they are received, of ``lmkv serve``.
_AHEAD = 2
#: Keys that were deleted where the server still has a value of no bytes.
_MOST_GONE = 1 << 16
#: Names of a key, by the version of LMCache that takes them apart: from 0.3.15 on, and before.
_FORMS = (b"%b@1@0@%b@uint8", b"lmkv@%b@1@0@%b@uint8")
_PREFIX = re.compile(r"[!-$&-?A-~]{1,80}")


class _TornError(Exception):
    """No more came in the middle of a value."""


@dataclass
class _Connection:
    """One connection, greeted.

    Args:
        form: how keys are named for this server.
        ours: whether ``lmkv serve`` is there.
        shared: memory of a server on this machine, by a Unix socket only.
        fresh: whether it was made for this call; one that rested may have been ended by the server meanwhile.
    """

    sock: socket.socket
    form: bytes
    ours: bool
    shared: Shared | None = None
    fresh: bool = True


class LmBackend:
    """Values in an ``lm://`` server. Connects on first use.

    Options (in the tier's ``options`` or the URL's query): ``prefix`` (``lmkv``; the model name in LMCache's keys), ``token``
    (or ``token_env``, ``token_file``), which only ``lmkv serve`` understands.

    Raises:
        ConfigError: a malformed URL or option, or a capacity (the server bounds itself, or nobody does).
    """

    def __init__(self, settings: BackendSettings) -> None:
        where = f"tier {settings.name}"
        if settings.capacity:
            raise ConfigError(
                f"{where}: expected no capacity for an lm:// server, which bounds itself; got {settings.capacity}"
            )
        parts = urllib.parse.urlsplit(settings.url)
        try:
            self._address = (parts.hostname or "", parts.port or DEFAULT_PORT)
        except ValueError:
            self._address = ("", 0)
        if parts.scheme != "lm" or not self._address[0] or parts.path.strip("/"):
            raise ConfigError(f"{where}: expected a url such as lm://localhost:65432; got {shown_url(settings.url)!r}")
        options = {**dict(urllib.parse.parse_qsl(parts.query)), **settings.options}
        for name in options:
            if name not in _KNOWN:
                raise ConfigError(f"{where}: expected options out of {', '.join(_KNOWN)}; got {name!r}")
        prefix = str(options.get("prefix", "lmkv"))
        if not _PREFIX.fullmatch(prefix):
            raise ConfigError(f"{where}: prefix: expected 1 to 80 printable characters without @, % and spaces; got {prefix!r}")
        token = (read_secret(options, "token", where) or "").encode()
        if len(TOKEN_KEY) + len(token) > MOST_KEY_BYTES:
            raise ConfigError(f"{where}: token: expected at most {MOST_KEY_BYTES - len(TOKEN_KEY)} bytes; got {len(token)}")
        self._prefix, self._token = prefix.encode(), token
        self._shown = f"lm://{self._address[0]}:{self._address[1]}"
        self._deadline, self._report = settings.deadline_seconds, settings.report
        self._lock = threading.Lock()
        self._resting: list[_Connection] = []
        self._gone: OrderedDict[ChunkKey, None] = OrderedDict()
        self._form = _FORMS[0]
        self._closed = False

    def __repr__(self) -> str:
        return f"LmBackend({self._shown})"

    # -- connections -----------------------------------------------------------------------------------------------------

    def _greet(self, form: bytes, until: float) -> _Connection | None:
        """Connect and say hello; ``None`` if the server ends the connection over the form of the key."""
        left = until - time.monotonic()
        if left <= 0:
            raise WireError("expected an answer in time; none came")
        try:
            sock = socket.create_connection(self._address, timeout=left)
        except OSError as error:
            raise WireError(f"no connection: {error}") from None
        try:
            answer = self._hello(sock, form, until)
            if answer is None:
                sock.close()
                return None
            ours = answer.shape[0] == GREETING
            # of another port is a proxy there, which somebody wants in between
            if ours and answer.shape[1] == self._address[1] and any(answer.shape[2:]) and is_local(sock):
                return self._local(sock, form, answer, until)
            return _Connection(sock, form, ours)
        except BaseException:
            sock.close()
            raise

    def _hello(self, sock: socket.socket, form: bytes, until: float) -> Answer | None:
        """The greeting's answer; ``None`` if the server ends the connection over it."""
        prepare(sock)
        sock.settimeout(0)  # which is how a wire leaves it, so that a look at a connection at rest does not wait
        wire = MarkingWire(sock, until)
        key = TOKEN_KEY + self._token if self._token else form % (self._prefix, b"0")
        wire.send(Request(Command.HEALTH, key).pack())
        try:
            answer = self._answer(wire)
        except WireError:
            if time.monotonic() >= until:
                raise
            return None
        if answer.code != Code.SUCCESS:
            raise WireError("the server refuses the token" if self._token else "the server wants a token, or is not well")
        wire.rest()
        return answer

    def _local(self, tcp: socket.socket, form: bytes, answer: Answer, until: float) -> _Connection:
        """The server's Unix socket in place of ``tcp``, if it can be reached from here."""
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(max(0.001, until - time.monotonic()))
            sock.connect(local_name((answer.shape[2], answer.shape[3])))
            found = self._hello(sock, form, until)
            if found is not None and found.shape == answer.shape:
                sock.settimeout(max(0.001, until - time.monotonic()))
                shared = join(sock)
                sock.settimeout(0)
                tcp.close()
                return _Connection(sock, form, True, shared)
        except (OSError, HeaderError):
            pass  # another network namespace
        sock.close()
        return _Connection(tcp, form, True)

    def _connect(self, until: float) -> _Connection:
        for form in sorted(_FORMS, key=lambda form: form != self._form):
            made = self._greet(form, until)
            if made is not None:
                self._form = form
                return made
            if self._token:
                break
        raise WireError("the server ended the connection at the first request: it is no lm:// server, or takes no token")

    @staticmethod
    def _alive(sock: socket.socket) -> bool:
        """Whether a connection at rest is still there and silent."""
        try:
            sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def _take(self, until: float) -> _Connection:
        while True:
            with self._lock:
                found = self._resting.pop() if self._resting else None
            if found is None:
                return self._connect(until)
            if self._alive(found.sock):
                found.fresh = False
                return found
            found.sock.close()

    @contextlib.contextmanager
    def _wire(self, until: float) -> Iterator[tuple[MarkingWire, _Connection]]:
        """A connection, kept for the next call unless the block fails."""
        connection = self._take(until)
        try:
            wire = MarkingWire(connection.sock, until)
            yield wire, connection
            wire.rest()
        except BaseException:
            connection.sock.close()
            raise
        with self._lock:
            if not self._closed:
                self._resting.append(connection)
                return
        connection.sock.close()

    def _call(self, step: Callable[[MarkingWire, _Connection], None], until: float = 0.0) -> None:
        """``step`` over a connection, within the deadline; once more if one that rested turns out to be of no use."""
        if self._closed:
            raise StoreClosedError("expected an open backend; it was closed")
        until = until or time.monotonic() + self._deadline
        while True:
            fresh = True
            try:
                with self._wire(until) as (wire, connection):
                    fresh = connection.fresh
                    step(wire, connection)
                return
            except (OSError, HeaderError) as error:
                if fresh or time.monotonic() >= until:
                    raise BackendUnavailableError(f"{self._shown}: {error}") from None

    # -- requests --------------------------------------------------------------------------------------------------------

    def _name(self, form: bytes, key: ChunkKey) -> bytes:
        return form % (self._prefix, key.hex().encode())

    @staticmethod
    def _answer(wire: MarkingWire) -> Answer:
        head = bytearray(ANSWER_BYTES)
        wire.take(memoryview(head))
        return Answer.unpack(head)

    def _ask(self, wire: MarkingWire, connection: _Connection, keys: Sequence[ChunkKey]) -> list[bool]:
        there: list[bool] = []
        at_once = _QUESTIONS if connection.ours else 1
        for begin in range(0, len(keys), at_once):
            some = keys[begin : begin + at_once]
            wire.send(b"".join(Request(Command.EXIST, self._name(connection.form, key)).pack() for key in some))
            there += [self._answer(wire).code == Code.SUCCESS for _ in some]
        return there

    def _put(self, wire: MarkingWire, form: bytes, key: ChunkKey, value: memoryview | bytes) -> None:
        size = len(value)
        head = Request(Command.PUT, self._name(form, key), size, BINARY, 0, (size, 0, 0, 0))
        wire.send(head.pack(), value)

    def _fill(
        self, wire: MarkingWire, connection: _Connection, shared: Shared, keys: Sequence[ChunkKey], data: Sequence[memoryview]
    ) -> None:
        """Store values, large ones straight in the server's memory."""
        large = [(key, value) for key, value in zip(keys, data, strict=True) if len(value) >= LEAST_BYTES]
        for key, value in zip(keys, data, strict=True):
            if len(value) < LEAST_BYTES:
                self._put(wire, connection.form, key, value)
        asked = 0
        for done, (key, value) in enumerate(large):
            while asked < min(done + _AHEAD, len(large)):
                name, size = self._name(connection.form, large[asked][0]), len(large[asked][1])
                wire.send(Request(Command.PUT, name, size, LENT, 0, (size, 0, 0, 0)).pack())
                asked += 1
            answer = self._answer(wire)
            if answer.code != Code.SUCCESS:
                self._put(wire, connection.form, key, value)
                continue
            if answer.length != len(value) or answer.fmt != LENT:
                raise HeaderError(f"expected room for {len(value)} bytes; got it for {answer.length}")
            copy(shared.part(answer.shape[0], len(value)), np.frombuffer(value, np.uint8))
            wire.marks += READY  # there is a question, or another value, to come

    def _remember_gone(self, keys: Sequence[ChunkKey]) -> None:
        with self._lock:
            for key in keys:
                self._gone[key] = None
            while len(self._gone) > _MOST_GONE:
                self._gone.popitem(last=False)

    def _forget_gone(self, keys: Sequence[ChunkKey]) -> None:
        with self._lock:
            for key in keys:
                self._gone.pop(key, None)

    # -- Backend ---------------------------------------------------------------------------------------------------------

    def contains_many(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """See :class:`lmkv.backends.base.Backend`.

        What another process deleted from an ``lmcache_server`` seems to be there.
        """
        there: list[bool] = []

        def step(wire: MarkingWire, connection: _Connection) -> None:
            there[:] = self._ask(wire, connection, keys)

        if keys:
            self._call(step)
        with self._lock:
            return [found and key not in self._gone for found, key in zip(there, keys, strict=True)]

    def read_many(self, keys: Sequence[ChunkKey], out: Sequence[memoryview]) -> list[int | None]:
        """See :class:`lmkv.backends.base.Backend`. Received straight into the buffers.

        A value over which the server ends the connection is absent: LMCache's server keeps such a thing where a writer ended
        in the middle of a value.
        """
        sizes: list[int | None] = [None] * len(keys)
        done = 0

        def step(wire: MarkingWire, connection: _Connection) -> None:
            nonlocal done
            sent = done
            ahead = _AHEAD if connection.ours else 1
            while done < len(keys):
                while sent < min(done + ahead, len(keys)):
                    wire.send(Request(Command.GET, self._name(connection.form, keys[sent])).pack())
                    sent += 1
                size = self._receive(wire, out[done], connection.shared)
                if wire.marks:
                    following = keys[sent : sent + 1]
                    try:  # after the server ended the connection, what was read may have been another value
                        wire.send(*(Request(Command.GET, self._name(connection.form, key)).pack() for key in following))
                    except WireError as error:
                        raise _TornError(str(error)) from None
                    sent += len(following)
                sizes[done] = size
                done += 1

        until = time.monotonic() + self._deadline
        while done < len(keys):
            try:
                self._call(step, until)
            except _TornError as torn:
                if time.monotonic() >= until:
                    raise BackendUnavailableError(f"{self._shown}: {torn}") from None
                self._report("read", f"{self._shown}: in the middle of a value: {torn}")
                done += 1
        return sizes

    @classmethod
    def _receive(cls, wire: MarkingWire, out: memoryview, shared: Shared | None) -> int | None:
        answer = cls._answer(wire)
        if answer.code != Code.SUCCESS or not answer.length:
            return None
        if shared is not None and answer.fmt == LENT:
            value = shared.part(answer.shape[0], answer.length)
            wire.marks += FREE
            if answer.length > len(out):
                return None
            copy(np.frombuffer(out[: answer.length], np.uint8), value)
            return answer.length
        if answer.length > len(out):
            wire.skip(answer.length)
            return None
        try:
            wire.take(out[: answer.length])
        except WireError as error:
            raise _TornError(str(error)) from None
        return answer.length

    def write_many(self, keys: Sequence[ChunkKey], data: Sequence[memoryview]) -> None:
        """See :class:`lmkv.backends.base.Backend`. A value of no bytes is absent."""
        too_long = [len(piece) for piece in data if len(piece) > MOST_BYTES]
        if too_long:
            raise CapacityError(f"{self._shown}: expected values of at most {MOST_BYTES} bytes; got {too_long[0]}")
        there: list[bool] = []

        def step(wire: MarkingWire, connection: _Connection) -> None:
            if connection.shared is None:
                for key, piece in zip(keys, data, strict=True):
                    self._put(wire, connection.form, key, piece)
            else:
                self._fill(wire, connection, connection.shared, keys, data)
            there[:] = self._ask(wire, connection, keys)

        if not keys:
            return
        self._call(step)
        if not all(there):
            self.delete_many([key for key, found in zip(keys, there, strict=True) if found])
            raise CapacityError(f"{self._shown}: the server did not keep {there.count(False)} of {len(keys)} values")
        self._forget_gone(keys)

    def delete_many(self, keys: Sequence[ChunkKey]) -> None:
        """See :class:`lmkv.backends.base.Backend`. An ``lmcache_server`` keeps the key, with a value of no bytes."""

        def step(wire: MarkingWire, connection: _Connection) -> None:
            there = self._ask(wire, connection, keys)
            present = [key for key, found in zip(keys, there, strict=True) if found]
            for key in present:
                self._put(wire, connection.form, key, b"")
            kept = self._ask(wire, connection, present[-1:])
            if not connection.ours and any(kept):
                self._remember_gone(present)

        if keys:
            self._call(step)

    def close(self) -> None:
        """See :class:`lmkv.backends.base.Backend`."""
        with self._lock:
            self._closed = True
            resting, self._resting = self._resting, []
        for connection in resting:
            connection.sock.close()
