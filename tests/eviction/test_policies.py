from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Container, Iterator
from typing import ClassVar

import pytest

from lmkv.chunks import ChunkKey
from lmkv.eviction.base import EvictionPolicy
from lmkv.eviction.chain import ChainAware, ChainTable
from lmkv.eviction.fifo import FIFO
from lmkv.eviction.lfu import LFU
from lmkv.eviction.lru import LRU
from lmkv.eviction.mru import MRU
from lmkv.eviction.s3fifo import S3FIFO
from lmkv.testing.policy_suite import PolicySuite


def k(name: str) -> ChunkKey:
    return ChunkKey(name.encode().ljust(16, b"."))


def order(policy: EvictionPolicy) -> str:
    """Names of all keys, first to go first."""
    keys = policy.victims(len(policy), ())
    assert keys is not None
    return "".join(key.decode()[0] for key in keys)


def fill(policy: EvictionPolicy, inserted: str, touched: str = "") -> EvictionPolicy:
    for name in inserted:
        policy.insert(k(name))
    for name in touched:
        policy.touch(k(name))
    return policy


class TestLRU(PolicySuite):
    def make(self, capacity: int) -> EvictionPolicy:
        return LRU(capacity)

    def test_used_keys_go_last(self) -> None:
        assert order(fill(LRU(4), "abcd", "ca")) == "bdca"


class TestFIFO(PolicySuite):
    def make(self, capacity: int) -> EvictionPolicy:
        return FIFO(capacity)

    def test_uses_do_not_count(self) -> None:
        assert order(fill(FIFO(4), "abcd", "caab")) == "abcd"


class TestMRU(PolicySuite):
    def make(self, capacity: int) -> EvictionPolicy:
        return MRU(capacity)

    def test_used_keys_go_first(self) -> None:
        assert order(fill(MRU(4), "abcd", "ca")) == "acdb"

    def test_wants_texts_first_to_last(self) -> None:
        assert MRU.newest_first
        assert not LRU.newest_first

    def test_deferred_keys_go_last(self) -> None:
        policy = MRU(4)
        fill(policy, "abcd")
        policy.defer(k("d"))
        assert order(policy) == "cbad"


class TestLFU(PolicySuite):
    def make(self, capacity: int) -> EvictionPolicy:
        return LFU(capacity)

    def test_fewest_uses_go_first_and_ties_to_the_least_recently_used(self) -> None:
        assert order(fill(LFU(5), "abcde", "cacab")) == "debca"

    def test_uses_before_a_new_admission_do_not_count(self) -> None:
        policy = fill(LFU(3), "ab", "aab")
        policy.remove(k("a"))
        policy.insert(k("a"))
        assert order(policy) == "ab"

    def test_deferring_doubles_the_uses(self) -> None:
        policy = LFU(4)
        fill(policy, "abcd", "abb")
        policy.defer(k("a"))  # 2 -> 4 uses: behind b with 3
        policy.defer(k("c"))  # 1 -> 2 uses
        assert order(policy) == "dcba"


class TestS3FIFO(PolicySuite):
    def make(self, capacity: int) -> EvictionPolicy:
        return S3FIFO(capacity)

    def test_newcomers_go_first_and_used_ones_move_to_the_main_queue(self) -> None:
        policy = fill(S3FIFO(10), "abcd", "b")
        assert policy.victims(2, ()) == [k("a"), k("c")]  # b moved on; a and c leave the small queue of one
        policy.insert(k("e"))
        assert order(policy) == "acdbe"  # the small queue gives down to one key, then the main one, then the rest

    def test_a_key_that_left_too_early_comes_back_into_the_main_queue(self) -> None:
        policy = fill(S3FIFO(10), "abcd")
        policy.remove(k("a"))
        policy.insert(k("a"))
        policy._check()
        assert order(policy) == "bcad"

    def test_the_ghost_queue_is_as_long_as_the_main_queue(self) -> None:
        policy = S3FIFO(4)  # one small, three main
        for name in "abcd":
            policy.insert(k(name))
            policy.remove(k(name))
        fill(policy, "xyab")  # a was pushed out of the ghost queue by d, b was not
        assert order(policy) == "xyba"

    def test_a_key_in_the_main_queue_has_one_more_round_for_each_use_up_to_three(self) -> None:
        policy = S3FIFO(10)
        fill(policy, "abc", "abc")
        assert order(policy) == "abc"  # all moved on to the main queue, with no uses left
        fill(policy, "", "aaaaab")
        assert order(policy) == "cba"

    def test_the_small_queue_gives_for_each_deferred_key_of_the_main_queue(self) -> None:
        policy = S3FIFO(40)
        fill(policy, "abcde", "ab")
        assert order(policy) == "abcde"  # asking moved a and b to the main queue, the only one that gives as long as it has any
        assert policy.victims(1, ()) == [k("a")]  # the small queue may hold four, so the main one gives
        policy.defer(k("a"))
        assert policy.victims(2, ()) == [k("c"), k("b")]
        policy.remove(k("c"))
        assert policy.victims(2, ()) == [k("b"), k("a")]
        policy.defer(k("d"))
        assert policy.victims(3, ()) == [k("b"), k("a"), k("d")]


