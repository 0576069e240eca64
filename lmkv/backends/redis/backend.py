"""Values in a Redis: small ones under one key, larger ones in parts of 1 MiB, visible once all parts are there.

A value's *head* stands under ``<prefix>:{<chunk key in hex>}``: 32 bytes that say its size, how it is cut and which write it is
of, followed by the first 508 KiB of the value, or all of it. What is beyond stands in parts under
``<prefix>:{<key>}:<write>:<number>``. A write is one transaction, so that a reader meets one write's parts or none, whoever
else writes at the time, and nothing is left of a write that ended halfway. A part that is gone (evicted, expired, lost with a
node) makes the value absent. The braces put a value's keys on one node of a cluster.

Larger parts cost less time at both ends, smaller ones stay in a core's caches on their way (docs/benchmarks.md).
All sizes are a little below a power of two, since servers' allocators round up to such sizes: 512 KiB take 640.
"""

from __future__ import annotations

import secrets
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...chunks import ChunkKey
from ...errors import BackendError, BackendUnavailableError, CapacityError, ConfigError, StoreClosedError
from ..base import BackendSettings
from .nodes import Nodes, open_nodes
from .target import LEAST_PART, RedisTarget
from .wire import ErrorReply, Wire, WireError, command

__all__ = ["RedisBackend"]

#: magic, bytes of a part, bytes of the value, write (0 where there are no parts).
_HEAD = struct.Struct("<4sIQ16s")
_MAGIC = b"LKV1"
_UNCUT = bytes(16)
_HEAD_RANGE = (b"0", b"%d" % (_HEAD.size - 1))
#: What of a value stands behind its head at most; a part's bytes where they are fewer.
_FIRST = 508 * 1024
_MOST_BYTES = 2**36
#: So many replies are always under way, and more as long as they are of no more bytes in all: a server that waits for the next
#: question, or we for the next answer, costs more than what it keeps ready.
_LEAST_ASKED, _MOST_ASKED_BYTES = 2, 2 * 1024**2
#: A reply of which more is expected is received to where it belongs from its first bytes on.
_LARGE = 8 * 1024
#: How long a server that was full is not asked again.
_FULL_SECONDS = 1.0
#: Errors that say that another node has the keys, or the role, by now.
_MOVED = ("MOVED", "ASK", "READONLY", "CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN")


class _MovedError(Exception):
    """Somebody else is to be asked."""


@dataclass(frozen=True, slots=True)
class _Head:
    part: int
    size: int
    write: bytes

    @property
    def first(self) -> int:
        """Bytes that stand behind the head."""
        return min(self.part, _FIRST, self.size)

    def parts(self) -> Iterator[tuple[int, int, int]]:
        """Number, begin and end of each part."""
        for number, begin in enumerate(range(self.first, self.size, self.part)):
            yield number, begin, min(begin + self.part, self.size)


class _Ask(NamedTuple):
    """A reply that is wanted, and how to ask for it."""

    value: int
    begin: int
    end: int
    is_head: bool
    request: bytes


class _Asking:
    """Replies that are wanted, in order, and those of them that are under way."""

    def __init__(self, wire: Wire, wanted: Iterable[_Ask]) -> None:
        self._wire = wire
        self._wanted = deque(wanted)
        self._asked: deque[_Ask] = deque()
        #: The one that is being received; it counts as under way.
        self._current: _Ask | None = None
        self._bytes = 0

    def send(self, *first: _Ask) -> None:
        """Ask for as much as may be under way, for ``first`` before the others."""
        wanted, asked = self._wanted, self._asked
        wanted.extendleft(reversed(first))
        least = _LEAST_ASKED - (self._current is not None)
        requests = []
        while wanted and (len(asked) < least or self._bytes + wanted[0].end - wanted[0].begin <= _MOST_ASKED_BYTES):
            ask = wanted.popleft()
            asked.append(ask)
            self._bytes += ask.end - ask.begin
            requests.append(ask.request)
        if requests:
            self._wire.send(b"".join(requests))

    def next(self) -> _Ask | None:
        """Whose reply is the next one; ``None`` after the last."""
        if self._current is not None:
            self._bytes -= self._current.end - self._current.begin
            self._current = None
        self.send()
        self._current = self._asked.popleft() if self._asked else None
        return self._current

    def give_up(self, value: int) -> None:
        """Ask for no more of a value."""
        self._wanted = deque(ask for ask in self._wanted if ask.value != value)


def _read_head(data: bytes) -> _Head | None:
    """A head, or ``None`` where something else stands."""
    if len(data) != _HEAD.size:
        return None
    magic, part, size, write = _HEAD.unpack(data)
    return _Head(part, size, write) if magic == _MAGIC and part >= LEAST_PART and size < _MOST_BYTES else None


