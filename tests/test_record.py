"""Records: what was sealed is proved whole, and nothing else is."""

from __future__ import annotations

import struct
import sys
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmkv.chunks import ChunkKey
from lmkv.errors import ArgumentError, CorruptRecordError
from lmkv.record import ALIGNMENT, HEADER_BYTES, MAGIC, payload_offset, read_header, seal, verify

KEY, PARENT, ROOT, LAYOUT = (bytes([i]) * 16 for i in range(1, 5))
NAMES: dict[str, Any] = {
    "key": ChunkKey(KEY),
    "parent": ChunkKey(PARENT),
    "root": ChunkKey(ROOT),
    "layout": LAYOUT,
    "start": 512,
}


def sealed(tokens: bytes, payload: bytes, offset: int | None = None, codec: str = "raw") -> memoryview:
    offset = payload_offset(len(tokens) // 4) if offset is None else offset
    record = memoryview(bytearray(b"\xee" * offset + payload))
    seal(record, **NAMES, tokens=tokens, offset=offset, payload_bytes=len(payload), codec=codec)
    return record


@given(tokens=st.binary(min_size=4, max_size=80).map(lambda b: b[: len(b) // 4 * 4]), payload=st.binary(max_size=200))
def test_what_was_sealed_is_proved(tokens: bytes, payload: bytes) -> None:
    record = sealed(tokens, payload)
    header = verify(record, **NAMES)
    assert (header.key, header.parent, header.root, header.layout, header.start) == (KEY, PARENT, ROOT, LAYOUT, 512)
    assert header.tokens == tokens
    assert header.codec == "raw"
    assert record[header.payload_offset :] == payload
    assert header.payload_bytes == len(payload)
    assert read_header(bytes(record)) == header


def test_the_header_by_the_letter() -> None:
    record = sealed(b"\x07\0\0\0", b"payload", codec="blosc2")
    assert HEADER_BYTES == 128
    assert bytes(record[:8]) == MAGIC == b"LMKVREC\0"
    assert struct.unpack_from("<HHI", record, 8) == (1, 0, 4096)
    assert bytes(record[16:80]) == KEY + PARENT + ROOT + LAYOUT
    assert struct.unpack_from("<II12s", record, 80) == (512, 1, b"blosc2" + bytes(6))
    assert struct.unpack_from("<Q", record, 104) == (7,)
    assert bytes(record[128:132]) == b"\x07\0\0\0"
    assert not any(record[132:4096]), "the padding is zero, whatever was there before"
    assert bytes(record[4096:]) == b"payload"


@pytest.mark.parametrize("chunk_tokens", [1, 256, 992, 993, 65536])
def test_payloads_are_aligned(chunk_tokens: int) -> None:
    offset = payload_offset(chunk_tokens)
    assert offset % ALIGNMENT == 0
    assert HEADER_BYTES + 4 * chunk_tokens <= offset < HEADER_BYTES + 4 * chunk_tokens + ALIGNMENT


def test_every_flipped_bit_is_seen() -> None:
    tokens, payload = bytes(range(12)), bytes(range(60))
    record = sealed(tokens, payload, offset=HEADER_BYTES + len(tokens) + 4)
    meant = [*range(HEADER_BYTES + len(tokens)), *range(HEADER_BYTES + len(tokens) + 4, len(record))]
    for byte in meant:
        for bit in range(8):
            record[byte] ^= 1 << bit
            with pytest.raises(CorruptRecordError):
                verify(record, **NAMES)
            record[byte] ^= 1 << bit
    verify(record, **NAMES)


@given(size=st.integers(0, 4200))
def test_cut_records_are_seen(size: int) -> None:
    record = sealed(bytes(range(12)), bytes(range(100)))
    if size < len(record):
        with pytest.raises(CorruptRecordError):
            verify(record[:size], **NAMES)


@given(junk=st.binary(max_size=300), head=st.booleans())
def test_junk_is_seen(junk: bytes, head: bool) -> None:
    with pytest.raises(CorruptRecordError):
        verify(memoryview(MAGIC + b"\x01\0\0\0" + junk if head else junk), **NAMES)


def test_longer_records_are_seen() -> None:
    record = sealed(bytes(range(12)), bytes(range(100)))
    with pytest.raises(CorruptRecordError, match=f"{len(record)} bytes; got {len(record) + 1}"):
        verify(memoryview(bytes(record) + b"\0"), **NAMES)


@pytest.mark.parametrize("name", list(NAMES))
def test_a_record_of_something_else(name: str) -> None:
    record = sealed(bytes(range(12)), bytes(range(100)))
    other = 513 if name == "start" else b"\x99" * 16
    with pytest.raises(CorruptRecordError, match=name):
        verify(record, **(NAMES | {name: other}))


def test_another_version() -> None:
    record = sealed(bytes(range(12)), b"")
    struct.pack_into("<H", record, 8, 2)
    with pytest.raises(CorruptRecordError, match="version 1; got 2"):
        read_header(record)


def test_what_does_not_fit() -> None:
    record = memoryview(bytearray(300))
    common: dict[str, Any] = {**NAMES, "payload_bytes": 100}
    with pytest.raises(ArgumentError, match="room"):
        seal(record, **common, tokens=bytes(80), offset=200)  # header and tokens reach into the payload
    with pytest.raises(ArgumentError, match="room"):
        seal(record, **common, tokens=bytes(40), offset=201)
    with pytest.raises(ArgumentError, match="12 bytes"):
        seal(record, **common, tokens=bytes(40), offset=200, codec="a-codec-too-long")
    assert not any(record)


def test_sealing_again_is_never_seen_half_done() -> None:
    """Two tiers may write the same slot: one seals it while the other copies it."""
    record = sealed(bytes(range(40)), bytes(range(256)) * 16)
    whole = bytes(record)
    stop = threading.Event()

    def again() -> None:
        while not stop.is_set():
            seal(record, **NAMES, tokens=bytes(range(40)), offset=4096, payload_bytes=4096)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    sealing = threading.Thread(target=again)
    sealing.start()
    try:
        for _ in range(3000):
            assert bytes(record) == whole
    finally:
        stop.set()
        sealing.join()
        sys.setswitchinterval(interval)
