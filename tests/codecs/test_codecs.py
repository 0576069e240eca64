"""Codecs: the built-in ones pass the contract, and names are resolved."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lmkv.codecs import Codec, make_codec
from lmkv.codecs.raw import RawCodec
from lmkv.errors import ConfigError, CorruptRecordError
from lmkv.testing import CodecSuite


class TestRaw(CodecSuite):
    def make(self, itemsize: int) -> Codec:
        return make_codec("raw", itemsize)

    def test_makes_no_copy(self) -> None:
        payload = memoryview(bytearray(b"payload"))
        assert self.make(1).encode(payload) is payload
        assert self.make(1).bound(1234) == 1234


class TestBlosc2(CodecSuite):
    def make(self, itemsize: int) -> Codec:
        pytest.importorskip("blosc2")
        return make_codec("blosc2", itemsize)

    def test_makes_smooth_payloads_smaller(self) -> None:
        payload = memoryview(b"".join(i.to_bytes(4, "little") for i in range(20000)))
        assert len(self.make(4).encode(payload)) < len(payload) // 4

    def test_another_codecs_data(self) -> None:
        with pytest.raises(CorruptRecordError):
            self.make(2).decode(memoryview(b"raw payload, not compressed at all, but long enough"), memoryview(bytearray(51)))


def test_names() -> None:
    assert isinstance(make_codec("RAW", 2), RawCodec)
    with pytest.raises(ConfigError, match="did you mean 'blosc2'"):
        make_codec("blosc", 2)
    assert isinstance(make_codec("naive", 2), RawCodec)
    pytest.importorskip("blosc2")
    assert make_codec("lossless", 2).name == "blosc2"
    with pytest.raises(ConfigError, match="expected one of blosc2, lossless, naive, raw"):
        make_codec("zip", 2)


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "blosc2.py").write_text("raise ImportError('not here')")
    code = "import lmkv.codecs\ntry: lmkv.codecs.make_codec('blosc2', 2)\nexcept lmkv.ConfigError as error: print(error)"
    env = {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "pip install 'lmkv[blosc2]'" in done.stdout
