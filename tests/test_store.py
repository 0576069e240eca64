"""The store's verbs: hits that end at a token, holds, two-phase writes, restarts, many threads."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lmkv

LAYERS, HEADS, SIZE = 2, 2, 8


def layout_of(chunk: int) -> lmkv.KVLayout:
    return lmkv.KVLayout.dense(layers=LAYERS, heads=HEADS, head_size=SIZE, dtype="float32", chunk_tokens=chunk)


def kv_of(tokens: np.ndarray) -> np.ndarray:
    """KV whose every token's values depend on all tokens up to it."""
    state = np.cumsum((tokens.astype(np.float64) + 1) * (np.arange(len(tokens)) + 1)) % 9973
    base = np.arange(LAYERS * 2 * HEADS * SIZE, dtype=np.float64).reshape(LAYERS, 2, HEADS, 1, SIZE)
    return (base + state[None, None, None, :, None]).astype(np.float32)


@pytest.fixture
def open_store(tmp_path: Path) -> Callable[..., lmkv.Store]:
    """Opens stores on one directory; closes what is still open."""
    opened: list[lmkv.Store] = []

    def build(chunk: int = 8, *, events: list[lmkv.Event] | None = None, **settings: object) -> lmkv.Store:
        given = {
            "model": "m",
            "ram_capacity": "16MiB",
            "disk_capacity": "32MiB",
            "disk_path": str(tmp_path / "disk"),
        } | settings
        config = lmkv.StoreConfig.from_dict(given)
        store = lmkv.Store(config, layout_of(chunk), on_event=events.append if events is not None else None)
        opened.append(store)
        return store

    yield build
    for store in opened:
        store.close()


def load(store: lmkv.Store, tokens: np.ndarray) -> tuple[lmkv.Match, int, np.ndarray]:
    out = np.full((LAYERS, 2, HEADS, len(tokens), SIZE), np.nan, np.float32)
    match = store.lookup(tokens)
    with store.lease(match) as lease:
        return match, store.retrieve(lease, out), out


@pytest.mark.parametrize("chunk", [8, 16, 256])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_two_texts_share_exactly_the_tokens_before_they_part(chunk: int, data: st.DataObject, tmp_path_factory) -> None:
    shared = data.draw(st.integers(0, 3 * chunk + 2), label="shared")
    mine = data.draw(st.integers(1, chunk + 3), label="mine")
    other = data.draw(st.integers(1, chunk + 3), label="other")
    rng = np.random.default_rng(shared * 10007 + mine)
    stem = rng.integers(0, 50, shared)
    first = np.concatenate([stem, [100], rng.integers(0, 50, mine)]).astype(np.uint32)
    second = np.concatenate([stem, [101], rng.integers(0, 50, other)]).astype(np.uint32)
    path = str(tmp_path_factory.mktemp("disk"))
    config = lmkv.StoreConfig(model="m", ram_capacity=2**24, disk_capacity=2**25, disk_path=path)
    wanted = kv_of(second)
    with lmkv.Store(config, layout_of(chunk)) as store:
        store.store(first, kv_of(first))
        match, got, out = load(store, second)
        assert (match.hit_tokens, got) == (shared, shared)
        assert np.array_equal(out[:, :, :, :shared], wanted[:, :, :, :shared])
        assert np.isnan(out[:, :, :, shared:]).all()
    with lmkv.Store(config, layout_of(chunk)) as store:
        match, got, out = load(store, second)
        assert (match.hit_tokens, got) == (shared, shared)
        assert match.tokens_by_tier() == ({"disk": shared} if shared else {})
        assert np.array_equal(out[:, :, :, :shared], wanted[:, :, :, :shared])


def test_many_texts_that_part_inside_one_chunk_are_told_apart(open_store) -> None:
    """Siblings with long common beginnings, in RAM and on disk."""
    stem = np.arange(300, dtype=np.uint32)
    texts = [np.concatenate([stem[:cut], np.full(40, 5000 + cut, np.uint32)]) for cut in range(255, 300)]
    store = open_store(256, ram_capacity="64MiB")
    for text in texts:
        store.store(text, kv_of(text))
    store._check()
    store.close()
    for store in (open_store(256), open_store(256, disk_path=None, disk_capacity=0)):
        if not store.config.disk_capacity:
            for text in texts:
                store.store(text, kv_of(text))
        for cut in (255, 256, 257, 280, 299):
            asked = np.concatenate([stem[:cut], np.full(3, 5000 + cut, np.uint32), np.full(9, 7, np.uint32)])
            match, got, out = load(store, asked)
            assert match.hit_tokens == got == cut + 3
            assert np.array_equal(out[:, :, :, :got], kv_of(asked)[:, :, :, :got])


