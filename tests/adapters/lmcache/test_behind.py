"""A tier behind an ``lm://`` server's memory: values outlive evictions and restarts, and whatever goes wrong is a miss."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import servers
from lm_servers import EXIST, GET, HEALTH, PUT, RawClient, running

from lmkv.adapters.lmcache.behind import Behind
from lmkv.adapters.lmcache.shelf import Value
from lmkv.errors import ConfigError

KEYS = [b"model@1@0@%x@half" % number for number in range(6)]


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("kind", ["file", "redis"])
def test_values_outlive_evictions_and_restarts(kind: str, tmp_path: Path) -> None:
    values = [os.urandom(100_000) for _ in KEYS]
    redis = servers.RedisServer(tmp_path).start() if kind == "redis" else None
    url = redis.url if redis else (tmp_path / "kv").as_uri()
    try:
        for turn in range(2):
            with running(capacity=250_000, tier=url) as server, RawClient(server.address[1]) as client:
                if not turn:
                    for key, value in zip(KEYS, values, strict=True):
                        client.put(key, value)
                    assert client.ask(EXIST, KEYS[-1]) == 200
                assert len(server.shelf._values) <= 2
                assert [client.ask(EXIST, key) for key in KEYS] == [200] * 6
                client.sock.sendall(client.head(2, KEYS[0]))
                assert client.answer() == (200, 100_000, 1, 2, 2, 1, 1, 25_000, 0)
                assert client.exact(100_000) == values[0]
                assert [client.get(key) for key in KEYS] == values
                assert client.get(b"another") is None
                assert server.told == []  # type: ignore[attr-defined]
    finally:
        if redis:
            redis.kill()


def test_a_deleted_or_refused_value_is_gone_there_too(tmp_path: Path) -> None:
    with running(tier=tmp_path.as_uri()) as server, RawClient(server.address[1]) as client:
        for key in KEYS[:3]:
            client.put(key, b"12345678")
        client.put(KEYS[0], b"")
        client.sock.sendall(client.head(PUT, KEYS[1], 8, (1, 1, 1, 1)) + b"87654321")
        assert [client.ask(EXIST, key) for key in KEYS[:3]] == [400, 400, 200]
        assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("damage", ["flipped", "head", "cut", "longer", "empty", "swapped"])
def test_damaged_values_are_misses_and_deleted(damage: str, tmp_path: Path) -> None:
    with running(tier=tmp_path.as_uri()) as server, RawClient(server.address[1]) as client:
        client.put(KEYS[0], b"12345678" * 100)
        client.put(KEYS[1], b"abcdefgh" * 100)
        assert client.ask(HEALTH, b"k") == 200
        found = {bytes(path.read_bytes()).find(b"abcd") > 0: path for path in files(tmp_path)}
        path, data = found[False], bytearray(found[False].read_bytes())
        if damage == "flipped":
            data[-3] ^= 4
        elif damage == "head":
            data[30] ^= 1
        elif damage == "swapped":
            data = bytearray(found[True].read_bytes())
        path.write_bytes({"cut": data[:-1], "longer": data + b"x", "empty": b""}.get(damage, data))
        server.shelf.remove(KEYS[0])
        assert client.get(KEYS[0]) is None
        assert "damaged and deleted" in server.told[0]  # type: ignore[attr-defined]
        assert client.ask(EXIST, KEYS[0]) == 400
        assert client.get(KEYS[1]) == b"abcdefgh" * 100
        assert not path.exists()


def test_a_tier_that_fails_costs_nothing_but_what_it_held(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    with running(tier=folder.as_uri()) as server, RawClient(server.address[1]) as client:
        client.put(KEYS[0], b"12345678")
        assert client.ask(EXIST, KEYS[0]) == 200
        shutil.rmtree(folder)
        folder.write_text("in the way")
        client.put(KEYS[1], b"12345678")
        assert [client.get(key) for key in KEYS[:2]] == [b"12345678"] * 2  # from memory
        server.shelf.remove(KEYS[1])
        assert client.get(KEYS[1]) is None
        assert [client.ask(EXIST, key) for key in KEYS[1:]] == [400] * 5
        (line,) = server.told  # type: ignore[attr-defined]
        assert "the tier behind failed to write" in line
        folder.unlink()
        time.sleep(1)  # its first rest
        client.put(KEYS[2], b"abcdefgh")
        assert client.ask(HEALTH, b"k") == 200
        servers.until(lambda: client.ask(EXIST, KEYS[2]) == 200 and files(folder))


def test_a_tier_that_hangs_is_left_alone(tmp_path: Path) -> None:
    (port,) = servers.free_ports(1)
    with running(tier=f"redis://127.0.0.1:{port}") as server, RawClient(server.address[1]) as client:
        begin = time.monotonic()
        assert [client.get(key) for key in KEYS * 20] == [None] * 120
        assert time.monotonic() - begin < 30
        client.put(KEYS[0], b"12345678")
        assert client.get(KEYS[0]) == b"12345678"


@pytest.mark.parametrize("url", ["/var/kv", "lmdb:///x", "memory://x", "lm://h:1", "nosuch://x", "redis://h:port"])
def test_what_is_no_tier_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        Behind(url, 1 << 20, print)


def test_values_of_other_keys_are_never_taken(tmp_path: Path) -> None:
    behind = Behind(tmp_path.as_uri(), 1 << 20, print)
    value = Value(memoryview(b"12345678"), 1, 2, (2, 1, 1, 2))
    behind.write(KEYS[0], value)
    found = behind.read(KEYS[0])
    assert found is not None
    assert (bytes(found.data), found.fmt, found.dtype, found.shape) == (b"12345678", 1, 2, (2, 1, 1, 2))
    (path,) = files(tmp_path)
    name = Behind._name(KEYS[1]).hex()
    (tmp_path / name[:2]).mkdir(exist_ok=True)
    shutil.copy(path, tmp_path / name[:2] / name)
    assert behind.contains(KEYS[1])
    assert behind.read(KEYS[1]) is None
    assert not behind.contains(KEYS[1])
    behind.close()


def test_the_command_finds_after_a_restart_what_it_kept(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; from lmkv.cli import main; sys.exit(main())", "serve", "127.0.0.1", "0"]
    for number in (signal.SIGKILL, signal.SIGTERM):
        with subprocess.Popen([*command, "--tier", tmp_path.as_uri()], stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                port = int(process.stdout.readline().split("lm://127.0.0.1:")[1].split(" ")[0])
                with RawClient(port) as client:
                    if number == signal.SIGKILL:
                        client.put(KEYS[0], b"12345678")
                        assert client.ask(HEALTH, b"k") == 200
                    assert client.get(KEYS[0]) == b"12345678"
                process.send_signal(number)
                assert process.wait(20) == (0 if number == signal.SIGTERM else -number)
            finally:
                process.kill()


def test_an_old_value_that_is_being_brought_does_not_replace_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        running(tier=tmp_path.as_uri()) as server,
        RawClient(server.address[1]) as reader,
        RawClient(server.address[1]) as writer,
    ):
        writer.put(KEYS[0], b"old-old-")
        assert writer.ask(EXIST, KEYS[0]) == 200
        server.shelf.remove(KEYS[0])  # as an eviction does
        assert server._behind is not None
        read, begun, go_on = server._behind.read, threading.Event(), threading.Event()

        def slowly(key: bytes) -> Value | None:
            value = read(key)
            begun.set()
            go_on.wait(1)
            return value

        monkeypatch.setattr(server._behind, "read", slowly)
        reader.sock.sendall(reader.head(GET, KEYS[0]))
        assert begun.wait(10)
        writer.put(KEYS[0], b"new-new-")
        threading.Timer(0.5, go_on.set).start()
        assert writer.ask(EXIST, KEYS[0]) == 200  # the new value was taken
        assert reader.answer()[0] == 200
        assert reader.exact(8) in (b"old-old-", b"new-new-")
        for client in (reader, writer):
            assert client.get(KEYS[0]) == b"new-new-"


@pytest.mark.parametrize("change", [b"new-new-", b""])
def test_what_a_tier_could_not_change_is_not_found_there_later(tmp_path: Path, change: bytes) -> None:
    folder = tmp_path / "kv"
    with running(tier=folder.as_uri()) as server, RawClient(server.address[1]) as client:
        client.put(KEYS[0], b"old-old-")
        assert client.ask(EXIST, KEYS[0]) == 200
        folder.rename(tmp_path / "away")
        folder.write_text("in the way")  # a share that is not mounted
        client.put(KEYS[0], change)
        assert client.ask(EXIST, KEYS[0]) == (200 if change else 400)
        server.shelf.remove(KEYS[0])  # as an eviction does
        folder.unlink()
        (tmp_path / "away").rename(folder)
        for _ in range(2):
            assert client.get(KEYS[0]) is None
            assert client.ask(EXIST, KEYS[0]) == 400
        servers.until(lambda: server._behind is not None and server._behind._breaker.allows())
        client.put(KEYS[0], b"last one")
        assert client.ask(EXIST, KEYS[0]) == 200
        server.shelf.remove(KEYS[0])
        assert client.get(KEYS[0]) == b"last one"
