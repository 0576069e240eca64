"""How a directory's bytes are shared out: the index's map, and segment files of equal slots."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ...chunks import TOKEN_BYTES
from ...errors import CapacityError
from ...layout import KVLayout
from ...record import payload_offset

__all__ = ["LEAST_CAPACITY", "PAGE", "Geometry", "Plan", "Run", "plan"]

#: Direct I/O and LMDB both work in pages of this size.
PAGE = 4096
#: The smallest capacity that leaves LMDB room to work and a few slots beside it.
LEAST_CAPACITY = 256 * 1024
#: Segments are this large, or larger where a directory would have more of them than ``_MOST_SEGMENTS``.
_SEGMENT_BYTES = 256 * 1024**2
_MOST_SEGMENTS = 256
#: A full chunk takes up to this many slots: short chunks waste half a slot on average.
_FINEST = 32
#: LMDB writes changed pages to other places and keeps the old ones for two transactions: a small tree is rewritten whole each
#: time, so its map is four times as large; of a large one, a batch changes no more than this.
_MAP_CHANGES = 2 * 1024**2
_MAP_FIXED = 24 * PAGE
_PACKED = struct.Struct("<QQQ")

#: First slot, numbered over all segments, and how many.
Run = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Sizes that a directory keeps for its life.

    Args:
        slot_bytes: bytes of a slot, whole pages.
        segment_slots: slots of a segment file; a page in front of them says whose they are.
        chunk_slots: slots of a full chunk's record.
    """

    slot_bytes: int
    segment_slots: int
    chunk_slots: int

    @property
    def segment_bytes(self) -> int:
        """Size of a segment file."""
        return PAGE + self.segment_slots * self.slot_bytes

    def slots(self, record_bytes: int) -> int:
        """Slots that a record of so many bytes takes."""
        return -(-record_bytes // self.slot_bytes)

    def offset(self, slot: int) -> int:
        """Where a slot begins in its segment file."""
        return PAGE + slot % self.segment_slots * self.slot_bytes

    def pack(self) -> bytes:
        """As the directory's ``meta`` keeps it."""
        return _PACKED.pack(self.slot_bytes, self.segment_slots, self.chunk_slots)

    @classmethod
    def unpack(cls, data: bytes) -> Geometry:
        """The other way round.

        Raises:
            ValueError: no geometry.
        """
        if len(data) != _PACKED.size:
            raise ValueError(f"expected {_PACKED.size} bytes; got {len(data)}")
        found = cls(*_PACKED.unpack(data))
        if found.slot_bytes < PAGE or found.slot_bytes % PAGE or found.segment_slots < 1 or found.chunk_slots < 1:
            raise ValueError(f"expected whole pages and at least one slot; got {found}")
        return found


@dataclass(frozen=True)
class Plan:
    """A capacity, shared out.

    Args:
        geometry: of the segments.
        map_bytes: what LMDB's file may grow to.
        segments: how many segment files there may be.
        records: how many records the index has room for.
    """

    geometry: Geometry
    map_bytes: int
    segments: int
    records: int


def _slot_pages(pages: int) -> int:
    """Pages of a slot, for records of full chunks of so many: little is wasted by those, and not much by short ones."""
    if pages <= _FINEST:
        return 1
    counts = range(_FINEST // 4, _FINEST + 1)
    best = min(counts, key=lambda count: (count * -(-pages // count), -count))
    return -(-pages // best)


def _index_bytes(chunk_tokens: int) -> int:
    """What one record takes in LMDB's trees, half-empty pages included: its tokens stand there twice."""
    return int(1.8 * (2 * chunk_tokens * TOKEN_BYTES + 400))


def plan(layout: KVLayout, capacity: int, taken: int, held: Geometry | None, index: int) -> Plan:
    """Share ``capacity`` out between index and segments.

    Args:
        taken: bytes of other files of the directory.
        held: the geometry of a directory that exists already.
        index: bytes that its index takes already.

    Raises:
        CapacityError: there is not room for one segment.
    """
    record_bytes = payload_offset(layout.chunk_tokens) + layout.chunk_bytes
    pages = -(-record_bytes // PAGE)
    slot_bytes = held.slot_bytes if held else _slot_pages(pages) * PAGE
    room = (capacity - taken) // PAGE * PAGE
    entry = _index_bytes(layout.chunk_tokens)
    # room for as many records as half of the slots: all full ones of the smallest layouts, and many short ones of others
    live = int((room - _MAP_FIXED) / (slot_bytes + 2 * entry) * entry / 2)
    if 3 * live > _MAP_CHANGES:
        live = int((room - _MAP_FIXED - _MAP_CHANGES) / (slot_bytes + entry / 2) * entry / 2)
    index = max((_MAP_FIXED + live + min(3 * live, _MAP_CHANGES)) // PAGE * PAGE, index)
    data = room - index
    if held:
        geometry = held
    else:
        size = max(min(_SEGMENT_BYTES, data // 4), data // _MOST_SEGMENTS)
        geometry = Geometry(slot_bytes, max(1, (size - PAGE) // slot_bytes), -(-record_bytes // slot_bytes))
    segments = max(0, data // geometry.segment_bytes)
    if not segments:
        raise CapacityError(
            f"expected a capacity of at least {room - data + taken + geometry.segment_bytes} bytes, for an index of "
            f"{room - data + taken} and one segment file as large as those that are there; got {capacity}: raise it or delete "
            "the directory's files"
        )
    map_bytes = room - segments * geometry.segment_bytes  # what the segments leave is the index's
    live = max((map_bytes - _MAP_FIXED) // 4, map_bytes - _MAP_FIXED - _MAP_CHANGES)
    return Plan(geometry, map_bytes, segments, max(1, live // entry))
