"""Records encrypted for storages that others can read or write: AES-256-GCM of the package ``cryptography``.

An envelope holds a whole record, tokens included. It opens only with its key and only as the chunk that was asked for, since
what names the chunk is authenticated with it: a value that was altered, swapped with another's, or put there in the clear does
not open. The format is specified in ``docs/format.md``.
"""

from __future__ import annotations

import re
import secrets
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from ..config import read_secret_source
from ..errors import ConfigError, CorruptRecordError
from .ram import NewChunk

__all__ = ["OVERHEAD", "Envelope", "read_keys"]

_MAGIC = b"LMKVENC\0"
_VERSION = 1
#: magic, version, padding, id of the key, nonce, padding, bytes of the record, padding
_HEAD = struct.Struct("<8sH6x16s12s4xQ8x")
_TAG_BYTES = 16
_NONCE_BYTES = 12
#: Bytes by which an envelope is larger than its record.
OVERHEAD = _HEAD.size + _TAG_BYTES
#: key, parent, root, layout, start; the tokens follow.
_PLACE = struct.Struct("<16s16s16s16sI")


class Envelope:
    """Closes and opens envelopes. Safe to use from several threads.

    Args:
        keys: id and 32 bytes of each key; the first one closes, all of them open.
        layout: the layout's fingerprint.
        where: begins messages.

    Raises:
        ConfigError: the package is not installed, or is older than 47.
    """

    def __init__(self, keys: Sequence[tuple[str, bytes]], layout: bytes, where: str) -> None:
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError:
            raise ConfigError(
                f"{where}: encryption: expected the package cryptography; it is not installed: pip install 'lmkv[encryption]'"
            ) from None
        if not hasattr(AESGCM, "decrypt_into"):
            raise ConfigError(f"{where}: encryption: expected cryptography 47 or later: pip install 'lmkv[encryption]'")
        self._invalid: type[Exception] = InvalidTag
        self._ciphers: dict[bytes, Any] = {name.encode(): AESGCM(key) for name, key in keys}
        self._own = keys[0][0].encode()
        self._layout = layout

    def __repr__(self) -> str:
        return f"Envelope({', '.join(name.decode() for name in self._ciphers)})"

    def _bound(self, head: memoryview, chunk: NewChunk) -> bytes:
        """What is authenticated beside the record."""
        place = _PLACE.pack(chunk.key, chunk.parent, chunk.root, self._layout, chunk.start)
        return bytes(head) + place + bytes(chunk.piece)

    def close(self, chunk: NewChunk, record: memoryview) -> memoryview:
        """The envelope around a chunk's record, in memory of its own."""
        envelope = memoryview(bytearray(OVERHEAD + len(record)))
        nonce = secrets.token_bytes(_NONCE_BYTES)
        _HEAD.pack_into(envelope, 0, _MAGIC, _VERSION, self._own, nonce, len(record))
        head, body = envelope[: _HEAD.size], envelope[_HEAD.size :]
        self._ciphers[self._own].encrypt_into(nonce, record, self._bound(head, chunk), body)
        return envelope

    def open(self, chunk: NewChunk, envelope: memoryview, out: memoryview) -> int:
        """Leave the record at the beginning of ``out``; returns its bytes. What is in ``out`` after an error is of no use.

        Raises:
            CorruptRecordError: no envelope, closed with a key that is not at hand, or not the one of this chunk as it was
                closed.
        """
        if len(envelope) < OVERHEAD or bytes(envelope[:8]) != _MAGIC:
            raise CorruptRecordError("expected an encrypted record; got something else: it was stored without encryption?")
        _, version, padded, nonce, size = _HEAD.unpack_from(envelope)
        if version != _VERSION:
            raise CorruptRecordError(f"expected encryption version {_VERSION}; got {version}: by another version of lmkv")
        if size != len(envelope) - OVERHEAD or size > len(out):
            raise CorruptRecordError(
                f"expected an encrypted record of {len(envelope) - OVERHEAD} bytes, at most {len(out)}; it says {size}"
            )
        name = padded.rstrip(b"\0")
        cipher = self._ciphers.get(name)
        if cipher is None:
            known = ", ".join(sorted(each.decode() for each in self._ciphers))
            raise CorruptRecordError(f"expected a record encrypted with one of the keys {known}; got {name!r}")
        head, body = envelope[: _HEAD.size], envelope[_HEAD.size :]
        try:
            cipher.decrypt_into(nonce, body, self._bound(head, chunk), out[:size])
        except self._invalid:
            raise CorruptRecordError(
                f"expected a record that key {name.decode()} opens; it does not: altered, another chunk's, or another key"
            ) from None
        return int(size)


_KEY_LINE = re.compile(r"([A-Za-z0-9._-]{1,16})[ \t]+([0-9a-fA-F]{64})")


def read_keys(source: str, where: str, environ: Mapping[str, str] | None = None) -> list[tuple[str, bytes]]:
    """Keys for encryption: id and 32 bytes of each, in order.

    Args:
        source: ``file:/path`` or ``env:NAME``. There, one key a line (in a variable also separated by commas): its id, of up to
            16 letters, digits, ``.``, ``_`` and ``-``, a blank, and 64 hexadecimal digits. ``#`` begins a comment line.

    Raises:
        ConfigError: nothing readable is there, or no keys. What is there is not repeated.
    """
    text = read_secret_source(f"{where}: encryption", source, environ)
    keys: dict[str, bytes] = {}
    for number, line in enumerate(text.replace(",", "\n").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        found = _KEY_LINE.fullmatch(line)
        if found is None or found[1] in keys:
            wrong = "an id that came before" if found else "something else"
            raise ConfigError(
                f"{where}: encryption: {source}: line {number}: expected an id, a blank and 64 hexadecimal digits; got {wrong}"
            )
        keys[found[1]] = bytes.fromhex(found[2])
    if not keys:
        raise ConfigError(f"{where}: encryption: {source}: expected at least one line with a key; got none")
    return list(keys.items())
