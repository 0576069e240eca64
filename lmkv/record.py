"""A chunk as it lies on disk or crosses a wire: a 128-byte header, the chunk's tokens, padding, the payload.

Everything that says whether these bytes may be used travels with them and is verified before they are: key, parent, namespace
root, layout fingerprint, tokens, length, checksum. The format is specified in ``docs/format.md``; all integers are
little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from .chunks import TOKEN_BYTES, ChunkKey
from .errors import ArgumentError, CorruptRecordError

__all__ = ["RecordHeader", "payload_offset", "read_header", "seal", "verify"]

MAGIC = b"LMKVREC\0"
VERSION = 1
#: magic, version, priority, payload offset, key, parent, root, layout, start, tokens, codec, padding, payload bytes, checksums
_HEADER = struct.Struct("<8sHBxI16s16s16s16sII12s4xQQQ")
_SUM = struct.Struct("<Q")
HEADER_BYTES = _HEADER.size
_HEADER_SUM_AT = HEADER_BYTES - _SUM.size
#: Payloads begin at a multiple of this, so that direct I/O and device copies find them aligned.
ALIGNMENT = 4096


@dataclass(frozen=True)
class RecordHeader:
    """What a record says about itself.

    Args:
        key, parent, root: of the chunk, of the chunk it extends (or the root), of its namespace; 16 bytes each.
        layout: the layout's fingerprint, 16 bytes.
        start: position of the first token in its text.
        tokens: the chunk's tokens, little-endian uint32.
        codec: how the payload is encoded; ``raw`` is not.
        payload_offset, payload_bytes: where the (encoded) payload lies in the record.
        checksum: xxh3-64 of the (encoded) payload.
        priority: from 0 (the usual one) to 255; lower ones are evicted first.
    """

    key: ChunkKey
    parent: ChunkKey
    root: ChunkKey
    layout: bytes
    start: int
    tokens: bytes
    codec: str
    payload_offset: int
    payload_bytes: int
    checksum: int
    priority: int = 0


def payload_offset(chunk_tokens: int) -> int:
    """Where payloads begin in records of chunks of up to ``chunk_tokens`` tokens, in bytes."""
    return -(-(HEADER_BYTES + chunk_tokens * TOKEN_BYTES) // ALIGNMENT) * ALIGNMENT


def seal(
    record: memoryview,
    *,
    key: ChunkKey,
    parent: ChunkKey,
    root: ChunkKey,
    layout: bytes,
    start: int,
    tokens: bytes,
    offset: int,
    payload_bytes: int,
    codec: str = "raw",
    priority: int = 0,
) -> None:
    """Write header and tokens in front of a payload that already stands at ``offset`` in ``record``.

    Raises:
        ArgumentError: the header does not fit before ``offset``, or the payload not into ``record``.
    """
    if HEADER_BYTES + len(tokens) > offset or offset + payload_bytes > len(record):
        raise ArgumentError(
            f"expected room for {HEADER_BYTES + len(tokens)} bytes before {offset} and a record of at least "
            f"{offset + payload_bytes} bytes; got {len(record)}"
        )
    name = codec.encode()
    if len(name) > 12:
        raise ArgumentError(f"expected a codec name of at most 12 bytes; got {codec!r}")
    checksum = xxhash.xxh3_64_intdigest(record[offset : offset + payload_bytes])
    count = len(tokens) // TOKEN_BYTES
    head = bytearray(offset)  # copied in one go: another tier may be writing this very record
    _HEADER.pack_into(
        head, 0, MAGIC, VERSION, priority, offset, key, parent, root, layout, start, count, name, payload_bytes, checksum, 0
    )
    head[HEADER_BYTES : HEADER_BYTES + len(tokens)] = tokens
    _SUM.pack_into(head, _HEADER_SUM_AT, _header_sum(memoryview(head), len(tokens)))
    record[:offset] = head


def _header_sum(record: memoryview, token_length: int) -> int:
    h = xxhash.xxh3_64()
    h.update(record[:_HEADER_SUM_AT])
    h.update(record[HEADER_BYTES : HEADER_BYTES + token_length])
    return int(h.intdigest())


def read_header(record: memoryview | bytes) -> RecordHeader:
    """The header of a record, checked against its own checksum; the payload is not looked at.

    Raises:
        CorruptRecordError: too short, no record, a later version, or a wrong checksum.
    """
    record = memoryview(record)
    if len(record) < HEADER_BYTES:
        raise CorruptRecordError(f"expected a record of at least {HEADER_BYTES} bytes; got {len(record)}")
    fields = _HEADER.unpack_from(record)
    magic, version, priority, offset, key, parent, root, layout, start, count, codec, size, checksum, own = fields
    if magic != MAGIC:
        raise CorruptRecordError(f"expected a record to begin with {MAGIC!r}; got {magic!r}")
    if version != VERSION:
        raise CorruptRecordError(f"expected record version {VERSION}; got {version}: written by another version of lmkv")
    length = count * TOKEN_BYTES
    if HEADER_BYTES + length > min(offset, len(record)):
        raise CorruptRecordError(f"expected {count} tokens within {min(offset, len(record))} bytes of header; they do not fit")
    if _header_sum(record, length) != own:
        raise CorruptRecordError("expected a header that matches its checksum; it does not: the record was damaged")
    tokens = bytes(record[HEADER_BYTES : HEADER_BYTES + length])
    name = codec.rstrip(b"\0").decode("ascii", "replace")
    chain = ChunkKey(key), ChunkKey(parent), ChunkKey(root)
    return RecordHeader(*chain, layout, start, tokens, name, offset, size, checksum, priority)


def verify(record: memoryview, *, key: ChunkKey, parent: ChunkKey, root: ChunkKey, layout: bytes, start: int) -> RecordHeader:
    """Prove that ``record`` is the whole, undamaged record of ``key`` in this place and layout.

    Args:
        record: exactly the bytes that were read.

    Raises:
        CorruptRecordError: anything differs; the message says what.
    """
    header = read_header(record)
    for name, wanted in (("key", key), ("parent", parent), ("root", root), ("layout", layout), ("start", start)):
        got = getattr(header, name)
        if got != wanted:
            show = [x.hex() if isinstance(x, bytes) else x for x in (wanted, got)]
            raise CorruptRecordError(f"expected a record with {name} {show[0]}; got {show[1]}")
    end = header.payload_offset + header.payload_bytes
    if end != len(record):
        raise CorruptRecordError(f"expected a record of {end} bytes; got {len(record)}")
    if xxhash.xxh3_64_intdigest(record[header.payload_offset : end]) != header.checksum:
        raise CorruptRecordError("expected a payload that matches its checksum; it does not: the record was damaged")
    return header
