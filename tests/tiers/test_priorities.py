"""What is stored with a priority stays longer, in RAM and on the disk, and over restarts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import known_kv
import pytest

import lmkv

LAYOUT = lmkv.KVLayout.dense(layers=2, heads=2, head_size=8, dtype="float16", chunk_tokens=16)


def open_store(path: Path | None, **settings: Any) -> lmkv.Store:
    defaults: dict[str, Any] = {"ram_capacity": 1 << 20, "disk_capacity": 1 << 20 if path else 0}
    return lmkv.Store(lmkv.StoreConfig(model="m", disk_path=str(path) if path else None, **(defaults | settings)), LAYOUT)


def keep(store: lmkv.Store, tokens: list[int], priority: int = 0) -> None:
    store.store(tokens, known_kv.source(LAYOUT, tokens), priority=priority)
    assert store.flush(60)


def crowd(store: lmkv.Store, texts: int, priority: int = 0) -> None:
    for i in range(texts):
        keep(store, list(range(i * 100, i * 100 + 32)), priority)


FAVOURITE, SECOND = list(range(50_000, 50_040)), list(range(60_000, 60_040))


def test_in_ram() -> None:
    with open_store(None, ram_capacity=20 * 8192) as store:
        keep(store, FAVOURITE, 2)
        keep(store, SECOND, 1)
        crowd(store, 30)
        assert [known_kv.fetch(store, text) for text in (FAVOURITE, SECOND)] == [40, 40]
        crowd(store, 30, 2)
        assert [known_kv.fetch(store, text) for text in (FAVOURITE, SECOND)] == [0, 0]
        store._check()


@pytest.mark.parametrize("policy", ["lru", "fifo", "s3fifo"])
def test_on_the_disk_over_restarts(tmp_path: Path, policy: str) -> None:
    with open_store(tmp_path, disk_policy=policy) as store:
        keep(store, FAVOURITE, 255)
        keep(store, SECOND)
    for _ in range(2):
        with open_store(tmp_path, disk_policy=policy) as store:
            crowd(store, 60)
            assert store.stats().tiers[1].evictions > 0
            store._check()
        with open_store(tmp_path, disk_policy=policy) as store:
            assert store.lookup(FAVOURITE).tokens_by_tier() == {"disk": 40}
            assert store.lookup(SECOND).hit_tokens == 0
    with open_store(tmp_path, disk_policy=policy) as store:
        assert known_kv.fetch(store, FAVOURITE) == 40
        crowd(store, 200)
        assert store.lookup(FAVOURITE).tokens_by_tier() == {"ram": 40}, "it came with its priority"


def test_what_it_may_be(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        for wrong in (-1, 256, 1.0, "1", None):
            with pytest.raises(lmkv.ArgumentError, match="expected a priority from 0 to 255; got"):
                store.reserve([1, 2], priority=wrong)  # type: ignore[arg-type]
