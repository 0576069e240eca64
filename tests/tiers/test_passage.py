"""``ram_cache: false``: RAM holds what is on its way only, hits come from slow tiers."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import known_kv
import pytest
import remotes

import lmkv

LAYOUT = lmkv.KVLayout.dense(layers=2, heads=2, head_size=8, dtype="float16", chunk_tokens=16)
SLOT = 8192


def open_store(path: Path | None, events: list[lmkv.Event] | None = None, **settings: Any) -> lmkv.Store:
    defaults: dict[str, Any] = {"ram_capacity": 1 << 20, "ram_cache": False, "disk_capacity": 8 << 20 if path else 0}
    config = lmkv.StoreConfig(model="m", disk_path=str(path) if path else None, **(defaults | settings))
    return lmkv.Store(config, LAYOUT, on_event=None if events is None else events.append)


def save(store: lmkv.Store, tokens: list[int]) -> int:
    return store.store(tokens, known_kv.source(LAYOUT, tokens))


def in_ram(store: lmkv.Store) -> tuple[int, int]:
    """Chunks, bytes."""
    ram = store.stats().tiers[0]
    return ram.chunks, ram.used_bytes


def test_a_stored_chunk_leaves_ram_once_the_disk_has_it_and_hits_come_from_there(tmp_path: Path) -> None:
    tokens = list(range(70))
    with open_store(tmp_path) as store:
        assert save(store, tokens) == 70
        assert store.flush(60)
        assert in_ram(store) == (0, 0)
        for turn in range(3):
            assert store.lookup(tokens).tokens_by_tier() == {"disk": 70}
            with store.lease(store.lookup(tokens)) as lease:
                assert (lease.hit_tokens, in_ram(store)[0]) == (70, 5)
            assert in_ram(store) == (0, 0)
            assert known_kv.fetch(store, [*tokens[:50], 1]) == 50, "up to a token"
            assert store.stats().tiers[1].read_chunks == 9 * (turn + 1)
        ram, disk = store.stats().tiers
        assert (ram.hit_tokens, disk.hit_tokens) == (0, 3 * 120)
        store._check()


def test_what_waits_to_be_written_is_served_from_ram(register: Callable[[str, str, str], None]) -> None:
    register("lmkv.backends", "slow", "remotes:slow")
    tier = lmkv.TierConfig("slow", options={"server": remotes.new_server(), "seconds": 0.5, "operations": ["write_many"]})
    tokens = list(range(40))
    with open_store(None, tiers=(tier,)) as store:
        save(store, tokens)
        assert known_kv.fetch(store, tokens) == 40
        assert in_ram(store)[0] == 3
        assert store.flush(60)
        assert in_ram(store) == (0, 0)
        assert known_kv.fetch(store, tokens, store.lookup(tokens).wait(30)) == 40


def test_it_stays_until_all_slow_tiers_have_it(tmp_path: Path, register: Callable[[str, str, str], None]) -> None:
    register("lmkv.backends", "slow", "remotes:slow")
    server = remotes.new_server()
    tier = lmkv.TierConfig("slow", options={"server": server, "seconds": 0.5, "operations": ["write_many"]})
    with open_store(tmp_path / "disk", tiers=(tier,)) as store:
        save(store, list(range(64)))
        assert store._slow[0].flush(60)
        assert in_ram(store)[0] == 4, "the disk has it, the other has not"
        assert store.flush(60)
        assert in_ram(store) == (0, 0)
        assert remotes.SERVERS[server]._used > 0


def test_what_the_disk_has_is_not_copied_again(tmp_path: Path) -> None:
    tokens = list(range(70))
    with open_store(tmp_path) as store:
        save(store, tokens)
        store.flush(60)
        for known in (tokens, tokens[:64], tokens[:66], tokens[:20], tokens[:5]):
            assert save(store, known) == 0
        assert save(store, [*tokens[:64], 7, 8]) == 2
        assert save(store, [*tokens, 9]) == 7, "the last chunk is longer now"
        store.flush(60)
        assert (in_ram(store), store.stats().tiers[1].chunks) == ((0, 0), 6)
        assert known_kv.fetch(store, [*tokens, 9]) == 71
        store._check()


def test_a_lookup_that_found_it_in_ram_is_good_when_it_is_on_the_disk_by_now(tmp_path: Path) -> None:
    tokens = list(range(70))
    with open_store(tmp_path, disk_write_budget=1) as store:
        save(store, list(range(1000, 1016)))  # overdraws the budget
        time.sleep(0.3)
        save(store, tokens)
        match = store.lookup(tokens)
        assert match.tokens_by_tier() == {"ram": 70}
        assert store.flush(60)
        assert in_ram(store) == (0, 0)
        assert known_kv.fetch(store, tokens, match) == 70


def test_a_prefetch_that_nobody_leases_gives_its_room_to_others(tmp_path: Path) -> None:
    with open_store(tmp_path, ram_capacity=6 * SLOT, ram_extent=SLOT) as store:
        for i in range(4):
            save(store, list(range(i * 100, i * 100 + 64)))
            store.flush(60)
        for i in range(4):
            assert store.prefetch(store.lookup(list(range(i * 100, i * 100 + 64)))).result(60) == 64
        for i in range(4):
            assert known_kv.fetch(store, list(range(i * 100, i * 100 + 64))) == 64
        assert save(store, list(range(900, 900 + 64))) == 64
        store.flush(60)
        disk = store.stats().tiers[1]
        assert disk.hit_tokens == 256, "prefetched or not, it came from there"
        store._check()


def test_a_disk_that_fails_costs_hits_and_no_room(tmp_path: Path, register: Callable[[str, str, str], None]) -> None:
    register("lmkv.backends", "flaky", "remotes:flaky")
    server = remotes.new_server()
    events: list[lmkv.Event] = []
    with open_store(None, events, tiers=(lmkv.TierConfig("flaky", options={"server": server}),)) as store:
        connection = remotes.CONNECTIONS[server]
        connection.fails = lambda operation, number: True
        for i in range(8):
            save(store, list(range(i * 100, i * 100 + 48)))
        assert not store.flush(60)
        assert in_ram(store) == (0, 0)
        assert sum(int(str(e.detail["chunks"])) for e in events if e.kind == "write_dropped") == 24
        assert known_kv.fetch(store, list(range(48)), store.lookup(list(range(48))).wait(5)) == 0
        store._check()


def test_threads_that_store_and_load_the_same_texts_through_a_few_slots(tmp_path: Path) -> None:
    with open_store(tmp_path, ram_capacity=24 * SLOT, ram_extent=SLOT) as store:
        texts = [[*range(32), *range(i * 100, i * 100 + 30)] for i in range(8)]
        hits = [0] * 4
        errors: list[BaseException] = []

        def work(number: int) -> None:
            rng = random.Random(number)
            try:
                for _ in range(60):
                    tokens = rng.choice(texts)
                    save(store, tokens)
                    hits[number] += known_kv.fetch(store, tokens)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
        assert sum(hits) > 4 * 60 * 62 // 2
        assert store.flush(60)
        store.clear()
        assert in_ram(store) == (0, 0)
        store._check()


def test_it_needs_a_tier_behind_ram() -> None:
    with pytest.raises(lmkv.ConfigError, match="ram_cache: expected a slow tier that keeps chunks"):
        lmkv.StoreConfig(ram_cache=False, disk_capacity=0)
    assert lmkv.StoreConfig.load(environ={"LMKV_RAM_CACHE": "false"}).ram_cache is False
