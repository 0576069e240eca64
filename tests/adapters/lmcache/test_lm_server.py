"""LMKV's server of the lm:// protocol, through sockets: what clients do wrong costs them their connection at most."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import servers
from hypothesis import given
from hypothesis import strategies as st
from lm_servers import EXIST, GET, HEALTH, LIST, PUT, RawClient, running

from lmkv.adapters.lmcache.lm_server import LmServer, ServerLimits
from lmkv.adapters.lmcache.serve import parse_arguments
from lmkv.adapters.lmcache.shelf import Shelf, Value
from lmkv.adapters.lmcache.spares import Spares
from lmkv.errors import ConfigError

KEY = b"meta-llama/Llama-3.1-8B@1@0@-7542097a982a0d29@half"


def told(server: LmServer) -> list[str]:
    return server.told  # type: ignore[attr-defined,no-any-return]


def works(server: LmServer, key: bytes = KEY) -> None:
    """The next client is served, and finds no byte that it did not store."""
    with RawClient(server.address[1]) as client:
        client.put(key, b"0123456789ab")
        assert client.get(key) == b"0123456789ab"


def test_what_was_stored_is_found() -> None:
    with running() as server, RawClient(server.address[1]) as client:
        assert client.ask(HEALTH, KEY) == 200
        assert client.ask(EXIST, KEY) == 400
        assert client.get(KEY) is None
        value = os.urandom(1 << 20)
        client.put(KEY, value)
        assert client.ask(EXIST, KEY) == 200
        client.sock.sendall(client.head(GET, KEY))
        assert client.answer() == (200, len(value), 1, 2, 2, 1, 1, len(value) // 4, 0)
        assert client.exact(len(value)) == value
        client.put(KEY, b"other---")
        with RawClient(server.address[1]) as another:
            assert another.get(KEY) == b"other---"
        assert client.ask(LIST, KEY) == 400  # which LMCache's server never answers


def test_a_half_sent_value_is_not_there() -> None:
    with running() as server:
        with RawClient(server.address[1]) as client:
            client.put(KEY, b"the one before..")
            client.sock.sendall(client.head(PUT, KEY, 1000, (2, 1, 1, 250)) + b"x" * 999)
        with RawClient(server.address[1]) as client:
            servers.until(lambda: any("ended" in line for line in told(server)))
            assert client.get(KEY) in (None, b"the one before..")
        works(server)


def test_a_half_sent_header_is_no_request() -> None:
    with running() as server:
        with RawClient(server.address[1]) as client:
            client.sock.sendall(client.head(PUT, KEY, 8)[:100])
        works(server)
        servers.until(lambda: server.connections() == 0)


def test_a_client_that_stops_within_a_request_is_let_go() -> None:
    with running(limits=ServerLimits(patience_seconds=0.3)) as server, RawClient(server.address[1]) as client:
        assert client.ask(HEALTH, KEY) == 200
        time.sleep(0.5)  # between requests it may take its time
        assert client.ask(HEALTH, KEY) == 200
        client.sock.sendall(client.head(PUT, KEY, 1 << 20, (2, 1, 1, 1 << 18)) + b"x" * 10)
        assert client.answer() == ()
        assert any("in time" in line for line in told(server))
        works(server)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ((6, KEY), "expected a command of 1 to 5; got 6"),
        ((0, KEY), "got 0"),
        ((GET, b""), "expected a key"),
        ((GET, b"a\x01b"), "expected a key in printable characters"),
        ((PUT, KEY, -1), "expected a length of at least 0; got -1"),
    ],
)
def test_headers_without_sense_are_answered_and_end_the_connection(request_: tuple[int, ...], message: str) -> None:
    with running() as server:
        with RawClient(server.address[1]) as client:
            client.sock.sendall(client.head(*request_))  # type: ignore[arg-type]
            assert client.answer()[0] == 400
            assert client.answer() == ()
        assert message in told(server)[0]
        works(server)


def test_an_oversized_key_ends_the_connection() -> None:
    with running() as server:
        with RawClient(server.address[1]) as client:
            client.sock.sendall(client.head(GET, b"k" * 400))
            assert [client.answer()[0] for _ in range(2)] == [400, 400]  # the first 150 bytes are a key, the rest no header
            assert client.answer() == ()
        works(server)


@pytest.mark.parametrize("shape", [(2, 1, 1, 3), (2, 1, 1, 5), (0, 0, 0, 0), (2, 1, 1, -4), (2, 2**20, 2**20, 2**20)])
def test_a_length_that_contradicts_the_dimensions_is_not_kept(shape: tuple[int, ...]) -> None:
    with running() as server, RawClient(server.address[1]) as client:
        client.put(KEY, b"the one before..")
        client.sock.sendall(client.head(PUT, KEY, 16, shape) + b"y" * 16)
        assert client.get(KEY) is None  # neither the new bytes nor the ones that they were to replace
        assert "is not kept" in told(server)[0]
        assert client.ask(HEALTH, KEY) == 200  # the connection is in step


def test_unknown_element_types_and_formats_are_not_kept() -> None:
    with running() as server, RawClient(server.address[1]) as client:
        client.sock.sendall(client.head(PUT, KEY, 16, (16, 0, 0, 0), dtype=77) + b"y" * 16)
        assert client.ask(EXIST, KEY) == 400


def test_values_above_the_limit_and_above_the_quota_pass_by() -> None:
    with running(capacity=100_000, limits=ServerLimits(most_bytes=200_000)) as server, RawClient(server.address[1]) as client:
        client.put(b"small", b"1234")
        for size in (120_000, 400_000):
            client.put(KEY, bytes(size))
            assert client.ask(EXIST, KEY) == 400
        assert client.get(b"small") == b"1234"
        assert "do not fit into 100000" in told(server)[0]
        assert "expected at most 200000" in told(server)[1]


def test_the_least_recently_used_goes_first() -> None:
    with running(capacity=10 * (1000 + 512)) as server, RawClient(server.address[1]) as client:
        for number in range(10):
            client.put(b"key-%d" % number, bytes([number]) * 1000)
        assert client.get(b"key-0") == bytes(1000)
        client.put(b"key-10", b"x" * 1000)
        held = [number for number in range(11) if client.ask(EXIST, b"key-%d" % number) == 200]
        assert held == [0, 2, 3, 4, 5, 6, 7, 8, 9, 10]
        assert server.shelf.stats()["used_bytes"] <= server.shelf.capacity


def test_an_empty_value_deletes() -> None:
    with running() as server, RawClient(server.address[1]) as client:
        client.put(KEY, b"1234")
        client.put(KEY, b"")
        assert client.ask(EXIST, KEY) == 400
        assert server.shelf.stats()["used_bytes"] == 0


def test_more_connections_than_allowed_are_refused() -> None:
    with running(limits=ServerLimits(most_connections=2)) as server:
        with RawClient(server.address[1]) as first, RawClient(server.address[1]) as second:
            assert [client.ask(HEALTH, KEY) for client in (first, second)] == [200, 200]
            with RawClient(server.address[1]) as third:
                assert third.answer() == ()
            assert first.ask(HEALTH, KEY) == 200
        servers.until(lambda: server.connections() == 0)
        works(server)


def test_a_token_comes_first() -> None:
    with running(limits=ServerLimits(token=b"secret")) as server:
        for key in (b"lmkv-token:wrong", KEY):
            with RawClient(server.address[1]) as client:
                client.sock.sendall(client.head(HEALTH, key))
                assert client.answer()[0] == 400
                client.sock.sendall(client.head(GET, KEY))
                assert client.answer()[:1] in ((), (400,))
        with RawClient(server.address[1]) as client:
            assert client.ask(HEALTH, b"lmkv-token:secret") == 200
            client.put(KEY, b"1234")
            assert client.get(KEY) == b"1234"
        assert not any("secret" in line for line in told(server))


def test_many_clients_at_once_never_see_mixtures() -> None:
    errors: list[str] = []
    with running(capacity=1 << 20) as server:

        def work(number: int) -> None:
            with RawClient(server.address[1]) as client:
                for turn in range(60):
                    key = b"key-%d" % (turn % 7)
                    client.put(key, bytes([number * 16 + turn % 16]) * 40_000)
                    found = client.get(key)
                    if found is not None and (len(found) != 40_000 or len(set(found)) != 1):
                        errors.append(f"{number} found a mixture")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        servers.until(lambda: server.connections() == 0)
        assert server.shelf.stats()["used_bytes"] <= 1 << 20


@given(st.lists(st.binary(max_size=400), max_size=4))
def test_any_bytes_at_all(pieces: list[bytes]) -> None:
    with running(capacity=1 << 20, limits=ServerLimits(patience_seconds=0.2)) as server:
        with RawClient(server.address[1]) as client:
            for piece in pieces:
                try:
                    client.sock.sendall(piece)
                except OSError:
                    break
        works(server)


def room_of(shelf: Shelf, data: bytes) -> memoryview:
    room = shelf.reserve(len(data))
    assert room is not None
    room[:] = data
    return room


def test_promised_room_counts_and_is_given_back() -> None:
    shelf = Shelf(3 * 1512, "fifo")
    rooms = [room_of(shelf, bytes(1000)) for _ in range(3)]
    assert shelf.reserve(1000) is None
    shelf.release(rooms[0])
    shelf.put(b"a", Value(rooms[1], 1, 2, (0, 0, 0, 0)))
    shelf._check()
    assert shelf.reserve(1000) is not None  # what was given back
    assert shelf.reserve(1000) is not None  # in place of "a"
    assert not shelf.contains(b"a")
    shelf._check()


def test_no_memory_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*_: object) -> None:
        raise MemoryError

    with running() as server, RawClient(server.address[1]) as client:
        client.put(KEY, b"the one before..")
        assert client.ask(EXIST, KEY) == 200
        monkeypatch.setattr("lmkv.adapters.lmcache.spares.np.empty", empty)
        client.put(b"another", b"12345678")
        assert client.ask(EXIST, b"another") == 400
        assert client.get(KEY) == b"the one before.."
        monkeypatch.undo()
        server.shelf._check()
        assert server.shelf._promised == 0


# -- memory made ready ---------------------------------------------------------------------------------------------------------

MIB = 1 << 20


def test_rooms_of_the_usual_size_are_made_ready() -> None:
    spares = Spares(4 * MIB)
    first = spares.take(MIB)
    assert len(first) == MIB
    servers.until(lambda: len(spares._ready) == 4)
    rooms = [spares.take(MIB) for _ in range(6)]  # more than there are
    assert len({np.frombuffer(room, np.uint8).ctypes.data for room in rooms}) == 6, "one room was given out twice"
    servers.until(lambda: len(spares._ready) == 4)
    assert spares._held == 4 * MIB
    assert [len(spares.take(MIB + number)) for number in range(1, 8)] == [MIB + number for number in range(1, 8)]
    assert [len(room) for room in spares._ready] == [MIB] * 4  # short values now and then change nothing
    others = [spares.take(MIB + 1) for _ in range(2)]
    assert [len(other) for other in others] == [MIB + 1] * 2
    servers.until(lambda: [len(room) for room in spares._ready] == [MIB + 1] * 3)
    assert spares._held == 3 * (MIB + 1)


def test_small_and_very_large_rooms_are_not_made_ready() -> None:
    spares = Spares(4 * MIB)
    assert [len(spares.take(size)) for size in (0, 1, 1000, 4 * MIB + 1)] == [0, 1, 1000, 4 * MIB + 1]
    assert spares._thread is None
    assert Spares(0).take(MIB).nbytes == MIB


def test_no_memory_to_make_ready_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    spares = Spares(4 * MIB)
    real, failing = np.empty, [True]

    def empty(size: int, dtype: object) -> object:
        if failing[0] and threading.current_thread().name == "lmkv-serve-spares":
            raise MemoryError
        return real(size, dtype)

    monkeypatch.setattr("lmkv.adapters.lmcache.spares.np.empty", empty)
    spares.take(MIB)
    servers.until(lambda: not spares._size)
    assert not spares._ready
    failing[0] = False
    room = spares.take(MIB)
    assert len(room) == MIB
    servers.until(lambda: len(spares._ready) == 4)


def test_memory_is_used_again_when_its_last_use_ends() -> None:
    spares = Spares(4 * MIB)
    room = spares.take(MIB)
    part, where = room[MIB // 2 :], np.frombuffer(room, np.uint8).ctypes.data
    servers.until(lambda: len(spares._ready) == 4)
    del room
    others = [spares.take(MIB) for _ in range(4)]
    assert where not in {np.frombuffer(other, np.uint8).ctypes.data for other in others}, "a part of it is in use"
    servers.until(lambda: len(spares._ready) == 4)
    others += [spares.take(MIB)]
    del part
    assert len(spares._back) == 1
    again = spares.take(MIB)
    assert np.frombuffer(again, np.uint8).ctypes.data == where
    del again
    for _ in range(9):
        spares.take(MIB + 1)
    assert all(len(memory) == MIB + 1 for memory in spares._back), "of another size, it is of no use"


def test_what_is_being_read_stays_while_its_key_is_replaced() -> None:
    shelf = Shelf(16 * MIB, "lru", 4 * MIB)
    shelf.put(b"a", Value(room_of(shelf, b"a" * MIB), 1, 2, (0, 0, 0, 0)))
    kept = shelf.get(b"a")
    assert kept is not None
    for byte in range(32):
        shelf.put(b"a", Value(room_of(shelf, bytes([byte]) * MIB), 1, 2, (0, 0, 0, 0)))
        shelf.put(b"%d" % byte, Value(room_of(shelf, bytes([byte]) * MIB), 1, 2, (0, 0, 0, 0)))
    assert kept.data == b"a" * MIB
    shelf._check()


def test_what_is_ready_is_part_of_the_quota() -> None:
    value = os.urandom(MIB)
    shelf = Shelf(8 * MIB, "lru", 4 * MIB)
    for number in range(9):
        shelf.put(b"%d" % number, Value(room_of(shelf, value), 1, 2, (0, 0, 0, 0)))
        shelf._check()
    assert [shelf.contains(b"%d" % number) for number in range(9)] == [False] * 6 + [True] * 3
    kept = shelf.get(b"8")
    assert kept is not None
    assert kept.data == value
    assert shelf.reserve(4 * MIB) is None


# -- the command ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: host, port"),
        (["localhost", "x"], "invalid int value: 'x'"),
        (["localhost", "1", "cuda"], "device: expected cpu; got 'cuda'"),
        (["localhost", "70000"], "port: expected 0 to 65535"),
        (["0.0.0.0", "65432"], "Say --insecure"),
        (["localhost", "1", "--ram-capacity", "lots"], "ram_capacity: expected a size"),
        (["localhost", "1", "--max-value", "big"], "expected a size"),
        (["localhost", "1", "--ahead", "big"], "expected a size"),
        (["localhost", "1", "--ram-capacity", "1GiB", "--ahead", "600MiB"], "at most half"),
        (["localhost", "1", "--max-connections", "0"], "expected more than 0"),
        (["localhost", "1", "--ram-kapacity", "1"], "unrecognized arguments"),
        (["localhost", "1", "--token-file", "/nonexistent"], "expected a readable file"),
    ],
)
def test_wrong_arguments_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_arguments(argv, {})


def test_arguments(tmp_path: Path) -> None:
    options = parse_arguments(["localhost", "65432", "cpu"], {})  # as lmcache_server takes them
    assert (options.host, options.port, options.capacity, options.policy) == ("127.0.0.1", 65432, 4 << 30, "lru")
    (tmp_path / "lmc.yaml").write_text("max_local_cpu_size: 2\ncache_policy: LFU\n")
    options = parse_arguments(["0.0.0.0", "1", "--config", str(tmp_path / "lmc.yaml"), "--insecure", "--max_value=1MiB"], {})
    assert (options.capacity, options.policy, options.limits.most_bytes) == (2 << 30, "lfu", 1 << 20)
    assert options.warnings == ()
    (line,) = parse_arguments(["::1", "1"], {"LMCACHE_LOCAL_DISK": "/d", "LMCACHE_REMOTE_URL": "redis://h:1"}).warnings
    assert "disk_path, tiers of the configuration have no effect" in line
    assert "--tier URL" in line
    options = parse_arguments(["0.0.0.0", "1", "--ram-capacity", "8GiB"], {"LMKV_TOKEN": "t"})
    assert (options.capacity, options.limits.token) == (8 << 30, b"t")
    assert "LMKV_TOKEN" not in repr(options)
    assert parse_arguments(["::1", "1"], {}).host == "::1"
    sizes = {"8GiB": 256 << 20, "1GiB": 64 << 20, "16MiB": 1 << 20}
    assert {size: parse_arguments(["::1", "1", "--ram-capacity", size], {}).ahead for size in sizes} == sizes
    assert parse_arguments(["::1", "1", "--ahead", "0"], {}).ahead == 0


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no process ids elsewhere")
def test_a_signal_ends_it_whichever_thread_gets_it() -> None:
    command = [sys.executable, "-c", "import sys; from lmkv.cli import main; sys.exit(main())", "serve", "127.0.0.1", "0"]
    for main in (False, True, False):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            try:
                assert process.stdout is not None
                port = int(process.stdout.readline().split("lm://127.0.0.1:")[1].split(" ")[0])
                with RawClient(port) as client:
                    client.put(KEY, b"0123456789ab")
                    threads = [int(name) for name in os.listdir(f"/proc/{process.pid}/task")]
                    os.kill(process.pid if main else max(threads), signal.SIGTERM)
                    assert process.wait(20) == 0
            finally:
                process.kill()


def test_the_command_serves_until_it_is_told_to_stop() -> None:
    command = [sys.executable, "-c", "import sys; from lmkv.cli import main; sys.exit(main())", "serve", "127.0.0.1", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            port = int(line.split("lm://127.0.0.1:")[1].split(" ")[0])
            with RawClient(port) as client:
                client.put(KEY, b"1234")
                assert client.get(KEY) == b"1234"
                process.send_signal(signal.SIGTERM)
                _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "puts 1" in errors


def test_an_address_in_use_is_said() -> None:
    with running() as server:
        command = [sys.executable, "-c", "import sys; from lmkv.cli import main; sys.exit(main())", "serve", "127.0.0.1"]
        done = subprocess.run([*command, str(server.address[1])], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "expected to listen on 127.0.0.1" in done.stderr
