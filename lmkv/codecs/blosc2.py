"""Lossless compression by Blosc2: bytes of equal significance side by side, then Zstandard (package ``blosc2``)."""

from __future__ import annotations

import os
from typing import Any

from ..errors import ConfigError, CorruptRecordError

__all__ = ["Blosc2Codec"]

#: Blosc2's own limit of one buffer.
_MAX_BYTES = 2**31 - 1 - 32
#: Decoding is waited for; more threads than this gain little.
_MOST_THREADS = 4


class Blosc2Codec:
    """Zstandard at level 1 behind Blosc2's byte shuffle.

    Args:
        itemsize: bytes of the layout's elements; the shuffle splits at it.
        threads: that decode one payload; by default as many as there are processors, up to four. Encoding, behind which nobody
            waits, takes one.

    Raises:
        ConfigError: the package is not installed.
    """

    name = "blosc2"

    def __init__(self, itemsize: int = 2, *, threads: int | None = None) -> None:
        try:
            import blosc2
        except ImportError:
            raise ConfigError(
                "codec blosc2: expected the package blosc2; it is not installed: pip install 'lmkv[blosc2]'"
            ) from None
        self._blosc2: Any = blosc2
        self._itemsize = itemsize
        self._threads = threads or min(_MOST_THREADS, os.cpu_count() or 1)

    def encode(self, payload: memoryview) -> bytes:
        """Compressed payload.

        Raises:
            ConfigError: the payload is larger than Blosc2 takes (2 GiB); choose a smaller chunk.
        """
        if len(payload) > _MAX_BYTES:
            raise ConfigError(
                f"codec blosc2: expected payloads of at most {_MAX_BYTES} bytes; got {len(payload)}: use smaller chunks"
            )
        b = self._blosc2
        out: bytes = b.compress2(
            payload, typesize=self._itemsize, codec=b.Codec.ZSTD, clevel=1, filters=[b.Filter.SHUFFLE], nthreads=1
        )
        return out

    def decode(self, data: memoryview, out: memoryview) -> None:
        """Decompress into ``out``.

        Raises:
            CorruptRecordError: the data does not decode to that many bytes.
        """
        b = self._blosc2
        try:
            size = b.get_cbuffer_sizes(bytes(data[:32]))[0]
            if size != len(out):
                raise CorruptRecordError(f"expected {len(out)} bytes after decoding; the data holds {size}")
            b.decompress2(data, dst=out, nthreads=self._threads)
        except (RuntimeError, ValueError, TypeError) as error:
            raise CorruptRecordError(f"expected data that Blosc2 can decode; it says: {error}") from None

    def bound(self, payload_bytes: int) -> int:
        """Blosc2 adds at most its header and a table of blocks."""
        return payload_bytes + payload_bytes // 256 + 4096
