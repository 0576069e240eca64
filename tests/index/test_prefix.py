"""The prefix index beside a slow reference: chains, siblings that share beginnings, place-holders."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import lmkv
from lmkv.chunks import ChunkKey
from lmkv.errors import ArgumentError
from lmkv.index import Node, PrefixIndex
from lmkv.testing._chunks import Chunk, best_shared, covered, siblings_of, text_chunks

LAYOUT = lmkv.KVLayout.dense(layers=1, heads=1, head_size=4, dtype="float32", chunk_tokens=8)


def insert(index: PrefixIndex, chunk: Chunk, slot: int) -> Node:
    return index.insert(chunk.key, chunk.parent, chunk.tokens, slot)


def walk(index: PrefixIndex, chunks: list[Chunk], begin: int = 0) -> list[ChunkKey]:
    return [node.key for node in index.walk([c.key for c in chunks], [c.tokens for c in chunks], begin)]


def test_walks_to_the_first_gap() -> None:
    index = PrefixIndex()
    chunks = text_chunks(LAYOUT, range(45))
    assert walk(index, chunks) == []
    for i in (0, 1, 3, 4, 5):
        insert(index, chunks[i], i)
    assert walk(index, chunks) == [chunks[0].key, chunks[1].key]
    assert walk(index, chunks, begin=3) == [c.key for c in chunks[3:]]
    assert walk(index, chunks, begin=2) == []
    insert(index, chunks[2], 2)
    assert walk(index, chunks) == [c.key for c in chunks]
    assert [node.slot for node in index.chain(index.walk([c.key for c in chunks], [c.tokens for c in chunks])[-1])] == list(
        range(6)
    )
    index._check()


def test_a_hit_is_proved_by_its_tokens() -> None:
    index = PrefixIndex()
    first, second = text_chunks(LAYOUT, range(16))
    insert(index, first, 0)
    assert index.walk([first.key, second.key], [second.tokens, second.tokens]) == []


def test_children_that_come_before_their_parent() -> None:
    index = PrefixIndex()
    chunks = text_chunks(LAYOUT, range(24))
    for i in (2, 1, 0):
        insert(index, chunks[i], i)
        index._check()
    assert index.parent_of(chunks[2].key) == chunks[1].key
    assert index.parent_of(chunks[0].key) is None
    assert [index.children_count(c.key) for c in chunks] == [1, 1, 0]
    middle = index.get(chunks[1].key)
    assert middle is not None
    index.remove(middle)
    index._check()
    assert index.get(chunks[1].key) is None
    assert index.parent_of(chunks[2].key) is None
    assert [index.children_count(c.key) for c in chunks] == [0, 1, 0]
    insert(index, chunks[1], 9)
    assert walk(index, chunks) == [c.key for c in chunks]
    for chunk in chunks:
        node = index.get(chunk.key)
        assert node is not None
        index.remove(node)
        index._check()
    assert (len(index), len(index._nodes)) == (0, 0)


def test_refusals() -> None:
    index = PrefixIndex()
    (chunk,) = text_chunks(LAYOUT, range(8))
    node = insert(index, chunk, 0)
    with pytest.raises(ArgumentError, match="not held"):
        insert(index, chunk, 1)
    other = text_chunks(LAYOUT, range(7))[0]
    for tokens, slot in ((b"", 1), (other.tokens, -1)):
        with pytest.raises(ArgumentError, match="tokens and a slot"):
            index.insert(other.key, other.parent, tokens, slot)
    index.remove(node)
    with pytest.raises(ArgumentError, match="held"):
        index.remove(node)
    index._check()


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32), width=st.sampled_from([1, 2, 8, 256]), count=st.integers(0, 12))
def test_siblings_equal_a_slow_reference(seed: int, width: int, count: int) -> None:
    layout = lmkv.KVLayout.dense(layers=1, heads=1, head_size=1, dtype="int8", chunk_tokens=width)
    rng = random.Random(seed)

    def piece(base: list[int]) -> list[int]:
        cut = rng.randint(0, len(base))
        return (base[:cut] + [rng.choice((0, 1, 2**32 - 1)) for _ in range(width - cut)])[
            : rng.choice((width, rng.randint(1, width)))
        ]

    pieces = [piece([])]
    pieces += [piece(rng.choice(pieces)) for _ in range(count)]
    chunks = siblings_of(layout, pieces, "")
    index = PrefixIndex()
    for slot, chunk in enumerate(chunks):
        insert(index, chunk, slot)
    for chunk in chunks[: rng.randint(0, 3)]:
        node = index.get(chunk.key)
        assert node is not None
        index.remove(node)
        chunks = [c for c in chunks if c is not chunk]
    index._check()
    parent = text_chunks(layout, [0])[0].parent
    asked = [chunk.tokens for chunk in siblings_of(layout, pieces + [piece(rng.choice(pieces)) for _ in range(6)], "")]
    for tokens in asked:
        found = index.best_child(parent, tokens)
        assert (found[1] if found else 0) == best_shared(chunks, parent, tokens)
        assert {node.key for node in index.covered_siblings(parent, tokens)} == covered(chunks, parent, tokens)
    assert index.best_child(parent, b"") is None
    assert index.best_child(ChunkKey(bytes(16)), asked[0]) is None


def _universe() -> list[Chunk]:
    base = list(range(30))
    texts = [base, base[:3], base[:5], [*base[:12], 7], [*base[:16], 9, 9, 9], [1], [1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 2]]
    return list({chunk.key: chunk for text in texts for chunk in text_chunks(LAYOUT, text)}.values())


CHUNKS = _universe()


class _Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.held: dict[ChunkKey, tuple[Chunk, int]] = {}

    @rule(chunk=st.sampled_from(CHUNKS), slot=st.integers(0, 999))
    def insert(self, chunk: Chunk, slot: int) -> None:
        if chunk.key not in self.held:
            insert(self.index, chunk, slot)
            self.held[chunk.key] = (chunk, slot)

    @rule(chunk=st.sampled_from(CHUNKS))
    def remove(self, chunk: Chunk) -> None:
        node = self.index.get(chunk.key)
        assert (node is not None) == (chunk.key in self.held)
        if node is not None:
            self.index.remove(node)
            del self.held[chunk.key]

    @invariant()
    def holds_what_it_was_given(self) -> None:
        self.index._check()
        assert {node.key: node.slot for node in self.index} == {key: slot for key, (_, slot) in self.held.items()}
        held = [chunk for chunk, _ in self.held.values()]
        for chunk in CHUNKS:
            children = [other for other in held if other.parent == chunk.key]
            assert self.index.children_count(chunk.key) == len(children)
            wanted = chunk.parent if chunk.key in self.held and chunk.parent in self.held else None
            assert self.index.parent_of(chunk.key) == wanted
            found: Any = self.index.best_child(chunk.parent, chunk.tokens)
            assert (found[1] if found else 0) == best_shared(held, chunk.parent, chunk.tokens)


TestAnySequenceOfCalls = _Machine.TestCase
