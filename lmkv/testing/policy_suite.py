"""The contract of eviction policies as tests (needs pytest and hypothesis).

A policy's author inherits it, says how to make one, and adds only what is special about the policy::

    from lmkv.testing.policy_suite import PolicySuite

    class TestMine(PolicySuite):
        def make(self, capacity):
            return MyPolicy(capacity)

It checks what :class:`lmkv.eviction.base.EvictionPolicy` promises, alone and under chain-aware eviction, and calls the
policy's ``_check`` after each step.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Container, Iterable
from typing import ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from ..chunks import ChunkKey
from ..eviction.base import EvictionPolicy
from ..eviction.chain import ChainAware, ChainTable, Deferring

__all__ = ["PolicySuite"]

_UNIVERSE = 24


def _key(i: int) -> ChunkKey:
    return ChunkKey(i.to_bytes(16, "little"))


#: The keys of the random tests and what each extends: three texts with branches, up to 12 chunks deep.
_KEYS = [_key(i) for i in range(_UNIVERSE)]
_PARENTS = {_key(i): None if i % 8 == 0 else _key(i // 2 if i % 5 == 0 else i - 1) for i in range(_UNIVERSE)}


class _Asked:
    """A container that can only be asked, and only about held keys."""

    def __init__(self, pinned: Iterable[ChunkKey], held: Iterable[ChunkKey]) -> None:
        self._pinned = frozenset(pinned)
        self._held = frozenset(held)

    def __contains__(self, key: object) -> bool:
        assert isinstance(key, bytes), f"pinned was asked about {key!r}, which is no key"
        assert key in self._held, f"pinned was asked about {key!r}, which is not held"
        return key in self._pinned


class _Machine(RuleBasedStateMachine):
    """Any sequence of calls that a tier may make, beside a set of what must be held.

    Args:
        make: a new policy.
        chained: put chain-aware eviction around it, with the links of ``_PARENTS``.
    """

    def __init__(self, make: Callable[[int], EvictionPolicy], chained: bool) -> None:
        super().__init__()
        inner = make(_UNIVERSE // 2)
        self.links = ChainTable()
        self.policy: EvictionPolicy = ChainAware(inner, self.links) if chained else inner
        self.chained = chained
        self.held: set[ChunkKey] = set()

    def children(self, key: ChunkKey) -> list[ChunkKey]:
        return [child for child in self.held if _PARENTS[child] == key] if self.chained else []

    def may_go(self, key: ChunkKey, pinned: Container[ChunkKey]) -> bool:
        return key not in pinned and all(self.may_go(child, pinned) for child in self.children(key))

    def use(self, key: ChunkKey) -> None:
        if key in self.held:
            self.policy.touch(key)
            return
        self.held.add(key)
        self.links.add(key, _PARENTS[key])
        self.policy.insert(key)

    def forget(self, key: ChunkKey) -> None:
        self.policy.remove(key)
        self.links.discard(key)
        self.held.remove(key)

    def ask(self, n: int, pinned: set[ChunkKey]) -> list[ChunkKey]:
        """``victims`` with its answer checked; no answer is an empty list."""
        free = {key for key in self.held if self.may_go(key, pinned)}
        answer = self.policy.victims(n, _Asked(pinned, self.held))
        if n > len(free):
            assert answer is None, f"expected None for {n} victims where {len(free)} may go; got {answer}"
            return []
        assert answer is not None, f"expected {n} victims where {len(free)} may go; got None"
        assert len(answer) == n, f"expected {n} victims; got {len(answer)}"
        assert len(set(answer)) == n, f"expected different victims; got {answer}"
        assert free.issuperset(answer), f"expected victims that are held and not pinned; got {set(answer) - free} too"
        for i, key in enumerate(answer):
            late = set(self.children(key)) - set(answer[:i])
            assert not late, f"expected {key!r} after all that extend it; got it before {late}"
        return answer

    @initialize(keys=st.lists(st.sampled_from(_KEYS), max_size=2 * _UNIVERSE))
    def fill(self, keys: list[ChunkKey]) -> None:
        for key in keys:
            self.use(key)

    @rule(keys=st.lists(st.sampled_from(_KEYS), min_size=1, max_size=8))
    def request(self, keys: list[ChunkKey]) -> None:
        for key in keys:
            self.use(key)

    @rule(key=st.sampled_from(_KEYS))
    def delete(self, key: ChunkKey) -> None:
        if key in self.held:
            self.forget(key)

    @rule(key=st.sampled_from(_KEYS))
    def defer(self, key: ChunkKey) -> None:
        if key in self.held and isinstance(self.policy, Deferring):
            self.policy.defer(key)

    @rule(n=st.integers(0, _UNIVERSE), pinned=st.sets(st.sampled_from(_KEYS), max_size=6))
    def ask_only(self, n: int, pinned: set[ChunkKey]) -> None:
        self.ask(n, pinned)

    @rule(n=st.integers(0, 6), pinned=st.sets(st.sampled_from(_KEYS), max_size=6))
    def evict(self, n: int, pinned: set[ChunkKey]) -> None:
        for key in self.ask(n, pinned):
            self.forget(key)

    @rule(pinned=st.sets(st.sampled_from(_KEYS), max_size=6))
    def evict_all(self, pinned: set[ChunkKey]) -> None:
        for key in self.ask(sum(self.may_go(key, pinned) for key in self.held), pinned):
            self.forget(key)

    @invariant()
    def holds_what_it_was_given(self) -> None:
        self.policy._check()
        self.links._check()
        assert len(self.policy) == len(self.held), f"expected {len(self.held)} keys; got {len(self.policy)}"
        listed = list(self.policy)
        assert sorted(listed) == sorted(self.held), f"expected to list {self.held}; got {listed}"
        for key in _KEYS:
            assert (key in self.policy) == (key in self.held), f"wrong answer whether {key!r} is held"


class PolicySuite:
    """Inherit, define :meth:`make`, and name the class ``Test…``."""

    #: How many random sequences of calls are tried, and how long one is.
    examples: ClassVar[int] = 100
    steps: ClassVar[int] = 30

    def make(self, capacity: int) -> EvictionPolicy:
        """A new, empty policy of a tier that holds ``capacity`` chunks."""
        raise NotImplementedError(f"{type(self).__name__}: define make(self, capacity) so that it returns a new policy")

    def _filled(self, count: int, capacity: int = 0) -> EvictionPolicy:
        policy = self.make(capacity or count)
        for i in range(count):
            policy.insert(_key(i))
        return policy

    def test_is_a_policy(self) -> None:
        policy = self.make(4)
        assert isinstance(policy, EvictionPolicy), f"{type(policy).__name__} lacks a part of EvictionPolicy"
        assert isinstance(policy.newest_first, bool), "newest_first must be True or False"

    def test_empty(self) -> None:
        policy = self.make(4)
        assert len(policy) == 0
        assert list(policy) == []
        assert _key(0) not in policy
        assert policy.victims(0, ()) == []
        assert policy.victims(1, ()) is None
        policy._check()

    def test_victims_are_all_or_none(self) -> None:
        policy = self._filled(8)
        assert policy.victims(9, ()) is None
        everything = policy.victims(8, ())
        assert everything is not None
        assert sorted(everything) == [_key(i) for i in range(8)]
        assert policy.victims(6, _Asked([_key(0), _key(4), _key(7)], policy)) is None
        policy._check()

    def test_pinned_keys_stay(self) -> None:
        policy = self._filled(8)
        for i in (1, 1, 2, 5, 6):
            policy.touch(_key(i))
        pinned = [_key(i) for i in (0, 1, 5, 7)]
        chosen = policy.victims(4, _Asked(pinned, policy))
        assert chosen is not None
        assert sorted(chosen) == [_key(i) for i in (2, 3, 4, 6)]
        policy._check()

    def test_forgets_nothing_by_itself(self) -> None:
        policy = self._filled(8)
        for n in (3, 8, 9, 1):
            policy.victims(n, ())
            policy._check()
            assert sorted(policy) == [_key(i) for i in range(8)]

    def test_removed_keys_are_gone_and_may_come_back(self) -> None:
        policy = self._filled(8)
        policy.touch(_key(3))
        policy.remove(_key(3))
        policy._check()
        assert _key(3) not in policy
        rest = policy.victims(7, ())
        assert rest is not None
        assert _key(3) not in rest
        policy.insert(_key(3))
        policy._check()
        assert _key(3) in policy
        assert len(policy) == 8

    def test_holds_more_keys_than_chunks_of_full_size_fit(self) -> None:
        policy = self._filled(32, capacity=4)  # short chunks are smaller: the tier decides what fits, not the policy
        policy._check()
        assert sorted(policy) == [_key(i) for i in range(32)]

    def test_capacity_costs_nothing_up_front(self) -> None:
        tracemalloc.start()
        try:
            policy = self.make(10**12)
            used = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert len(policy) == 0
        assert used < 2**20, f"an empty policy took {used} bytes: grow with the keys instead"

    def test_parents_go_last_under_chain_aware_eviction(self) -> None:
        links = ChainTable()
        inner = self.make(8)
        policy = ChainAware(inner, links)
        for i in range(8):  # parents first: the order in which a policy would rather evict them
            links.add(_key(i), _key(i - 1) if i else None)
            policy.insert(_key(i))
        assert policy.victims(3, ()) == [_key(7), _key(6), _key(5)]
        assert policy.victims(8, ()) == [_key(i) for i in reversed(range(8))]
        assert policy.victims(1, {_key(7)}) is None
        assert policy.victims(4, {_key(3)}) == [_key(i) for i in (7, 6, 5, 4)]
        assert len(policy) == 8
        policy._check()

    def _run(self, chained: bool) -> None:
        make = self.make

        class Machine(_Machine):
            def __init__(self) -> None:
                super().__init__(make, chained)

        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=self.examples,
                stateful_step_count=self.steps,
                deadline=None,
                report_multiple_bugs=False,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
            ),
        )

    def test_any_sequence_of_calls(self) -> None:
        self._run(chained=False)

    def test_any_sequence_of_calls_under_chain_aware_eviction(self) -> None:
        self._run(chained=True)
