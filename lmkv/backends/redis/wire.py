"""Redis's protocol (RESP2) over a connected socket, for large values: sent from slots and received straight into slots.

A client library reads replies into buffers of its own and hands out copies, which costs more than half of the speed at
megabytes a value. Format: https://redis.io/docs/latest/develop/reference/protocol-spec/.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import time

__all__ = ["ErrorReply", "Wire", "WireError", "command"]

_SCRATCH = 16 * 1024
#: Bytes first received of a reply that is expected to be large; the rest goes straight to where it belongs.
_LARGE_REPLY = 48
#: A line of a reply is a number or an error's text.
_LONGEST_LINE = 4096
_TIMEVAL = struct.Struct("ll")
_END = b"\r\n"


class WireError(OSError):
    """The connection is of no use any more: ended, too late, or out of step."""


class ErrorReply(str):
    """A reply that says what is wrong; the first word is its kind (``OOM``, ``MOVED``, ``NOAUTH``, …)."""

    __slots__ = ()

    @property
    def kind(self) -> str:
        """The first word."""
        return self.split(" ", 1)[0]


def command(*words: bytes) -> bytes:
    """One command as it is sent."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


class Wire:
    """Commands out, replies in, until a moment in time.

    Args:
        sock: connected and at rest: no reply under way. Left in non-blocking or timeout mode as :meth:`rest` finds it.
        until: ``time.monotonic()`` at which every wait ends.
    """

    def __init__(self, sock: socket.socket, until: float) -> None:
        self._sock = sock
        self._tls = isinstance(sock, ssl.SSLSocket)
        self._until = until
        self._scratch = memoryview(bytearray(_SCRATCH))
        self._begin = self._end = 0
        self._armed = 0.0
        self._timeout = sock.gettimeout()
        if not self._tls:
            sock.settimeout(None)  # SO_RCVTIMEO bounds a wait and lets one call fill a whole buffer; a timeout here would not

    def finish(self) -> None:
        """All that was asked has been answered.

        Raises:
            WireError: bytes came that nobody asked for.
        """
        if self._begin != self._end:
            raise WireError("expected no more replies; bytes came that belong to none")

    def at_rest(self) -> bool:
        """Whether the connection stands, and nothing has come since :meth:`finish`."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return not poll.poll(0)

    def rest(self) -> None:
        """As :meth:`finish`; leaves the socket as it was found."""
        self.finish()
        self._sock.settimeout(self._timeout)  # what was armed counts for blocking sockets only, and is armed anew then

    def allow(self, until: float) -> None:
        """Move the moment at which waits end."""
        self._until = until

    def acknowledge(self) -> None:
        """Have what came acknowledged now: a sender that gathers small pieces (Nagle) waits for that with its next one."""
        if not self._tls and hasattr(socket, "TCP_QUICKACK"):
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def _arm(self) -> None:
        """Give the next wait what is left of the time."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise WireError("expected an answer in time; none came")
        if self._tls:
            self._sock.settimeout(left)
        elif not left <= self._armed <= left * 1.05 + 0.001:  # setting it costs a system call
            self._set_timeouts(left)

    def _set_timeouts(self, seconds: float) -> None:
        self._armed = seconds
        value = _TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6) or int(seconds > 0))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    # -- sending ---------------------------------------------------------------------------------------------------------

    def send(self, *pieces: bytes | memoryview) -> None:
        """Send bytes as they lie, in one system call where the socket takes them, without putting them together first.

        Raises:
            WireError: the connection ended, or they did not go out in time.
        """
        left = [memoryview(piece) for piece in pieces if len(piece)]
        while left:
            self._arm()
            try:
                sent = self._sock.send(left[0]) if self._tls else self._sock.sendmsg(left)
            except (BlockingIOError, TimeoutError):
                continue  # the next look at the clock says whether there is time left
            except OSError as error:
                raise WireError(f"the connection ended while sending: {error}") from None
            _drop(left, sent)

    # -- receiving -------------------------------------------------------------------------------------------------------

    def _fill(self, most: int = _SCRATCH) -> None:
        """Receive what there is, but no more than ``most``, into the empty or moved-together scratch."""
        if self._begin:
            left = self._end - self._begin
            self._scratch[:left] = self._scratch[self._begin : self._end]
            self._begin, self._end = 0, left
        if self._end == _SCRATCH:
            raise WireError(f"expected a line of at most {_LONGEST_LINE} bytes; got more")
        self._end += self._receive([self._scratch[self._end : self._end + most]], 0)

    def _receive(self, views: list[memoryview], flags: int) -> int:
        while True:
            self._arm()
            try:
                size = self._sock.recv_into(views[0]) if self._tls else self._sock.recvmsg_into(views, 0, flags)[0]
            except (BlockingIOError, TimeoutError):
                continue
            except OSError as error:
                raise WireError(f"the connection ended while receiving: {error}") from None
            if not size:
                raise WireError("the connection was ended by the other side")
            return size

    def _line(self, most: int = _SCRATCH) -> bytes:
        if self._begin == self._end:
            self._fill(most)
        while True:
            held = bytes(self._scratch[self._begin : min(self._end, self._begin + _LONGEST_LINE)])
            at = held.find(_END)
            if at >= 0:
                self._begin += at + 2
                return held[:at]
            if len(held) == _LONGEST_LINE:
                raise WireError(f"expected a line of at most {_LONGEST_LINE} bytes; got more")
            self._fill(most)

    def size(self, large: bool = False) -> int | ErrorReply | None:
        """Begin to receive a bulk reply: its bytes, which :meth:`take` or :meth:`skip` must receive; ``None`` for no value.

        Args:
            large: much is expected: take no more of it off the socket now than it takes to know its size.

        Raises:
            WireError: the connection ended, or what came is no bulk reply.
        """
        return self._counted(b"$", _LARGE_REPLY if large else _SCRATCH)

    def array(self) -> int | ErrorReply | None:
        """Begin to receive an array: how many replies follow; ``None`` for no array."""
        return self._counted(b"*", _SCRATCH)

    def _counted(self, kind: bytes, most: int) -> int | ErrorReply | None:
        line = self._line(most)
        if line[:1] == b"-":
            return ErrorReply(line[1:].decode("utf-8", "replace"))
        try:
            if line[:1] != kind:
                raise ValueError
            size = int(line[1:])
        except ValueError:
            raise WireError(f"expected a reply that begins with {kind.decode()} and a number; got {line[:40]!r}") from None
        return None if size < 0 else size

    def take(self, view: memoryview) -> None:
        """Receive the next bytes of a bulk reply to where they belong."""
        ready = self._take_ready(view)
        while ready < len(view):
            ready += self._receive([view[ready:]], socket.MSG_WAITALL)

    def take_last(self, view: memoryview) -> None:
        """Receive the last bytes of a bulk reply to where they belong, and its end with them, in one system call."""
        ready = self._take_ready(view)
        if ready < len(view):  # so nothing is left in the scratch
            tail = self._scratch[:2]
            left = [view[ready:], tail]
            while left:
                _drop(left, self._receive(left, socket.MSG_WAITALL))
            self._begin, self._end = 0, 2
        self.end()

    def _take_ready(self, view: memoryview) -> int:
        """What is in the scratch already."""
        ready = min(self._end - self._begin, len(view))
        view[:ready] = self._scratch[self._begin : self._begin + ready]
        self._begin += ready
        return ready

    def skip(self, size: int) -> None:
        """Receive the next bytes of a bulk reply and drop them."""
        while size:
            ready = min(self._end - self._begin, size)
            self._begin += ready
            size -= ready
            if size:
                self._fill()

    def end(self) -> None:
        """Finish a bulk reply, all of whose bytes were received."""
        while self._end - self._begin < 2:
            self._fill()
        if self._scratch[self._begin : self._begin + 2] != _END:
            raise WireError("expected the end of a reply; got other bytes")
        self._begin += 2

    def status(self) -> int | ErrorReply:
        """A short reply: a number, 0 for ``OK``, or an error.

        Raises:
            WireError: the connection ended, or what came is something else.
        """
        return _status(self._line())

    def statuses(self, count: int) -> list[int | ErrorReply]:
        """That many short replies, in order; what came in one piece is taken apart in one go."""
        found: list[int | ErrorReply] = []
        while len(found) < count:
            lines = bytes(self._scratch[self._begin : self._end]).split(_END)[:-1][: count - len(found)]
            if not lines:
                lines = [self._line()]
            else:
                self._begin += sum(map(len, lines)) + len(_END) * len(lines)
            found += [_COMMON[line] if line in _COMMON else _status(line) for line in lines]
        return found


def _drop(views: list[memoryview], count: int) -> None:
    """Take that many bytes off the front."""
    while views and count >= len(views[0]):
        count -= len(views.pop(0))
    if count:
        views[0] = views[0][count:]


#: Short replies that come by the hundred.
_COMMON = {b":0": 0, b":1": 1, b"+OK": 0, b"+QUEUED": 0}


def _status(line: bytes) -> int | ErrorReply:
    try:
        if line[:1] == b":":
            return int(line[1:])
    except ValueError:
        raise WireError(f"expected a number; got {line[:40]!r}") from None
    if line[:1] == b"+":
        return 0
    if line[:1] == b"-":
        return ErrorReply(line[1:].decode("utf-8", "replace"))
    raise WireError(f"expected a short reply; got {line[:40]!r}")
