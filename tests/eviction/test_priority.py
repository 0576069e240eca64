"""Priorities around policies: lower ones first, the policy's order within one, children always before what they extend."""

from __future__ import annotations

import random

import pytest

from lmkv.chunks import ChunkKey
from lmkv.eviction import make_policy
from lmkv.eviction.base import EvictionPolicy
from lmkv.eviction.chain import ChainTable
from lmkv.eviction.lru import LRU
from lmkv.eviction.priority import ByPriority
from lmkv.testing.policy_suite import PolicySuite


def key(name: str) -> ChunkKey:
    return ChunkKey(name.encode().ljust(16, b"."))


def level(of: ChunkKey) -> int:
    """What the key's first digit says, or 0."""
    digits = [byte for byte in of if 48 <= byte <= 57]
    return digits[0] - 48 if digits else 0


def names(keys: list[ChunkKey] | None) -> str:
    assert keys is not None
    return " ".join(one.decode().rstrip(".") for one in keys)


class TestLevelsOfLRU(PolicySuite):
    def make(self, capacity: int) -> EvictionPolicy:
        return ByPriority(lambda: make_policy("lru", capacity), lambda of: sum(of) % 3)


class TestLevelsOfS3FIFO(PolicySuite):
    def make(self, capacity: int) -> EvictionPolicy:
        return ByPriority(lambda: make_policy("s3fifo", capacity), lambda of: sum(of) % 2 * 7)


class TestOneLevelOfLFU(PolicySuite):
    def make(self, capacity: int) -> EvictionPolicy:
        return ByPriority(lambda: make_policy("lfu", capacity), lambda of: 0)


def test_lower_ones_first_and_the_policy_within_one() -> None:
    policy = ByPriority(lambda: LRU(8), level)
    for name in ("a2", "b", "c1", "d2", "e", "f1"):
        policy.insert(key(name))
    policy.touch(key("b"))
    policy.touch(key("a2"))
    assert names(policy.victims(6, ())) == "e b c1 f1 d2 a2"
    assert names(policy.victims(3, {key("e"), key("c1")})) == "b f1 d2"
    assert policy.victims(5, {key("e"), key("c1")}) is None
    policy.remove(key("a2"))
    policy.remove(key("b"))
    assert names(policy.victims(4, ())) == "e c1 f1 d2"
    policy._check()


def test_a_parent_stays_with_what_extends_it_whatever_its_priority() -> None:
    links = ChainTable()
    policy = ByPriority(lambda: LRU(8), level, links)
    for name, parent in (("a", None), ("b5", "a"), ("c", None), ("d", "c"), ("e3", None), ("f", "e3")):
        policy.insert(key(name))
        links.add(key(name), key(parent) if parent else None)
    assert sorted(names(policy.victims(3, ())).split()) == ["c", "d", "f"]
    assert names(policy.victims(4, ())).endswith(" e3")
    assert names(policy.victims(6, ())).endswith(" e3 b5 a")
    assert policy.victims(6, {key("b5")}) is None
    assert sorted(names(policy.victims(4, {key("b5")})).split()) == ["c", "d", "e3", "f"]
    policy._check()


@pytest.mark.parametrize("name", ["lru", "fifo", "lfu", "mru", "s3fifo"])
def test_chains_of_several_priorities(name: str) -> None:
    """Beside a table of what may go: as many as wanted if there are so many, children first, and the lowest first."""
    rng = random.Random(len(name))
    for _ in range(60):
        links = ChainTable()
        levels: dict[ChunkKey, int] = {}
        parents: dict[ChunkKey, ChunkKey | None] = {}
        policy = ByPriority(lambda: make_policy(name, 40), levels.__getitem__, links)
        for number in range(40):
            one = ChunkKey(bytes([number]) * 16)
            parents[one] = rng.choice([None, *parents]) if rng.random() < 0.8 else None
            levels[one] = rng.choice([0, 0, 0, 1, 2])
            policy.insert(one)
            links.add(one, parents[one])
            policy.touch(rng.choice(list(parents)))
        while parents:
            pinned = set(rng.sample(sorted(parents), min(len(parents), rng.randrange(4))))
            kept = set(pinned)
            for one in pinned:
                above = parents[one]
                while above is not None and above in parents:
                    kept.add(above)
                    above = parents[above]
            free = parents.keys() - kept
            wanted = rng.randrange(1, 9)
            victims = policy.victims(wanted, pinned)
            if wanted > len(free):
                assert victims is None
                wanted, victims = len(free), policy.victims(len(free), pinned) if free else []
            assert victims is not None
            assert len(set(victims)) == wanted
            assert free.issuperset(victims)
            extended = {parents[one] for one in parents}
            if victims:
                lowest = min(levels[one] for one in free if one not in extended)
                assert levels[victims[0]] == lowest, "the first is one of the lowest that may go at once"
            for victim in victims:
                assert victim not in {parents[one] for one in parents}, "what extends it goes first"
                policy.remove(victim)
                links.discard(victim)
                del parents[victim]
            policy._check()
            if not victims:
                break


@pytest.mark.parametrize("name", ["lru", "fifo", "lfu", "mru", "s3fifo"])
def test_none_goes_while_one_of_a_lower_priority_may(name: str) -> None:
    rng = random.Random(3)
    policy = ByPriority(lambda: make_policy(name, 64), lambda of: of[0] % 4)
    held: set[ChunkKey] = set()
    for _ in range(3000):
        one = ChunkKey(bytes([rng.randrange(120)]) * 16)
        if one in held:
            policy.touch(one)
            continue
        if len(held) == 64:
            pinned = set(rng.sample(sorted(held), 20))
            wanted = rng.randrange(1, 12)
            victims = policy.victims(wanted, pinned)
            assert victims is not None
            assert len(set(victims)) == wanted
            most = max(victim[0] % 4 for victim in victims)
            assert not any(other[0] % 4 < most for other in held - pinned - set(victims))
            for victim in victims:
                policy.remove(victim)
                held.discard(victim)
        policy.insert(one)
        held.add(one)
        policy._check()
    assert set(policy) == held
