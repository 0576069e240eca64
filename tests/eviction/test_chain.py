from __future__ import annotations

import random
from collections.abc import Container, Iterator
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmkv.chunks import ChunkKey
from lmkv.eviction import make_policy
from lmkv.eviction.base import EvictionPolicy
from lmkv.eviction.chain import ChainAware, ChainTable, Deferring

POLICIES = ["lru", "lfu", "fifo", "mru", "s3fifo"]


def k(i: int) -> ChunkKey:
    return ChunkKey(i.to_bytes(16, "big"))


class CountingTable(ChainTable):
    """Counts how often anybody asks for a number of children."""

    __slots__ = ("asked",)

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def children_count(self, key: ChunkKey) -> int:
        self.asked += 1
        return super().children_count(key)


class Plain:
    """The built-in order of a policy without its ``defer``: what a third party gives that knows the contract only."""

    newest_first: ClassVar[bool] = False

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy

    def insert(self, key: ChunkKey) -> None:
        self._policy.insert(key)

    def touch(self, key: ChunkKey) -> None:
        self._policy.touch(key)

    def remove(self, key: ChunkKey) -> None:
        self._policy.remove(key)

    def victims(self, n: int, pinned: Container[ChunkKey]) -> list[ChunkKey] | None:
        return self._policy.victims(n, pinned)

    def __len__(self) -> int:
        return len(self._policy)

    def __contains__(self, key: object) -> bool:
        return key in self._policy

    def __iter__(self) -> Iterator[ChunkKey]:
        return iter(self._policy)

    def _check(self) -> None:
        self._policy._check()


def chain_of(policy: EvictionPolicy, links: ChainTable, parents: dict[int, int | None]) -> ChainAware:
    """All keys inserted in the order of the mapping."""
    aware = ChainAware(policy, links)
    for key, parent in parents.items():
        links.add(k(key), None if parent is None else k(parent))
        aware.insert(k(key))
    return aware


def evict(policy: ChainAware, links: ChainTable, n: int) -> list[ChunkKey]:
    chosen = policy.victims(n, ())
    assert chosen is not None
    for key in chosen:
        assert links.children_count(key) == 0, "evicted before a chunk that extends it"
        policy.remove(key)
        links.discard(key)
    return chosen


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("deferring", [True, False])
def test_a_parent_goes_after_its_children_and_in_the_same_call(name: str, deferring: bool) -> None:
    links = ChainTable()
    inner = make_policy(name, 8)
    policy = chain_of(inner if deferring else Plain(inner), links, {0: None, 1: 0, 2: 1, 3: 1, 4: 0})
    chosen = policy.victims(5, ())
    assert chosen is not None
    place = {key: i for i, key in enumerate(chosen)}
    assert place.keys() == {k(i) for i in range(5)}
    assert place[k(2)] < place[k(1)] < place[k(0)]
    assert place[k(3)] < place[k(1)]
    assert place[k(4)] < place[k(0)]


@pytest.mark.parametrize("name", POLICIES)
def test_a_lease_on_a_chunk_holds_all_that_it_extends(name: str) -> None:
    links = ChainTable()
    policy = chain_of(make_policy(name, 8), links, {0: None, 1: 0, 2: 1, 3: 2, 9: 1})
    leased = {k(2)}
    assert policy.victims(3, leased) is None
    chosen = policy.victims(2, leased)
    assert chosen is not None
    assert sorted(chosen) == [k(3), k(9)]
    policy._check()
    assert len(policy) == 5


@pytest.mark.parametrize("name", POLICIES)
def test_old_parents_in_front_are_passed_over_once_not_for_every_victim(name: str) -> None:
    n = 2000
    links = CountingTable()
    ends = [(i, None) for i in range(n)] + [(n + i, i) for i in range(n)]
    if make_policy(name, 1).newest_first:
        ends.reverse()
    policy = chain_of(make_policy(name, 2 * n), links, dict(ends))
    for i in range(n):
        policy.touch(k(n + i))  # children rank behind parents for every policy but FIFO, where they do anyway
    for _ in range(2 * n):
        evict(policy, links, 1)
    assert len(policy) == 0
    assert links.asked < 20 * n, f"{links.asked} questions for {2 * n} victims; about {n * n} would mean a new search for each"


