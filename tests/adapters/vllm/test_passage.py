"""LMCache's ``local_cpu: False``: hits come from the disk, RAM is a passage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import CHUNK, assert_same, text

from lmkv import Store


@pytest.fixture
def disk_only(tmp_path: Path, engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """An engine whose disk alone keeps chunks, and is read however quick the model is."""
    monkeypatch.setattr(Store, "worthwhile", lambda self, match, speed: match)

    def make(**more: Any) -> Any:
        names = {"local_cpu": False, "local_disk": f"file://{tmp_path}/kv/", "max_local_disk_size": 0.0625}
        return engine_of(connector={f"lmcache.{name}": value for name, value in names.items()} | more)

    return make


def ram_chunks(engine: Any) -> int:
    engine.settle()
    assert engine.store.flush(30)
    return int(engine.store.stats().tiers[0].chunks)


def test_hits_come_from_the_disk_every_time(disk_only: Callable[..., Any]) -> None:
    prompts = [text(length, seed=400 + length) for length in (40, 150, 333)]
    engine = disk_only()
    wanted = engine.computed(prompts)
    assert_same(engine.one_by_one(prompts), wanted)
    assert ram_chunks(engine) == 0
    written = engine.store.stats().tiers[1].written_chunks
    for turn in (1, 2):
        found = engine.one_by_one(prompts)
        assert_same(found, wanted)
        assert [answer.cached for answer in found] == [39, 149, 332]
        assert ram_chunks(engine) == 0
        ram, disk = engine.store.stats().tiers
        chunks = sum(-(-(len(prompt) - 1) // CHUNK) for prompt in prompts)
        assert (disk.read_chunks, disk.written_chunks) == (turn * chunks, written)
        assert ram.hit_tokens == 0
    engine.check_clean()


@pytest.mark.parametrize("load", ["sync", "async"])
def test_requests_that_share_a_beginning_find_it_together(load: str, disk_only: Callable[..., Any]) -> None:
    shared = text(4 * CHUNK, seed=500)
    prompts = [shared + text(20 + i, seed=510 + i) for i in range(6)]
    engine = disk_only(**{"lmkv.load": load})
    wanted = engine.computed(prompts)
    assert_same(engine.one_by_one([shared]), engine.computed([shared]))
    assert ram_chunks(engine) == 0
    found = engine.ask(prompts)
    assert_same(found, wanted)
    assert [answer.cached for answer in found] == [len(shared)] * 6
    assert ram_chunks(engine) == 0
    assert_same(engine.ask(prompts), wanted)
    engine.check_clean()
