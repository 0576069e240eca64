"""Chunks in slots to records as a slow tier keeps them, and back: sealed, encoded, encrypted; proved."""

from __future__ import annotations

from collections.abc import Callable

from ..chunks import TOKEN_BYTES
from ..codecs import Codec, make_codec
from ..errors import CorruptRecordError
from ..layout import KVLayout
from ..record import payload_offset, seal, verify
from .envelope import OVERHEAD, Envelope
from .ram import NewChunk

__all__ = ["Packer"]


class Packer:
    """Records of one tier.

    Args:
        codec: how payloads are encoded; records of other codecs are read, too.
        slot_view: slot id -> its whole memory.
        envelope: what records are encrypted with, and must be; ``None`` for records in the clear.

    Raises:
        ConfigError: an unknown codec, or its package is missing.
    """

    def __init__(
        self, layout: KVLayout, codec: str, slot_view: Callable[[int], memoryview], envelope: Envelope | None = None
    ) -> None:
        self._layout = layout
        self._itemsize = max(group.itemsize for group in layout.groups)
        self._codecs: dict[str, Codec] = {}
        self._codec = self._codec_named(codec)
        self._raw = self._codec.name == "raw"
        self._slot_view = slot_view
        self._envelope = envelope
        #: Where payloads begin in records that are not encrypted.
        self.offset = payload_offset(layout.chunk_tokens)

    def _codec_named(self, name: str) -> Codec:
        if name not in self._codecs:
            self._codecs[name] = make_codec(name, self._itemsize)
        return self._codecs[name]

    def _payload_bytes(self, chunk: NewChunk) -> int:
        return len(chunk.piece) // TOKEN_BYTES * self._layout.token_bytes

    def pack(self, chunk: NewChunk) -> memoryview:
        """The chunk's record: the slot itself where it is kept as it is."""
        size = self._payload_bytes(chunk)
        record = self._slot_view(chunk.slot)[: self.offset + size]
        if not self._raw:
            encoded = self._codec.encode(record[self.offset :])
            size = len(encoded)
            record = memoryview(bytearray(self.offset + size))
            record[self.offset :] = encoded
        seal(
            record,
            key=chunk.key,
            parent=chunk.parent,
            root=chunk.root,
            layout=self._layout.fingerprint,
            start=chunk.start,
            tokens=chunk.piece,
            offset=self.offset,
            payload_bytes=size,
            codec=self._codec.name,
            priority=chunk.priority,
        )
        return record if self._envelope is None else self._envelope.close(chunk, record)

    def room(self, chunk: NewChunk) -> memoryview:
        """Where the chunk's record is to be read: its slot itself where it is kept as it is."""
        if self._raw:
            slot = self._slot_view(chunk.slot)
            return slot if self._envelope is None else memoryview(bytearray(OVERHEAD + len(slot)))
        size = self._payload_bytes(chunk)
        overhead = OVERHEAD if self._envelope is not None else 0
        return memoryview(bytearray(overhead + self.offset + max(size, self._codec.bound(size))))

    def unpack(self, chunk: NewChunk, record: memoryview) -> None:
        """Prove a record and leave its payload in the chunk's slot.

        Args:
            record: what was read to the beginning of :meth:`room`.

        Raises:
            CorruptRecordError: it is not this chunk's whole record.
            ConfigError: it is encoded by a codec that is not to be had.
        """
        slot = self._slot_view(chunk.slot)
        if self._envelope is not None:
            out = slot if self._raw else memoryview(bytearray(max(0, len(record) - OVERHEAD)))
            record = out[: self._envelope.open(chunk, record, out)]
        header = verify(
            record, key=chunk.key, parent=chunk.parent, root=chunk.root, layout=self._layout.fingerprint, start=chunk.start
        )
        chunk.priority = header.priority
        if header.tokens != chunk.piece:
            raise CorruptRecordError("expected the tokens that were looked up; the record holds others")
        size = self._payload_bytes(chunk)
        stored = record[header.payload_offset :]
        if self._raw and header.codec == "raw" and header.payload_offset == self.offset and len(stored) == size:
            return
        if self._raw:  # it stands in the slot itself: decode from a copy
            stored = memoryview(bytes(stored))
        self._codec_named(header.codec).decode(stored, slot[self.offset : self.offset + size])
