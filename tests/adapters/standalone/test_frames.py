"""The binary framing: what is written is read back, what is damaged is refused."""

from __future__ import annotations

import struct

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from lmkv.adapters.standalone import frames
from lmkv.errors import ArgumentError, CorruptRecordError, LayoutMismatchError, LMKVError
from lmkv.layout import KVLayout

LAYOUT = KVLayout.parse("(2,3,8,2,4):float16:3")
TEXT = struct.pack("<5I", 1, 2, 3, 4, 2**32 - 1)


def packed(**changes: object) -> bytes:
    values: dict[str, object] = {
        "kind": frames.STORE, "layout": LAYOUT.fingerprint, "total_tokens": 5, "start": 0, "stop": 5, "tokens": TEXT,
    }  # fmt: skip
    return frames.Head(**{**values, **changes}).pack()  # type: ignore[arg-type]


def read(data: bytes, kind: int = frames.STORE) -> frames.Head:
    fixed = frames.read_fixed(data[: frames.HEAD_BYTES], kind, LAYOUT)
    assert len(data) == frames.HEAD_BYTES + fixed.rest_bytes
    return frames.read_rest(fixed, data[frames.HEAD_BYTES :])


def read_what_is_there(data: bytes) -> None:
    """As a service reads it: it takes as many bytes as the head announces, here filled up with zeros."""
    fixed = frames.read_fixed(data[: frames.HEAD_BYTES], frames.STORE, LAYOUT)
    rest = data[frames.HEAD_BYTES :][: fixed.rest_bytes]
    frames.read_rest(fixed, rest.ljust(min(fixed.rest_bytes, 1 << 20), b"\0"))


def test_the_documented_bytes() -> None:
    scope = b'{"salt":"s"}'
    data = struct.pack("<4sHH16sQQQII", b"LMKV", 1, 1, LAYOUT.fingerprint, 5, 0, 5, len(scope), 0) + scope + TEXT
    data += struct.pack("<Q", xxhash.xxh3_64_intdigest(data))
    assert packed(scope={"salt": "s"}) == data


@given(
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40),
    st.dictionaries(st.sampled_from(frames.SCOPE_FIELDS), st.text()),
    st.data(),
)
def test_heads_come_back(ids: list[int], scope: dict[str, str], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(ids)))
    stop = data.draw(st.integers(start, len(ids)))
    text = struct.pack(f"<{len(ids)}I", *ids)
    head = frames.Head(frames.RETRIEVE, LAYOUT.fingerprint, len(ids), start, stop, scope, text)
    assert read(head.pack(), frames.RETRIEVE) == head


def test_replies_hold_no_tokens() -> None:
    head = frames.Head(frames.REPLY, LAYOUT.fingerprint, 5, 1, 4)
    assert len(head.pack()) == frames.HEAD_BYTES + frames.SUM_BYTES
    assert read(head.pack(), frames.REPLY) == head


@pytest.mark.parametrize("bit", range(0, 8 * len(packed()), 5))
def test_every_flipped_bit_is_refused(bit: int) -> None:
    data = bytearray(packed())
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(LMKVError):
        read_what_is_there(bytes(data))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layout": bytes(16)}, LayoutMismatchError, "expected KV of layout"),
        ({"kind": frames.RETRIEVE}, ArgumentError, "expected a store frame; got retrieve"),
        ({"kind": 9}, ArgumentError, "got 9"),
        ({"total_tokens": 0}, ArgumentError, "expected 1 to"),
        ({"total_tokens": 2**40}, ArgumentError, "expected 1 to"),
        ({"start": 4, "stop": 3}, ArgumentError, "start <= stop"),
        ({"stop": 6}, ArgumentError, "start <= stop <= 5"),
    ],
)
def test_heads_that_contradict_themselves(changes: dict[str, object], error: type[LMKVError], message: str) -> None:
    with pytest.raises(error, match=message):
        read(packed(**changes))


def test_scopes_are_checked() -> None:
    for scope in ({"model": "x"}, {"salt": 3}, {"salt": None}):
        with pytest.raises(ArgumentError, match="expected scope"):
            read(packed(scope=scope))
    raw = bytearray(packed(scope={"salt": "s"}))
    raw[frames.HEAD_BYTES] = ord("[")
    raw[-8:] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(raw[:-8])))
    with pytest.raises(ArgumentError, match="the scope as JSON"):
        read(bytes(raw))


@given(st.integers(1, 9), st.integers(0, 60), st.integers(0, 60))
def test_pieces_cut_a_range_where_chunks_end(width: int, start: int, length: int) -> None:
    layout = KVLayout.dense(layers=1, heads=1, head_size=1, dtype="uint8", chunk_tokens=width)
    stop = start + length
    found = list(frames.pieces(width, start, stop))
    assert [i for a, b in found for i in range(a, b)] == list(range(start, stop))
    assert all(a // width == (b - 1) // width for a, b in found)
    assert all(b % width == 0 for _, b in found[:-1])
    assert frames.pieces_bytes(layout, start, stop) == sum((b - a) * layout.token_bytes + 8 for a, b in found)


def test_a_piece_in_another_place_does_not_pass() -> None:
    hasher = frames.piece_hasher(8)
    hasher.update(b"payload")
    sent = frames.pack_sum(hasher.intdigest())
    frames.check_sum(hasher, sent, 8)
    other = frames.piece_hasher(16)
    other.update(b"payload")
    with pytest.raises(CorruptRecordError, match="piece at token 16"):
        frames.check_sum(other, sent, 16)
