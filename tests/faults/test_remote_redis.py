"""Stores in front of real Redis servers that die, stall, lie or fill up: a miss at most, and hits again without a restart."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import known_kv
import proxy
import pytest
import servers
from remote_client import DEADLINE, LAYOUT, SLACK, TEXT, other_text, until_served

import lmkv


@pytest.fixture
def server(tmp_path: Path) -> Iterator[servers.RedisServer]:
    with servers.RedisServer(tmp_path) as running:
        yield running


@pytest.fixture
def between(server: servers.RedisServer) -> Iterator[proxy.Proxy]:
    with proxy.Proxy(server.port) as running:
        yield running


def test_what_one_store_wrote_another_loads(client: Any, server: servers.RedisServer) -> None:
    assert client(server.url).put()
    second = client(server.url)
    assert second.get() == 100
    stats = second.store.stats().tiers[1]
    assert (stats.read_chunks, stats.failures, stats.dropped_writes) == (7, 0, 0)
    assert stats.read_bytes == 7 * 4096 + 100 * LAYOUT.token_bytes
    assert stats.read_seconds > 0
    assert "tier_failed" not in second.kinds()


_OTHER_PROCESS = """
import sys, lmkv, known_kv
layout = lmkv.KVLayout.dense(layers=2, heads=8, head_size=64, dtype='float16', chunk_tokens=16)
tier = lmkv.TierConfig(url=sys.argv[1], name='remote', options={'part_bytes': 65536})
store = lmkv.Store(lmkv.StoreConfig(model='m', ram_capacity=8 << 20, disk_capacity=0, tiers=(tier,)), layout)
print(known_kv.fetch(store, list(range(1000, 1100)), store.lookup(list(range(1000, 1100))).wait(10)), flush=True)
store.store(list(range(7000, 7050)), known_kv.source(layout, list(range(7000, 7050))))
store.close()
"""


def test_two_processes_share(client: Any, server: servers.RedisServer) -> None:
    mine = client(server.url)
    assert mine.put()
    environment = {**os.environ, "PYTHONPATH": str(Path(known_kv.__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", _OTHER_PROCESS, server.url], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "100\n"), done.stderr
    assert mine.get(list(range(7000, 7050))) == 50, "what waited to be written was written when the store was closed"


# -- gone and back -----------------------------------------------------------------------------------------------------------


def test_killed_and_started_again(client: Any, server: servers.RedisServer) -> None:
    mine = client(server.url, breaker_seconds=2.0)
    assert mine.put()
    assert mine.get() == 100
    server.kill()
    for number in range(8):
        assert mine.get(other_text(number)) == 0
    assert mine.store.store(other_text(1), known_kv.source(LAYOUT, other_text(1))) == 101, "storing in RAM does not suffer"
    assert "tier_failed" in mine.kinds()
    assert "tier_disabled" in mine.kinds()
    stats = mine.store.stats().tiers[1]
    assert stats.failures >= 3
    assert stats.written_bytes == 7 * 4096 + 100 * LAYOUT.token_bytes
    server.start()
    assert until_served(mine, 10) < 5
    assert "tier_enabled" in mine.kinds() or mine.store.stats().tiers[1].enabled
    assert mine.slowest < DEADLINE + SLACK


def test_killed_between_lookup_and_load(client: Any, server: servers.RedisServer) -> None:
    mine = client(server.url)
    assert mine.put()
    mine.store._ram.clear()
    match = mine.store.lookup(TEXT).wait(DEADLINE)
    assert match.hit_tokens == 100
    server.kill()
    assert known_kv.fetch(mine.store, TEXT, match) == 0
    assert "tier_failed" in mine.kinds()
    mine.store._check()


def test_a_server_that_starts_late(client: Any, tmp_path: Path) -> None:
    server = servers.RedisServer(tmp_path)
    mine = client(server.url, breaker_seconds=2.0)
    assert not mine.put()
    assert mine.get() == 0
    with server:
        assert until_served(mine, 10) < 5


def test_a_server_that_is_still_loading(client: Any, server: servers.RedisServer, between: proxy.Proxy) -> None:
    mine = client(f"redis://127.0.0.1:{between.port}", breaker_seconds=0.5)
    loading = b"-LOADING Redis is loading the dataset in memory\r\n"
    between.damage = lambda data: loading
    assert mine.get() == 0
    assert not mine.put()
    between.damage = None
    until_served(mine, 10)


# -- stalled and cut ---------------------------------------------------------------------------------------------------------


def test_stalled_replies_cost_the_deadline_and_then_nothing(client: Any, between: proxy.Proxy) -> None:
    mine = client(f"redis://127.0.0.1:{between.port}", breaker_seconds=2.0)
    assert mine.put()
    between.stall()
    begun = time.monotonic()
    waits, number = [], 0
    while time.monotonic() < begun + 10:
        asked = time.monotonic()
        assert mine.get(other_text(number)) == 0
        assert mine.store.store(other_text(number), known_kv.source(LAYOUT, other_text(number))) > 0
        waits.append(time.monotonic() - asked)
        number += 1
        time.sleep(0.01)
    assert max(waits) < DEADLINE + SLACK
    assert sum(waits) < 8, "a tier that stalls is left alone soon"
    assert "tier_disabled" in mine.kinds()
    between.flow()
    assert until_served(mine, 10) < 5


def test_several_tiers_that_do_not_answer_cost_one_wait(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        deaf = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(5)]
        tiers = tuple(
            lmkv.TierConfig(url=f"redis://127.0.0.1:{one.getsockname()[1]}", name=f"deaf-{number}", deadline_seconds=DEADLINE)
            for number, one in enumerate(deaf)
        )
        store = stack.enter_context(lmkv.Store(lmkv.StoreConfig(ram_capacity=8 << 20, disk_capacity=0, tiers=tiers), LAYOUT))
        begun = time.monotonic()
        assert store.lookup(TEXT).wait(DEADLINE).hit_tokens == 0
        assert time.monotonic() - begun < DEADLINE + SLACK


def test_a_stalled_load_costs_the_deadline(client: Any, server: servers.RedisServer, between: proxy.Proxy) -> None:
    mine = client(f"redis://127.0.0.1:{between.port}")
    assert mine.put()
    mine.store._ram.clear()
    match = mine.store.lookup(TEXT).wait(DEADLINE)
    assert match.hit_tokens == 100
    between.stall()
    begun = time.monotonic()
    assert known_kv.fetch(mine.store, TEXT, match) == 0
    assert time.monotonic() - begun < DEADLINE + SLACK
    between.flow()
    servers.until(lambda: mine.store._loader.loading == 0)
    mine.store._check()


def test_closing_while_stalled(client: Any, between: proxy.Proxy) -> None:
    mine = client(f"redis://127.0.0.1:{between.port}")
    assert mine.put()
    between.stall()
    mine.store.lookup(other_text(1))
    mine.store.store(other_text(2), known_kv.source(LAYOUT, other_text(2)))
    begun = time.monotonic()
    mine.store.close(0.5)
    assert time.monotonic() - begun < 0.5 + 2 * SLACK


@pytest.mark.parametrize("count", [0, 1, 4, 5, 30, 40, 100, 4096, 65536, 70_000, 131_000, 200_000])
def test_connections_cut_after_some_bytes(client: Any, server: servers.RedisServer, between: proxy.Proxy, count: int) -> None:
    assert client(server.url).put()
    mine = client(f"redis://127.0.0.1:{between.port}", breaker_seconds=0.2)
    between.cut_after = count
    for _ in range(3):
        assert mine.get() in (0, 16, 32, 48, 64, 80, 96, 100)
        time.sleep(0.02)
    between.cut_after = None
    servers.until(lambda: mine.get() == 100, 10)
    mine.store._check()


@pytest.mark.parametrize("count", [0, 3, 50, 400])
def test_connections_cut_while_writing(client: Any, server: servers.RedisServer, between: proxy.Proxy, count: int) -> None:
    mine = client(f"redis://127.0.0.1:{between.port}", breaker_seconds=0.2)
    between.cut_after = count
    mine.put()
    reader = client(server.url)
    assert reader.get() in (0, 16, 32, 48, 64, 80, 96, 100), "what is visible is whole"
    between.cut_after = None
    until_served(mine, 10)


# -- lying -------------------------------------------------------------------------------------------------------------------


def parts_of(server: servers.RedisServer, key: str) -> list[bytes]:
    return sorted(name for name in server.client().keys("*") if key.encode() in name)


@pytest.mark.parametrize("damage", ["truncated", "corrupted", "swapped", "longer", "empty"])
@pytest.mark.parametrize("part", [0, 1])
def test_damaged_values_are_misses(client: Any, server: servers.RedisServer, damage: str, part: int) -> None:
    mine = client(server.url)
    assert mine.put()
    assert mine.put(other_text(3))
    redis = server.client()
    victim, donor = (parts_of(server, mine.keys(text)[2]) for text in (TEXT, other_text(3)))
    assert len(victim) == len(donor) == 2, "a head with the first part, and the second one"
    data = bytearray(redis.get(victim[part]))
    if damage == "corrupted":
        data[random.Random(part).randrange(len(data))] ^= 0x10
    value = {
        "truncated": bytes(data[:-1]),
        "corrupted": bytes(data),
        "swapped": redis.get(donor[part]),
        "longer": bytes(data) + b"x",
        "empty": b"",
    }[damage]
    redis.set(victim[part], value)
    assert mine.get() == 32, "what comes before the damage is served"
    assert {"corrupt", "load_failed"} & set(mine.kinds())
    assert mine.get() == 32
    assert mine.put()
    assert mine.get() == 100, "what was damaged is written anew"
    assert mine.get(other_text(3)) == 101
    mine.store._check()


def test_bytes_flipped_on_the_way(client: Any, server: servers.RedisServer, between: proxy.Proxy) -> None:
    assert client(server.url).put()
    mine = client(f"redis://127.0.0.1:{between.port}", breaker_seconds=0.1)
    rng = random.Random(7)

    def flip(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)

    between.damage = flip
    for _ in range(60):
        mine.get()  # proves every byte it is given
    between.damage = None
    until_served(mine, 10)


def test_a_server_that_answers_nonsense(client: Any, between: proxy.Proxy) -> None:
    rng = random.Random(3)
    for answer in (
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"$999999999999\r\n",
        b"$-7\r\n",
        b":1\r\n" * 400,
        b"*3\r\n",
        b"\r\n",
        b"x" * 9000,
        b"+OK\r\n" * 900,
    ):
        mine = client(f"redis://127.0.0.1:{between.port}", breaker_seconds=0.1)
        between.damage = lambda data, answer=answer: answer  # type: ignore[misc]
        assert mine.get() == 0
        mine.put()
        assert mine.get() == 0
        between.damage = lambda data: rng.randbytes(64)
        assert mine.get() == 0
        assert mine.slowest < DEADLINE + SLACK
        between.damage = None


# -- refused and full --------------------------------------------------------------------------------------------------------


def test_a_wrong_password_is_a_miss_and_is_not_told(client: Any, tmp_path: Path) -> None:
    with servers.RedisServer(tmp_path, "--requirepass", "right-secret") as guarded:
        for url in (f"redis://:wrong-secret@127.0.0.1:{guarded.port}", guarded.url):
            mine = client(url)
            assert mine.get() == 0
            mine.put()
            told = repr(mine.events) + repr(mine.store.config)
            assert "tier_failed" in mine.kinds()
            assert "secret" not in told
        right = client(f"redis://:right-secret@127.0.0.1:{guarded.port}")
        assert right.put()
        assert right.get() == 100
        assert "secret" not in repr(right.store.config)


def test_a_password_that_changes(client: Any, server: servers.RedisServer) -> None:
    mine = client(server.url, breaker_seconds=0.3)
    assert mine.put()
    admin = server.client()
    admin.config_set("requirepass", "new")
    admin.client_kill_filter(_type="normal")
    assert mine.get(other_text(1)) == 0
    assert "tier_failed" in mine.kinds()


def test_a_full_server_loses_writes_and_still_answers(client: Any, tmp_path: Path) -> None:
    with servers.RedisServer(tmp_path, "--maxmemory", "3mb", "--maxmemory-policy", "noeviction") as small:
        mine = client(small.url)
        assert mine.put()
        written = [number for number in range(6) if mine.put(other_text(number))]
        assert len(written) < 6
        assert "write_dropped" in mine.kinds()
        assert "tier_disabled" not in mine.kinds(), "being full is not being away"
        assert mine.get() == 100
        for number in written:
            assert mine.get(other_text(number)) == 101


def test_a_server_that_evicts_loses_hits_only(client: Any, tmp_path: Path) -> None:
    with servers.RedisServer(tmp_path, "--maxmemory", "4mb", "--maxmemory-policy", "allkeys-lru") as small:
        mine = client(small.url)
        served = 0
        for number in range(12):
            mine.put(other_text(number))
            served += mine.get(other_text(number)) > 0
        assert served >= 8, "it evicts among what is equally old to the second, and for its own replies, too"
        assert "tier_disabled" not in mine.kinds()
        assert mine.get(other_text(0)) < 101


# -- several nodes -----------------------------------------------------------------------------------------------------------


def test_sentinel_failover(client: Any, tmp_path: Path) -> None:
    with servers.redis_sentinels(tmp_path) as (nodes, _, url):
        mine = client(url)
        assert mine.put()
        assert mine.get() == 100
        nodes[0].kill()
        took = until_served(mine, 20)
        assert mine.slowest < DEADLINE + SLACK
        assert took < 5 + SLACK, f"writable and hits again after {took:.1f} s"


def test_a_master_that_hangs(client: Any, tmp_path: Path) -> None:
    with servers.redis_sentinels(tmp_path) as (nodes, _, url):
        mine = client(url)
        assert mine.put()
        nodes[0].signal(signal.SIGSTOP)
        until_served(mine, 20)
        nodes[0].signal(signal.SIGCONT)  # comes back as a replica, which refuses writes
        for number in range(5):
            assert mine.put(other_text(number)) or until_served(mine, 10)
            assert mine.get(other_text(number)) == 101
        assert mine.slowest < DEADLINE + SLACK


def test_a_cluster_that_loses_a_node(client: Any, tmp_path: Path) -> None:
    with servers.redis_cluster(tmp_path) as (nodes, url):
        mine = client(url, breaker_seconds=1.0)
        assert mine.put()
        assert mine.get() == 100
        nodes[1].kill()
        held = mine.get()
        assert held < 100, "the seven chunks are on all three nodes"
        mine.events.clear()
        for number in range(10):
            mine.put(other_text(number))
        got = [mine.get(other_text(number)) for number in range(10)]
        assert any(got), "what is on the other nodes is served"
        assert "tier_disabled" not in mine.kinds(), "one node of three is not the tier"
        assert mine.slowest < DEADLINE + SLACK
        nodes[1].start()
        until_served(mine, 20)