@pytest.mark.parametrize("name", POLICIES)
def test_a_long_chain_in_the_wrong_order_is_sorted_once(name: str) -> None:
    n = 2000
    links = CountingTable()
    order = {i: i - 1 if i else None for i in range(n)}
    policy = chain_of(make_policy(name, n), links, dict(reversed(order.items())) if name == "mru" else order)
    gone = [key for _ in range(n // 10) for key in evict(policy, links, 10)]
    assert gone == [k(i) for i in reversed(range(n))]
    assert links.asked < 30 * n


def test_pinned_keys_are_not_deferred() -> None:
    deferred: list[ChunkKey] = []

    class Recording(Plain):
        def defer(self, key: ChunkKey) -> None:
            deferred.append(key)

    links = ChainTable()
    policy = chain_of(Recording(make_policy("fifo", 8)), links, {0: None, 1: 0, 2: 1, 3: None})
    assert isinstance(policy._policy, Deferring)
    assert policy.victims(1, {k(0), k(2)}) == [k(3)]
    assert deferred == [k(1)]


def test_parents_that_became_free_in_the_call_keep_their_place() -> None:
    links = ChainTable()
    policy = chain_of(make_policy("fifo", 8), links, {0: None, 1: 0, 2: None, 3: None})
    assert evict(policy, links, 1) == [k(1)]  # 0 stood in front, had to wait for 1, and is next
    assert evict(policy, links, 1) == [k(0)]


def test_it_wants_texts_in_its_policys_order() -> None:
    assert ChainAware(make_policy("mru", 4), ChainTable()).newest_first
    assert not ChainAware(make_policy("lru", 4), ChainTable()).newest_first


@pytest.mark.parametrize("name", POLICIES)
def test_no_chunk_is_ever_left_without_its_parent(name: str) -> None:
    """Requests along a random tree, at a capacity that evicts all the time."""
    rng = random.Random(7)
    links = ChainTable()
    inner = make_policy(name, 60)
    policy = ChainAware(inner, links)
    for _ in range(1500):
        text = [rng.randrange(3)]
        while len(text) < rng.randint(1, 9):
            text.append(text[-1] * 4 + 3 + rng.randrange(4 if rng.random() < 0.2 else 2))
        keys = [k(i) for i in text]
        order = keys if policy.newest_first else keys[::-1]
        for key in order:
            if key in policy:
                policy.touch(key)
        missing = [key for key in order if key not in policy]
        victims = policy.victims(max(0, len(policy) + len(missing) - 60), set(keys))
        assert victims is not None
        for key in victims:
            policy.remove(key)
            links.discard(key)
        for key in missing:
            i = keys.index(key)
            policy.insert(key)
            links.add(key, keys[i - 1] if i else None)
        assert len(policy) <= 60
        for key in policy:
            i = int.from_bytes(key, "big")
            assert i < 3 or k((i - 3) // 4) in policy, f"{i} is held without the chunk it extends"
    policy._check()
    links._check()


def test_table_counts_links_between_held_chunks() -> None:
    table = ChainTable()
    table.add(k(2), k(1))
    assert table.parent_of(k(2)) is None  # not there yet
    assert table.children_count(k(1)) == 1
    table.add(k(1), None)
    table.add(k(1), None)
    assert table.parent_of(k(2)) == k(1)
    assert table.parent_of(k(1)) is None
    table.add(k(3), k(1))
    assert table.children_count(k(1)) == 2
    table.discard(k(1))  # before its children
    assert table.parent_of(k(2)) is None
    table.add(k(1), None)
    assert table.parent_of(k(3)) == k(1)
    table.discard(k(2))
    table.discard(k(2))
    table.discard(k(3))
    assert table.children_count(k(1)) == 0
    assert k(1) in table
    assert len(table) == 1
    table._check()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 11)), max_size=60))
def test_table_agrees_with_a_list_of_links(steps: list[tuple[bool, int]]) -> None:
    parents = [None, 0, 1, 1, 0, 4, None, 6, 7, 7, 7, 10]
    table, held = ChainTable(), set()
    for add, i in steps:
        if add:
            parent = parents[i]
            table.add(k(i), None if parent is None else k(parent))
            held.add(i)
        else:
            table.discard(k(i))
            held.discard(i)
        table._check()
        assert len(table) == len(held)
        for j, parent in enumerate(parents):
            assert (k(j) in table) == (j in held)
            assert table.children_count(k(j)) == sum(parents[child] == j for child in held)
            if j in held:
                assert table.parent_of(k(j)) == (k(parent) if parent is not None and parent in held else None)
