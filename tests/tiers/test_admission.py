"""Admission at second use: prompts that never come again do not reach the disk."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import known_kv
import pytest

import lmkv
from lmkv.chunks import ChunkKey
from lmkv.tiers.admission import SeenOnce, seen_size

LAYOUT = lmkv.KVLayout.dense(layers=2, heads=2, head_size=8, dtype="float16", chunk_tokens=16)
SLOT = 8192


def open_store(path: Path, **settings: Any) -> lmkv.Store:
    defaults: dict[str, Any] = {"ram_capacity": 1 << 20, "disk_capacity": 4 << 20, "disk_admission": "second"}
    return lmkv.Store(lmkv.StoreConfig(model="m", disk_path=str(path), **(defaults | settings)), LAYOUT)


def keep(store: lmkv.Store, tokens: list[int]) -> None:
    store.store(tokens, known_kv.source(LAYOUT, tokens))
    assert store.flush(60)


def on_disk(store: lmkv.Store) -> tuple[int, int]:
    """Chunks written, chunks held back."""
    disk = store.stats().tiers[1]
    return disk.written_chunks, disk.held_back


def test_what_is_used_again_from_ram_is_written_and_nothing_else(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        texts = [list(range(i * 100, i * 100 + 40)) for i in range(10)]
        for tokens in texts:
            keep(store, tokens)
        assert on_disk(store) == (0, 30)
        assert known_kv.fetch(store, texts[3]) == 40
        assert known_kv.fetch(store, [*texts[4][:20], 1]) == 20, "two of its chunks"
        assert store.flush(60)
        assert on_disk(store) == (5, 30)
        assert known_kv.fetch(store, texts[3]) == 40
        assert store.flush(60)
        assert on_disk(store) == (5, 30), "once"
        store._check()
        assert all(node.pins == 0 for node in store._ram.index)
    with open_store(tmp_path) as store:
        assert [known_kv.fetch(store, tokens) for tokens in texts] == [0, 0, 0, 40, 32] + [0] * 5


def test_what_is_stored_again_after_it_went_from_ram_is_written(tmp_path: Path) -> None:
    with open_store(tmp_path, ram_capacity=12 * SLOT, ram_extent=SLOT) as store:
        tokens = list(range(70))
        keep(store, tokens)
        for i in range(1, 6):
            keep(store, list(range(i * 100, i * 100 + 48)))
        assert store.lookup(tokens).hit_tokens == 0
        assert on_disk(store) == (0, 20)
        keep(store, tokens)
        assert on_disk(store) == (5, 20)
        for i in range(6, 12):
            keep(store, list(range(i * 100, i * 100 + 48)))
        assert store.lookup(tokens).tokens_by_tier() == {"disk": 70}
        assert known_kv.fetch(store, tokens) == 70
        store._check()


def test_a_text_that_grows_brings_its_beginning(tmp_path: Path) -> None:
    with open_store(tmp_path, ram_cache=False) as store:
        tokens = list(range(200))
        keep(store, tokens[:48])
        assert store.stats().tiers[0].chunks == 0
        keep(store, tokens[:96])
        assert on_disk(store) == (3, 6), "what came before is written, what is new is not"
        keep(store, tokens[:96])
        assert on_disk(store) == (6, 6)
        assert known_kv.fetch(store, tokens) == 96


def test_by_name_of_any_tier(tmp_path: Path) -> None:
    tier = lmkv.TierConfig("memory", admission="second")
    with lmkv.Store(lmkv.StoreConfig(model="m", ram_capacity=1 << 20, disk_capacity=0, tiers=(tier,)), LAYOUT) as store:
        keep(store, list(range(40)))
        assert on_disk(store) == (0, 3)
        assert known_kv.fetch(store, list(range(40))) == 40
        assert store.flush(60)
        assert on_disk(store) == (3, 3)
    with pytest.raises(lmkv.ConfigError, match="admission: expected one of all, second; got 'secnd'; did you mean 'second'"):
        lmkv.TierConfig("memory", admission="secnd")
    with pytest.raises(lmkv.ConfigError, match="disk_admission: expected one of all, second"):
        lmkv.StoreConfig(disk_admission="third")


def test_the_memory_is_bounded_and_keeps_the_newest() -> None:
    rng = random.Random(5)
    seen = SeenOnce(4096)
    assert seen._marks.itemsize * len(seen._marks) == 32 * 1024
    keys = [ChunkKey(rng.randbytes(16)) for _ in range(40_000)]
    for i, key in enumerate(keys):
        assert key not in seen
        seen.add(key)
        if i % 1000 == 0:
            seen._check()
    assert seen._marks.itemsize * len(seen._marks) == 32 * 1024
    assert sum(key in seen for key in keys) == 4096
    assert sum(key in seen for key in keys[-1000:]) > 980
    assert all(key in seen for key in keys[-100:])
    seen.discard(keys[-1])
    seen.discard(keys[-1])
    assert keys[-1] not in seen
    seen._check()
    assert (seen_size(10), seen_size(10**5), seen_size(10**9)) == (4096, 10**5, 1 << 20)


def test_admission_of_a_text() -> None:
    keys = [ChunkKey(bytes([i] * 16)) for i in range(1, 7)]
    seen = SeenOnce(64)
    assert seen.admit(keys[:3]) == 0
    assert seen.admit(keys[:5]) == 3
    assert [key in seen for key in keys] == [False, False, False, True, True, False]
    seen.add(keys[5])
    seen.discard(keys[3])
    assert seen.admit(keys[3:]) == 3, "what comes before a chunk comes with it"
    assert not any(key in seen for key in keys)
