"""Values between LMKV's ``lm://`` client and ``lmkv serve`` on one machine, in memory that both have mapped.

``lmkv serve`` keeps values in a memfd and hands it to LMKV's clients of its own user over its Unix socket. A client then copies
a value straight to where it stays, or from there: nothing else is copied, and the server's processor is not needed for it.

A PUT with :data:`LENT` as its format asks for room: the answer says where, or refuses, and the value may be sent as ever then.
The mark :data:`READY` in front of a header says that the oldest room is filled; the value is there from then on, not before.
A GET that finds a value there is answered with :data:`LENT` as the format, the length, and where it lies. It stays as it is
until the mark :data:`FREE` says that the oldest such answer has been read, or the connection has ended. So no room is used for
another value while a client may still write to it or read from it, however late it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import mmap
import os
import socket
import struct
import sys
import threading
import weakref
from array import array
from typing import Any

import numpy as np

from ..pool import HUGE_PAGE, map_aligned, populate
from .lm_wire import ANSWER_BYTES, Answer, Code, Command, HeaderError, Request
from .redis.wire import Wire, WireError

__all__ = [
    "FREE",
    "LEAST_BYTES",
    "LENT",
    "MARKS",
    "READY",
    "SHARED_KEY",
    "Arena",
    "MarkingWire",
    "Shared",
    "copy",
    "give",
    "join",
]

_native: Any = None
with contextlib.suppress(ModuleNotFoundError):  # a source tree that is not installed
    _native = importlib.import_module("lmkv._native")
#: The key of a HEALTH request that asks for the memory.
SHARED_KEY = b"lmkv-shared"
#: "LMKM" in ASCII: the first dimension of an answer that brings it; its size in MiB is the second.
_BROUGHT = int.from_bytes(b"LMKM", "little")
#: A format that no value has.
LENT = -1
#: No header begins with them, whatever the order of bytes.
READY, FREE = b"\xfe", b"\xff"
MARKS = READY + FREE
#: Smaller values take less time with their header.
LEAST_BYTES = 256 * 1024
_PAGE = 4096
_MIB = 1024**2
_MOST_BYTES = 2**43  # a page's number is a signed 32-bit integer
#: Linux's MADV_POPULATE_READ, which Python does not name; before 5.14 it is refused. It maps 16 pages at a time, for writing
#: too, as the mapping is shared: MADV_POPULATE_WRITE took twice as long.
_POPULATE = 22

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def copy(to: Bytes, source: Bytes) -> None:
    """Copy bytes, and let other threads run meanwhile.

    Raises:
        ValueError: the sizes differ, or ``to`` is read-only; nothing was copied.
    """
    alike = len(to) == len(source) and to.flags.writeable and to.flags.c_contiguous and source.flags.c_contiguous
    if not alike or _native is None or _native.lib is None:
        np.copyto(to, source)
        return
    target, begin = (int(one.__array_interface__["data"][0]) for one in (to, source))
    _native.lib.lmkv_copy(target, begin, len(to))


class MarkingWire(Wire):
    """Sends marks with what is sent next."""

    def __init__(self, sock: socket.socket, until: float) -> None:
        super().__init__(sock, until)
        self.marks = b""

    def send(self, *pieces: bytes | memoryview) -> None:
        """See :class:`lmkv.backends.redis.wire.Wire`."""
        marks, self.marks = self.marks, b""
        super().send(marks, *pieces)


class Arena:
    """The server's end: rooms of any size in a memfd, whose other parts take no memory.

    A room's place is of twice its size at most, and used again for rooms of about that size: what lies between rooms are
    addresses, not memory.

    Args:
        capacity: bytes of the rooms that there will be at a time.

    Raises:
        OSError: the system has no memfd, or not so many addresses.
    """

    def __init__(self, capacity: int) -> None:
        if sys.platform != "linux":
            raise OSError("memfd is Linux's")
        self.size = min(_MOST_BYTES, 32 * max(capacity, 64 * _MIB) // _MIB * _MIB)
        self.descriptor = os.memfd_create("lmkv-serve", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.truncate(self.descriptor, self.size)
            # a peer that shrank it would end whoever touches it then
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._memory, self._begin = map_aligned(self.descriptor, self.size, 0)
        except BaseException:
            os.close(self.descriptor)
            raise
        weakref.finalize(self, os.close, self.descriptor)
        self._bytes: Bytes = np.frombuffer(self._memory, np.uint8, self.size, self._begin)
        self._address = self._bytes.ctypes.data
        self._lock = threading.Lock()
        self._end = 0
        #: Places that were used before, by the logarithm of their size; without a lock, as the last use may end anywhere.
        self._free: dict[int, list[int]] = {}

    def room(self, size: int) -> Bytes | None:
        """Memory that nothing else uses until the last reference to it is gone; ``None`` if there are no addresses left."""
        kind = max(size - 1, _PAGE).bit_length()
        free = self._free.setdefault(kind, [])
        try:
            begin = free.pop()
        except IndexError:
            with self._lock:
                align = min(1 << kind, HUGE_PAGE)
                begin = -(-self._end // align) * align
                if begin + (1 << kind) > self.size:
                    return None
                self._end = begin + (1 << kind)
        room: Bytes = self._bytes[begin : begin + size]
        weakref.finalize(room, self._return, begin, size, kind).atexit = False
        return room

    def touch(self, room: Bytes) -> None:
        """Give a room its memory: huge pages where it is large, whatever the system's setting for shared memory says, as those
        who map it then take a fault for each of these instead of one for each small one."""
        whole = len(room) // HUGE_PAGE * HUGE_PAGE
        if whole:
            populate([(room.ctypes.data, whole)], collapse=True)
        room[::_PAGE] = 0

    def _return(self, begin: int, size: int, kind: int) -> None:
        self._memory.madvise(mmap.MADV_REMOVE, self._begin + begin, -(-size // _PAGE) * _PAGE)
        self._free[kind].append(begin)

    def page(self, view: memoryview) -> int | None:
        """Where a room lies; ``None`` for other memory."""
        begin = np.frombuffer(view, np.uint8).ctypes.data - self._address
        return begin // _PAGE if 0 <= begin < self.size else None


class Shared:
    """A client's end: the same memory.

    Args:
        descriptor: of the memfd.
        size: its bytes.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self._memory, self._begin = map_aligned(descriptor, size, 0)
        self._bytes: Bytes = np.frombuffer(self._memory, np.uint8, size, self._begin)
        self._seen: set[int] = set()

    def part(self, page: int, size: int) -> Bytes:
        """The room there.

        Raises:
            HeaderError: there is none.
        """
        begin = page * _PAGE
        if page < 0 or begin + size > len(self._bytes):
            raise HeaderError(f"expected a room within {len(self._bytes)} bytes; got {size} bytes at {begin}")
        if page not in self._seen:
            with contextlib.suppress(OSError):  # in one go, where each page would be a fault
                self._memory.madvise(_POPULATE, self._begin + begin, -(-size // _PAGE) * _PAGE)
            self._seen.add(page)
        return self._bytes[begin : begin + size]


def give(sock: socket.socket, arena: Arena) -> bool:
    """Send the memory, unless another user is there: whoever has it reads and changes all values, whatever their keys.

    Raises:
        WireError: the connection ended.
    """
    try:
        _, user, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user not in (os.geteuid(), 0):
            return False
        head = Answer(Code.SUCCESS, shape=(_BROUGHT, arena.size // _MIB, 0, 0)).pack()
        sent = socket.send_fds(sock, [head], [arena.descriptor])
    except OSError as error:
        raise WireError(f"the connection ended while sending: {error}") from None
    if sent != len(head):
        raise WireError("expected to send an answer at once; nobody receives")
    return True


def join(sock: socket.socket) -> Shared | None:
    """Ask for the memory; ``None`` if the server has none to give. The socket's timeout bounds each step.

    Raises:
        OSError, HeaderError: the connection is of no use any more.
    """
    sock.sendall(Request(Command.HEALTH, SHARED_KEY).pack())
    came = array("i")
    head, extra, _, _ = sock.recvmsg(ANSWER_BYTES, socket.CMSG_LEN(came.itemsize), getattr(socket, "MSG_CMSG_CLOEXEC", 0))
    for level, kind, data in extra:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            came.frombytes(data[: len(data) - len(data) % came.itemsize])
    try:
        if len(head) != ANSWER_BYTES:
            raise HeaderError(f"expected an answer of {ANSWER_BYTES} bytes; got {len(head)}")
        brought, mebibytes, _, _ = Answer.unpack(head).shape
        if brought != _BROUGHT:
            return None
        size = mebibytes * _MIB
        if not came or not 0 < size <= _MOST_BYTES or os.fstat(came[0]).st_size != size:
            raise HeaderError(f"expected a descriptor of {size} bytes; got none, or of another size")
        if not fcntl.fcntl(came[0], fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise HeaderError("expected memory that is sealed against shrinking; it is not")
        return Shared(came[0], size)
    finally:
        for descriptor in came:
            os.close(descriptor)
