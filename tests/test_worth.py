"""What is loaded and what is computed: decided by what tiers took before and how quick the caller is."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import known_kv
import pytest
import remotes
from hypothesis import given
from hypothesis import strategies as st

import lmkv
from lmkv.handles import Match, Tail
from lmkv.tiers.speed import ReadSpeed
from lmkv.worth import PrefillSpeed, worthwhile

LAYOUT = lmkv.KVLayout.dense(layers=2, heads=2, head_size=8, dtype="float16", chunk_tokens=16)
TEXT = list(range(1000, 1160))  # ten full chunks
WIDTH = 16


def speed_of(bytes_per_second: float, latency: float = 0.0) -> ReadSpeed:
    speed = ReadSpeed()
    for size in (1000, 20_000, 300_000, 1_000_000):
        speed.add(size, latency + size / bytes_per_second)
    return speed


def match_of(*runs: tuple[str, int], tail: tuple[str, int, int] | None = None) -> Match:
    """A match with runs of chunks in tiers; the tail's tier, tokens that serve, tokens it has."""
    count = sum(number for _, number in runs) + 1
    keys = [lmkv.ChunkKey(bytes([i]) * 16) for i in range(count)]
    end = Tail(keys[-1], bytes(4 * tail[2]), tail[1], tail[0]) if tail else None
    space = lmkv.Namespace.of(LAYOUT)
    return Match(space, WIDTH, keys, [bytes(4 * WIDTH)] * count, runs, end, pending=False, again=lambda _: None)  # type: ignore[arg-type,return-value]


#: 100 bytes a token, 1000 tokens a second: 100,000 bytes a second are as quick as computing.
def decide(match: Match, **speeds: ReadSpeed) -> int:
    return worthwhile(match, speeds, 100, 1000.0).hit_tokens


def test_what_is_quicker_is_loaded() -> None:
    assert decide(match_of(("disk", 4)), disk=speed_of(2e5)) == 64
    assert decide(match_of(("disk", 4)), disk=speed_of(5e4)) == 0


def test_what_is_in_ram_is_kept() -> None:
    assert decide(match_of(("ram", 3), ("far", 4)), far=speed_of(5e4)) == 48
    assert decide(match_of(("ram", 3))) == 48


def test_while_too_little_is_known_everything_is_loaded() -> None:
    assert decide(match_of(("disk", 4)), disk=ReadSpeed()) == 64


def test_a_slow_tier_behind_a_quick_one_is_cut_off() -> None:
    assert decide(match_of(("disk", 4), ("far", 2)), disk=speed_of(1e6), far=speed_of(5e4, 0.1)) == 64


def test_a_slow_gap_is_taken_for_what_stands_behind_it() -> None:
    assert decide(match_of(("far", 1), ("ram", 8)), far=speed_of(2e4)) == 9 * WIDTH
    assert decide(match_of(("far", 1), ("ram", 8)), far=speed_of(2e4, 1.0)) == 0, "not for any price"


def test_latency_needs_enough_tokens_to_pay() -> None:
    far = speed_of(1e9, latency=0.1)
    assert decide(match_of(("far", 5)), far=far) == 0
    assert decide(match_of(("far", 8)), far=far) == 8 * WIDTH


def test_tiers_are_read_side_by_side() -> None:
    both = {"disk": speed_of(1e9, 0.1), "far": speed_of(1e9, 0.1)}
    assert decide(match_of(("disk", 5), ("far", 5)), **both) == 160


def test_a_tail_is_read_whole_for_what_of_it_serves() -> None:
    disk = speed_of(1e5)  # just as quick as computing
    assert decide(match_of(("ram", 1), tail=("disk", 16, 16)), disk=disk) == 32
    assert decide(match_of(("ram", 1), tail=("disk", 4, 16)), disk=disk) == 16


def test_a_tier_that_is_passed_over_is_tried_again_now_and_then() -> None:
    far = speed_of(5e4)
    decisions = [decide(match_of(("far", 4)), far=far) for _ in range(32)]
    assert decisions.count(64) == 2
    for _ in range(24):
        far.add(6400, 0.001)
    assert decide(match_of(("far", 4)), far=far) == 64