def test_a_longer_text_replaces_the_short_chunk_it_extends(open_store) -> None:
    store = open_store()
    text = np.arange(60, dtype=np.uint32)
    for end in (3, 5, 11, 13, 30):
        store.store(text[:end], kv_of(text[:end]))
        store.flush()
    stats = store.stats()
    assert [tier.chunks for tier in stats.tiers] == [4, 4]  # 8 + 8 + 8 + 6 tokens
    assert store.lookup(text).hit_tokens == 30
    store._check()


def test_short_chunks_are_left_out_on_request(open_store) -> None:
    store = open_store(save_partial_chunk=False)
    text = np.arange(21, dtype=np.uint32)
    assert store.store(text, kv_of(text)) == 16
    assert store.lookup(text).hit_tokens == 16
    assert store.store(text[:5], kv_of(text[:5])) == 0


def test_a_reservation_is_invisible_until_committed_and_gone_if_not(open_store) -> None:
    store = open_store()
    text = np.arange(20, dtype=np.uint32)
    used = store.stats().tiers[0].used_bytes
    with store.reserve(text) as reservation:
        assert [slot.tokens for slot in reservation.slots] == [8, 8, 4]
        assert store.lookup(text).hit_tokens == 0
        with store.reserve(text) as second:
            assert second.slots == []  # somebody else is filling them
    assert store.lookup(text).hit_tokens == 0
    assert store.stats().tiers[0].used_bytes == used
    with pytest.raises(lmkv.ArgumentError, match="committed or aborted"):
        reservation.commit()
    with store.reserve(text, start=8) as reservation:
        assert [slot.start for slot in reservation.slots] == [8, 16]
        reservation.commit()
    assert store.lookup(text).hit_tokens == 0  # what comes before them is missing
    store.store(text, kv_of(text))
    assert store.lookup(text).hit_tokens == 20


def test_a_forgotten_reservation_gives_its_slots_back(open_store) -> None:
    events: list[lmkv.Event] = []
    store = open_store(disk_capacity=0, events=events)
    text = np.arange(20, dtype=np.uint32)
    reservation = store.reserve(text)
    del reservation
    assert [event.kind for event in events] == ["reservation_lost"]
    assert store.stats().reservations == 0
    assert store.store(text, kv_of(text)) == 20
    store._check()


