"""lm:// as a backend, against LMKV's own server, and against one that keeps what no client asked it to."""

from __future__ import annotations

import dataclasses
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import ClassVar

import known_kv
import lm_servers
import pytest
import servers
from lm_servers import open_at
from proxy import Proxy

import lmkv
from lmkv.adapters.lmcache.lm_server import ServerLimits
from lmkv.backends import Backend, BackendSettings, open_backend
from lmkv.backends.lm_wire import ANSWER_BYTES, GREETING, Answer, Code, Command, HeaderError, Request, local_name
from lmkv.chunks import ChunkKey
from lmkv.errors import BackendUnavailableError, CapacityError, ConfigError, StoreClosedError
from lmkv.testing import BackendSuite

LAYOUT = lm_servers.LAYOUT
KEYS = [ChunkKey(bytes([i]) * 16) for i in range(1, 9)]


def fetch(backend: Backend, keys: list[ChunkKey], room: int = 1 << 16) -> list[bytes | None]:
    buffers = [memoryview(bytearray(room)) for _ in keys]
    sizes = backend.read_many(keys, buffers)
    return [None if size is None else bytes(buffer[:size]) for size, buffer in zip(sizes, buffers, strict=True)]


class TestLm(BackendSuite):
    persistent = True
    refuses_when_full = False
    examples = 12
    port: ClassVar[int]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _server(cls) -> Iterator[None]:
        with lm_servers.running() as server:
            cls.port = server.address[1]
            yield

    def make(self, settings: BackendSettings) -> Backend:
        options = {"prefix": f"{self.directory.name}:{settings.name}", **settings.options}
        url = f"lm://127.0.0.1:{self.port}"
        return open_backend("lm", dataclasses.replace(settings, capacity=0, url=url, options=options, deadline_seconds=20.0))


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("lm://", {}, "expected a url such as lm://localhost:65432"),
        ("lm://h:port", {}, "expected a url such as"),
        ("lm://h:1/path", {}, "expected a url such as"),
        ("lm://h:1", {"prefix": "a@b"}, "prefix: expected 1 to 80 printable"),
        ("lm://h:1?ttl=3", {}, "got 'ttl'"),
        ("lm://h:1", {"token": "t" * 150}, "token: expected at most 139 bytes; got 150"),
        ("lm://h:1", {"token": "t", "token_env": "T"}, "expected one of token and token_env"),
    ],
)
def test_what_is_wrong_is_refused(url: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_backend("lm", BackendSettings("remote", LAYOUT, url=url, options=options))


def test_a_capacity_is_the_servers() -> None:
    with pytest.raises(ConfigError, match="bounds itself"):
        open_backend("lm", BackendSettings("remote", LAYOUT, url="lm://h", capacity=1))


def test_a_store_keeps_and_finds_through_it() -> None:
    layout = lmkv.KVLayout.dense(layers=2, heads=2, head_size=8, dtype="float16", chunk_tokens=64)
    text = list(range(600))
    with lm_servers.running() as server:
        tiers = [{"url": f"lm://127.0.0.1:{server.address[1]}", "codec": "lossless", "deadline_seconds": 20}]
        config = lmkv.StoreConfig.from_dict({"model": "m", "disk_capacity": 0, "ram_capacity": "8MiB", "tiers": tiers})
        with lmkv.Store(config, layout) as store:
            assert store.store(text, known_kv.source(layout, text)) == 600
        with lmkv.Store(config, layout) as store:
            match = store.lookup(text).wait(20)
            assert match.tokens_by_tier() == {"lm": 600}
            assert known_kv.fetch(store, text, match) == 600
        with lm_servers.RawClient(server.address[1]) as client:  # a foreign value under one of its keys is a miss, not KV
            name = b"lmkv@1@0@%b@uint8" % match.hits[2].key.hex().encode()
            assert client.ask(lm_servers.EXIST, name) == 200
            client.put(name, b"x" * 4096)
        with lmkv.Store(config, layout) as store:
            assert known_kv.fetch(store, text, store.lookup(text).wait(20)) == 128


def test_it_connects_again_after_the_server_was_away() -> None:
    (port,) = servers.free_ports(1)
    backend = open_at(port, deadline=2.0)
    with pytest.raises(BackendUnavailableError, match="no connection"):
        backend.contains_many(KEYS[:1])
    from lmkv.adapters.lmcache.lm_server import LmServer
    from lmkv.adapters.lmcache.shelf import Shelf

    shelf = Shelf(1 << 20, "lru")
    for number in range(2):
        server = LmServer(shelf, "127.0.0.1", port, ServerLimits())
        server.start()
        assert fetch(backend, KEYS[:2]) == [[None, None], [b"value", None]][number]
        backend.write_many(KEYS[:1], [memoryview(b"value")])
        server.close()
    with pytest.raises(BackendUnavailableError):
        backend.read_many(KEYS[:1], [memoryview(bytearray(8))])
    backend.close()
    with pytest.raises(StoreClosedError):
        backend.contains_many(KEYS[:1])


@pytest.mark.parametrize("operation", ["lookup", "read", "write", "delete"])
def test_a_server_that_hangs_costs_the_deadline(operation: str) -> None:
    with lm_servers.running() as server, Proxy(server.address[1]) as proxy:
        backend = open_at(proxy.port, deadline=0.4)
        backend.write_many(KEYS[:2], [memoryview(b"value")] * 2)
        calls: dict[str, Callable[[], object]] = {
            "lookup": lambda: backend.contains_many(KEYS),
            "read": lambda: backend.read_many(KEYS, [memoryview(bytearray(10)) for _ in KEYS]),
            "write": lambda: backend.write_many(KEYS[2:], [memoryview(bytes(1 << 20))] * 6),
            "delete": lambda: backend.delete_many(KEYS[2:]),
        }
        proxy.stall()
        begin = time.monotonic()
        with pytest.raises(BackendUnavailableError, match="in time"):
            calls[operation]()
        assert time.monotonic() - begin < 10
        proxy.flow()
        assert fetch(backend, KEYS[:2]) == [b"value"] * 2


def test_a_connection_that_is_cut_in_a_value_gives_none_of_it() -> None:
    told: list[str] = []
    with lm_servers.running() as server, Proxy(server.address[1]) as proxy:
        backend = open_at(proxy.port, told=told)
        values = [bytes([i]) * 5000 for i in range(4)]
        backend.write_many(KEYS[:4], [memoryview(value) for value in values])
        backend.close()
        backend = open_at(proxy.port, told=told)
        proxy.cut_after = 36 + 36 + 5000 + 36 + 100  # the greeting, one value, and a bit of the next
        found = fetch(backend, KEYS[:4])
        assert found[0] == values[0]
        assert found[1] is None
        assert all(value in (None, values[i]) for i, value in enumerate(found))
        assert any("in the middle of a value" in line for line in told)


def test_answers_out_of_step_end_the_connection() -> None:
    with lm_servers.running() as server, Proxy(server.address[1]) as proxy:
        backend = open_at(proxy.port)
        backend.write_many(KEYS[:1], [memoryview(b"value")])
        proxy.damage = lambda data: b"\xff" * len(data)
        with pytest.raises(BackendUnavailableError, match="expected an answer of 200 or 400"):
            backend.contains_many(KEYS[:1])
        proxy.damage = None
        assert backend.contains_many(KEYS[:1]) == [True]


def test_what_the_server_does_not_keep_is_a_capacity_error() -> None:
    with lm_servers.running(limits=ServerLimits(most_bytes=100)) as server:
        backend = open_at(server.address[1])
        with pytest.raises(CapacityError, match="did not keep 1 of 2"):
            backend.write_many(KEYS[:2], [memoryview(b"short"), memoryview(bytes(101))])
        assert backend.contains_many(KEYS[:2]) == [False, False]
        assert "expected at most 100 bytes; got 101" in server.told[0]  # type: ignore[attr-defined]


def test_tokens() -> None:
    with lm_servers.running(limits=ServerLimits(token=b"secret")) as server:
        good = open_at(server.address[1], token="secret")
        good.write_many(KEYS[:1], [memoryview(b"value")])
        assert fetch(good, KEYS[:1]) == [b"value"]
        for options, message in (({}, "wants a token"), ({"token": "Secret"}, "refuses the token")):
            bad = open_at(server.address[1], **options)
            with pytest.raises(BackendUnavailableError, match=message) as caught:
                bad.contains_many(KEYS[:1])
            assert "ecret" not in str(caught.value).replace("refuses", "")


class Keeper:
    """What LMCache's own server does and LMKV's does not: it takes names apart and ends the connection over one that it can't,
    keeps values of no bytes, and ends the connection over a value whose writer ended within it."""

    def __init__(self, parts: int) -> None:
        self.parts, self.values, self.torn = parts, dict[bytes, bytes](), set[bytes]()
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            sock, _ = self.listening.accept()
            threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def serve(self, sock: socket.socket) -> None:
        stream = sock.makefile("rwb")
        with sock:
            while head := stream.read(186):
                request = Request.unpack(head)
                if request.key.count(b"@") + 1 != self.parts:
                    break
                answer = Answer(Code.SUCCESS)
                if request.command == Command.PUT:
                    self.values[request.key] = stream.read(request.length)
                    continue
                if request.command in (Command.GET, Command.EXIST) and request.key not in self.values:
                    answer = Answer(Code.FAIL)
                elif request.command == Command.GET:
                    answer = Answer(Code.SUCCESS, len(self.values[request.key]))
                stream.write(answer.pack())
                if request.key in self.torn and answer.length:
                    break
                stream.write(self.values[request.key] if answer.length else b"")
                stream.flush()
            stream.close()


@pytest.mark.parametrize("parts", [5, 6])
def test_names_follow_the_version_of_the_server(parts: int) -> None:
    keeper = Keeper(parts)
    backend = open_at(keeper.port)
    backend.write_many(KEYS[:3], [memoryview(b"a"), memoryview(b"b"), memoryview(b"c")])
    assert all(name.count(b"@") + 1 == parts and name.endswith(b"@uint8") for name in keeper.values)
    backend.delete_many([KEYS[1], KEYS[7]])
    assert sorted(map(len, keeper.values.values())) == [0, 1, 1]
    assert backend.contains_many(KEYS[:3]) == [True, False, True]
    assert fetch(backend, KEYS[:3]) == [b"a", None, b"c"]
    assert fetch(open_at(keeper.port), KEYS[:3]) == [b"a", None, b"c"]
    backend.write_many(KEYS[1:2], [memoryview(b"again")])
    assert backend.contains_many(KEYS[:3]) == [True] * 3


def test_a_value_that_the_server_breaks_over_is_absent() -> None:
    keeper, told = Keeper(5), list[str]()
    backend = open_at(keeper.port, told=told)
    backend.write_many(KEYS[:3], [memoryview(b"a"), memoryview(b"b"), memoryview(b"c")])
    keeper.torn.add(next(name for name in keeper.values if KEYS[1].hex().encode() in name))
    assert fetch(backend, KEYS[:3]) == [b"a", None, b"c"]
    assert len(told) == 1


def test_headers_refuse_what_they_cannot_say() -> None:
    with pytest.raises(HeaderError, match="expected a key of 1 to 150 bytes"):
        Request(Command.GET, b"k" * 151).pack()
    with pytest.raises(HeaderError, match="a value of at most"):
        Request(Command.PUT, b"k", 2**31).pack()
    assert Request.unpack(Request(Command.PUT, b"k", 8, 4, 0, (8, 0, 0, 0)).pack()).mismatch() == ""


# -- a client of the same machine ----------------------------------------------------------------------------------------------

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="abstract names of Unix sockets are Linux's")