@given(
    runs=st.lists(st.tuples(st.sampled_from(["ram", "disk", "far"]), st.integers(1, 5)), max_size=6),
    disk=st.floats(1e3, 1e8),
    far=st.floats(1e3, 1e8),
    latency=st.floats(0, 0.5),
)
def test_no_other_cut_would_save_more(runs: list[tuple[str, int]], disk: float, far: float, latency: float) -> None:
    speeds = {"disk": speed_of(disk), "far": speed_of(far, latency)}

    def saved(count: int) -> float:
        sizes = {name: sum(n for tier, n in runs[:count] if tier == name) * WIDTH * 100 for name in speeds}
        waits = [speeds[name].seconds(size) or 0.0 for name, size in sizes.items() if size]
        return sum(n for _, n in runs[:count]) * WIDTH / 1000.0 - max(waits, default=0.0)

    chosen = worthwhile(match_of(*runs), speeds, 100, 1000.0)
    assert saved(len(chosen.runs)) == pytest.approx(max(saved(count) for count in range(len(runs) + 1)))
    assert list(chosen.runs) == runs[: len(chosen.runs)]


def test_how_quick_prompts_are_computed() -> None:
    speed = PrefillSpeed()
    for _ in range(2):
        speed.add(1000, 0.1)
        speed.add(4, 10.0)  # says more of a step than of the speed
        assert speed.tokens_per_second is None
    speed.add(1000, 5.0)
    assert speed.tokens_per_second == pytest.approx(10_000)


# -- a store ----------------------------------------------------------------------------------------------------------------


def test_a_store_learns_what_its_tiers_take(register: Callable[[str, str, str], None]) -> None:
    register("lmkv.backends", "slow", "remotes:slow")
    server = remotes.new_server()
    options = {"server": server, "seconds": 0.0, "operations": ["read_many"]}
    tier = lmkv.TierConfig("slow", name="remote", options=options)
    config = lmkv.StoreConfig(model="m", ram_capacity=1 << 20, disk_capacity=0, tiers=(tier,))
    with lmkv.Store(config, LAYOUT) as store:
        store.store(TEXT, known_kv.source(LAYOUT, TEXT))
        assert store.flush(60)
        connection: Any = remotes.CONNECTIONS[server]

        def again(count: int) -> Match:
            store._ram.clear()
            return store.lookup(TEXT[:count]).wait(30)

        def load(*counts: int) -> None:
            for count in counts:
                assert known_kv.fetch(store, TEXT[:count], again(count)) == count

        quick = 1e5
        assert store.worthwhile(again(160), quick).hit_tokens == 160, "nothing is known yet"
        connection.seconds = 0.05
        load(16, 32, 160)
        assert store.worthwhile(again(160), quick).hit_tokens == 0, "160 tokens are computed in 1.6 ms"
        assert store.worthwhile(again(160), 100.0).hit_tokens == 160, "or in 1.6 s"
        with store.lease(store.worthwhile(again(160), quick)) as lease:
            assert lease.hit_tokens == 0
        connection.seconds = 0.0
        load(*itertools.repeat(160, 24))
        assert store.worthwhile(again(160), 1000.0).hit_tokens == 160, "it became quick"
        for wrong in (0, -1.0, float("nan")):
            with pytest.raises(lmkv.ArgumentError, match="tokens_per_second"):
                store.worthwhile(again(16), wrong)


def test_loads_that_come_too_late_count_as_slow(register: Callable[[str, str, str], None]) -> None:
    """Also where the backend answers everything else in time, so that its breaker never opens."""
    register("lmkv.backends", "slow", "remotes:slow")
    register("lmkv.backends", "flaky", "remotes:flaky")
    server = remotes.new_server()
    tier = lmkv.TierConfig("flaky", name="remote", options={"server": server}, deadline_seconds=0.05)
    config = lmkv.StoreConfig(model="m", ram_capacity=1 << 20, disk_capacity=0, tiers=(tier,))
    with lmkv.Store(config, LAYOUT) as store:
        store.store(TEXT, known_kv.source(LAYOUT, TEXT))
        assert store.flush(60)
        connection: Any = remotes.CONNECTIONS[server]

        def late(operation: str, number: int) -> bool:
            if operation == "read_many":
                time.sleep(0.06)
                return True
            return False

        connection.fails = late
        for _ in range(3):
            store._ram.clear()
            assert store.prefetch(store.lookup(TEXT).wait(30)).result(30) == 0
        found = store.lookup(TEXT).wait(30)
        assert found.hit_tokens == 160
        assert store.worthwhile(found, 1e5).hit_tokens == 0
