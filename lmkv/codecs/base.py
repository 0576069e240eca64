"""How a payload is kept in a slow tier.

A codec is lossless: what ``decode`` writes is bit for bit what ``encode`` was given. Third parties register one under the entry
point group ``lmkv.codecs``; ``lmkv.testing.CodecSuite`` is its contract.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

__all__ = ["Codec"]


@runtime_checkable
class Codec(Protocol):
    """Lossless encoding of payloads."""

    #: Stored in every record; at most 12 ASCII characters. A record of an unknown codec is a miss.
    name: str

    def encode(self, payload: memoryview) -> memoryview | bytes:
        """The encoded payload; the input is left alone. Safe to call from several threads."""

    def decode(self, data: memoryview, out: memoryview) -> None:
        """Fill exactly ``out`` with the payload.

        Raises:
            CorruptRecordError: ``data`` is damaged or does not decode to ``len(out)`` bytes.
        """

    def bound(self, payload_bytes: int) -> int:
        """The most bytes ``encode`` returns for a payload of that size."""