def families(backend: Backend) -> list[socket.AddressFamily]:
    return [connection.sock.family for connection in backend._resting]  # type: ignore[attr-defined]


@ON_LINUX
@pytest.mark.parametrize("token", [{}, {"token": "secret"}])
def test_on_one_machine_values_go_over_a_unix_socket(token: dict[str, str]) -> None:
    limits = ServerLimits(token=token.get("token", "").encode())
    values = [bytes([i]) * 3_000_000 for i in range(3)]
    with lm_servers.running(limits=limits) as server:
        backend = open_at(server.address[1], **token)
        backend.write_many(KEYS[:3], [memoryview(value) for value in values])
        assert families(backend) == [socket.AF_UNIX]
        assert fetch(backend, KEYS[:4], 4_000_000) == [*values, None]
        servers.until(lambda: server.connections() == 1)  # the first one, by TCP, was let go
        if token:
            (numbers,) = {Answer.unpack(server._greeting).shape[2:]}
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.connect(local_name((numbers[0], numbers[1])))
                stranger.sendall(Request(Command.GET, b"lmkv@1@0@%b@uint8" % KEYS[0].hex().encode()).pack())
                assert Answer.unpack(stranger.recv(ANSWER_BYTES)).code == Code.FAIL
                assert stranger.recv(1) == b""
        server.close()
        with pytest.raises(BackendUnavailableError):
            backend.contains_many(KEYS)


