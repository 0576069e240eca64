"""Counting what a remote tier holds: exact, whatever is missing, and in few questions."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from lmkv.chunks import ChunkKey
from lmkv.tiers.probing import BATCH, count_leading

KEYS = [ChunkKey(i.to_bytes(16, "big")) for i in range(5000)]


class Asked:
    """Holds some keys and notes what it is asked."""

    def __init__(self, missing: set[ChunkKey]) -> None:
        self._missing = missing
        self.sizes: list[int] = []

    def __call__(self, keys: Sequence[ChunkKey]) -> list[bool]:
        self.sizes.append(len(keys))
        return [key not in self._missing for key in keys]


@given(st.integers(0, 5000), st.sets(st.integers(0, 4999), max_size=4))
def test_it_is_the_place_of_the_first_gap(length: int, gaps: set[int]) -> None:
    asked = Asked({KEYS[gap] for gap in gaps})
    assert count_leading(asked, KEYS[:length]) == min([gap for gap in gaps if gap < length], default=length)
    assert all(size <= BATCH for size in asked.sizes)


def test_up_to_a_batch_is_one_question() -> None:
    for missing in (set(), {KEYS[0]}, {KEYS[300]}):
        asked = Asked(missing)
        count_leading(asked, KEYS[:BATCH])
        assert asked.sizes == [BATCH]


def test_of_a_long_prompt_that_nobody_knows_few_keys_are_asked() -> None:
    asked = Asked(set(KEYS))
    assert count_leading(asked, KEYS) == 0
    assert sum(asked.sizes) <= 64


def test_behind_a_gap_little_is_asked() -> None:
    asked = Asked(set(KEYS[700:]))
    assert count_leading(asked, KEYS) == 700
    assert sum(asked.sizes) <= 64 + 700 + 5000 // 64 + 1


def test_no_keys_are_no_question() -> None:
    asked = Asked(set())
    assert count_leading(asked, []) == 0
    assert asked.sizes == []


@given(st.integers(0, 3000), st.sets(st.integers(0, 2999), max_size=4), st.integers(1, 64))
def test_where_each_key_costs_a_request_few_are_asked_behind_a_gap(length: int, gaps: set[int], at_once: int) -> None:
    asked = Asked({KEYS[gap] for gap in gaps})
    found = count_leading(asked, KEYS[:length], at_once)
    assert found == min([gap for gap in gaps if gap < length], default=length)
    assert sum(asked.sizes) <= 3 * found + 2 * at_once
