"""The mirror of a bounded tier: catches up with every process, forgets what is gone, finds by content."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lmkv
from lmkv.backends import BackendSettings
from lmkv.backends.lmdb_disk import LmdbBackend
from lmkv.eviction import make_policy
from lmkv.index.content import root_seed, window_fingerprints
from lmkv.testing._chunks import Chunk, text_chunks
from lmkv.tiers.mirror import Mirror

LAYOUT = lmkv.KVLayout.dense(layers=1, heads=1, head_size=4, dtype="float32", chunk_tokens=8)


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[LmdbBackend]:
    opened = LmdbBackend(BackendSettings("disk", LAYOUT, 16 << 20, {"path": str(tmp_path)}))
    yield opened
    opened.close()


def write(backend: LmdbBackend, chunks: list[Chunk]) -> None:
    backend.write_many([chunk.key for chunk in chunks], [chunk.record(LAYOUT) for chunk in chunks])


def mirror(backend: LmdbBackend, chain_aware: bool = True, policy: str = "lru") -> Mirror:
    made = Mirror(backend, lambda: make_policy(policy, 100), chain_aware)
    made.sync()
    return made


def test_goes_by_last_use(backend: LmdbBackend) -> None:
    chunks = [text_chunks(LAYOUT, [i])[0] for i in range(5)]
    write(backend, chunks)
    m = mirror(backend)
    assert m.victims(2, ()) == [chunks[0].key, chunks[1].key]
    backend.touch_many([chunks[0].key])
    m.sync()
    assert m.victims(2, ()) == [chunks[1].key, chunks[2].key]
    assert m.victims(9, {chunks[3].key}) == [chunks[1].key, chunks[2].key, chunks[4].key, chunks[0].key][:4], (
        "as many as there are"
    )
    m._check()


def test_parents_go_last(backend: LmdbBackend) -> None:
    chunks = text_chunks(LAYOUT, range(24))
    write(backend, chunks)  # first to last: by use alone the first would go first
    assert mirror(backend).victims(3, ()) == [chunk.key for chunk in reversed(chunks)]
    assert mirror(backend).victims(1, {chunks[2].key}) == []
    assert mirror(backend, chain_aware=False).victims(3, ()) == [chunk.key for chunk in chunks]


def test_what_is_removed_is_gone(backend: LmdbBackend) -> None:
    chunks = text_chunks(LAYOUT, range(24))
    write(backend, chunks)
    m = mirror(backend)
    m.remove(chunks[2].key)
    m.remove(chunks[2].key)
    m._check()
    assert m.victims(1, ()) == [chunks[1].key]
    m.reset()
    m.sync()
    assert m.victims(1, ()) == [chunks[2].key], "it was only the mirror's view"


def test_finds_by_content(backend: LmdbBackend) -> None:
    chunks = text_chunks(LAYOUT, range(20))
    write(backend, chunks)
    m = mirror(backend)
    text = np.array([5, 5, *range(8, 16), 5], "<u4")
    found = list(m.content.matches(window_fingerprints(text, 8, root_seed(chunks[0].root))))
    assert [offset for offset, _ in found] == [2]
    assert [m.key_of(number) for number in found[0][1]] == [(chunks[1].key, chunks[1].root, 8)]
    m.remove(chunks[1].key)
    assert list(m.content.matches(window_fingerprints(text, 8, root_seed(chunks[0].root)))) == []
    assert m.key_of(found[0][1][0]) is None


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.sampled_from("wtd"), st.integers(0, 11), st.booleans()), max_size=40))
def test_catching_up_is_the_same_as_starting_anew(backend: LmdbBackend, steps: list[tuple[str, int, bool]]) -> None:
    universe = [*text_chunks(LAYOUT, range(40)), *text_chunks(LAYOUT, [1, 2, 3, *range(50)])]
    backend.clear()
    kept = mirror(backend)
    for word, i, sync in steps:
        chunk = universe[i]
        if word == "w":
            write(backend, [chunk])
        elif word == "t":
            backend.touch_many([chunk.key])
        else:
            backend.delete_many([chunk.key])
            kept.remove(chunk.key)
        if sync:
            kept.sync()
            kept._check()
    kept.sync()
    kept._check()
    fresh = mirror(backend)
    assert sorted(kept.policy) == sorted(fresh.policy)
    assert len(kept.content) == len(fresh.content)
    n = len(fresh.policy)
    assert kept.victims(n, ()) == fresh.victims(n, ()), "the same order of going"
