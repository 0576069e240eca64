"""The binary bodies of store and retrieve. ``docs/standalone.md`` specifies them; all integers are little-endian.

::

    head     magic, version, kind, layout fingerprint, tokens of the text, start, stop, scope bytes, 0         56 bytes
    scope    UTF-8 JSON {"salt": …, "lora": …, "extra": …}; may be empty
    tokens   uint32 each; only in requests
    sum      xxh3-64 of everything before
    pieces   for every chunk that [start, stop) touches: payload of its tokens in that range, xxh3-64 of it     store, reply

The checksum of a piece is seeded with the position of its first token, so that a piece in a wrong place does not pass.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import xxhash

from lmkv.chunks import TOKEN_BYTES
from lmkv.errors import ArgumentError, CorruptRecordError, LayoutMismatchError
from lmkv.layout import KVLayout

__all__ = ["REPLY", "RETRIEVE", "SCOPE_FIELDS", "STORE", "Head", "pieces", "pieces_bytes"]

MAGIC = b"LMKV"
VERSION = 1
#: Kinds of frames.
STORE, RETRIEVE, REPLY = 1, 2, 3
_KINDS = {STORE: "store", RETRIEVE: "retrieve", REPLY: "reply"}
_HEAD = struct.Struct("<4sHH16sQQQII")
HEAD_BYTES = _HEAD.size
_SUM = struct.Struct("<Q")
SUM_BYTES = _SUM.size
#: What a scope may hold: the parts of a namespace that differ between users of one service.
SCOPE_FIELDS = ("salt", "lora", "extra")
#: Longest scope and text that a frame may announce: bounds what is read before the checksum is known.
MAX_SCOPE_BYTES = 64 * 1024
MAX_TOKENS = 4 * 1024**2

CONTENT_TYPE = "application/x-lmkv"


@dataclass(frozen=True)
class Head:
    """What a frame says before its pieces.

    Args:
        kind: :data:`STORE`, :data:`RETRIEVE` or :data:`REPLY`.
        layout: fingerprint, 16 bytes.
        total_tokens: tokens of the whole text.
        start, stop: the range of tokens that the pieces cover, or that is asked for.
        scope: changes to the service's namespace.
        tokens: the text, little-endian uint32; empty in replies.
    """

    kind: int
    layout: bytes
    total_tokens: int
    start: int
    stop: int
    scope: Mapping[str, str] = field(default_factory=dict)
    tokens: bytes = b""

    def pack(self) -> bytes:
        """The bytes before the pieces, checksum included."""
        scope = json.dumps(dict(self.scope), separators=(",", ":")).encode() if self.scope else b""
        head = _HEAD.pack(MAGIC, VERSION, self.kind, self.layout, self.total_tokens, self.start, self.stop, len(scope), 0)
        h = xxhash.xxh3_64(head)
        h.update(scope)
        h.update(self.tokens)
        return b"".join((head, scope, self.tokens, _SUM.pack(h.intdigest())))


@dataclass(frozen=True)
class Fixed:
    """The first :data:`HEAD_BYTES` bytes of a frame: enough to know how many bytes follow."""

    kind: int
    layout: bytes
    total_tokens: int
    start: int
    stop: int
    scope_bytes: int
    raw: bytes

    @property
    def rest_bytes(self) -> int:
        """Bytes between these and the pieces."""
        return self.scope_bytes + self.token_bytes + SUM_BYTES

    @property
    def token_bytes(self) -> int:
        """Bytes of token ids that follow the scope."""
        return 0 if self.kind == REPLY else self.total_tokens * TOKEN_BYTES


def read_fixed(data: bytes, kind: int, layout: KVLayout) -> Fixed:
    """The first part of a frame of that kind and layout.

    Raises:
        ArgumentError: no such frame, another version or kind, or numbers that contradict each other.
        LayoutMismatchError: KV of another layout.
    """
    magic, version, got, fingerprint, total, start, stop, scope_bytes, reserved = _HEAD.unpack(data)
    if magic != MAGIC:
        raise ArgumentError(f"expected a frame that begins with {MAGIC!r}; got {magic!r}: send {CONTENT_TYPE} as documented")
    if version != VERSION or reserved:
        raise ArgumentError(f"expected frame version {VERSION}; got {version}: client and service are of different versions")
    if got != kind:
        raise ArgumentError(f"expected a {_KINDS[kind]} frame; got {_KINDS.get(got, got)}")
    if fingerprint != layout.fingerprint:
        raise LayoutMismatchError(
            f"expected KV of layout {layout.fingerprint.hex()} ({layout.describe}); got {fingerprint.hex()}: "
            "open client and service with the same layout"
        )
    if not 1 <= total <= MAX_TOKENS:
        raise ArgumentError(f"expected 1 to {MAX_TOKENS} tokens; got {total}")
    if not start <= stop <= total:
        raise ArgumentError(f"expected start <= stop <= {total} tokens; got start {start}, stop {stop}")
    if scope_bytes > MAX_SCOPE_BYTES:
        raise ArgumentError(f"expected a scope of at most {MAX_SCOPE_BYTES} bytes; got {scope_bytes}")
    return Fixed(got, fingerprint, total, start, stop, scope_bytes, data)


def read_rest(fixed: Fixed, rest: bytes) -> Head:
    """The whole head, from its fixed part and the :attr:`Fixed.rest_bytes` bytes behind it.

    Raises:
        CorruptRecordError: the checksum does not match.
        ArgumentError: the scope is not one.
    """
    body, (expected,) = rest[:-SUM_BYTES], _SUM.unpack(rest[-SUM_BYTES:])
    h = xxhash.xxh3_64(fixed.raw)
    h.update(body)
    if h.intdigest() != expected:
        raise CorruptRecordError("expected a frame head that matches its checksum; it does not: it was damaged on its way")
    scope_text = body[: fixed.scope_bytes]
    try:
        scope = json.loads(scope_text) if scope_text else {}
    except ValueError as error:
        raise ArgumentError(f"expected the scope as JSON; got: {error}") from None
    return Head(
        fixed.kind, fixed.layout, fixed.total_tokens, fixed.start, fixed.stop, check_scope(scope), body[fixed.scope_bytes :]
    )


def check_scope(scope: object) -> dict[str, str]:
    """A scope whose keys and values are known to be right.

    Raises:
        ArgumentError: an unknown key, or a value that is not a text.
    """
    if not isinstance(scope, Mapping):
        raise ArgumentError(f"expected a scope with keys out of {', '.join(SCOPE_FIELDS)}; got {type(scope).__name__}")
    for key, value in scope.items():
        if key not in SCOPE_FIELDS:
            raise ArgumentError(f"expected scope keys out of {', '.join(SCOPE_FIELDS)}; got {key!r}")
        if not isinstance(value, str):
            raise ArgumentError(f"expected scope {key} as a text; got {value!r}")
    return dict(scope)


def pieces(chunk_tokens: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """``(first, last)`` tokens of every piece of ``[start, stop)``: cut where chunks end."""
    while start < stop:
        last = min(stop, (start // chunk_tokens + 1) * chunk_tokens)
        yield start, last
        start = last


def pieces_bytes(layout: KVLayout, start: int, stop: int) -> int:
    """Bytes of all pieces of ``[start, stop)``, checksums included."""
    count = -(-stop // layout.chunk_tokens) - start // layout.chunk_tokens if stop > start else 0
    return (stop - start) * layout.token_bytes + count * SUM_BYTES


def piece_hasher(first: int) -> xxhash.xxh3_64:
    """The running checksum of the piece whose first token stands at ``first``."""
    return xxhash.xxh3_64(seed=first)


def pack_sum(value: int) -> bytes:
    """A checksum as it is sent."""
    return _SUM.pack(value)


def check_sum(hasher: xxhash.xxh3_64, sent: bytes | memoryview, first: int) -> None:
    """Prove that a piece arrived as it was sent.

    Raises:
        CorruptRecordError: it did not.
    """
    if hasher.intdigest() != _SUM.unpack(sent)[0]:
        raise CorruptRecordError(f"expected the piece at token {first} to match its checksum; it does not: damaged on its way")
