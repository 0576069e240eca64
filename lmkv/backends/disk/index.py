"""What is known of each record: databases of one LMDB environment, changed together in one transaction.

    meta      format, byte order, layout, id, geometry, sequence counter, bytes used
    index     key -> parent, root, content fingerprint, size, place, tokens
    uses      key -> sequence number of the last use, number of uses
    order     sequence number -> key
    children  place in the tree of siblings -> keys (see ``_levels``)
    segments  number of a segment file -> which of its slots hold records

``docs/format.md`` has the bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from ...chunks import TOKEN_BYTES, ChunkKey, shared_tokens
from ...index.content import chunk_fingerprints, root_seed
from ...record import RecordHeader
from ..base import Entry
from .geometry import Geometry, Run

__all__ = ["DATABASES", "Place", "RecordIndex"]

DATABASES = (b"meta", b"index", b"uses", b"order", b"children", b"segments")
#: parent, root, sequence number of its birth, fingerprint, bytes, start, written, runs, priority; then the runs, the tokens
_INDEX = struct.Struct("<16s16sQQQIIHB5x")
_RUN = struct.Struct("<QI")
_USE = struct.Struct("<QI")  # sequence number, uses
#: LMDB's keys have at most 511 bytes; 16 are the place in the tree, so a segment of siblings' tokens is 120 tokens.
_SEGMENT = 480
_BATCH = 1024
_KEY_BYTES = 16


@dataclass(frozen=True)
class Place:
    """Where a record lies.

    Args:
        born: sequence number of its writing: another record in the same slots has another one.
        size: bytes of the record.
        runs: its slots, in order.
        written: seconds since 1970.
    """

    born: int
    size: int
    runs: tuple[Run, ...]
    written: int


def _levels(parent: bytes, tokens: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The entries of a chunk in ``children``: place and segment.

    LMDB sorts its keys, so a neighbour search finds the longest shared prefix, but keys are short: a chunk's tokens are cut
    into segments, and the second segment stands at a place of its own, named by a hash of the way there. The last segment is
    shorter than the others, if need be empty, so that it tells where the tokens end.
    """
    place = parent
    for begin in range(0, len(tokens) + 1, _SEGMENT):
        segment = tokens[begin : begin + _SEGMENT]
        yield place, segment
        place = xxhash.xxh3_128_digest(place + segment)


def _runs_end(value: Any) -> int:
    """Where the tokens begin in an index entry; -1 for one that can't be."""
    if len(value) < _INDEX.size:
        return -1
    end = _INDEX.size + int(_INDEX.unpack_from(value)[7]) * _RUN.size
    return end if end <= len(value) else -1


def _tokens(value: Any) -> bytes | None:
    """The tokens of an index entry; ``None`` for an absent or a damaged one."""
    end = -1 if value is None else _runs_end(value)
    return bytes(value[end:]) if end >= 0 else None


