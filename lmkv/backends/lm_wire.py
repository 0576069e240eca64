"""The headers of LMCache's ``lm://`` protocol: what its clients send and what its server answers.

A request is a header of 186 bytes, and for PUT the value; an answer is a header of 36 bytes, and for a GET that found something
the value. PUT has no answer. There is no magic, version, checksum or login, and integers have the machine's own byte order.
Format: ``lmcache/v1/protocol.py`` of LMCache 0.3.9 to 0.5.6, which agree on it.

Three things are LMKV's own, between an LMKV client and an LMKV server only. A HEALTH request whose key is :data:`TOKEN_KEY` and
a token logs a connection in. The answer to HEALTH carries :data:`GREETING` as its first dimension, and tells a client of the
same machine in the others its port and the numbers of a Unix socket that serves the same (:func:`local_name`), where values may
lie in memory that both have (:mod:`lmkv.backends.lm_shared`). A PUT of no bytes deletes.
"""

from __future__ import annotations

import math
import socket
import struct
from dataclasses import dataclass
from enum import IntEnum

__all__ = [
    "ANSWER_BYTES",
    "BINARY",
    "DEFAULT_PORT",
    "GREETING",
    "MOST_BYTES",
    "MOST_KEY_BYTES",
    "REQUEST_BYTES",
    "TOKEN_KEY",
    "Answer",
    "Code",
    "Command",
    "HeaderError",
    "Request",
    "is_local",
    "local_name",
    "prepare",
]

DEFAULT_PORT = 65432
MOST_KEY_BYTES = 150
#: command, length, format, element type, location, four dimensions, key
_REQUEST = struct.Struct(f"=9i{MOST_KEY_BYTES}s")
#: code, length, format, element type, four dimensions, location
_ANSWER = struct.Struct("=9i")
REQUEST_BYTES, ANSWER_BYTES = _REQUEST.size, _ANSWER.size
#: Lengths are signed 32-bit integers.
MOST_BYTES = 2**31 - 1
#: The format of plain bytes.
BINARY = 4
_KV_2LTD, _FLOAT16 = 1, 2
#: Bytes of an element by its number: none (bytes), float16 twice, bfloat16, float32, float64, uint8, two kinds of float8.
_ELEMENT_BYTES = (1, 2, 2, 2, 4, 8, 1, 1, 1)
#: Formats are numbered from 0; 8 is the last one that is known, and later versions add some.
_MOST_FORMAT = 31
TOKEN_KEY = b"lmkv-token:"
#: "LMKV" in ASCII.
GREETING = int.from_bytes(b"LMKV", "little")


#: Between processes of one machine so much under way stays in a core's caches; values of megabytes moved faster with it.
_LOCAL_BUFFER = 256 * 1024


def prepare(sock: socket.socket, *, listened: bool = False) -> None:
    """Set a connection up for short questions and large values.

    Args:
        listened: whether this is the server's end. It receives as much as the kernel likes: LMCache's client sends from a loop
            of events, which turns more often the less is taken at a time.

    Raises:
        OSError: it has ended.
    """
    if sock.family == getattr(socket, "AF_UNIX", None):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LOCAL_BUFFER)
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a client whose machine died says nothing for ever
    if is_local(sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LOCAL_BUFFER)
        if not listened:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _LOCAL_BUFFER)


def is_local(sock: socket.socket) -> bool:
    """Whether the other end is on this machine, by loopback."""
    return str(sock.getpeername()[0]).startswith(("127.", "::1", "::ffff:127."))


def local_name(numbers: tuple[int, int]) -> str:
    """The abstract name of a Unix socket, which the same network namespace reaches: values move faster over it than by TCP.

    The numbers are random, so that nobody can take the name before the server does.
    """
    return f"\0lmkv-serve-{numbers[0]:08x}{numbers[1]:08x}"


class HeaderError(ValueError):
    """A header that no side would send; what follows on the connection can't be understood."""


class Command(IntEnum):
    """What is asked for."""

    PUT = 1
    GET = 2
    EXIST = 3
    LIST = 4
    HEALTH = 5


class Code(IntEnum):
    """What became of it."""

    SUCCESS = 200
    FAIL = 400


@dataclass(frozen=True, slots=True)
class Request:
    """A client's header.

    Args:
        key: as it is sent, without the spaces that fill it up.
        length: bytes of the value that follows; for PUT only.
        fmt, dtype, shape: LMCache's numbers for the value's format and element type, and its four dimensions.
    """

    command: Command
    key: bytes
    length: int = 0
    fmt: int = _KV_2LTD
    dtype: int = _FLOAT16
    shape: tuple[int, int, int, int] = (0, 0, 0, 0)

    def pack(self) -> bytes:
        """The header as it is sent.

        Raises:
            HeaderError: the key or the value is too long for it.
        """
        if not 0 < len(self.key) <= MOST_KEY_BYTES or not 0 <= self.length <= MOST_BYTES:
            raise HeaderError(
                f"expected a key of 1 to {MOST_KEY_BYTES} bytes and a value of at most {MOST_BYTES}; "
                f"got {len(self.key)} and {self.length}"
            )
        return _REQUEST.pack(self.command, self.length, self.fmt, self.dtype, 0, *self.shape, self.key.ljust(MOST_KEY_BYTES))

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Request:
        """The header that these :data:`REQUEST_BYTES` bytes are.

        Raises:
            HeaderError: they are none: an unknown command, a negative length, or no key.
        """
        command, length, fmt, dtype, _, *dims, key = _REQUEST.unpack(data)
        try:
            known = Command(command)
        except ValueError:
            raise HeaderError(f"expected a command of 1 to 5; got {command}") from None
        if length < 0:
            raise HeaderError(f"expected a length of at least 0; got {length}")
        name = key.rstrip(b" \0")
        if not name or any(byte < 0x20 for byte in name):
            raise HeaderError(f"expected a key in printable characters; got {name[:40]!r}")
        return cls(known, name, length, fmt, dtype, (dims[0], dims[1], dims[2], dims[3]))

    def mismatch(self) -> str:
        """Why the description contradicts the length, or ``""``: a receiver would run over its buffer, or short of it."""
        if not 0 <= self.fmt <= _MOST_FORMAT or not 0 <= self.dtype < len(_ELEMENT_BYTES) or min(self.shape) < 0:
            return f"expected a known format, element type and dimensions; got {self.fmt}, {self.dtype} and {self.shape}"
        wanted = math.prod(size for size in self.shape if size) * _ELEMENT_BYTES[self.dtype] if any(self.shape) else 0
        if wanted != self.length:
            return f"expected {wanted} bytes for dimensions {self.shape} of element type {self.dtype}; got {self.length}"
        return ""


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's header; the fields are those of :class:`Request`."""

    code: Code
    length: int = 0
    fmt: int = _KV_2LTD
    dtype: int = _FLOAT16
    shape: tuple[int, int, int, int] = (0, 0, 0, 0)

    def pack(self) -> bytes:
        """The header as it is sent."""
        return _ANSWER.pack(self.code, self.length, self.fmt, self.dtype, *self.shape, 0)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Answer:
        """The header that these :data:`ANSWER_BYTES` bytes are.

        Raises:
            HeaderError: they are none.
        """
        code, length, fmt, dtype, *dims, _ = _ANSWER.unpack(data)
        if code not in (Code.SUCCESS, Code.FAIL) or length < 0:
            raise HeaderError(f"expected an answer of 200 or 400 and a length of at least 0; got {code} and {length}")
        return cls(Code(code), length, fmt, dtype, (dims[0], dims[1], dims[2], dims[3]))
