"""What stores that lend each other slots say over TCP: frames of JSON. KV crosses by NIXL, never here.

A client's first frame is ``{"lmkv-peer": 1, "layout": …, "token": …}``, answered by ``{"agent": name}``. Then come
``{"has": [keys]}``, answered by ``{"has": "0110…"}``; ``{"hold": [keys]}``, answered by ``{"held": [[address, bytes] or
null, …], "hold": number, "metadata": …}``, where the agent's metadata stand if they changed; and ``{"release": number}``,
without answer. Keys are hexadecimal. Anything else is answered by ``{"error": text}`` and the end of the connection.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

__all__ = ["GREETING", "MOST_KEYS", "receive", "send"]

GREETING = "lmkv-peer"
VERSION = 1
#: Keys of one question.
MOST_KEYS = 4096
_LENGTH = struct.Struct("<I")
_MOST_BYTES = 4 * 1024**2


def send(sock: socket.socket, message: dict[str, Any], until: float) -> None:
    """Send one frame.

    Raises:
        OSError: the connection ended, or it did not go out in time.
    """
    data = json.dumps(message).encode()
    sock.settimeout(_left(until))
    sock.sendall(_LENGTH.pack(len(data)) + data)


def receive(sock: socket.socket, until: float) -> dict[str, Any]:
    """Receive one frame.

    Raises:
        OSError: the connection ended, nothing came in time, or what came is no frame.
    """
    (size,) = _LENGTH.unpack(_take(sock, _LENGTH.size, until))
    if size > _MOST_BYTES:
        raise OSError(f"expected a message of at most {_MOST_BYTES} bytes; {size} are announced")
    try:
        message = json.loads(_take(sock, size, until))
    except ValueError as error:
        raise OSError(f"expected JSON; got: {error}") from None
    if not isinstance(message, dict):
        raise OSError(f"expected a JSON object; got {type(message).__name__}")
    return message


def _take(sock: socket.socket, size: int, until: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        sock.settimeout(_left(until))
        piece = sock.recv(size - len(data))
        if not piece:
            raise ConnectionResetError("the other side ended the connection")
        data += piece
    return bytes(data)


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("expected an answer in time; none came")
    return left
