"""Bodies read and written piece by piece, with limits on their size and on how long a client may take."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from aiohttp import ClientPayloadError, StreamReader, web

from .replies import RefusedError

__all__ = ["MIN_RATE", "BodyReader", "BodyWriter"]

#: Waiting for a client uses up its budget of seconds; bytes that come earn new seconds at this rate (bytes a second).
MIN_RATE = 256 * 1024


class _Hasher(Protocol):
    def update(self, data: memoryview) -> None: ...


class _TooSlow(asyncio.TimeoutError):
    """Woke a reader whose client sent nothing for too long."""


class BodyReader:
    """One request's body.

    Args:
        stream: aiohttp's ``request.content``.
        limit: the most bytes to take.
        patience: seconds that a client may keep the service waiting; see :data:`MIN_RATE`.
        length: the body's length as announced; ``None`` for chunked transfer.
    """

    def __init__(self, stream: StreamReader, *, limit: int, patience: float, length: int | None = None) -> None:
        self._stream = stream
        self._length = length
        self._limit = limit
        self._patience = patience
        self._budget = patience
        self._rest = memoryview(b"")
        self.received = 0

    def check_length(self, expected: int) -> None:
        """Prove that a whole body of ``expected`` bytes may come, and will as far as is known.

        Raises:
            RefusedError: it is too large, or another length was announced.
        """
        if expected > self._limit:
            text = f"expected a body of at most {self._limit} bytes; this one has {expected}: raise --max-body, or send less"
            raise RefusedError(413, "BodyTooLarge", text)
        if self._length is not None and self._length != expected:
            text = f"expected a body of {expected} bytes for this head; got {self._length}"
            raise RefusedError(400, "ArgumentError", text)

    async def read_into(self, target: memoryview | None, size: int, hasher: _Hasher | None = None) -> None:
        """Take exactly ``size`` bytes, into ``target`` unless it is ``None``.

        Raises:
            RefusedError: the body ends early, is too large, or comes too slowly.
            ConnectionError: the client is gone.
        """
        filled = 0
        while filled < size:
            if not self._rest:
                await self._wait(size - filled)
            piece = self._rest[: size - filled]
            self._rest = self._rest[len(piece) :]
            if target is not None:
                target[filled : filled + len(piece)] = piece
            if hasher is not None:
                hasher.update(piece)
            filled += len(piece)

    async def read(self, size: int) -> bytes:
        """Exactly ``size`` bytes. Raises as :meth:`read_into`."""
        data = bytearray(size)
        await self.read_into(memoryview(data), size)
        return bytes(data)

    async def read_all(self, limit: int) -> bytes:
        """The whole rest, at most ``limit`` bytes. Raises as :meth:`read_into`."""
        self._limit = min(self._limit, limit)
        parts = []
        while await self._more(limit):
            parts.append(bytes(self._rest))
            self._rest = memoryview(b"")
        return b"".join(parts)

    async def expect_end(self) -> None:
        """Prove that nothing follows.

        Raises:
            RefusedError: something does.
        """
        if self._rest or await self._more(0):
            raise RefusedError(
                400, "ArgumentError", f"expected the body to end after {self.received - len(self._rest)} bytes; more follows"
            )

    async def _wait(self, wanted: int) -> None:
        if not await self._more(wanted):
            raise RefusedError(400, "ArgumentError", f"expected {wanted} more bytes of body; it ended after {self.received}")

    async def _more(self, wanted: int) -> bool:
        """Wait for the next bytes; false at the end of the body."""
        loop, stream = asyncio.get_running_loop(), self._stream
        begin = loop.time()
        # set_exception wakes a waiting reader: one timer a read, where wait_for takes a task a read
        timer = loop.call_later(self._budget, stream.set_exception, _TooSlow())
        try:
            data = b""
            while not data and not stream.at_eof():  # a border of chunked transfer comes as no data
                data, _ = await stream.readchunk()
        except _TooSlow:
            text = f"expected {wanted} more bytes of body; none came for {self._budget:.0f} seconds, or too few"
            raise RefusedError(408, "Timeout", text) from None
        except (ClientPayloadError, web.RequestPayloadError) as error:
            raise RefusedError(400, "ArgumentError", f"expected {wanted} more bytes of body; got: {error}") from None
        finally:
            timer.cancel()
        self.received += len(data)
        self._budget = min(self._patience, self._budget - (loop.time() - begin) + len(data) / MIN_RATE)
        if self.received > self._limit:
            text = f"expected a body of at most {self._limit} bytes; more came: send less at once"
            raise RefusedError(413, "BodyTooLarge", text)
        self._rest = memoryview(data)
        return bool(data)


class BodyWriter:
    """One reply's body, written from memory that is somebody else's again as soon as :meth:`write` returns.

    Args:
        request, response: aiohttp's; the response is prepared.
        patience: as for :class:`BodyReader`; a client that takes too little is cut off.

    Raises:
        ConnectionResetError: the client is gone.
    """

    #: Bytes handed to the transport at once: enough to keep a socket full, little enough to share the loop.
    SLICE = 1024**2
    #: aiohttp waits for the transport only after more than this many bytes: less is copied before it is handed over.
    _WAITS_ABOVE = 64 * 1024

    def __init__(self, request: web.Request, response: web.StreamResponse, *, patience: float) -> None:
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client is gone")
        # with a mark of 0, write() returns only when the transport holds nothing any more, in particular no slot's memory
        transport.set_write_buffer_limits(high=0)
        self._transport = transport
        self._response = response
        self._patience = patience
        self._budget = patience

    async def write(
        self, data: memoryview | bytes, hasher: _Hasher | None = None, keep: Callable[[], bool] = lambda: True
    ) -> None:
        """Send all of ``data``, adding it to a running checksum on the way.

        Args:
            keep: called again and again; false means that ``data`` must not be touched any more.

        Raises:
            ConnectionError: the client is gone or was too slow, or ``data`` went away.
        """
        view = memoryview(data)
        loop = asyncio.get_running_loop()
        for begin in range(0, len(view), self.SLICE):
            if not keep():
                raise ConnectionResetError("what was to be sent is gone")
            part = view[begin : begin + self.SLICE]
            if hasher is not None:
                hasher.update(part)
            before = loop.time()
            timer = loop.call_later(self._budget, self._transport.abort)
            try:
                await self._response.write(part if len(part) > self._WAITS_ABOVE else bytes(part))
            except asyncio.CancelledError:
                self._transport.abort()  # it may hold the part still, which is not ours any more from here on
                raise
            finally:
                timer.cancel()
            self._budget = min(self._patience, self._budget - (loop.time() - before) + len(part) / MIN_RATE)