@ON_LINUX
def test_it_stays_with_tcp_where_the_unix_socket_is_not_its_servers() -> None:
    with lm_servers.running() as server, Proxy(server.address[1]) as proxy:
        through = open_at(proxy.port)  # somebody wants it in between
        through.write_many(KEYS[:1], [memoryview(b"1234")])
        assert families(through) == [socket.AF_INET]
        shape = (GREETING, server.address[1], 1, 1)  # of a socket that is not there, as in another network namespace
        server._greeting = Answer(Code.SUCCESS, shape=shape).pack()
        backend = open_at(server.address[1])
        assert fetch(backend, KEYS[:1]) == [b"1234"]
        assert families(backend) == [socket.AF_INET]


@ON_LINUX
def test_a_server_with_one_place_left_is_served_by_tcp() -> None:
    with lm_servers.running(limits=ServerLimits(most_connections=1)) as server:
        backend = open_at(server.address[1])
        backend.write_many(KEYS[:1], [memoryview(b"1234")])
        assert families(backend) == [socket.AF_INET]


def test_lmcaches_clients_are_told_nothing_that_they_do_not_know() -> None:
    with lm_servers.running() as server, lm_servers.RawClient(server.address[1]) as client:
        client.sock.sendall(client.head(lm_servers.HEALTH, b"m@1@0@1@half"))
        answer = client.answer()
        assert len(answer) == 9
        assert (answer[0], answer[1], answer[8]) == (200, 0, 0)  # well, and no value follows