def test_a_process_that_forgets_to_close_loses_nothing(tmp_path: Path) -> None:
    code = (
        "import lmkv, numpy as np\n"
        f"config = lmkv.StoreConfig(model='m', disk_path={str(tmp_path / 'disk')!r}, disk_capacity='32MiB')\n"
        "layout = lmkv.KVLayout.dense(layers=2, heads=2, head_size=8, dtype='float32', chunk_tokens=8)\n"
        "store = lmkv.Store(config, layout)\n"
        "print(store.store(np.arange(800), np.ones((2, 2, 2, 800, 8), np.float32)))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "800\n"
    config = lmkv.StoreConfig(model="m", disk_path=str(tmp_path / "disk"), disk_capacity="32MiB", ram_capacity="16MiB")
    with lmkv.Store(config, layout_of(8)) as store:
        assert store.lookup(np.arange(800)).hit_tokens == 800


def test_leased_chunks_stay_and_their_time_is_limited(open_store) -> None:
    events: list[lmkv.Event] = []
    slots = 4
    store = open_store(ram_capacity=slots * 8192, disk_capacity=0, lease_seconds=0.05, events=events)
    text = np.arange(32, dtype=np.uint32)
    store.store(text, kv_of(text))
    other = text + 1000
    lease = store.lease(store.lookup(text))
    assert lease.hit_tokens == 32
    assert store.store(other, kv_of(other)) == 0  # nothing may go
    time.sleep(0.06)
    assert store.store(other, kv_of(other)) == 32
    assert not lease.held
    assert store.retrieve(lease, np.zeros((LAYERS, 2, HEADS, 32, SIZE), np.float32)) == 0
    assert "lease_expired" in [event.kind for event in events]
    renewed = store.lease(store.lookup(other))
    for _ in range(4):
        time.sleep(0.02)
        assert renewed.renew()
    assert store.store(text, kv_of(text)) == 0
    renewed.release()
    renewed.release()
    store._check()


def test_a_lease_that_is_lost_under_a_copy_counts_as_nothing(open_store) -> None:
    store = open_store(ram_capacity=4 * 8192, disk_capacity=0, lease_seconds=0.01)
    text = np.arange(32, dtype=np.uint32)
    store.store(text, kv_of(text))
    lease = store.lease(store.lookup(text))

    class SlowSink(lmkv.DenseKV):
        """Somebody needs the slots just when the copy begins."""

        def places(self, start: int, stop: int) -> np.ndarray:
            time.sleep(0.02)
            other = text + 5000
            store.store(other, kv_of(other))
            return super().places(start, stop)

    assert store.retrieve(lease, SlowSink(np.zeros((LAYERS, 2, HEADS, 32, SIZE), np.float32))) == 0


def test_ram_smaller_than_the_prompt_serves_what_fits(open_store) -> None:
    store = open_store(ram_capacity=3 * 8192)
    text = np.arange(64, dtype=np.uint32)
    store.store(text, kv_of(text))
    store.flush()
    assert store.lookup(text).hit_tokens == 24
    store.store(text[:40], kv_of(text[:40]), start=24)
    store.flush()
    match, got, out = load(store, text)
    assert match.hit_tokens >= 24
    assert got == 24
    assert np.array_equal(out[:, :, :, :24], kv_of(text)[:, :, :, :24])
    store._check()


def test_scopes_never_find_each_other(open_store) -> None:
    store = open_store()
    text = np.arange(24, dtype=np.uint32)
    mine = store.namespace.replace(salt="a secret")
    store.store(text, kv_of(text), namespace=mine)
    assert store.lookup(text).hit_tokens == 0
    assert store.lookup(text, namespace=store.namespace.replace(lora="x@1")).hit_tokens == 0
    assert store.lookup(text, namespace=mine).hit_tokens == 24
    assert store.lookup(np.concatenate([[9], text]), anywhere=True).elsewhere == ()
    assert len(store.lookup(np.concatenate([[9], text]), anywhere=True, namespace=mine).elsewhere) == 3
    with pytest.raises(lmkv.ArgumentError, match="namespace of this store's layout"):
        store.lookup(text, namespace=lmkv.Namespace.of(layout_of(16)))


@pytest.mark.parametrize("where", ["ram", "disk"])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=st.integers(1, 40), between=st.integers(0, 20), length=st.integers(8, 40), cut=st.integers(0, 7))
def test_stored_chunks_are_found_at_any_offset(where, before, between, length, cut, tmp_path_factory) -> None:
    path = str(tmp_path_factory.mktemp("disk"))
    config = lmkv.StoreConfig(model="m", ram_capacity=2**24, disk_capacity=2**25, disk_path=path)
    passage = np.arange(500, 500 + length, dtype=np.uint32)
    store = lmkv.Store(config, layout_of(8))
    try:
        store.store(passage, kv_of(passage))
        if where == "disk":
            store.close()
            store = lmkv.Store(config, layout_of(8))
        kept = passage[: length - cut]
        filler = np.arange(9000, 9000 + before, dtype=np.uint32)
        prompt = np.concatenate([filler, kept, np.full(between, 77, np.uint32), passage]).astype(np.uint32)
        match = store.lookup(prompt, anywhere=True)
        assert match.hit_tokens == 0
        hits = match.elsewhere
        covered = np.zeros(len(prompt), bool)
        for hit in hits:
            assert hit.tier == where
            assert not covered[hit.start : hit.start + hit.tokens].any()
            covered[hit.start : hit.start + hit.tokens] = True
            assert np.array_equal(passage[hit.position : hit.position + hit.tokens], prompt[hit.start : hit.start + hit.tokens])
        assert covered[before + len(kept) + between :].all()
        if len(kept) >= 8:
            assert covered[before : before + len(kept)].all()
        assert not covered[:before].any()
    finally:
        store.close()


