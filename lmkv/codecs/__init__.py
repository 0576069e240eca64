"""Lossless encodings of payloads in slow tiers."""

from __future__ import annotations

from typing import cast

from .._plugins import find
from .base import Codec

__all__ = ["Codec", "make_codec"]

#: ``naive`` and ``lossless`` are what to ask for; records name how their payload is in fact encoded.
_BUILTIN = {
    "raw": "lmkv.codecs.raw:RawCodec",
    "naive": "lmkv.codecs.raw:RawCodec",
    "blosc2": "lmkv.codecs.blosc2:Blosc2Codec",
    "lossless": "lmkv.codecs.blosc2:Blosc2Codec",
}


def make_codec(name: str, itemsize: int) -> Codec:
    """The codec of that name for elements of ``itemsize`` bytes.

    Raises:
        ConfigError: an unknown name, or a package that it needs is missing.
    """
    return cast(Codec, find("codecs", name, _BUILTIN)(itemsize))
