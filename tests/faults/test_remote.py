"""A remote tier that is late, failing or damaged costs a miss at most: never wrong bytes, never an exception, never a wait
beyond its deadline. The tiers are reached through real entry points.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import known_kv
import pytest
import remotes

import lmkv
from lmkv.backends.disk import directory
from lmkv.chunks import TokenChunker
from lmkv.record import HEADER_BYTES, payload_offset, seal
from lmkv.testing.faults import flip_bit, truncate

LAYOUT = lmkv.KVLayout.dense(layers=2, heads=2, head_size=8, dtype="float16", chunk_tokens=16)
TOKENS = list(range(1000, 1070))  # 70 tokens: four full chunks and one of six
HANG = 3600.0

Result = TypeVar("Result")
Register = Callable[[str, str, str], None]


def soon(call: Callable[[], Result]) -> Result:
    """``call()``, which must not hang."""
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    thread.join(60)
    assert results, "the call did not come back"
    return results[0]


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that other threads bring about."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come about")


class Setup:
    """Stores in front of one server."""

    def __init__(self, register: Register) -> None:
        for kind in ("healthy", "slow", "flaky", "flipping"):
            register("lmkv.backends", kind, f"remotes:{kind}")
        self.server = remotes.new_server()
        self.events: list[lmkv.Event] = []
        self.stores: list[lmkv.Store] = []

    def open(self, kind: str, deadline: float = 30.0, codec: str = "raw", **options: Any) -> lmkv.Store:
        tier = lmkv.TierConfig(
            kind, name="remote", deadline_seconds=deadline, codec=codec, options={"server": self.server, **options}
        )
        config = lmkv.StoreConfig(
            model="m", ram_capacity=1 << 20, disk_capacity=0, tiers=(tier,), breaker_failures=3, breaker_seconds=0.05
        )
        self.stores.append(lmkv.Store(config, LAYOUT, on_event=self.events.append))
        return self.stores[-1]

    def fill(self, codec: str = "raw") -> None:
        """Put the text on the server, through a good connection."""
        store = self.open("healthy", codec=codec)
        assert store.store(TOKENS, known_kv.source(LAYOUT, TOKENS)) == 70
        assert store.flush(60)
        store.close()
        self.events.clear()

    @property
    def backend(self) -> remotes.Server:
        return remotes.SERVERS[self.server]

    @property
    def connection(self) -> Any:
        return remotes.CONNECTIONS[self.server]

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


@pytest.fixture
def setup(register: Register) -> Iterator[Setup]:
    made = Setup(register)
    yield made
    for store in made.stores:
        soon(lambda store=store: store.close(1.0) or True)  # type: ignore[misc]


def keys_of(store: lmkv.Store) -> list[lmkv.ChunkKey]:
    return TokenChunker(store.namespace, LAYOUT.chunk_tokens).prefix_keys(TOKENS)


# -- healthy -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["raw", "blosc2"])
def test_another_store_finds_what_one_left(setup: Setup, codec: str) -> None:
    if codec == "blosc2":
        pytest.importorskip("blosc2")
    setup.fill(codec)
    store = setup.open("healthy", codec=codec)
    match = store.lookup(TOKENS).wait(30)
    assert not match.pending
    assert match.hit_tokens == 70, "the short last chunk is the same text's, so its key is known"
    assert match.tokens_by_tier() == {"remote": 70}
    assert known_kv.fetch(store, TOKENS, match) == 70
    assert store.lookup(TOKENS).tokens_by_tier() == {"ram": 70}
    store._check()


def test_codecs_may_differ_from_store_to_store(setup: Setup) -> None:
    pytest.importorskip("blosc2")
    for wrote, reads in (("raw", "blosc2"), ("blosc2", "raw")):
        setup.server = remotes.new_server()
        setup.fill(wrote)
        store = setup.open("healthy", codec=reads)
        assert known_kv.fetch(store, TOKENS, store.lookup(TOKENS).wait(30)) == 70, f"{wrote} read by {reads}"
        assert "corrupt" not in setup.kinds()


# -- late --------------------------------------------------------------------------------------------------------------------


def test_a_lookup_never_waits(setup: Setup) -> None:
    setup.fill()
    store = setup.open("slow", seconds=HANG, operations=["contains_many"])
    for _ in range(3):
        match = soon(lambda: store.lookup(TOKENS))
        assert match.pending
        assert match.hit_tokens == 0
    assert soon(lambda: match.wait(0.05)).pending


def test_a_pending_lookup_is_answered_later(setup: Setup) -> None:
    setup.fill()
    store = setup.open("slow", seconds=0.3, operations=["contains_many"])
    match = store.lookup(TOKENS)
    assert match.pending
    match = match.wait(30)
    assert not match.pending
    assert match.hit_tokens == 70
    assert known_kv.fetch(store, TOKENS, match) == 70


def test_what_is_in_ram_does_not_wait_for_the_remote_tier(setup: Setup) -> None:
    store = setup.open("slow", seconds=HANG)
    assert store.store(TOKENS, known_kv.source(LAYOUT, TOKENS)) == 70
    match = soon(lambda: store.lookup(TOKENS))
    assert (match.pending, match.hit_tokens) == (False, 70)
    assert soon(lambda: known_kv.fetch(store, TOKENS, match)) == 70
    assert soon(lambda: store.flush(0.05)) is False
    match = soon(lambda: store.lookup([*TOKENS[:64], 5, 5, *range(30)]))
    assert match.hit_tokens == 64


def test_a_lookup_that_is_never_answered_is_a_miss(setup: Setup) -> None:
    setup.fill()
    store = setup.open("slow", deadline=0.1, seconds=HANG, operations=["contains_many"])
    assert store.lookup(TOKENS).pending
    until(lambda: not store.lookup(TOKENS).pending)
    assert store.lookup(TOKENS).hit_tokens == 0
    assert ("tier_failed", "lookup") in [(e.kind, e.detail.get("operation")) for e in setup.events]


def test_a_lease_waits_no_longer_than_its_deadline(setup: Setup) -> None:
    setup.fill()
    store = setup.open("slow", deadline=0.2, seconds=HANG, operations=["read_many"])
    match = store.lookup(TOKENS).wait(30)
    assert match.hit_tokens == 70
    with soon(lambda: store.lease(match)) as lease:
        assert lease.hit_tokens == 0
        assert lease.slots == []
    assert ("tier_failed", "read") in [(e.kind, e.detail.get("operation")) for e in setup.events]
    assert soon(lambda: store.store(TOKENS, known_kv.source(LAYOUT, TOKENS))) == 70, "work goes on"
    assert known_kv.fetch(store, TOKENS) == 70


def test_a_tier_that_always_answers_too_late_is_switched_off(setup: Setup) -> None:
    setup.fill()
    store = setup.open("slow", deadline=0.05, seconds=0.25, operations=["read_many"])
    for _ in range(4):
        match = store.lookup(TOKENS).wait(30)
        if match.hit_tokens == 0:  # switched off already
            break
        soon(lambda match=match: store.lease(match)).release()  # type: ignore[misc]
        until(lambda: store._loader.loading == 0)  # the late answer has come
        store._ram.clear()
    assert "tier_disabled" in setup.kinds()


def test_closing_does_not_wait_for_a_tier_that_hangs(setup: Setup) -> None:
    setup.fill()
    store = setup.open("slow", deadline=0.1, seconds=HANG)
    store.lookup(TOKENS)
    store.store(TOKENS, known_kv.source(LAYOUT, TOKENS))
    assert soon(lambda: store.close(0.2) or True)
    with pytest.raises(lmkv.StoreClosedError):
        store.lookup(TOKENS)


_HANGING = """
import known_kv, lmkv, remotes, test_layout
store = lmkv.Store(test_layout.config, test_layout.layout)
store.lookup(range(40))
store.store(range(40), known_kv.source(test_layout.layout, range(40)))
print("done", flush=True)
"""


def test_a_process_ends_though_a_tier_hangs(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "site" / "test_layout.py").write_text(
        "import lmkv\n"
        "layout = lmkv.KVLayout.dense(layers=2, heads=2, head_size=8, dtype='float16', chunk_tokens=16)\n"
        f"tier = lmkv.TierConfig('slow', deadline_seconds=0.1, options={{'server': 's', 'seconds': {HANG}}})\n"
        "config = lmkv.StoreConfig(ram_capacity=1 << 20, disk_capacity=0, tiers=(tier,))\n"
    )
    path = os.pathsep.join([str(tmp_path / "site"), str(Path(remotes.__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", _HANGING], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


# -- failing -----------------------------------------------------------------------------------------------------------------


def test_a_failing_tier_is_switched_off_and_on_again(setup: Setup) -> None:
    setup.fill()
    store = setup.open("flaky")
    setup.connection.fails = lambda operation, number: True
    for i in range(8):  # other texts, since an answer is believed for a while
        match = store.lookup([i, *TOKENS]).wait(30)
        assert match.hit_tokens == 0
    assert setup.kinds().count("tier_failed") >= 3
    assert "tier_disabled" in setup.kinds()
    asked = setup.connection.calls
    assert asked < 8, "a tier that is switched off is not asked"
    setup.connection.fails = lambda operation, number: False
    until(lambda: store.lookup(TOKENS).wait(30).hit_tokens == 70)
    assert "tier_enabled" in setup.kinds()
    assert known_kv.fetch(store, TOKENS, store.lookup(TOKENS).wait(30)) == 70
    assert store.stats().tiers[1].enabled


def test_a_tier_that_fails_once_in_a_while_stays(setup: Setup) -> None:
    setup.fill()
    store = setup.open("flaky")
    setup.connection.fails = lambda operation, number: number % 2 == 0
    for i in range(20):
        assert store.lookup([i, *TOKENS]).wait(30).hit_tokens == 0
    assert "tier_disabled" not in setup.kinds()


@pytest.mark.parametrize("error", [OSError, ValueError, KeyError, lmkv.BackendError, MemoryError])
def test_whatever_a_backend_raises_is_a_miss(setup: Setup, error: Callable[[str], Exception]) -> None:
    setup.fill()
    store = setup.open("flaky")
    setup.connection.error = error
    setup.connection.fails = lambda operation, number: operation == "read_many"
    match = store.lookup(TOKENS).wait(30)
    assert match.hit_tokens == 70
    with store.lease(match) as lease:
        assert lease.hit_tokens == 0
    reasons = [str(event.detail["reason"]) for event in setup.events if event.kind == "tier_failed"]
    assert reasons
    assert all(getattr(error, "__name__", "") in reason for reason in reasons)
    store._check()


def test_failing_writes_are_given_up_with_an_event(setup: Setup) -> None:
    store = setup.open("flaky")
    setup.connection.fails = lambda operation, number: True
    for i in range(6):
        assert store.store([i, *TOKENS], known_kv.source(LAYOUT, [i, *TOKENS])) == 71, "storing in RAM does not suffer"
        assert not store.flush(60)
    assert setup.kinds().count("write_dropped") == 6
    assert "tier_disabled" in setup.kinds()
    assert not any(setup.backend.contains_many(keys_of(store)))
    for i in range(6):
        assert known_kv.fetch(store, [i, *TOKENS]) == 71
    setup.connection.fails = lambda operation, number: False

    def written() -> bool:
        store._ram.clear()
        store.store(TOKENS, known_kv.source(LAYOUT, TOKENS))
        store.flush(60)
        return all(setup.backend.contains_many(keys_of(store)))

    until(written)
    assert "tier_enabled" in setup.kinds()
    store._check()


def test_a_failing_tier_does_not_hide_the_next_one(setup: Setup) -> None:
    setup.fill()
    broken = lmkv.TierConfig("flaky", name="broken", options={"server": remotes.new_server()})
    good = lmkv.TierConfig("healthy", name="good", options={"server": setup.server})
    config = lmkv.StoreConfig(model="m", ram_capacity=1 << 20, disk_capacity=0, tiers=(broken, good), breaker_failures=2)
    with lmkv.Store(config, LAYOUT, on_event=setup.events.append) as store:
        remotes.CONNECTIONS[str(broken.options["server"])].fails = lambda operation, number: True
        match = store.lookup(TOKENS).wait(30)
        assert match.tokens_by_tier() == {"good": 70}
        assert known_kv.fetch(store, TOKENS, match) == 70


def test_a_tier_that_is_switched_off_is_closed_all_the_same(register: Register, tmp_path: Path) -> None:
    register("lmkv.backends", "flaky_disk", "remotes:flaky_disk")
    path = str(tmp_path / "disk")
    tier = lmkv.TierConfig("flaky_disk", capacity=1 << 20, options={"path": path})
    config = lmkv.StoreConfig(ram_capacity=1 << 20, disk_capacity=0, tiers=(tier,), breaker_failures=1)
    with lmkv.Store(config, LAYOUT) as store:
        remotes.CONNECTIONS[path].fails = lambda operation, number: True
        assert store.lookup(TOKENS).hit_tokens == 0
        assert not store.stats().tiers[1].enabled
        assert path in directory._registry
    assert path not in directory._registry


# -- damaged -----------------------------------------------------------------------------------------------------------------

OFFSET = payload_offset(LAYOUT.chunk_tokens)
#: What every part of a record is, by the byte it begins at (see docs/format.md).
PLACES = {
    "magic": 0, "version": 8, "flags": 10, "payload offset": 12, "key": 16, "parent": 32, "root": 48, "layout": 64, "start": 80,
    "token count": 84, "codec": 88, "reserved": 100, "payload bytes": 104, "payload checksum": 112, "header checksum": 120,
    "first token": HEADER_BYTES, "last token": HEADER_BYTES + 63, "payload": OFFSET, "end": OFFSET + LAYOUT.chunk_bytes - 1,
}  # fmt: skip


def damaged_third(setup: Setup, store: lmkv.Store, damage: Callable[[memoryview], int]) -> Callable[[memoryview], int]:
    """``damage`` for the record of the third chunk only."""
    third = bytes(keys_of(store)[2])
    return lambda value: damage(value) if bytes(value[16:32]) == third else len(value)


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_is_a_miss(setup: Setup, place: int, bit: int) -> None:
    setup.fill()
    store = setup.open("flipping")
    setup.connection.damage = damaged_third(setup, store, flip_bit(place * 8 + bit))
    match = store.lookup(TOKENS).wait(30)
    assert match.hit_tokens == 70
    assert known_kv.fetch(store, TOKENS, match) == 32, "what comes before the damage is served, and proved"
    third = keys_of(store)[2]
    corrupt = [event for event in setup.events if event.kind == "corrupt"]
    assert [(event.tier, event.detail["key"]) for event in corrupt] == [("remote", third.hex())]
    assert not setup.backend.contains_many([third])[0], "a damaged record is deleted"
    setup.connection.damage = None
    assert store.store(TOKENS, known_kv.source(LAYOUT, TOKENS)) == 16, "only the damaged chunk is missing"
    assert store.flush(60)
    assert setup.backend.contains_many([third])[0]
    assert known_kv.fetch(store, TOKENS, store.lookup(TOKENS).wait(30)) == 70
    store._check()


@pytest.mark.parametrize("size", [0, 1, 127, HEADER_BYTES, OFFSET - 1, OFFSET, OFFSET + LAYOUT.chunk_bytes - 1])
def test_a_cut_record_is_a_miss(setup: Setup, size: int) -> None:
    setup.fill()
    store = setup.open("flipping")
    setup.connection.damage = damaged_third(setup, store, truncate(size))
    assert known_kv.fetch(store, TOKENS, store.lookup(TOKENS).wait(30)) == 32
    assert setup.kinds().count("corrupt") == 1
    store._check()


def test_damage_where_nothing_stands_does_no_harm(setup: Setup) -> None:
    setup.fill()
    store = setup.open("flipping")
    setup.connection.damage = flip_bit((HEADER_BYTES + 64) * 8)  # between tokens and payload
    assert known_kv.fetch(store, TOKENS, store.lookup(TOKENS).wait(30)) == 70
    assert "corrupt" not in setup.kinds()


@pytest.mark.parametrize("part", ["payload", "end"])
def test_damage_in_encoded_payloads(setup: Setup, part: str) -> None:
    pytest.importorskip("blosc2")
    setup.fill("blosc2")
    store = setup.open("flipping", codec="blosc2")
    setup.connection.damage = damaged_third(setup, store, flip_bit(OFFSET * 8 + 40 if part == "payload" else -1))
    assert known_kv.fetch(store, TOKENS, store.lookup(TOKENS).wait(30)) == 32
    assert setup.kinds().count("corrupt") == 1


def record(setup: Setup, key: lmkv.ChunkKey) -> bytes:
    buffer = memoryview(bytearray(1 << 16))
    (size,) = setup.backend.read_many([key], [buffer])
    assert size is not None
    return bytes(buffer[:size])


def test_whole_records_of_other_chunks_are_misses(setup: Setup) -> None:
    setup.fill()
    store = setup.open("healthy")
    keys = keys_of(store)
    for wrong in (keys[0], keys[3], keys[4]):
        setup.backend.write_many([keys[2]], [memoryview(record(setup, wrong))])
        setup.events.clear()
        store._ram.clear()
        assert known_kv.fetch(store, TOKENS, store.lookup(TOKENS).wait(30)) == 32
        assert setup.kinds().count("corrupt") == 1
        until(lambda: not store.lookup(TOKENS).pending)


def test_a_record_that_lies_about_its_tokens_is_a_miss(setup: Setup) -> None:
    setup.fill()
    store = setup.open("healthy")
    keys = keys_of(store)
    lying = memoryview(bytearray(record(setup, keys[2])))
    names = {"key": keys[2], "parent": keys[1], "root": store.namespace.root, "layout": LAYOUT.fingerprint, "start": 32}
    seal(lying, **names, tokens=bytes(64), offset=OFFSET, payload_bytes=LAYOUT.chunk_bytes)  # type: ignore[arg-type]
    setup.backend.write_many([keys[2]], [lying])
    assert known_kv.fetch(store, TOKENS, store.lookup(TOKENS).wait(30)) == 32
    assert setup.kinds().count("corrupt") == 1


def test_records_of_another_layout_are_misses(setup: Setup) -> None:
    other = lmkv.KVLayout.dense(layers=2, heads=2, head_size=8, dtype="bfloat16", chunk_tokens=16)
    tier = lmkv.TierConfig("healthy", name="remote", options={"server": setup.server})
    config = lmkv.StoreConfig(model="m", ram_capacity=1 << 20, disk_capacity=0, tiers=(tier,))
    with lmkv.Store(config, other) as store:
        store.store(TOKENS, known_kv.source(other, TOKENS))
        assert store.flush(60)
        theirs = TokenChunker(store.namespace, 16).prefix_keys(TOKENS)
    store = setup.open("healthy")
    assert store.lookup(TOKENS).wait(30).hit_tokens == 0, "other keys"
    keys = keys_of(store)
    setup.backend.write_many(keys, [memoryview(record(setup, key)) for key in theirs])
    store = setup.open("healthy")
    assert known_kv.fetch(store, TOKENS, store.lookup(TOKENS).wait(30)) == 0, "even under our keys"
    assert setup.kinds().count("corrupt") == 5
