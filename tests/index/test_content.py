"""The content index beside a slow reference: every held chunk is found at every offset, and nothing else is."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkv.index.content import ContentIndex, chunk_fingerprints, root_seed, window_fingerprints

native: Any = importlib.import_module("lmkv._native")


@pytest.fixture(params=["compiled", "numpy"], autouse=True, scope="module")
def scanner(request: pytest.FixtureRequest) -> Iterator[str]:
    """With the compiled part, and as where there was no compiler."""
    if request.param == "compiled" and native.lib is None:
        pytest.skip("the compiled part was not built")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(native, "lib", None)
        yield str(request.param)


A, B = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95
TOKENS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 2**32 - 1)), min_size=1, max_size=60)


def slow(window: list[int], seed: int) -> int:
    """The formula by the letter."""
    width = len(window)
    return sum((t + 1) * A * B ** (width - 1 - j) for j, t in enumerate(window)) % 2**64 >> 4 ^ seed


@given(tokens=TOKENS, width=st.integers(1, 20), seed=st.integers(0, 2**60 - 1))
def test_windows_follow_the_formula(tokens: list[int], width: int, seed: int) -> None:
    ids = np.array(tokens, "<u4")
    wanted = [slow(tokens[i : i + width], seed) for i in range(len(tokens) - width + 1)]
    assert window_fingerprints(ids, width, seed).tolist() == wanted
    full = len(tokens) // width * width
    if full:
        assert chunk_fingerprints(ids[:full], width, seed).tolist() == wanted[:full:width]


@pytest.mark.parametrize("width", [1, 16, 256])
def test_long_texts(width: int) -> None:
    tokens = np.random.default_rng(3).integers(0, 2**32, 20000, dtype=np.uint32)
    windows = window_fingerprints(tokens, width, 7)
    assert len(windows) == 20000 - width + 1
    for i in (0, 1, 777, 4999, 5000, 9937, len(windows) - 1):
        assert int(windows[i]) == slow(tokens[i : i + width].tolist(), 7)


@pytest.mark.parametrize("n", [5, 20, 21, 22, 23, 24, 25, 39, 40])
def test_every_window_of_texts_that_are_cut_into_stretches(n: int) -> None:
    tokens = np.random.default_rng(n).integers(0, 2**32, n, dtype=np.uint32)
    for width in (1, 2, 4, 5):
        wanted = [slow(tokens[i : i + width].tolist(), 3) for i in range(n - width + 1)]
        assert window_fingerprints(tokens, width, 3).tolist() == wanted
        assert window_fingerprints(tokens[::-1][::-1], width, 3).tolist() == wanted
        assert window_fingerprints(tokens.astype(">u4"), width, 3).tolist() == wanted
        assert window_fingerprints(np.repeat(tokens, 2)[::2], width, 3).tolist() == wanted


def test_seeds_are_the_namespaces_own() -> None:
    assert root_seed(bytes(range(16))) == int.from_bytes(bytes(range(8)), "little") >> 4
    tokens = np.arange(8, dtype=np.uint32)
    assert chunk_fingerprints(tokens, 8, 1) != chunk_fingerprints(tokens, 8, 2)


@settings(max_examples=60)
@given(data=st.data(), width=st.sampled_from([1, 2, 4, 8]))
def test_finds_what_a_slow_search_finds(data: st.DataObject, width: int) -> None:
    chunk = st.lists(st.integers(0, 2), min_size=width, max_size=width)
    chunks = data.draw(st.lists(chunk, min_size=1, max_size=12))
    text = data.draw(st.lists(st.integers(0, 2), max_size=40))
    index = ContentIndex()
    prints = chunk_fingerprints(np.array(chunks, "<u4").reshape(-1), width, 5)
    index.add(prints, list(range(len(chunks))))
    index._check()
    gone = data.draw(st.sets(st.integers(0, len(chunks) - 1)))
    for value in gone:
        index.discard(int(prints[value]), value)
        index._check()
    index.discard(int(prints[0]), 999)  # never held: nothing happens
    assert len(index) == len(chunks) - len(gone)
    found = {offset: set(values) for offset, values in index.matches(window_fingerprints(np.array(text, "<u4"), width, 5))}
    wanted = {}
    for offset in range(len(text) - width + 1):
        values = {i for i, c in enumerate(chunks) if i not in gone and c == text[offset : offset + width]}
        if values:
            wanted[offset] = values
    assert found == wanted
    assert list(found) == sorted(found)


def test_grows_and_empties() -> None:
    index = ContentIndex()
    rng = np.random.default_rng(1)
    prints = rng.integers(0, 2**60, 5000, dtype=np.uint64)
    for i in range(0, 5000, 500):
        index.add(prints[i : i + 500], list(range(i, i + 500)))
        index._check()
    assert dict(index.matches(prints)) == {i: (i,) for i in range(5000)}
    for i, fingerprint in enumerate(prints.tolist()):
        index.discard(fingerprint, i)
    index._check()
    assert len(index) == 0
    assert list(index.matches(prints)) == []


def test_many_chunks_of_one_content() -> None:
    index = ContentIndex()
    prints = np.full(600, 42, np.uint64)
    index.add(prints, list(range(600)))
    index._check()
    assert [sorted(values) for _, values in index.matches(prints[:1])] == [list(range(600))]
    for value in range(599):
        index.discard(42, value)
    index._check()
    assert list(index.matches(prints[:1])) == [(0, (599,))]
    index.discard(42, 599)
    assert list(index.matches(prints[:1])) == []
    index._check()
