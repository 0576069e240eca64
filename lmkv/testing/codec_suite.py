"""The contract of codecs as tests (needs pytest and hypothesis).

A codec's author inherits it and says how to make one::

    from lmkv.testing import CodecSuite

    class TestMyCodec(CodecSuite):
        def make(self, itemsize):
            return MyCodec(itemsize)

It checks what :class:`lmkv.codecs.base.Codec` promises: lossless, bounded, harmless on damaged data, usable from threads.
"""

from __future__ import annotations

import random
import threading
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ..codecs.base import Codec
from ..errors import CorruptRecordError

__all__ = ["CodecSuite"]

_GUARD = b"\xa5" * 64


def _payload(kind: str, itemsize: int, items: int, seed: int) -> bytes:
    """Bytes such as KV caches hold, and such as they never should."""
    rng = np.random.default_rng(seed)
    if kind == "noise":
        return rng.bytes(items * itemsize)
    if kind == "zeros":
        return bytes(items * itemsize)
    smooth = np.cumsum(rng.standard_normal(items), dtype=np.float64).astype({8: "<f8", 4: "<f4", 2: "<f2"}.get(itemsize, "<i1"))
    return smooth.tobytes()


def _decoded(codec: Codec, data: memoryview, size: int) -> bytes:
    """``data`` decoded into a buffer between guards, which must not change."""
    room = bytearray(_GUARD + b"\x5a" * size + _GUARD)
    try:
        codec.decode(data, memoryview(room)[len(_GUARD) : len(_GUARD) + size])
    finally:
        assert room.startswith(_GUARD), "decode wrote in front of its buffer"
        assert room.endswith(_GUARD), "decode wrote behind its buffer"
    return bytes(room[len(_GUARD) : len(_GUARD) + size])


class CodecSuite:
    """Inherit, define :meth:`make`, and name the class ``Test…``."""

    #: How many random payloads are tried.
    examples: ClassVar[int] = 60

    def make(self, itemsize: int) -> Codec:
        """A codec for elements of ``itemsize`` bytes (1, 2, 4 or 8)."""
        raise NotImplementedError(f"{type(self).__name__}: define make(self, itemsize) so that it returns a codec")

    def test_is_a_codec(self) -> None:
        codec = self.make(2)
        assert isinstance(codec, Codec), f"{type(codec).__name__} lacks a part of Codec"
        assert codec.name.isascii()
        assert 1 <= len(codec.name) <= 12, f"expected a name of 1 to 12 ASCII characters; got {codec.name!r}"
        assert codec.name == self.make(4).name

    @pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
    def test_what_goes_in_comes_out(self, itemsize: int) -> None:
        codec = self.make(itemsize)

        @settings(max_examples=self.examples, deadline=None)
        @given(
            kind=st.sampled_from(["noise", "zeros", "smooth"]),
            items=st.one_of(st.integers(1, 64), st.integers(1, 40000)),
            seed=st.integers(0, 2**32),
        )
        def round_trip(kind: str, items: int, seed: int) -> None:
            payload = _payload(kind, itemsize, items, seed)
            mine = bytearray(payload)
            data = memoryview(codec.encode(memoryview(mine)))
            assert bytes(mine) == payload, "encode changed its input"
            assert len(data) <= codec.bound(len(payload)), (
                f"expected at most bound() = {codec.bound(len(payload))} bytes; got {len(data)}"
            )
            kept = memoryview(bytes(data))  # as it comes back from storage: read-only, somewhere else
            assert _decoded(codec, kept, len(payload)) == payload

        round_trip()

    def test_read_only_input_will_do(self) -> None:
        payload = _payload("smooth", 2, 5000, 1)
        codec = self.make(2)
        data = memoryview(codec.encode(memoryview(payload)))
        assert _decoded(codec, data.toreadonly(), len(payload)) == payload

    @pytest.mark.parametrize("size", [0, 1, 4998, 10002, 100000])
    def test_another_size_is_refused(self, size: int) -> None:
        codec = self.make(2)
        data = memoryview(bytes(codec.encode(memoryview(_payload("smooth", 2, 5000, 2)))))
        with pytest.raises(CorruptRecordError):
            _decoded(codec, data, size)

    def test_cut_data_are_refused(self) -> None:
        codec = self.make(2)
        payload = _payload("smooth", 2, 5000, 3)
        data = memoryview(bytes(codec.encode(memoryview(payload))))
        for size in sorted({0, 1, 2, 15, 16, 31, 32, 33, len(data) // 2, len(data) - 1}):
            with pytest.raises(CorruptRecordError):
                _decoded(codec, data[:size], len(payload))

    def test_damaged_data_do_no_harm(self) -> None:
        """What decodes at all is caught by the record's checksum; here nothing but a CorruptRecordError may come of it."""
        codec = self.make(2)
        payload = _payload("smooth", 2, 3000, 4)
        data = bytes(codec.encode(memoryview(payload)))
        rng = random.Random(5)
        for _ in range(300):
            damaged = bytearray(data)
            for _ in range(rng.choice((1, 1, 4, 64))):
                bit = rng.randrange(min(64 * 8, len(data) * 8)) if rng.random() < 0.5 else rng.randrange(len(data) * 8)
                damaged[bit // 8] ^= 1 << bit % 8
            try:
                _decoded(codec, memoryview(damaged), len(payload))
            except CorruptRecordError:
                continue

    def test_threads_do_not_disturb_each_other(self) -> None:
        codec = self.make(2)
        wrong: list[int] = []
        start = threading.Barrier(4)

        def work(number: int) -> None:
            start.wait(30)
            for i in range(20):
                payload = _payload("smooth", 2, 4000 + number * 100, number * 100 + i)
                data = memoryview(codec.encode(memoryview(payload)))
                try:
                    if _decoded(codec, data, len(payload)) != payload:
                        wrong.append(number)
                except CorruptRecordError:
                    wrong.append(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong, f"threads {sorted(set(wrong))} got something else back"