def test_eight_threads_on_two_tiers(open_store) -> None:
    """Many threads store, look up and load overlapping texts through few slots; every byte that comes is right."""
    store = open_store(ram_capacity=24 * 8192, disk_capacity="2MiB")
    rng = np.random.default_rng(3)
    stems = [rng.integers(0, 1000, 40).astype(np.uint32) for _ in range(4)]
    texts = [
        np.concatenate([stem[:cut], np.full(12, 2000 + cut + i, np.uint32)])
        for stem in stems
        for i, cut in enumerate((5, 16, 23, 40))
    ]
    truths = [kv_of(text) for text in texts]
    problems: list[str] = []
    loaded = [0]

    def work(seed: int) -> None:
        pick = np.random.default_rng(seed)
        for _ in range(120):
            i = int(pick.integers(len(texts)))
            if pick.random() < 0.4:
                store.store(texts[i], truths[i])
                continue
            _, got, out = load(store, texts[i])
            loaded[0] += got
            if got > len(texts[i]) or not np.array_equal(out[:, :, :, :got], truths[i][:, :, :, :got]):
                problems.append(f"text {i}: {got} tokens are wrong")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert problems == []
    assert loaded[0] > 0
    store.flush()
    store._check()
    stats = store.stats()
    assert stats.leases == stats.reservations == 0
    assert stats.tiers[0].evictions > 0


def test_stats_and_events_say_what_happened(open_store) -> None:
    events: list[lmkv.Event] = []
    store = open_store(events=events)
    text = np.arange(20, dtype=np.uint32)
    store.store(text, kv_of(text))
    store.flush()
    load(store, text)
    stats = store.stats()
    assert (stats.lookups, stats.lookup_tokens, stats.hit_tokens, stats.stored_tokens) == (1, 20, 20, 20)
    assert [(tier.name, tier.chunks, tier.hit_tokens) for tier in stats.tiers] == [("ram", 3, 20), ("disk", 3, 0)]
    assert stats.as_dict()["tiers"][1]["written_chunks"] == 3
    assert [(event.kind, event.tier) for event in events] == [("stored", "ram"), ("stored", "disk")]
    store.close()
    store = open_store(events=events)
    load(store, text)
    assert [(tier.name, tier.hit_tokens) for tier in store.stats().tiers] == [("ram", 0), ("disk", 20)]
    assert sum(int(str(event.detail["tokens"])) for event in events if event.kind == "loaded") == 20


def test_a_listener_that_raises_does_no_harm(tmp_path: Path) -> None:
    def listener(event: lmkv.Event) -> None:
        raise RuntimeError(event.kind)

    config = lmkv.StoreConfig(model="m", disk_capacity=0)
    with lmkv.Store(config, layout_of(8), on_event=listener) as store:
        text = np.arange(8, dtype=np.uint32)
        assert store.store(text, kv_of(text)) == 8


def test_clear_drops_everything_and_leases_hold_on(open_store) -> None:
    store = open_store()
    text = np.arange(32, dtype=np.uint32)
    store.store(text, kv_of(text))
    store.flush()
    lease = store.lease(store.lookup(text[:10]))
    store.clear()
    assert store.lookup(text).hit_tokens == 0, "what is leased is found no more"
    store._check()
    other = text + 7
    assert store.store(other, kv_of(other)) == 32
    out = np.zeros((LAYERS, 2, HEADS, 10, SIZE), np.float32)
    assert store.retrieve(lease, out) == 10
    assert np.array_equal(out, kv_of(text)[:, :, :, :10])
    used = store._ram.pool.used
    lease.release()
    assert store._ram.pool.used == used - len(lease.nodes)
    assert store.lookup(text).hit_tokens == 0
    store._check()


def test_the_disk_keeps_what_ram_lost(open_store) -> None:
    store = open_store(ram_capacity=4 * 8192)
    texts = [np.arange(i * 1000, i * 1000 + 24, dtype=np.uint32) for i in range(5)]
    for text in texts:
        store.store(text, kv_of(text))
        store.flush()
    for text in texts:
        match, got, out = load(store, text)
        assert match.hit_tokens == got == 24
        assert np.array_equal(out, kv_of(text))
    store._check()


def test_the_disk_quota_makes_the_least_used_go(open_store) -> None:
    store = open_store(disk_capacity=512 * 1024, ram_capacity=8 * 8192)
    texts = [np.arange(i * 1000, i * 1000 + 16, dtype=np.uint32) for i in range(60)]
    for text in texts:
        store.store(text, kv_of(text))
        load(store, texts[0])
        store.flush()
    disk = store.stats().tiers[1]
    assert disk.used_bytes <= disk.capacity_bytes < 512 * 1024
    assert disk.evictions > 0
    store.close()
    store = open_store(disk_capacity=512 * 1024)
    assert store.lookup(texts[0]).hit_tokens == 16
    assert store.lookup(texts[-1]).hit_tokens == 16
    assert store.lookup(texts[1]).hit_tokens == 0
    store._check()
    store._slow[0].backend._check()