class RecordIndex:
    """The databases. Every method works within the caller's transaction.

    Args:
        env: the environment.
        txn: a write transaction in which the databases are made where they are missing.
        meta: its first database, open already.
    """

    def __init__(self, env: Any, txn: Any, meta: Any, geometry: Geometry, chunk_tokens: int) -> None:
        self.meta = meta
        self._geometry = geometry
        self._chunk_tokens = chunk_tokens
        self._index = env.open_db(b"index", txn=txn)
        self._uses = env.open_db(b"uses", txn=txn)
        self._order = env.open_db(b"order", txn=txn)
        self._children = env.open_db(b"children", txn=txn, dupsort=True)
        self._segments = env.open_db(b"segments", txn=txn)

    # -- counters, slots -------------------------------------------------------------------------------------------------

    def counter(self, txn: Any, name: bytes) -> int:
        """``sequence`` or ``used``."""
        return int.from_bytes(txn.get(name, b"", db=self.meta), "little")

    def _set_counter(self, txn: Any, name: bytes, value: int) -> None:
        txn.put(name, value.to_bytes(8, "little"), db=self.meta)

    def count(self, txn: Any) -> int:
        """Records held."""
        return int(txn.stat(self._index)["entries"])

    def segments(self, txn: Any) -> dict[int, int]:
        """The registered segments: number -> slots in use, as bits."""
        return {int.from_bytes(number, "big"): int.from_bytes(bits, "little") for number, bits in txn.cursor(db=self._segments)}

    def segment_bits(self, txn: Any, number: int) -> int | None:
        """Which slots of a segment are in use; ``None`` for one that is not registered."""
        bits = txn.get(number.to_bytes(4, "big"), db=self._segments)
        return None if bits is None else int.from_bytes(bits, "little")

    def set_segment(self, txn: Any, number: int, bits: int | None) -> None:
        """Register a segment or change its slots; ``None`` takes it out."""
        name = number.to_bytes(4, "big")
        if bits is None:
            txn.delete(name, db=self._segments)
        else:
            txn.put(name, bits.to_bytes(-(-self._geometry.segment_slots // 8), "little"), db=self._segments)

    def _mark(self, txn: Any, runs: Iterable[Run], used: bool) -> None:
        changed: dict[int, int] = {}
        for first, count in runs:
            number, slot = divmod(first, self._geometry.segment_slots)
            if number not in changed:
                bits = self.segment_bits(txn, number)
                if bits is None:
                    continue
                changed[number] = bits
            mask = ((1 << count) - 1) << slot
            changed[number] = changed[number] | mask if used else changed[number] & ~mask
        for number, bits in changed.items():
            self.set_segment(txn, number, bits)

    def are_free(self, txn: Any, runs: Iterable[Run]) -> bool:
        """Whether these slots are registered and hold nothing."""
        for first, count in runs:
            number, slot = divmod(first, self._geometry.segment_slots)
            bits = self.segment_bits(txn, number)
            if bits is None or bits & (((1 << count) - 1) << slot):
                return False
        return True

    def _slot_bytes(self, runs: Iterable[Run]) -> int:
        return sum(count for _, count in runs) * self._geometry.slot_bytes

    # -- records ---------------------------------------------------------------------------------------------------------

    def has(self, txn: Any, key: ChunkKey) -> bool:
        """Whether a record is held."""
        return txn.get(key, db=self._uses) is not None

    def place(self, txn: Any, key: ChunkKey) -> Place | None:
        """Where a record lies; ``None`` if it is not held."""
        value = txn.get(key, db=self._index)
        return None if value is None else self._place(value)

    def _place(self, value: Any) -> Place | None:
        """The place in an entry; ``None`` if it can't be one."""
        if _runs_end(value) < 0:
            return None
        _, _, born, _, size, _, written, count, _ = _INDEX.unpack_from(value)
        runs = tuple(_RUN.unpack_from(value, _INDEX.size + i * _RUN.size) for i in range(count))
        width = self._geometry.segment_slots
        if any(not 1 <= slots <= width - first % width for first, slots in runs):
            return None
        if self._geometry.slots(size) != sum(slots for _, slots in runs):
            return None
        return Place(born, size, runs, written)

    def tokens_of(self, txn: Any, key: ChunkKey) -> bytes | None:
        """The tokens of a record."""
        return _tokens(txn.get(key, db=self._index))

    def insert(
        self, txn: Any, key: ChunkKey, header: RecordHeader, size: int, runs: Sequence[Run], now: int, floor: int = 0
    ) -> None:
        """Enter a record that lies in ``runs``, numbered behind ``floor``; one under the same key goes."""
        self.delete(txn, key)
        sequence = max(self.counter(txn, b"sequence"), floor) + 1
        fingerprint = self.fingerprint(header.root, header.tokens)
        fields = (sequence, fingerprint, size, header.start, now, len(runs), header.priority)
        entry = _INDEX.pack(header.parent, header.root, *fields)
        txn.put(key, entry + b"".join(_RUN.pack(*run) for run in runs) + header.tokens, db=self._index)
        txn.put(key, _USE.pack(sequence, 1), db=self._uses)
        txn.put(sequence.to_bytes(8, "big"), key, db=self._order)
        for where, segment in _levels(header.parent, header.tokens):
            txn.put(where + segment, key, db=self._children)
        self._mark(txn, runs, True)
        self._set_counter(txn, b"sequence", sequence)
        self._set_counter(txn, b"used", self.counter(txn, b"used") + self._slot_bytes(runs))

    def delete(self, txn: Any, key: ChunkKey) -> None:
        """Take a record out; its slots are free for others at once."""
        value = txn.get(key, db=self._index)
        use = txn.get(key, db=self._uses)
        if value is None and use is None:
            return
        if use is not None:
            txn.delete(_USE.unpack(use)[0].to_bytes(8, "big"), db=self._order)
            txn.delete(key, db=self._uses)
        if value is None:
            return
        place, tokens, parent = self._place(value), _tokens(value), bytes(value[:16])
        del value
        txn.delete(key, db=self._index)
        if place is None or tokens is None:
            return
        for where, segment in _levels(parent, tokens):
            txn.delete(where + segment, key, db=self._children)
        self._mark(txn, place.runs, False)
        self._set_counter(txn, b"used", max(0, self.counter(txn, b"used") - self._slot_bytes(place.runs)))

    def touch(self, txn: Any, keys: Sequence[ChunkKey], floors: Sequence[int]) -> None:
        """Count a use of each key that is held, in this order, each numbered behind its floor."""
        sequence = self.counter(txn, b"sequence")
        for key, floor in zip(keys, floors, strict=True):
            value = txn.get(key, db=self._uses)
            if value is None:
                continue
            last, uses = _USE.unpack(value)
            del value
            sequence = max(sequence, floor) + 1
            txn.delete(last.to_bytes(8, "big"), db=self._order)
            txn.put(sequence.to_bytes(8, "big"), key, db=self._order)
            txn.put(key, _USE.pack(sequence, min(uses + 1, 2**32 - 1)), db=self._uses)
        self._set_counter(txn, b"sequence", sequence)

    def clear(self, txn: Any) -> None:
        """Take all records out."""
        for db in (self._index, self._uses, self._order, self._children):
            txn.drop(db, delete=False)
        for number in self.segments(txn):
            self.set_segment(txn, number, 0)
        self._set_counter(txn, b"used", 0)

    def in_segment(self, txn: Any, number: int) -> list[ChunkKey]:
        """Keys of the records that have a slot in that segment. Looks at all."""
        slots = self._geometry.segment_slots
        found = []
        for key, value in txn.cursor(db=self._index):
            place = self._place(value)
            if place is None or any(first // slots == number for first, _ in place.runs):
                found.append(ChunkKey(bytes(key)))
        return found

    def fingerprint(self, root: bytes, tokens: bytes) -> int:
        """Of a full chunk's content; 0 for a short one."""
        width = self._chunk_tokens
        if len(tokens) != width * TOKEN_BYTES:
            return 0
        return int(chunk_fingerprints(np.frombuffer(tokens, "<u4"), width, root_seed(root))[0])

    def entries(self, txn: Any, after: int) -> list[Entry]:
        """Up to 1024 records used after a sequence number, in that order."""
        batch: list[Entry] = []
        with txn.cursor(db=self._order) as cursor:
            if not cursor.set_range((after + 1).to_bytes(8, "big")):
                return batch
            for place, key in cursor:
                value = txn.get(key, db=self._index) if len(key) == _KEY_BYTES else None
                where = None if value is None else self._place(value)
                if value is None or where is None:
                    continue  # damaged
                parent, root, _, fingerprint, _, start, _, _, priority = _INDEX.unpack_from(value)
                sequence, size = int.from_bytes(place, "big"), self._slot_bytes(where.runs)
                batch.append(Entry(sequence, ChunkKey(bytes(key)), parent, root, start, size, fingerprint, priority))
                if len(batch) == _BATCH:
                    break
        return batch

    # -- chains ----------------------------------------------------------------------------------------------------------

    def held_many(self, txn: Any, keys: Sequence[ChunkKey], pieces: Sequence[bytes]) -> list[bool]:
        """Which chunks are held, each proved by its tokens."""
        return [_tokens(txn.get(key, db=self._index)) == piece for key, piece in zip(keys, pieces, strict=True)]

    def match_prefix(self, txn: Any, keys: Sequence[ChunkKey], pieces: Sequence[bytes]) -> int:
        """How many leading chunks are held, each proved by its tokens."""
        for held, (key, piece) in enumerate(zip(keys, pieces, strict=True)):
            if _tokens(txn.get(key, db=self._index)) != piece:
                return held
        return len(keys)

    def best_child(self, txn: Any, parent: ChunkKey, tokens: bytes) -> tuple[ChunkKey, bytes, int] | None:
        """As :meth:`lmkv.backends.base.LocalIndex.best_child`."""
        key: ChunkKey | None = None
        with txn.cursor(db=self._children) as cursor:
            for place, segment in _levels(parent, tokens):
                found = self._nearest(cursor, place, segment)
                if found is None:
                    break
                key, shared = found
                if shared < _SEGMENT:
                    break
        held = self.tokens_of(txn, key) if key is not None else None
        if key is None or held is None:
            return None
        shared = shared_tokens(held, tokens)
        return (key, held, shared) if shared else None

    @staticmethod
    def _nearest(cursor: Any, place: bytes, segment: bytes) -> tuple[ChunkKey, int] | None:
        """A chunk at ``place`` whose segment shares the most bytes with ``segment``, and how many bytes (whole tokens, > 0)."""
        best: tuple[ChunkKey, int] | None = None
        here = cursor.set_range(place + segment)
        for step in ("here", "before"):
            if step == "before":
                here = cursor.prev_nodup() if here else cursor.last()
            if not here:
                continue
            where = bytes(cursor.key())
            if where[:16] != place:
                continue
            shared = shared_tokens(where[16:], segment) * TOKEN_BYTES
            if shared and (best is None or shared > best[1]):
                best = (ChunkKey(bytes(cursor.value())), shared)
        return best

    def covered_siblings(self, txn: Any, parent: ChunkKey, tokens: bytes) -> list[ChunkKey]:
        """As :meth:`lmkv.backends.base.LocalIndex.covered_siblings`."""
        found: list[ChunkKey] = []
        with txn.cursor(db=self._children) as cursor:
            for place, segment in _levels(parent, tokens):
                here = cursor.set_range(place + segment)
                here = cursor.prev_nodup() if here else cursor.last()
                while here and bytes(cursor.key())[:16] == place:
                    held = bytes(cursor.key())[16:]
                    if segment.startswith(held):
                        found.extend(ChunkKey(bytes(value)) for value in cursor.iternext_dup())
                        here = cursor.prev_nodup()
                        continue
                    # one that parts from the segment stands between: what is left is at most as long as what they share
                    shorter = place + segment[: shared_tokens(held, segment) * TOKEN_BYTES]
                    if not cursor.set_range(shorter) or bytes(cursor.key()) != shorter:
                        here = cursor.prev_nodup()
        return found

    # -- checks ----------------------------------------------------------------------------------------------------------

    def records(self, txn: Any) -> Iterator[tuple[ChunkKey, ChunkKey, Place, bytes]]:
        """Key, parent, place and tokens of every record whose entry can be understood."""
        for key, value in txn.cursor(db=self._index):
            place, tokens = self._place(value), _tokens(value)
            if place is not None and tokens is not None:
                yield ChunkKey(bytes(key)), ChunkKey(bytes(value[16:32])), place, tokens

    def problems(self, txn: Any) -> Iterator[str]:
        """Where the databases contradict each other. Looks at every entry, some microseconds each."""
        children = records = used = 0
        slots = self._geometry.segment_slots
        bits: dict[int, int] = dict.fromkeys(self.segments(txn), 0)
        for key, value in txn.cursor(db=self._index):
            records += 1
            place, tokens = self._place(value), _tokens(value)
            if place is None or tokens is None or len(tokens) % TOKEN_BYTES:
                yield f"the entry of {bytes(key).hex()} can't be understood"
                continue
            parent, root, _, fingerprint, _, _, _, _, _ = _INDEX.unpack_from(value)
            if fingerprint != self.fingerprint(root, tokens):
                yield f"the fingerprint of {bytes(key).hex()} is not that of its tokens"
            for first, count in place.runs:
                number, slot = divmod(first, slots)
                mask = ((1 << count) - 1) << slot
                if number not in bits or bits[number] & mask:
                    yield f"{bytes(key).hex()} lies in slots that are not there or belong to another record"
                bits[number] = bits.get(number, 0) | mask
            used += self._slot_bytes(place.runs)
            use = txn.get(key, db=self._uses)
            if use is None or len(use) != _USE.size:
                yield f"the use of {bytes(key).hex()} is not noted"
            elif bytes(txn.get(_USE.unpack(use)[0].to_bytes(8, "big"), b"", db=self._order)) != bytes(key):
                yield f"{bytes(key).hex()} has no place in the order of use"
            for where, segment in _levels(parent, tokens):
                children += 1
                if not self._has_child(txn, where + segment, key):
                    yield f"{bytes(key).hex()} is not listed behind the chunk that it extends"
        counts = [txn.stat(db)["entries"] for db in (self._uses, self._order, self._children)]
        if counts != [records, records, children]:
            yield f"expected {[records, records, children]} uses, places and siblings; there are {counts}"
        if self.segments(txn) != bits:
            yield "the segments count other slots as taken than the records take"
        if self.counter(txn, b"used") != used:
            yield f"the quota counts {self.counter(txn, b'used')} bytes; the records take {used}"

    def _has_child(self, txn: Any, place: bytes, key: Any) -> bool:
        with txn.cursor(db=self._children) as cursor:
            return bool(cursor.set_key_dup(place, bytes(key)))
