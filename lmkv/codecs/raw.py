"""The payload as it is."""

from __future__ import annotations

from ..errors import CorruptRecordError

__all__ = ["RawCodec"]


class RawCodec:
    """No encoding: slots go to and from storage without a copy in between."""

    name = "raw"

    def __init__(self, itemsize: int = 1) -> None:
        del itemsize  # every codec is told the element size; this one has no use for it

    def encode(self, payload: memoryview) -> memoryview:
        """The payload itself."""
        return payload

    def decode(self, data: memoryview, out: memoryview) -> None:
        """Copy.

        Raises:
            CorruptRecordError: the sizes differ.
        """
        if len(data) != len(out):
            raise CorruptRecordError(f"expected {len(out)} bytes of raw payload; got {len(data)}")
        out[:] = data

    def bound(self, payload_bytes: int) -> int:
        """The size itself."""
        return payload_bytes
