"""Stores in front of a real S3 server and of a shared directory: faults are misses, and hits come back without a restart."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import known_kv
import obstore
import proxy
import pytest
import servers
import weed
from remote_client import DEADLINE, SLACK, TEXT, Client, other_text, until_served

LOGIN = {"access_key_id": weed.ACCESS, "secret_access_key": weed.SECRET}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[weed.S3Server]:
    with weed.s3_server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture
def between(server: weed.S3Server) -> Iterator[proxy.Proxy]:
    with proxy.Proxy(server.port) as running:
        yield running


def through(between: proxy.Proxy, prefix: str) -> str:
    return f"s3://kv-cache/{prefix}?endpoint=http://127.0.0.1:{between.port}"


def objects(server: weed.S3Server, prefix: str, each: Client, text: list[int] = TEXT) -> list[str]:
    return [f"{prefix}/{key[:2]}/{key}" for key in each.keys(text)]


def test_what_one_store_wrote_another_loads(client: Any, server: weed.S3Server) -> None:
    assert client(server.url("shared"), options=LOGIN).put()
    second = client(server.url("shared"), options=LOGIN)
    assert second.get() == 100
    assert "tier_failed" not in second.kinds()


@pytest.mark.parametrize("damage", ["truncated", "corrupted", "swapped", "longer", "empty"])
def test_damaged_objects_are_misses(client: Any, server: weed.S3Server, damage: str) -> None:
    mine = client(server.url(damage), options=LOGIN)
    assert mine.put()
    assert mine.put(other_text(3))
    bucket = server.bucket("kv-cache")
    victim, donor = objects(server, damage, mine)[2], objects(server, damage, mine, other_text(3))[2]
    data = bytearray(obstore.get(bucket, victim).bytes())
    if damage == "corrupted":
        data[random.Random(1).randrange(4096, len(data))] ^= 0x10
    value = {
        "truncated": bytes(data[:-1]),
        "corrupted": bytes(data),
        "swapped": bytes(obstore.get(bucket, donor).bytes()),
        "longer": bytes(data) + b"x",
        "empty": b"",
    }[damage]
    obstore.put(bucket, victim, value)
    assert mine.get() == 32
    assert {"corrupt", "load_failed", "tier_failed"} & set(mine.kinds())
    if damage in ("truncated", "corrupted", "swapped"):
        assert mine.put()
        assert mine.get() == 100, "what was damaged is written anew"


def test_stalled_replies_cost_the_deadline_and_then_nothing(client: Any, between: proxy.Proxy) -> None:
    mine = client(through(between, "stalled"), options=LOGIN, breaker_seconds=2.0)
    assert mine.put()
    between.stall()
    waits = []
    for number in range(20):
        asked = time.monotonic()
        assert mine.get(other_text(number)) == 0
        waits.append(time.monotonic() - asked)
    assert max(waits) < DEADLINE + SLACK
    assert sum(waits) < 6
    assert "tier_disabled" in mine.kinds()
    between.flow()
    assert until_served(mine, 15) < 5


@pytest.mark.parametrize("count", [0, 10, 300, 5000, 70_000, 150_000])
def test_connections_cut_after_some_bytes(client: Any, server: weed.S3Server, between: proxy.Proxy, count: int) -> None:
    assert client(server.url(f"cut-{count}"), options=LOGIN).put()
    mine = client(through(between, f"cut-{count}"), options=LOGIN, breaker_seconds=0.2)
    between.cut_after = count
    for _ in range(2):
        assert mine.get() in (0, 16, 32, 48, 64, 80, 96, 100)
    between.cut_after = None
    servers.until(lambda: mine.get() == 100, 15)
    mine.store._check()


def test_wrong_credentials_are_misses_and_are_not_told(client: Any, server: weed.S3Server) -> None:
    mine = client(server.url("x"), options={"access_key_id": weed.ACCESS, "secret_access_key": "a-wrong-secret"})
    assert mine.get() == 0
    mine.put()
    assert "tier_failed" in mine.kinds()
    told = repr(mine.events) + repr(mine.store.config)
    assert "a-wrong-secret" not in told
    assert weed.ACCESS not in told


def test_a_bucket_that_is_not_there(client: Any, server: weed.S3Server) -> None:
    mine = client(f"s3://no-such-bucket/x?endpoint={server.endpoint}", options={"skip_signature": "true"})
    assert mine.get() == 0
    assert not mine.put()


def test_killed_and_started_again(client: Any, tmp_path: Path) -> None:
    with weed.s3_server(tmp_path) as own:
        mine = client(own.url("x"), options=LOGIN, breaker_seconds=2.0)
        assert mine.put()
        assert mine.get() == 100
        own.kill()
        for number in range(6):
            assert mine.get(other_text(number)) == 0
        assert "tier_disabled" in mine.kinds()
        own.start()
        until_served(mine, 20)
        assert mine.slowest < DEADLINE + SLACK


# -- a shared directory ------------------------------------------------------------------------------------------------------

_OTHER_PROCESS = """
import sys, lmkv, known_kv
from remote_client import LAYOUT, TEXT, Client
mine = Client(sys.argv[1], options={})
print(mine.get(), flush=True)
mine.store.store(list(range(7000, 7050)), known_kv.source(LAYOUT, list(range(7000, 7050))))
mine.store.close()
"""


def test_two_processes_share_a_directory(client: Any, tmp_path: Path) -> None:
    url = (tmp_path / "shared").as_uri()
    mine = client(url, options={})
    assert mine.put()
    environment = {**os.environ, "PYTHONPATH": str(Path(known_kv.__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", _OTHER_PROCESS, url], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "100\n"), done.stderr
    assert mine.get(list(range(7000, 7050))) == 50


@pytest.mark.parametrize("place", [0, 20, 128, 190, 4096, 50_000, -1])
def test_a_flipped_bit_in_a_file_is_a_miss(client: Any, tmp_path: Path, place: int) -> None:
    mine = client((tmp_path / "shared").as_uri(), options={})
    assert mine.put()
    key = mine.keys()[2]
    path = tmp_path / "shared" / key[:2] / key
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert mine.get() == 32
    assert "corrupt" in mine.kinds()
    assert not path.exists()


def test_a_directory_that_goes_away_and_comes_back(client: Any, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    mine = client(folder.as_uri(), options={}, breaker_seconds=0.5)
    assert mine.put()
    folder.rename(tmp_path / "elsewhere")
    folder.write_text("in the way")
    assert mine.get(other_text(1)) == 0
    assert "tier_failed" in mine.kinds()
    folder.unlink()
    (tmp_path / "elsewhere").rename(folder)
    servers.until(lambda: mine.get() == 100, 10)