class RedisBackend:
    """Values in a Redis, Sentinel, Cluster or Valkey. Connects on first use.

    Options (in the tier's ``options`` or the URL's query): ``prefix``, ``ttl_seconds``, ``part_bytes``, ``master``, ``db``,
    ``username``, ``password`` (or ``password_env``, ``password_file``), the same for ``sentinel_…``, and redis-py's
    ``ssl_cert_reqs``, ``ssl_ca_certs``, ``ssl_certfile``, ``ssl_keyfile``, ``ssl_check_hostname``.

    Raises:
        ConfigError: a malformed URL or option, a capacity (the server's ``maxmemory`` bounds it), or no package ``redis``.
    """

    def __init__(self, settings: BackendSettings) -> None:
        if settings.capacity:
            raise ConfigError(
                f"tier {settings.name}: expected no capacity for a Redis, which bounds itself by its maxmemory; "
                f"got {settings.capacity}"
            )
        self._target = RedisTarget.of(settings)
        self._deadline = settings.deadline_seconds
        self._report = settings.report
        self._nodes: Nodes = open_nodes(self._target, settings.deadline_seconds)
        self._before = self._target.prefix.encode() + b":{"
        #: Milliseconds after which values go; empty for never.
        self._expiry = b"%d" % max(1, round(self._target.ttl_seconds * 1000)) if self._target.ttl_seconds else b""
        self._full_until = 0.0
        self._closed = False

    def __repr__(self) -> str:
        return f"RedisBackend({self._target.shown})"

    # -- names and commands ----------------------------------------------------------------------------------------------

    def _name(self, key: ChunkKey) -> bytes:
        return self._before + key.hex().encode() + b"}"

    @staticmethod
    def _part(name: bytes, write: bytes, number: int) -> bytes:
        return b"%b:%b:%d" % (name, write.hex().encode(), number)

    def _set(self, name: bytes, start: bytes, size: int) -> bytes:
        """A SET, or a PSETEX, of ``start`` and ``size`` more bytes that are to follow, and a line's end.

        The value is the last word: a server then receives it in one piece, to where it stays.
        """
        expiry = b"$%d\r\n%b\r\n" % (len(self._expiry), self._expiry) if self._expiry else b""
        verb = b"*4\r\n$6\r\nPSETEX" if self._expiry else b"*3\r\n$3\r\nSET"
        return b"%b\r\n$%d\r\n%b\r\n%b$%d\r\n%b" % (verb, len(name), name, expiry, len(start) + size, start)

    # -- talking to nodes ------------------------------------------------------------------------------------------------

    def _each_node(self, operation: str, names: Sequence[bytes], step: Callable[[Wire, list[int]], None], until: float) -> None:
        """``step(wire, indices)`` on every node that has some of the keys; steps may be repeated.

        Raises:
            BackendUnavailableError: no node did its step. If some did, the others are reported.
        """
        if self._closed:
            raise StoreClosedError("expected an open backend; it was closed")
        left, failures, done = list(range(len(names))), [], False
        for attempt in range(3):
            again: list[int] = []
            for node, indices in self._nodes.group(names, left).items():
                try:
                    with self._nodes.wire(node, until) as wire:
                        step(wire, indices)
                    done = True
                except _MovedError as moved:
                    again += indices
                    last = str(moved)
                except BackendUnavailableError as error:
                    failures.append(str(error))
            if not again:
                break
            self._nodes.refresh()
            if attempt == 2 or time.monotonic() >= until:
                failures.append(last)
                break
            left = again
        if failures and not done:
            raise BackendUnavailableError(f"{self._target.shown}: {failures[0]}")
        for reason in failures:
            self._report(operation, f"{self._target.shown}: {reason}")

    def _told(self, reply: ErrorReply) -> None:
        """Raise what an error reply means; WRONGTYPE, a key of somebody else's, means nothing."""
        if reply.kind in _MOVED:
            raise _MovedError(str(reply))
        if reply.kind == "OOM":
            raise CapacityError(f"{self._target.shown}: the server is full: {reply}")
        if reply.kind != "WRONGTYPE":
            raise BackendUnavailableError(f"the server says: {reply}")

    # -- Backend ---------------------------------------------------------------------------------------------------------

    def contains_many(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """See :class:`lmkv.backends.base.Backend`. One round trip a node."""
        names = [self._name(key) for key in keys]
        there = [False] * len(keys)

        def step(wire: Wire, indices: list[int]) -> None:
            verb = b"*2\r\n$6\r\nEXISTS\r\n$%d\r\n" % len(names[0])  # names are all of one length
            wire.send(verb + (b"\r\n" + verb).join(names[i] for i in indices) + b"\r\n")
            replies = wire.statuses(len(indices))
            for i, reply in zip(indices, replies, strict=True):
                if isinstance(reply, ErrorReply):
                    self._told(reply)
                else:
                    there[i] = reply == 1

        self._each_node("lookup", names, step, time.monotonic() + self._deadline)
        return there

    def read_many(self, keys: Sequence[ChunkKey], out: Sequence[memoryview]) -> list[int | None]:
        """See :class:`lmkv.backends.base.Backend`. Received straight into the buffers."""
        names = [self._name(key) for key in keys]
        sizes: list[int | None] = [None] * len(keys)
        broken: set[int] = set()
        until = time.monotonic() + self._deadline

        def step(wire: Wire, indices: list[int]) -> None:
            broken.difference_update(indices)
            for i in indices:
                sizes[i] = None
            try:
                self._receive(wire, indices, names, out, sizes, broken)
            except BaseException:  # what is there of a value whose head came is not all of it
                for i in indices:
                    sizes[i] = None
                raise

        self._each_node("read", names, step, until)
        if broken:  # perhaps it was replaced meanwhile
            again = sorted(broken)
            self._each_node("read", [names[i] for i in again], lambda wire, few: step(wire, [again[j] for j in few]), until)
        if broken:
            self.delete_many([keys[i] for i in sorted(broken)])
        return sizes

    def _receive(
        self,
        wire: Wire,
        indices: list[int],
        names: Sequence[bytes],
        out: Sequence[memoryview],
        sizes: list[int | None],
        broken: set[int],
    ) -> None:
        """Heads, and of values that are cut the parts right after; sets ``sizes`` of what came whole, adds to ``broken``."""
        asking = _Asking(wire, [_Ask(i, 0, min(len(out[i]), _FIRST), True, command(b"GET", names[i])) for i in indices])
        while (ask := asking.next()) is not None:
            i = ask.value
            if ask.is_head:
                there, head = self._receive_head(wire, ask, out[i])
                if head is not None:
                    parts = [(self._part(names[i], head.write, number), begin, end) for number, begin, end in head.parts()]
                    asking.send(*[_Ask(i, begin, end, False, command(b"GET", part)) for part, begin, end in parts])
                    wire.take_last(out[i][: head.first])
                    sizes[i] = head.size
                elif there:
                    broken.add(i)
            elif not self._receive_part(wire, ask, out[i]):
                sizes[i] = None
                broken.add(i)
                asking.give_up(i)

    def _receive_head(self, wire: Wire, ask: _Ask, out: memoryview) -> tuple[bool, _Head | None]:
        """Whether something damaged or foreign stands there; the head of a value that fits, whose first bytes come next."""
        size = wire.size(ask.end > _LARGE)
        if isinstance(size, ErrorReply):
            self._told(size)
            return True, None
        if size is None:
            return False, None
        scratch = bytearray(min(size, _HEAD.size))
        wire.take(memoryview(scratch))
        head, rest = _read_head(bytes(scratch)), size - len(scratch)
        whole = head is not None and rest == head.first
        if head is not None and whole and head.size <= len(out):
            return False, head
        self._skip(wire, rest)
        wire.end()
        return not whole, None

    def _receive_part(self, wire: Wire, ask: _Ask, out: memoryview) -> bool:
        """Whether a part came as its head says."""
        size = wire.size(ask.end - ask.begin > _LARGE)
        if isinstance(size, ErrorReply):
            self._told(size)
        elif size == ask.end - ask.begin:
            wire.take_last(out[ask.begin : ask.end])
            return True
        elif size is not None:
            self._skip(wire, size)
            wire.end()
        return False

    def _skip(self, wire: Wire, size: int) -> None:
        if size > 4 * self._target.part_bytes + _HEAD.size:
            raise WireError(f"expected at most a part of {self._target.part_bytes} bytes; {size} are on their way")
        wire.skip(size)

    def write_many(self, keys: Sequence[ChunkKey], data: Sequence[memoryview]) -> None:
        """See :class:`lmkv.backends.base.Backend`. Each value gets the deadline's time of its own."""
        if time.monotonic() < self._full_until:
            raise CapacityError(f"{self._target.shown}: the server was full a moment ago")
        names = [self._name(key) for key in keys]
        until = time.monotonic() + self._deadline * max(1, len(keys))
        try:
            self._each_node("write", names, lambda wire, indices: self._send(wire, indices, names, data), until)
        except CapacityError:
            self._full_until = time.monotonic() + _FULL_SECONDS
            self.delete_many(keys)
            raise

    def _send(self, wire: Wire, indices: list[int], names: Sequence[bytes], data: Sequence[memoryview]) -> None:
        """A transaction a value; each is confirmed once the next one has been sent. Then what was replaced is dropped."""
        sent: deque[tuple[bytes, list[bytes]]] = deque()
        failed: ErrorReply | None = None
        unused: list[list[bytes]] = []
        for i in indices:
            sent.append((names[i], self._send_one(wire, names[i], data[i])))
            if len(sent) > 1:
                failed = self._confirm(wire, *sent.popleft(), unused)
                if failed is not None:
                    break
        while sent:
            failed = self._confirm(wire, *sent.popleft(), unused) or failed
        if unused:
            wire.send(b"".join(command(b"UNLINK", *names_of_one) for names_of_one in unused))
            wire.statuses(len(unused))
        if failed is not None:
            self._told(failed)
            raise BackendUnavailableError(f"the server says: {failed}")

    def _send_one(self, wire: Wire, name: bytes, data: memoryview) -> list[bytes]:
        """Send a value; the names of its further parts.

        The server takes the parts in and gives them their names at once at the end, or, if it refused one, none of them. A
        writer that is cut off before leaves nothing.
        """
        part, size = self._target.part_bytes, len(data)
        head = _Head(part, size, secrets.token_bytes(16) if size > min(part, _FIRST) else _UNCUT)
        start = _HEAD.pack(_MAGIC, part, size, head.write)
        before = command(b"MULTI") + command(b"GETRANGE", name, *_HEAD_RANGE)
        wire.send(before + self._set(name, start, head.first), data[: head.first])
        parts = []
        for number, begin, end in head.parts():
            parts.append(self._part(name, head.write, number))
            wire.send(b"\r\n" + self._set(parts[-1], b"", end - begin), data[begin:end])
        wire.send(b"\r\n" + command(b"EXEC"))
        return parts

    def _confirm(self, wire: Wire, name: bytes, parts: list[bytes], unused: list[list[bytes]]) -> ErrorReply | None:
        """Receive what became of a value that was sent; adds to ``unused`` the parts of the one that it replaced."""
        failed = self._first_error(wire.statuses(3 + len(parts)))  # of MULTI, and of each command whether it was taken in
        done = wire.array()
        if isinstance(done, ErrorReply):
            return failed or ErrorReply(done.rpartition("because of: ")[2])
        if done != 2 + len(parts):
            raise WireError(f"expected {2 + len(parts)} results of a transaction; got {done}")
        replaced = self._old_parts(wire, name)
        failed = self._first_error(wire.statuses(1 + len(parts)))
        gone = replaced if failed is None else [name, *parts]
        unused += [gone] if gone else []
        return failed

    def _old_parts(self, wire: Wire, name: bytes) -> list[bytes]:
        """The names of parts of which a GETRANGE of a head, asked before, speaks."""
        size = wire.size()
        if size is None or isinstance(size, ErrorReply):
            return []
        if size > _HEAD.size:
            raise WireError(f"expected at most {_HEAD.size} bytes of a head; {size} are on their way")
        held = bytearray(size)
        wire.take(memoryview(held))
        wire.end()
        head = _read_head(bytes(held))
        return [self._part(name, head.write, number) for number, _, _ in head.parts()] if head else []

    @staticmethod
    def _first_error(replies: Sequence[int | ErrorReply]) -> ErrorReply | None:
        return next((reply for reply in replies if isinstance(reply, ErrorReply)), None)

    def delete_many(self, keys: Sequence[ChunkKey]) -> None:
        """See :class:`lmkv.backends.base.Backend`."""
        names = [self._name(key) for key in keys]

        def step(wire: Wire, indices: list[int]) -> None:
            wire.send(b"".join(command(b"GETRANGE", names[i], *_HEAD_RANGE) for i in indices))
            gone = [[names[i], *self._old_parts(wire, names[i])] for i in indices]
            wire.send(b"".join(command(b"UNLINK", *names_of_one) for names_of_one in gone))
            failed = self._first_error(wire.statuses(len(indices)))
            if failed is not None:
                self._told(failed)

        self._each_node("delete", names, step, time.monotonic() + self._deadline)

    def clear(self) -> None:
        """See :class:`lmkv.backends.base.Clearable`: every key behind the prefix, whoever wrote it."""
        import redis.cluster

        pattern = "".join(f"\\{c}" if c in "*?[]^\\" else c for c in self._target.prefix) + ":{*"
        for client in self._nodes.masters():
            try:
                batch: list[bytes] = []
                for name in client.scan_iter(match=pattern, count=1000):
                    batch.append(name)
                    if len(batch) == 500:
                        self._unlink(client, batch)
                        batch = []
                self._unlink(client, batch)
            except (redis.RedisError, redis.cluster.RedisClusterException, OSError) as error:
                raise BackendError(f"{self._target.shown}: clear: {type(error).__name__}: {error}") from None

    @staticmethod
    def _unlink(client: Any, names: Sequence[bytes]) -> None:
        with client.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.unlink(name)
            pipe.execute()

    def close(self) -> None:
        """See :class:`lmkv.backends.base.Backend`."""
        self._closed = True
        self._nodes.close()
