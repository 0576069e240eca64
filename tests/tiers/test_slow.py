"""Slow tiers behind a store: what is written, in which order it goes, and what several of them do at once."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import known_kv
import pytest
import remotes

import lmkv
from lmkv.backends.lmdb_disk import LmdbBackend
from lmkv.chunks import TokenChunker
from lmkv.record import verify

LAYOUT = lmkv.KVLayout.dense(layers=2, heads=2, head_size=8, dtype="float16", chunk_tokens=16)


def open_store(path: Path | None, events: list[lmkv.Event] | None = None, **settings: Any) -> lmkv.Store:
    defaults: dict[str, Any] = {"model": "m", "ram_capacity": 1 << 20, "disk_capacity": 1 << 20 if path else 0}
    config = lmkv.StoreConfig(disk_path=str(path) if path else None, **(defaults | settings))
    return lmkv.Store(config, LAYOUT, on_event=None if events is None else events.append)


def keep(store: lmkv.Store, tokens: list[int]) -> None:
    store.store(tokens, known_kv.source(LAYOUT, tokens))
    assert store.flush(60)


def disk(store: lmkv.Store) -> LmdbBackend:
    backend = store._slow[0].backend
    assert isinstance(backend, LmdbBackend)
    return backend


def test_written_once(tmp_path: Path) -> None:
    events: list[lmkv.Event] = []
    tokens = list(range(70))
    with open_store(tmp_path, events) as store:
        keep(store, tokens)
        keep(store, tokens)
        keep(store, [*tokens[:64], 1, 2])
        stored = [(e.detail["chunks"], e.detail["tokens"]) for e in events if e.kind == "stored" and e.tier == "disk"]
        assert stored == [(5, 70), (1, 2)]
        stats = store.stats().tiers[1]
        assert (stats.name, stats.chunks, stats.written_chunks, stats.waiting_writes) == ("disk", 6, 6, 0)
        assert stats.used_bytes == disk(store).used_bytes()
    with open_store(tmp_path) as store:
        store.store(tokens, known_kv.source(LAYOUT, tokens))
        assert store.flush(60)
        assert store.stats().tiers[1].written_chunks == 0, "what another run left is not written again"


def test_flush_says_so_where_nothing_can_be_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = list(range(70))
    with open_store(tmp_path) as store:
        store.store(tokens, known_kv.source(LAYOUT, tokens))

        def full() -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(disk(store), "sync", full)
            assert not store.flush(60)
        assert store.flush(60)


def test_a_write_budget_bounds_what_reaches_the_device(tmp_path: Path) -> None:
    with open_store(tmp_path, disk_write_budget=10_000) as store:
        for i in range(20):  # 5,120 bytes of KV in five chunks, more as records
            tokens = list(range(i * 1000, i * 1000 + 80))
            store.store(tokens, known_kv.source(LAYOUT, tokens))
        time.sleep(0.5)
        stats = store.stats().tiers[1]
        batch = store._slow[0].writer._batch
        record = 4096 + LAYOUT.chunk_bytes
        assert 0 < stats.written_bytes <= 15_000 + batch * record, (
            "a second's worth, half of another, and one batch that overdraws"
        )
        assert stats.waiting_writes > 0
        for i in range(20):
            assert known_kv.fetch(store, list(range(i * 1000, i * 1000 + 80))) == 80, "what waits is served from RAM"
        assert store.flush(60), "who asks for it to be durable now does not wait for the budget"
        assert store.stats().tiers[1].waiting_writes == 0
        assert store.stats().tiers[1].written_chunks == 100


def test_what_outlived_its_time_is_not_there_and_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = list(range(70))
    now = time.time()
    with open_store(tmp_path) as store:
        keep(store, tokens[:32])
        monkeypatch.setattr("lmkv.backends.lmdb_disk.time.time", lambda: now + 1000)
        keep(store, tokens)
    with open_store(tmp_path, disk_ttl_seconds=600) as store:
        assert known_kv.fetch(store, tokens) == 0, "its beginning is too old"
        keep(store, tokens)
        assert store.stats().tiers[1].written_chunks == 2, "the rest is still good"
        store._check()
    monkeypatch.setattr("lmkv.backends.lmdb_disk.time.time", lambda: now + 1500)
    with open_store(tmp_path, disk_ttl_seconds=600) as store:
        assert known_kv.fetch(store, tokens) == 70
    monkeypatch.setattr("lmkv.backends.lmdb_disk.time.time", lambda: now + 1601)
    with open_store(tmp_path, disk_ttl_seconds=600) as store:
        assert known_kv.fetch(store, tokens) == 0
        assert known_kv.fetch(store, [*tokens[:20], 5]) == 0, "not a part of it either"
    with open_store(tmp_path) as store:
        assert known_kv.fetch(store, tokens) == 70, "who sets no limit has it all"
    with pytest.raises(lmkv.ConfigError, match="disk_ttl_seconds: expected at least 0"):
        open_store(tmp_path, disk_ttl_seconds=-1)


def test_a_longer_chunk_replaces_a_short_one_on_disk(tmp_path: Path) -> None:
    base = list(range(200, 240))
    with open_store(tmp_path) as store:
        keep(store, base[:20])
        keep(store, [*base[:17], 9])
        assert disk(store).count() == 3
        keep(store, base[:31])
        assert disk(store).count() == 3, "the first 4 tokens of the second chunk are also the first of 15"
        keep(store, base[:40])
        assert disk(store).count() == 4
        store._check()
    with open_store(tmp_path) as store:
        assert known_kv.fetch(store, base[:20]) == 20
        assert known_kv.fetch(store, base) == 40
        assert known_kv.fetch(store, [*base[:17], 9]) == 18


def test_what_is_used_stays_on_disk(tmp_path: Path) -> None:
    favourite = list(range(5000, 5040))
    with open_store(tmp_path) as store:
        keep(store, favourite)
        for i in range(60):
            keep(store, list(range(i * 100, i * 100 + 40)))
            with store.lease(store.lookup(favourite)) as lease:
                assert lease.hit_tokens == 40
            assert store.flush(60)  # uses are noted together, at the latest with a flush
        assert store.stats().tiers[1].evictions > 50
        gone = store.lookup(list(range(40)))
        assert gone.tokens_by_tier().get("disk", 0) == 0
    with open_store(tmp_path) as store:
        assert known_kv.fetch(store, favourite) == 40
        assert known_kv.fetch(store, list(range(5900, 5940))) == 40, "and what came last"
        assert known_kv.fetch(store, list(range(100, 140))) == 0


@pytest.mark.parametrize(("policy", "first_stays"), [("fifo", False), ("mru", True), ("lru", False)])
def test_the_policy_decides_who_goes(tmp_path: Path, policy: str, first_stays: bool) -> None:
    with open_store(tmp_path, disk_policy=policy) as store:
        for i in range(80):
            keep(store, list(range(i * 100, i * 100 + 32)))
    with open_store(tmp_path, disk_policy=policy) as store:
        assert (known_kv.fetch(store, list(range(32))) == 32) == first_stays
        assert known_kv.fetch(store, list(range(7900, 7932))) == 32


def test_eviction_goes_on_after_a_restart(tmp_path: Path) -> None:
    for run in range(4):
        with open_store(tmp_path) as store:
            for i in range(30):
                keep(store, list(range(run * 10000 + i * 100, run * 10000 + i * 100 + 40)))
            store._check()
            assert disk(store).used_bytes() <= disk(store).capacity
            last = run * 10000 + 2900
            assert known_kv.fetch(store, list(range(last, last + 40))) == 40
    with open_store(tmp_path) as store:
        assert known_kv.fetch(store, list(range(32900, 32940))) == 40
        assert known_kv.fetch(store, list(range(40))) == 0


def test_clear_reaches_the_disk(tmp_path: Path) -> None:
    tokens = list(range(40))
    with open_store(tmp_path) as store:
        keep(store, tokens)
        store.clear()
        assert store.lookup(tokens).hit_tokens == 0
        assert (disk(store).count(), disk(store).used_bytes()) == (0, 0)
        keep(store, tokens)
        store._check()
    with open_store(tmp_path) as store:
        assert known_kv.fetch(store, tokens) == 40


def test_a_full_queue_drops_the_oldest_with_an_event(tmp_path: Path, register: Callable[[str, str, str], None]) -> None:
    register("lmkv.backends", "slow", "remotes:slow")
    server = remotes.new_server()
    events: list[lmkv.Event] = []
    tier = lmkv.TierConfig("slow", options={"server": server, "seconds": 0.2, "operations": ["write_many"]})
    with open_store(None, events, tiers=(tier,), write_queue=4) as store:
        for i in range(6):
            tokens = list(range(i * 100, i * 100 + 48))
            store.store(tokens, known_kv.source(LAYOUT, tokens))
        assert not store.flush(60)
        dropped = [event for event in events if event.kind == "write_dropped"]
        assert dropped
        assert "more than 4 chunks were waiting" in str(dropped[0].detail["reason"])
        count = sum(int(str(event.detail["chunks"])) for event in dropped)
        keys = [key for i in range(6) for key in TokenChunker(store.namespace, 16).prefix_keys(range(i * 100, i * 100 + 48))]
        assert sum(remotes.SERVERS[server].contains_many(keys)) == 18 - count
        for i in range(6):
            assert known_kv.fetch(store, list(range(i * 100, i * 100 + 48))) == 48, "RAM has them all"
        store._check()


def test_two_tiers_get_whole_records_each(register: Callable[[str, str, str], None]) -> None:
    """Both write from the same slots at the same time."""
    register("lmkv.backends", "healthy", "remotes:healthy")
    servers = [remotes.new_server(), remotes.new_server()]
    tiers = tuple(lmkv.TierConfig("healthy", name=f"tier{i}", options={"server": s}) for i, s in enumerate(servers))
    with open_store(None, tiers=tiers, ram_capacity=16 << 20) as store:
        texts = [list(range(i * 100, i * 100 + 64)) for i in range(300)]
        for tokens in texts:
            store.store(tokens, known_kv.source(LAYOUT, tokens))
        assert store.flush(60)
        root = store.namespace.root
        for tokens in texts:
            keys = TokenChunker(store.namespace, 16).prefix_keys(tokens)
            for server in servers:
                buffers = [memoryview(bytearray(1 << 14)) for _ in keys]
                sizes = remotes.SERVERS[server].read_many(keys, buffers)
                for i, (key, size, buffer) in enumerate(zip(keys, sizes, buffers, strict=True)):
                    assert size is not None
                    parent = keys[i - 1] if i else root
                    verify(buffer[:size], key=key, parent=parent, root=root, layout=LAYOUT.fingerprint, start=i * 16)


def test_a_prefix_spread_over_tiers(tmp_path: Path, register: Callable[[str, str, str], None]) -> None:
    register("lmkv.backends", "healthy", "remotes:healthy")
    tier = lmkv.TierConfig("healthy", name="remote", options={"server": remotes.new_server()})
    tokens = list(range(64))
    with open_store(tmp_path / "disk", tiers=(tier,)) as store:
        keep(store, tokens)
    keys = TokenChunker(store.namespace, 16).prefix_keys(tokens)
    with open_store(tmp_path / "disk", tiers=(tier,)) as store:
        disk(store).delete_many(keys[2:])
        remotes.SERVERS[str(tier.options["server"])].delete_many(keys[:1])
        with store.lease(store.lookup(tokens[:16])) as lease:
            assert lease.hit_tokens == 16
        match = store.lookup(tokens).wait(30)
        assert match.tokens_by_tier() == {"ram": 16, "disk": 16, "remote": 32}
        assert [hit.tier for hit in match.hits] == ["ram", "disk", "remote", "remote"]
        assert known_kv.fetch(store, tokens, match) == 64
        assert store.stats().tiers[2].hit_tokens == 32
        store._check()


def test_prefetch_brings_chunks_into_slots(tmp_path: Path) -> None:
    events: list[lmkv.Event] = []
    tokens = list(range(70))
    with open_store(tmp_path) as store:
        keep(store, tokens)
    with open_store(tmp_path, events) as store:
        match = store.lookup(tokens)
        assert match.tokens_by_tier() == {"disk": 70}
        assert [store.prefetch(match).result(60), store.prefetch(match).result(60)] == [70, 70]
        assert store.lookup(tokens).tokens_by_tier() == {"ram": 70}
        loaded = [event for event in events if event.kind == "loaded"]
        assert sum(int(str(event.detail["chunks"])) for event in loaded) == 5, "each chunk is read once"
        assert known_kv.fetch(store, tokens) == 70
        store._check()


@pytest.mark.parametrize(("times", "left"), [(1, 5), (2, 0)])
def test_what_is_being_replaced_while_it_is_read_stays(
    times: int, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = list(range(70))
    with open_store(tmp_path) as store:
        keep(store, tokens)
    with open_store(tmp_path) as store:
        backend, reads = disk(store), iter(range(100))
        read = backend.read_many

        def torn(keys: Any, out: Any) -> Any:
            return [None] * len(keys) if next(reads) < times else read(keys, out)

        monkeypatch.setattr(backend, "read_many", torn)
        monkeypatch.setattr(store._slow[0], "batch_size", lambda chunks: chunks)
        assert known_kv.fetch(store, tokens) == 0, "a read that fails is a miss"
        assert backend.count() == left, "only what can't be read again either goes, so that it is written anew"
        assert known_kv.fetch(store, tokens) == (70 if left else 0)


def test_flush_says_so_once_where_chunks_were_given_up(register: Callable[[str, str, str], None]) -> None:
    register("lmkv.backends", "flaky", "remotes:flaky")
    server = remotes.new_server()
    with open_store(None, tiers=(lmkv.TierConfig("flaky", options={"server": server}),), breaker_failures=1000) as store:
        connection = remotes.CONNECTIONS[server]

        def given_up(number: int, *, clear: bool = False) -> None:
            connection.fails = lambda operation, number: operation == "write_many"
            store.store([number] * 40, known_kv.source(LAYOUT, [number] * 40))
            assert store._slow[0].writer.flush(60)
            if clear:
                store.clear()
            connection.fails = lambda operation, number: False

        given_up(1)
        assert not store.flush(60), "the tier never got them"
        assert store.flush(60), "that was told"
        given_up(2)
        keep_waiting = store._slow[0].writer
        with keep_waiting._changed:  # busy, as far as a flush can see
            keep_waiting._busy = 1
        assert not store.flush(0.01)
        with keep_waiting._changed:
            keep_waiting._busy = 0
        assert not store.flush(60), "one that was not in time has told of nothing"
        given_up(3, clear=True)
        assert store.flush(60), "what was cleared need not be there"
        keep(store, [4] * 40)
        assert store.stats().tiers[1].dropped_writes == 9
