"""The RAM tier beside a dictionary: what is held, what goes, and that slots are never shared or lost."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import lmkv
from lmkv.chunks import ChunkKey
from lmkv.errors import CapacityError
from lmkv.events import Emitter, Event
from lmkv.testing._chunks import Chunk, text_chunks
from lmkv.tiers import NewChunk, RamTier

LAYOUT = lmkv.KVLayout.dense(layers=1, heads=1, head_size=4, dtype="float32", chunk_tokens=8)
SLOT = 8192


def tier(slots: int, **settings: Any) -> tuple[RamTier, list[Event]]:
    events: list[Event] = []
    config = lmkv.StoreConfig(ram_capacity=slots * SLOT, ram_extent=2 * SLOT, **settings)
    return RamTier(config, LAYOUT, Emitter(events.append)), events


def put(ram: RamTier, chunks: list[Chunk], protected: tuple[ChunkKey, ...] = ()) -> list[ChunkKey]:
    """Store as many leading chunks as there is room for; each payload says whose it is."""
    missing = [chunk for chunk in chunks if ram.index.get(chunk.key) is None]
    n = ram.make_room(len(missing), {chunk.key for chunk in chunks} | set(protected)) if missing else 0
    slots = ram.pool.allocate(n) or []
    new = [NewChunk(c.key, c.parent, c.root, c.tokens, c.start, slot) for c, slot in zip(missing, slots, strict=False)]
    for chunk in new:
        ram.payload(chunk.slot, 1)[:16] = chunk.key
    return [node.key for node, _ in ram.commit(new)]


def payload_of(ram: RamTier, key: ChunkKey) -> bytes:
    node = ram.index.get(key)
    assert node is not None
    return bytes(ram.payload(node.slot, 1)[:16])


def test_a_slot_has_room_for_a_whole_record() -> None:
    ram, _ = tier(3)
    assert ram.pool.slot_bytes == SLOT
    assert ram.payload_offset == 4096
    ram.pool.allocate(1)
    assert len(ram.payload(0, 8)) == LAYOUT.chunk_bytes
    assert len(ram.payload(0, 3)) == 3 * LAYOUT.token_bytes


def test_less_than_one_chunk() -> None:
    with pytest.raises(CapacityError, match=r"ram_capacity: .*8192 bytes \(8 tokens\); got 8191"):
        RamTier(lmkv.StoreConfig(ram_capacity=SLOT - 1), LAYOUT, Emitter(None))


def test_makes_room_from_the_ends_of_texts() -> None:
    ram, events = tier(4)
    first, second = text_chunks(LAYOUT, range(24)), text_chunks(LAYOUT, range(100, 116))
    assert put(ram, first) == [chunk.key for chunk in first]
    assert put(ram, second) == [chunk.key for chunk in second]
    assert [ram.index.get(chunk.key) is not None for chunk in first] == [True, True, False]
    assert [(event.kind, event.tier, event.detail["chunks"]) for event in events] == [("evicted", "ram", 1)]
    assert ram.evictions == 1
    ram._check()


def test_pinned_chunks_stay() -> None:
    ram, _ = tier(3)
    first = text_chunks(LAYOUT, range(24))
    put(ram, first)
    last = ram.index.get(first[2].key)
    assert last is not None
    last.pins += 1
    assert put(ram, text_chunks(LAYOUT, range(50, 60))) == [], "a pinned chunk keeps what it extends"
    last.pins -= 1
    assert len(put(ram, text_chunks(LAYOUT, range(50, 60)))) == 2
    ram._check()


def test_as_many_as_fit() -> None:
    ram, _ = tier(3)
    chunks = text_chunks(LAYOUT, range(80))
    assert put(ram, chunks) == [chunk.key for chunk in chunks[:3]]
    assert put(ram, chunks) == [], "a text does not push out its own beginning"
    ram._check()


def test_a_chunk_that_came_by_another_way_meanwhile() -> None:
    ram, _ = tier(4)
    (chunk,) = text_chunks(LAYOUT, range(8))
    slots = ram.pool.allocate(2)
    assert slots is not None
    new = [NewChunk(chunk.key, chunk.parent, chunk.root, chunk.tokens, chunk.start, slot) for slot in slots]
    assert len(ram.commit(new[:1])) == 1
    assert ram.commit(new[1:]) == []
    assert ram.pool.used == 1, "the second slot was given back"
    ram._check()


def test_a_longer_chunk_replaces_a_short_one() -> None:
    ram, _ = tier(8)
    base = list(range(20))
    short, other = text_chunks(LAYOUT, base[:11])[1], text_chunks(LAYOUT, [*base[:9], 7])[1]
    put(ram, text_chunks(LAYOUT, base[:11]))
    put(ram, text_chunks(LAYOUT, [*base[:9], 7]))
    assert len(ram.index) == 3
    put(ram, text_chunks(LAYOUT, base[:16]))
    assert ram.index.get(short.key) is None, "its tokens are the beginning of the longer one's"
    assert ram.index.get(other.key) is not None
    ram._check()


def test_content_is_found_by_namespace() -> None:
    ram, _ = tier(8)
    mine, theirs = (text_chunks(LAYOUT, range(16), salt=salt) for salt in ("mine", "theirs"))
    put(ram, mine)
    node = ram.index.get(mine[1].key)
    assert node is not None
    assert ram.node_in(node.slot) is node
    assert ram.start_of(node.slot) == 8
    assert ram.has_root(node.slot, mine[0].root)
    assert not ram.has_root(node.slot, theirs[0].root)
    assert ram.node_in(10**6) is None


def test_many_namespaces_one_after_the_other() -> None:
    ram, _ = tier(2)
    for i in range(2000):
        (chunk,) = text_chunks(LAYOUT, [1, 2, 3], salt=str(i))
        assert put(ram, [chunk]) == [chunk.key]
        node = ram.index.get(chunk.key)
        assert node is not None
        assert ram.has_root(node.slot, chunk.root)
    assert len(ram._root_numbers) < 1100, "the numbers of those that are gone were given up"
    ram._check()


def test_clear_keeps_the_slots_of_what_is_pinned() -> None:
    ram, _ = tier(4)
    chunks = text_chunks(LAYOUT, range(24))
    put(ram, chunks)
    node = ram.index.get(chunks[1].key)
    assert node is not None
    slot = node.slot
    node.pins += 1
    assert ram.clear() == 1
    assert ram.index.get(chunks[1].key) is None, "it is found no more"
    assert bytes(ram.payload(slot, 8)[:16]) == chunks[1].key
    assert ram.pool.used == 1
    ram._check()
    ram.let_go([node])
    assert ram.clear() == 0
    assert ram.pool.used == 0
    ram._check()


def _universe() -> list[list[Chunk]]:
    base = list(range(40))
    texts = [base, base[:3], base[:11], [*base[:16], 7], [*base[:12], 9, 9, 9, 9, 9, 9], base[::-1], [5], [5, 5, 5]]
    return [text_chunks(LAYOUT, text) for text in texts]


TEXTS = _universe()


class _Machine(RuleBasedStateMachine):
    @initialize(
        slots=st.integers(1, 9), policy=st.sampled_from(["lru", "lfu", "fifo", "mru", "s3fifo"]), chain_aware=st.booleans()
    )
    def open(self, slots: int, policy: str, chain_aware: bool) -> None:
        self.ram, _ = tier(slots, ram_policy=policy, chain_aware=chain_aware)
        self.pinned: list[Any] = []

    @rule(text=st.sampled_from(TEXTS))
    def store(self, text: list[Chunk]) -> None:
        before = {node.key for node in self.ram.index}
        new = put(self.ram, text)
        assert not before & set(new)
        missing = [chunk.key for chunk in text if chunk.key not in before]
        assert new == missing[: len(new)], "the leading ones are served"
        assert len(new) == len(missing) or self.ram.pool.available == 0

    @rule(text=st.sampled_from(TEXTS))
    def touch(self, text: list[Chunk]) -> None:
        self.ram.touch(self.ram.index.walk([c.key for c in text], [c.tokens for c in text]))

    @rule(text=st.sampled_from(TEXTS))
    def pin(self, text: list[Chunk]) -> None:
        nodes = self.ram.index.walk([c.key for c in text], [c.tokens for c in text])
        for node in nodes:
            node.pins += 1
        self.pinned += nodes

    @rule()
    def unpin(self) -> None:
        self.ram.let_go(self.pinned)
        self.pinned = []

    @rule()
    def clear(self) -> None:
        assert self.ram.clear() == len({id(node) for node in self.pinned})
        assert not len(self.ram.index)

    @invariant()
    def holds_what_it_was_given(self) -> None:
        if not hasattr(self, "ram"):
            return
        self.ram._check()
        for node in self.ram.index:
            assert payload_of(self.ram, node.key) == node.key, "every slot still has the bytes of its chunk"
        held = [node for node in self.pinned if node.slot >= 0]  # others were cleared
        assert all(self.ram.index.get(node.key) is node for node in held), "what is pinned stays"
        assert self.ram.pool.used == len(self.ram.index) + self.ram.detached


TestAnySequenceOfCalls = _Machine.TestCase
