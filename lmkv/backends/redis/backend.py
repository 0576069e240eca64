"""Values in a Redis: small ones under one key, larger ones in parts of 512 KiB, visible once all parts are there.

A value's *head* stands under ``<prefix>:{<chunk key in hex>}``: 32 bytes that say its size, how it is cut and which write it is
of, followed by the value itself where it is not cut. Parts stand under ``<prefix>:{<key>}:<write>:<number>``. A write sends the
parts, has them confirmed, then sets the head; so a reader meets one write's parts or none, whoever else writes at the time.
A part that is gone (evicted, expired, lost with a node) makes the value absent. The braces put a value's keys on one node of
a cluster.
"""

from __future__ import annotations

import secrets
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...chunks import ChunkKey
from ...errors import BackendError, BackendUnavailableError, CapacityError, ConfigError, StoreClosedError
from ..base import BackendSettings
from .nodes import Nodes, open_nodes
from .target import LEAST_PART, RedisTarget
from .wire import ErrorReply, Wire, WireError, command

__all__ = ["RedisBackend"]

#: magic, bytes of a part, bytes of the value, write; a value that is not cut has the write 0 and follows at once.
_HEAD = struct.Struct("<4sIQ16s")
_MAGIC = b"LKV1"
_UNCUT = bytes(16)
_HEAD_RANGE = (b"0", b"%d" % (_HEAD.size - 1))
_MOST_BYTES = 2**36
#: Parts whose write ended before its head was set go after this time.
_UNFINISHED_MS = b"600000"
#: The next part is asked for when so much of one is still to come: sooner a server holds two replies at once, for which it
#: finds fresh memory each time and takes twice as long; later it waits for us.
_AHEAD = 128 * 1024
#: Heads that are asked for ahead.
_WINDOW = 2
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
    def parts(self) -> int:
        return 0 if self.write == _UNCUT else -(-self.size // self.part)

    def spans(self) -> Iterator[tuple[int, int]]:
        for begin in range(0, self.size, self.part):
            yield begin, min(begin + self.part, self.size)


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

    @staticmethod
    def _set(wire: Wire, name: bytes, start: bytes, value: memoryview, milliseconds: bytes) -> None:
        """Send a SET, or with milliseconds a PSETEX, of ``start`` and ``value`` put together.

        The value is the last word: a server then receives it in one piece, to where it stays.
        """
        size = len(start) + len(value)
        expiry = b"$%d\r\n%b\r\n" % (len(milliseconds), milliseconds) if milliseconds else b""
        verb = b"*4\r\n$6\r\nPSETEX" if milliseconds else b"*3\r\n$3\r\nSET"
        begin = b"%b\r\n$%d\r\n%b\r\n%b$%d\r\n%b" % (verb, len(name), name, expiry, size, start)
        wire.send(begin, value, b"\r\n")

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
            cut: list[tuple[int, _Head]] = []
            broken.difference_update(indices)
            for i, there, head in self._receive_heads(wire, indices, names, out):
                sizes[i] = None
                if head is None:
                    broken.update([i] if there else [])
                elif head.size > len(out[i]):
                    continue
                elif head.parts:
                    cut.append((i, head))
                else:
                    sizes[i] = head.size
            whole = self._receive_parts(wire, cut, names, out)
            for i, head in cut:
                if i in whole:
                    sizes[i] = head.size
                else:
                    broken.add(i)

        self._each_node("read", names, step, until)
        if broken:  # perhaps it was replaced meanwhile
            again = sorted(broken)
            self._each_node("read", [names[i] for i in again], lambda wire, few: step(wire, [again[j] for j in few]), until)
        if broken:
            self.delete_many([keys[i] for i in sorted(broken)])
        return sizes

    def _receive_heads(
        self, wire: Wire, indices: list[int], names: Sequence[bytes], out: Sequence[memoryview]
    ) -> Iterator[tuple[int, bool, _Head | None]]:
        """In order: whether something stands there, and its head; values that are not cut go straight into their buffers."""
        asked = 0
        for done, i in enumerate(indices):
            while asked < min(len(indices), done + 2 * _WINDOW):
                wire.send(command(b"GET", names[indices[asked]]))
                asked += 1
            size = wire.size()
            if size is None or isinstance(size, ErrorReply):
                if size is not None:
                    self._told(size)
                yield i, size is not None, None
                continue
            scratch = bytearray(min(size, _HEAD.size))
            wire.take(memoryview(scratch))
            head, rest = _read_head(bytes(scratch)), size - len(scratch)
            if head is not None and rest != (0 if head.parts else head.size):
                head = None
            if head is not None and rest <= len(out[i]):
                wire.take(out[i][:rest])
            else:
                self._skip(wire, rest)
            wire.end()
            yield i, True, head

    def _receive_parts(
        self, wire: Wire, cut: Sequence[tuple[int, _Head]], names: Sequence[bytes], out: Sequence[memoryview]
    ) -> set[int]:
        """Which of the cut values came whole."""
        wanted = [(i, head.write, number, span) for i, head in cut for number, span in enumerate(head.spans())]
        whole = {i for i, _ in cut}
        asks = iter([command(b"GET", self._part(names[i], write, number)) for i, write, number, _ in wanted])
        wire.send(next(asks, b""))
        for i, _, _, (begin, end) in wanted:
            size = wire.size()
            if isinstance(size, ErrorReply):
                self._told(size)
            if size != end - begin:
                whole.discard(i)
                wire.send(next(asks, b""))
                if isinstance(size, int):
                    self._skip(wire, size)
                    wire.end()
                continue
            ahead = max(begin, end - _AHEAD)
            wire.take(out[i][begin:ahead])
            wire.send(next(asks, b""))
            wire.take(out[i][ahead:end])
            wire.end()
        return whole

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
        """Parts first, and once they are confirmed, heads."""
        size = self._target.part_bytes
        heads = {i: _Head(size, len(data[i]), secrets.token_bytes(16) if len(data[i]) > size else _UNCUT) for i in indices}
        parts: dict[int, list[bytes]] = {i: [] for i in indices}
        for i in indices:
            for number, (begin, end) in enumerate(heads[i].spans() if heads[i].parts else ()):
                parts[i].append(self._part(names[i], heads[i].write, number))
                self._set(wire, parts[i][-1], b"", data[i][begin:end], self._expiry or _UNFINISHED_MS)
        sent = [name for i in indices for name in parts[i]]
        failed = self._first_error(wire.statuses(len(sent)))
        if failed is None:
            for i in indices:
                if not self._expiry:
                    wire.send(b"".join(command(b"PERSIST", name) for name in parts[i]))
                wire.send(command(b"GETRANGE", names[i], *_HEAD_RANGE))
                packed = _HEAD.pack(_MAGIC, size, heads[i].size, heads[i].write)
                self._set(wire, names[i], packed, data[i][:0] if parts[i] else data[i], self._expiry)
            failed = self._receive_confirmations(wire, [0 if self._expiry else len(parts[i]) for i in indices], indices, names)
        if failed is not None:
            self._unlink_all(wire, sent)
            self._told(failed)
            raise BackendUnavailableError(f"the server says: {failed}")

    def _receive_confirmations(
        self, wire: Wire, persisted: Sequence[int], indices: list[int], names: Sequence[bytes]
    ) -> ErrorReply | None:
        """What the setting of heads came to; drops the parts of values that were replaced."""
        replies: list[int | ErrorReply] = []
        replaced: list[bytes] = []
        for i, count in zip(indices, persisted, strict=True):
            replies += wire.statuses(count)
            replaced += self._old_parts(wire, names[i])
            replies.append(wire.status())
        failed = self._first_error(replies)
        if failed is None:
            self._unlink_all(wire, replaced)
        return failed

    @staticmethod
    def _unlink_all(wire: Wire, names: Sequence[bytes]) -> None:
        """Drop keys. One command a key: a cluster refuses keys of several slots in one."""
        wire.send(b"".join(command(b"UNLINK", name) for name in names))
        wire.statuses(len(names))

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
        return [self._part(name, head.write, number) for number in range(head.parts)] if head else []

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
