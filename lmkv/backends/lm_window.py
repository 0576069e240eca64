"""Values between LMKV's ``lm://`` client and ``lmkv serve`` on one machine, through memory that both have mapped.

A connection over the server's Unix socket may have a window: a ring of slots in a memfd that the server makes, seals and hands
over. Values of :data:`LEAST_BYTES` and more go through it in either direction, piece by piece, so that one side copies into a
slot while the other one copies out of another. Headers stay on the socket, and so do the marks: a byte :data:`_READY` behind a
header for each piece, in order, and a byte :data:`_FREE` in front of a header, or while a value is under way the other way, for
each slot that may be filled again. No mark says where or how long: both sides count, so that there is nothing to get wrong in
them. A slot is filled again only after it was given back, and a window ends with its connection, so that whoever is late finds
nothing in it but what was meant for it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import sys
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np

from .lm_wire import ANSWER_BYTES, Answer, Code, Command, HeaderError, Request
from .redis.wire import Wire, WireError

__all__ = ["LEAST_BYTES", "WINDOW_BYTES", "WINDOW_KEY", "LmWire", "Window", "give", "join"]

_Bytes = np.ndarray[Any, np.dtype[np.uint8]]

#: The key of a HEALTH request that asks for a window.
WINDOW_KEY = b"lmkv-window"
#: "LMKW" in ASCII: the first dimension of an answer that brings one; slots and bytes of a slot are the next two.
_BROUGHT = int.from_bytes(b"LMKW", "little")
_SLOTS, _SLOT_BYTES = 8, 512 * 1024
WINDOW_BYTES = _SLOTS * _SLOT_BYTES
_MOST_BYTES = 256 * 1024**2
#: Smaller values take less time with their header.
LEAST_BYTES = 64 * 1024
#: No header begins with them, whatever the order of bytes.
_READY, _FREE = b"\xfe", b"\xff"


class Window:
    """The slots of one connection, seen from one of its ends.

    Args:
        memory: the slots, one behind the other.
        slots: how many.
    """

    def __init__(self, memory: mmap.mmap, slots: int) -> None:
        self.slots: _Bytes = np.frombuffer(memory, np.uint8).reshape(slots, -1)
        self.next = 0
        #: Filled here, and not given back yet.
        self.lent = 0
        #: Emptied here, and not given back yet.
        self.owed = 0

    def slot(self) -> _Bytes:
        """The next one; both ends count alike."""
        at, self.next = self.next, (self.next + 1) % len(self.slots)
        return self.slots[at]  # type: ignore[no-any-return]  # NumPy says Any of a row

    def pay(self) -> bytes:
        """Marks for all that is owed."""
        marks, self.owed = _FREE * self.owed, 0
        return marks

    def freed(self, marks: int) -> None:
        """That many slots were given back.

        Raises:
            HeaderError: they were not lent.
        """
        if marks > self.lent:
            raise HeaderError(f"expected at most {self.lent} slots back; got {marks}")
        self.lent -= marks


def _map(descriptor: int, size: int) -> mmap.mmap:
    """Map all of it, touched before it is needed."""
    return mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))


def give(sock: socket.socket) -> Window:
    """Make a window and send its memfd, which can't be shrunk: whoever touches it then would be ended by SIGBUS.

    Raises:
        OSError: the system has no memfd, memory or descriptor for it, and nothing was sent; or the connection ended
            (:class:`WireError`).
    """
    if sys.platform != "linux":
        raise OSError("memfd is Linux's")
    descriptor = os.memfd_create("lmkv-window", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.truncate(descriptor, WINDOW_BYTES)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        window = Window(_map(descriptor, WINDOW_BYTES), _SLOTS)
        head = Answer(Code.SUCCESS, shape=(_BROUGHT, _SLOTS, _SLOT_BYTES, 0)).pack()
        try:
            sent = socket.send_fds(sock, [head], [descriptor])
        except OSError as error:
            raise WireError(f"the connection ended while sending: {error}") from None
        if sent != len(head):
            raise WireError("expected to send an answer at once; nobody receives")
        return window
    finally:
        os.close(descriptor)


def join(sock: socket.socket) -> Window | None:
    """Ask for a window; ``None`` if the server has none to give. The socket's timeout bounds each step.

    Raises:
        OSError, HeaderError: the connection is of no use any more.
    """
    sock.sendall(Request(Command.HEALTH, WINDOW_KEY).pack())
    came = array("i")
    head, extra, _, _ = sock.recvmsg(ANSWER_BYTES, socket.CMSG_LEN(came.itemsize), getattr(socket, "MSG_CMSG_CLOEXEC", 0))
    for level, kind, data in extra:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            came.frombytes(data[: len(data) - len(data) % came.itemsize])
    try:
        if len(head) != ANSWER_BYTES:
            raise HeaderError(f"expected an answer of {ANSWER_BYTES} bytes; got {len(head)}")
        brought, slots, size, _ = Answer.unpack(head).shape
        if brought != _BROUGHT:
            return None
        if not came or not 1 < slots <= size <= slots * size <= _MOST_BYTES:
            raise HeaderError(f"expected a descriptor and slots of {_MOST_BYTES} bytes at most; got {slots} of {size}")
        if os.fstat(came[0]).st_size != slots * size or not fcntl.fcntl(came[0], fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise HeaderError(f"expected memory of {slots * size} bytes that is sealed against shrinking; got other memory")
        return Window(_map(came[0], slots * size), slots)
    finally:
        for descriptor in came:
            os.close(descriptor)


class LmWire(Wire):
    """Headers and values of the protocol, in both directions.

    Args:
        sock, until: see :class:`lmkv.backends.redis.wire.Wire`.
        window: of this connection, if it has one.
    """

    def __init__(self, sock: socket.socket, until: float, window: Window | None = None) -> None:
        super().__init__(sock, until)
        self.window = window

    def send(self, *pieces: bytes | memoryview) -> None:
        """See :class:`lmkv.backends.redis.wire.Wire`."""
        super().send(self.window.pay() if self.window is not None else b"", *pieces)

    def begin(self, view: memoryview) -> int:
        """Receive the begin of a header; how many bytes."""
        got = 0
        while not got:
            got = self._some(view)
            if self.window is not None:
                came = bytes(view[:got]).lstrip(_FREE)
                self.window.freed(got - len(came))
                got = len(came)
                view[:got] = came
        return got

    def head(self, view: memoryview) -> None:
        """Receive a header."""
        self.take(view[self.begin(view) :])

    def send_value(self, head: bytes, value: memoryview | bytes) -> None:
        """Send a header and the value that belongs to it."""
        window = self.window
        if window is None or len(value) < LEAST_BYTES:
            self.send(head, value)
            return
        self.send(head)
        source = np.frombuffer(value, np.uint8)
        while len(source):
            if window.lent == len(window.slots):
                window.freed(self._marks(window.lent, _FREE))
            slot = window.slot()
            piece, source = source[: len(slot)], source[len(slot) :]
            np.copyto(slot[: len(piece)], piece)  # by numpy, which lets other threads run meanwhile
            window.lent += 1
            super().send(_READY)

    def take_value(self, view: memoryview, announced: Callable[[], None] = lambda: None) -> None:
        """Receive a value, all of which ``view`` is.

        Args:
            announced: is called when the other side has sent all and does not wait for anything, which is when it listens to
                the next header. Only if the value comes through the window.
        """
        if self.window is None or len(view) < LEAST_BYTES:
            self.take(view)
        else:
            self._through(self.window, len(view), np.frombuffer(view, np.uint8), announced)

    def skip_value(self, size: int) -> None:
        """Receive a value and drop it."""
        if self.window is None or size < LEAST_BYTES:
            self.skip(size)
        else:
            self._through(self.window, size, None, lambda: None)

    def _through(self, window: Window, size: int, target: _Bytes | None, announced: Callable[[], None]) -> None:
        slots, room = window.slots.shape
        left, ready = -(-size // room), 0
        for begin in range(0, size, room):
            if not ready:
                ready = self._marks(min(left, slots), _READY)
                left -= ready
                if not left:
                    announced()
            ready -= 1
            slot = window.slot()
            if target is not None:
                piece = target[begin : begin + room]
                np.copyto(piece, slot[: len(piece)])
            window.owed += 1
            if 2 * window.owed >= slots:  # fewer go with the next header
                self.send()

    def _marks(self, most: int, wanted: bytes) -> int:
        """Receive at least one mark; how many.

        Raises:
            HeaderError: something else came.
        """
        view = memoryview(bytearray(most))
        got = self._some(view)
        if bytes(view[:got]).strip(wanted):
            raise HeaderError(f"expected marks of a window; got {bytes(view[:got])!r}")
        return got

    def _some(self, view: memoryview) -> int:
        """Receive at least one byte; how many."""
        return self._take_ready(view) or self._receive([view], 0)