class Sampling:
    """A policy as a third party might write it, without :class:`Deferring`: asks about many keys, takes few of them."""

    newest_first: ClassVar[bool] = False

    def __init__(self) -> None:
        self._rank: dict[ChunkKey, float] = {}
        self._random = random.Random(5)

    def insert(self, key: ChunkKey) -> None:
        self._rank[key] = self._random.random()

    touch = insert

    def remove(self, key: ChunkKey) -> None:
        del self._rank[key]

    def victims(self, n: int, pinned: Container[ChunkKey]) -> list[ChunkKey] | None:
        free = [key for key in self._rank if key not in pinned]
        return heapq.nsmallest(n, free, key=self._rank.__getitem__) if len(free) >= n else None

    def __len__(self) -> int:
        return len(self._rank)

    def __contains__(self, key: object) -> bool:
        return key in self._rank

    def __iter__(self) -> Iterator[ChunkKey]:
        return iter(self._rank)

    def _check(self) -> None:
        assert all(0 <= rank < 1 for rank in self._rank.values())


class TestThirdParty(PolicySuite):
    def make(self, capacity: int) -> EvictionPolicy:
        return Sampling()


class TestChainAwareIsAPolicy(PolicySuite):
    def make(self, capacity: int) -> EvictionPolicy:
        return ChainAware(LRU(capacity), ChainTable())


class Broken(LRU):
    """Breaks one promise at a time."""

    def __init__(self, capacity: int, fault: str) -> None:
        super().__init__(capacity)
        self._fault = fault

    def victims(self, n: int, pinned: Container[ChunkKey]) -> list[ChunkKey] | None:
        if self._fault == "pinned":
            return super().victims(n, ())
        if self._fault == "partial":
            return [key for key in self._order if key not in pinned][:n]
        chosen = super().victims(n, pinned)
        if self._fault == "forgets":
            for key in chosen or ():
                self.remove(key)
        return chosen


class BrokenSuite(PolicySuite):
    examples: ClassVar[int] = 30
    fault = ""

    def make(self, capacity: int) -> EvictionPolicy:
        return Broken(capacity, self.fault)


@pytest.mark.parametrize(
    ("fault", "test"),
    [
        ("pinned", PolicySuite.test_pinned_keys_stay),
        ("pinned", PolicySuite.test_parents_go_last_under_chain_aware_eviction),
        ("partial", PolicySuite.test_victims_are_all_or_none),
        ("forgets", PolicySuite.test_forgets_nothing_by_itself),
        ("forgets", PolicySuite.test_any_sequence_of_calls),
        ("pinned", PolicySuite.test_any_sequence_of_calls_under_chain_aware_eviction),
    ],
)
def test_the_suite_finds_a_broken_promise(fault: str, test: Callable[[PolicySuite], None]) -> None:
    suite = BrokenSuite()
    suite.fault = fault
    with pytest.raises((AssertionError, KeyError)):
        test(suite)


def test_a_suite_without_a_policy_says_what_to_define() -> None:
    with pytest.raises(NotImplementedError, match=r"make\(self, capacity\)"):
        PolicySuite().test_empty()
