"""Nothing from before a ``clear`` is found after it, whatever was under way at the time."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import known_kv
import lm_servers
import pytest
import remotes

import lmkv
from lmkv.index import Node

LAYOUT = lmkv.KVLayout.dense(layers=2, heads=2, head_size=64, dtype="float16", chunk_tokens=16)
TEXT, OTHER = list(range(70)), list(range(500, 570))


def opened(path: Path, **settings: Any) -> lmkv.Store:
    disk = {"disk_path": str(path), "disk_capacity": 4 << 20, "deadline_seconds": 0.5}
    return lmkv.Store(lmkv.StoreConfig(**{"ram_capacity": 1 << 20, "breaker_seconds": 0.5} | disk | settings), LAYOUT)


def keep(store: lmkv.Store, tokens: list[int]) -> None:
    assert store.store(tokens, known_kv.source(LAYOUT, tokens)) == len(tokens)


class _Halt:
    """A method of a backend's that goes on only once it is let."""

    def __init__(self, backend: Any, name: str, *, after: bool = False) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        call = getattr(backend, name)

        def halted(*given: Any) -> Any:
            done = call(*given) if after else None
            self.begun.set()
            assert self.go_on.wait(60)
            return done if after else call(*given)

        setattr(backend, name, halted)


def gone(store: lmkv.Store, tokens: list[int]) -> bool:
    return not store.lookup(tokens).hit_tokens and not known_kv.fetch(store, tokens)


def settled(store: lmkv.Store) -> None:
    until = time.monotonic() + 20
    while len(store._slow[0].writer) and time.monotonic() < until:
        time.sleep(0.01)
    store._check()


def test_a_load_under_way(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        keep(store, TEXT)
        assert store.flush(60)
    with opened(tmp_path) as store:
        halt = _Halt(store._slow[0].backend, "read_many", after=True)
        loading = store.prefetch(store.lookup(TEXT))
        assert halt.begun.wait(60)
        store.clear()
        halt.go_on.set()
        assert loading.result(60) == 0
        assert gone(store, TEXT)
        settled(store)


def test_a_reservation(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        reservation = store.reserve(TEXT)
        store.clear()
        assert reservation.commit() == 0
        assert gone(store, TEXT)
        keep(store, TEXT)
        assert known_kv.fetch(store, TEXT) == 70
        assert store.flush(60)
        settled(store)


@pytest.mark.parametrize("hangs", [True, False])
def test_writes_under_way_and_waiting(hangs: bool, tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        tier = store._slow[0]
        halt = _Halt(tier, "_create")
        keep(store, TEXT)
        assert halt.begun.wait(60)
        keep(store, OTHER)
        if not hangs:
            threading.Timer(0.1, halt.go_on.set).start()
        store.clear()
        assert gone(store, TEXT)
        assert gone(store, OTHER)
        halt.go_on.set()
        settled(store)
        keep(store, OTHER)
        assert store.flush(60)
    with opened(tmp_path) as store:
        assert gone(store, TEXT)
        assert known_kv.fetch(store, OTHER) == 70


def test_a_tier_that_fails_meanwhile(tmp_path: Path) -> None:
    with opened(tmp_path, breaker_failures=2) as store:
        keep(store, TEXT)
        assert store.flush(60)
        tier = store._slow[0]
        for _ in range(2):
            tier.breaker.failure("write", "a test")
        store.clear()
        assert gone(store, TEXT)
        until = time.monotonic() + 20
        while tier.backend.contains_many([store.lookup(TEXT).keys[0]])[0]:
            assert gone(store, TEXT)
            assert time.monotonic() < until, "it is cleared once it can be"
            time.sleep(0.02)
        keep(store, TEXT)
        assert store.flush(60)
        store._ram.clear()
        assert known_kv.fetch(store, TEXT) == 70
        settled(store)


def test_a_storage_that_cannot_be_cleared_is_told_of() -> None:
    events: list[lmkv.Event] = []
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(lm_servers.running())
        tier = lmkv.TierConfig(url=f"lm://127.0.0.1:{server.address[1]}", name="remote", deadline_seconds=30.0)
        config = lmkv.StoreConfig(ram_capacity=1 << 20, disk_capacity=0, tiers=(tier,))
        store = stack.enter_context(lmkv.Store(config, LAYOUT, on_event=events.append))
        keep(store, TEXT)
        assert store.flush(60)
        assert not store.clear()
        told = [event for event in events if event.kind == "tier_failed"]
        assert [event.detail["operation"] for event in told] == ["clear"]
        assert "is found again" in str(told[0].detail["reason"])
        assert store.lookup(TEXT).wait(60).hit_tokens == 70
        assert not store.stats().tiers[1].failures


def test_what_a_remote_tier_answered_before_is_not_believed(register: Callable[[str, str, str], None]) -> None:
    register("lmkv.backends", "healthy", "remotes:healthy")
    tier = lmkv.TierConfig("healthy", options={"server": remotes.new_server()})
    with lmkv.Store(lmkv.StoreConfig(ram_capacity=1 << 20, disk_capacity=0, tiers=(tier,)), LAYOUT) as store:
        keep(store, TEXT)
        assert store.flush(60)
        store._ram.clear()
        assert store.lookup(TEXT).wait(60).hit_tokens == 70
        assert store.clear()
        assert store.lookup(TEXT).wait(60).hit_tokens == 0


def test_a_long_text_is_cleared_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever counts the chunks before each chunk takes minutes, under the lock."""
    small = lmkv.KVLayout.dense(layers=1, heads=1, head_size=4, dtype="float16", chunk_tokens=4)
    with lmkv.Store(lmkv.StoreConfig(ram_capacity=32 << 20, disk_capacity=0), small) as store:
        texts = [list(range(4000)), [*range(2000), *range(5000, 7000)]]
        for tokens in texts:
            with store.reserve(tokens) as reservation:
                reservation.commit()
        lease = store.lease(store.lookup(texts[0][:40]))
        steps = 0
        index = type(store._ram.index)
        chain, children = index.chain, Node.iter_children

        def counted_chain(self: Any, node: Node) -> list[Node]:
            nonlocal steps
            found = chain(self, node)
            steps += len(found)
            return found

        def counted_children(self: Node) -> Iterator[Node]:
            nonlocal steps
            for child in children(self):
                steps += 1
                yield child

        monkeypatch.setattr(index, "chain", counted_chain)
        monkeypatch.setattr(Node, "iter_children", counted_children)
        chunks = len(store._ram.index)
        assert chunks == 1500
        store.clear()
        assert steps < 4 * chunks
        monkeypatch.undo()
        store._check()
        assert (len(store._ram.index), store._ram.detached) == (0, 10)
        lease.release()
        assert store._ram.detached == 0
        store._check()
