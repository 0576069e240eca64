"""Redis, Valkey, Sentinel and Cluster as backends, each against real servers of its own."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import servers

from lmkv.backends import Backend, BackendSettings, open_backend
from lmkv.backends.base import Clearable
from lmkv.backends.redis.target import DEFAULT_PART, RedisTarget
from lmkv.chunks import ChunkKey
from lmkv.errors import BackendUnavailableError, CapacityError, ConfigError
from lmkv.layout import KVLayout
from lmkv.testing import BackendSuite

LAYOUT = KVLayout.dense(layers=1, heads=1, head_size=4, dtype="float32", chunk_tokens=16)
PART = 64 * 1024


class RedisSuite(BackendSuite):
    """What all topologies have in common."""

    offers = (Clearable,)
    persistent = True
    refuses_when_full = False
    examples = 12
    url: ClassVar[str]

    def make(self, settings: BackendSettings) -> Backend:
        prefix = f"{self.directory.name}:{settings.name}"
        options = {"prefix": prefix, **settings.options}
        url = type(self).url
        return open_backend(
            url.partition(":")[0],
            dataclasses.replace(settings, capacity=0, url=url, options=options, deadline_seconds=20.0),
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.RedisServer]:
    socket = tmp_path_factory.mktemp("socket") / "redis"
    with servers.RedisServer(tmp_path_factory.mktemp("redis"), "--unixsocket", str(socket)) as running:
        running.socket = socket  # type: ignore[attr-defined]
        yield running


class TestRedis(RedisSuite):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _server(cls, server: servers.RedisServer) -> None:
        cls.url = server.url


class TestValkey(RedisSuite):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        with servers.RedisServer(tmp_path_factory.mktemp("valkey"), binary=servers.valkey_binary()) as running:
            cls.url = f"valkey://127.0.0.1:{running.port}/3"
            yield


class TestSentinel(RedisSuite):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _servers(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        with servers.redis_sentinels(tmp_path_factory.mktemp("sentinel")) as (_, _, url):
            cls.url = url
            yield


class TestCluster(RedisSuite):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _servers(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        with servers.redis_cluster(tmp_path_factory.mktemp("cluster")) as (_, url):
            cls.url = url
            yield


class TestRedisOverASocket(RedisSuite):
    examples = 3

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _server(cls, server: Any) -> None:
        cls.url = f"unix://{server.socket}"


# -- values in parts ---------------------------------------------------------------------------------------------------------


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(16, "big"))


def value(number: int, size: int) -> bytes:
    return bytes((number + i) % 251 for i in range(997)) * (size // 997) + bytes([number]) * (size % 997)


def read(backend: Backend, keys: list[ChunkKey], room: int = 1 << 20) -> list[bytes | None]:
    buffers = [memoryview(bytearray(room)) for _ in keys]
    sizes = backend.read_many(keys, buffers)
    return [None if size is None else bytes(buffer[:size]) for size, buffer in zip(sizes, buffers, strict=True)]


@pytest.fixture
def backend(server: servers.RedisServer, request: pytest.FixtureRequest) -> Iterator[Any]:
    opened = open_backend(
        "redis",
        BackendSettings(
            "remote", LAYOUT, url=server.url, deadline_seconds=20, options={"prefix": request.node.name, "part_bytes": PART}
        ),
    )
    yield opened
    opened.clear()
    opened.close()


def names(server: servers.RedisServer, prefix: str) -> list[bytes]:
    return sorted(name for name in server.client().keys("*") if name.startswith(prefix.encode() + b":"))


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 2 * PART, 5 * PART + 123])
def test_values_of_any_size(backend: Backend, size: int) -> None:
    data = value(3, size)
    backend.write_many([key(1)], [memoryview(data)])
    assert read(backend, [key(1)]) == [data]
    buffer = memoryview(bytearray(max(0, size - 1)))
    if size:
        assert backend.read_many([key(1)], [buffer]) == [None], "a value larger than its buffer is absent"


def test_what_is_replaced_or_deleted_leaves_nothing_behind(
    backend: Backend, server: servers.RedisServer, request: pytest.FixtureRequest
) -> None:
    for size in (5 * PART, 2 * PART + 7, 10, 3 * PART):
        backend.write_many([key(1)], [memoryview(value(size % 200, size))])
        assert read(backend, [key(1)]) == [value(size % 200, size)]
        assert len(names(server, request.node.name)) == -(-size // PART), "the head has the first part"
        assert all(server.client().ttl(name) == -1 for name in names(server, request.node.name)), "nothing of it may expire"
    backend.delete_many([key(1)])
    assert names(server, request.node.name) == []


@pytest.mark.parametrize("lost", [0, 2, 3])
def test_a_missing_part_makes_the_value_absent(
    backend: Backend, server: servers.RedisServer, request: pytest.FixtureRequest, lost: int
) -> None:
    backend.write_many([key(1), key(2)], [memoryview(value(1, 5 * PART)), memoryview(value(2, 5 * PART))])
    victim = [
        name for name in names(server, request.node.name) if key(1).hex().encode() in name and name.endswith(b":%d" % lost)
    ]
    assert server.client().delete(*victim) == 1
    assert read(backend, [key(1), key(2)]) == [None, value(2, 5 * PART)]
    assert backend.contains_many([key(1), key(2)]) == [False, True], "so that it is written anew"
    assert len(names(server, request.node.name)) == 5, "the rest of it is gone, too"


@pytest.mark.parametrize("damage", [b"", b"x", b"y" * (PART - 1), b"z" * (PART + 1), b"w" * (4 * PART)])
def test_a_part_of_another_size_makes_the_value_absent(
    backend: Backend, server: servers.RedisServer, request: pytest.FixtureRequest, damage: bytes
) -> None:
    backend.write_many([key(1)], [memoryview(value(1, 3 * PART))])
    name = next(name for name in names(server, request.node.name) if name.endswith(b":1"))
    server.client().set(name, damage)
    assert read(backend, [key(1)]) == [None]
    backend.write_many([key(1)], [memoryview(value(1, 3 * PART))])
    assert read(backend, [key(1)]) == [value(1, 3 * PART)]


@pytest.mark.parametrize(
    "head", [b"", b"LKV1", b"\xff" * 32, b"LKV1" + b"\x01" * 28, b"LKV1" + b"\0\0\1\0" + b"\xff" * 24, b"LKV1" + bytes(40)]
)
def test_foreign_bytes_under_our_names_are_absent(
    backend: Backend, server: servers.RedisServer, request: pytest.FixtureRequest, head: bytes
) -> None:
    name = f"{request.node.name}:{{{key(1).hex()}}}"
    server.client().set(name, head)
    assert read(backend, [key(1)]) == [None]
    server.client().delete(name)
    server.client().rpush(name, "a list")
    assert read(backend, [key(1)]) == [None]
    backend.delete_many([key(1)])
    backend.write_many([key(1)], [memoryview(b"ours")])
    assert read(backend, [key(1)]) == [b"ours"]


def test_writers_of_one_key_never_mix(server: servers.RedisServer, request: pytest.FixtureRequest) -> None:
    settings = BackendSettings(
        "remote", LAYOUT, url=server.url, deadline_seconds=20, options={"prefix": request.node.name, "part_bytes": PART}
    )
    versions = [value(number, 4 * PART + number) for number in range(3)]
    stop = threading.Event()
    errors: list[BaseException] = []

    def work(number: int) -> None:
        mine = open_backend("redis", settings)
        try:
            while not stop.is_set():
                mine.write_many([key(1)], [memoryview(versions[number])])
        except BaseException as error:
            errors.append(error)
        mine.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    reader = open_backend("redis", settings)
    for thread in threads:
        thread.start()
    seen = [read(reader, [key(1)])[0] for _ in range(150)]
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    assert all(got is None or got in versions for got in seen), "a value was put together of several writes"
    mixed = read(reader, [key(1)])[0]
    assert mixed is None or mixed in versions
    reader.close()


def test_many_values_at_once(backend: Backend, server: servers.RedisServer, request: pytest.FixtureRequest) -> None:
    rng = random.Random(5)
    data = [value(i, rng.choice((0, 7, PART, PART + 1, 3 * PART, 9 * PART + i))) for i in range(40)]
    backend.write_many([key(i) for i in range(40)], [memoryview(each) for each in data])
    assert read(backend, [key(i) for i in range(40)]) == data
    lost = rng.sample(names(server, request.node.name), 12)
    for name in lost:
        rng.choice((server.client().delete, lambda name: server.client().set(name, b"?")))(name)
    expected = [None if any(key(i).hex().encode() in name for name in lost) else data[i] for i in range(40)]
    asked = [key(i) for i in (50, *range(40), 51)]
    for _ in range(2):
        assert read(backend, asked) == [None, *expected, None]


def test_many_values_replace_others(backend: Backend, server: servers.RedisServer, request: pytest.FixtureRequest) -> None:
    keys = [key(i) for i in range(8)]
    for turn in range(3):
        data = [value(10 * turn + i, (i % 4) * PART + turn) for i in range(8)]
        backend.write_many(keys, [memoryview(each) for each in data])
        assert read(backend, keys) == data
        assert len(names(server, request.node.name)) == sum(max(1, -(-len(each) // PART)) for each in data), (
            "old parts are gone"
        )


def test_a_user_who_may_do_what_the_manual_lists(server: servers.RedisServer, request: pytest.FixtureRequest) -> None:
    manual = (Path(__file__).parents[2] / "docs" / "remote.md").read_text()
    listed = re.search(r"\*\*Commands used\*\*: ([A-Z, ]+) and SCAN", manual)
    assert listed
    allowed = [f"+{word.strip().lower()}" for word in listed[1].split(",") if word.strip()]
    admin, name = server.client(), f"only-{request.node.name}"
    admin.execute_command("ACL", "SETUSER", name, "on", ">pw", f"~{name}:*", "-@all", "+scan", *allowed)
    for options in ({}, {"ttl_seconds": 60}):
        one = open_backend("redis", settings(server.url, username=name, password="pw", prefix=name, part_bytes=PART, **options))
        data = [value(i, i * PART) for i in range(4)]
        for _ in range(2):
            one.write_many([key(i) for i in range(4)], [memoryview(each) for each in data])
        assert read(one, [key(i) for i in range(5)]) == [*data, None]
        assert one.contains_many([key(3), key(4)]) == [True, False]
        one.delete_many([key(3)])
        assert isinstance(one, Clearable)
        one.clear()
        assert names(server, name) == []
        one.close()
    admin.execute_command("ACL", "DELUSER", name)


def test_a_write_that_is_cut_off_leaves_nothing(server: servers.RedisServer, request: pytest.FixtureRequest) -> None:
    import proxy

    with proxy.Proxy(server.port) as between:
        options = {"prefix": request.node.name, "part_bytes": PART}
        url = f"redis://127.0.0.1:{between.port}"
        far = open_backend("redis", BackendSettings("remote", LAYOUT, url=url, deadline_seconds=20, options=options))
        far.contains_many([key(0)])
        for parts in (3, 40, 400):
            between.cut_after = 5
            with pytest.raises(BackendUnavailableError):
                far.write_many([key(1)], [memoryview(value(1, parts * PART))])
            between.cut_after = None
            assert len(names(server, request.node.name)) in (0, parts), "all of it or nothing"
            far.delete_many([key(1)])
        far.close()


def test_no_part_wastes_the_memory_of_the_server(server: servers.RedisServer, request: pytest.FixtureRequest) -> None:
    prefix = request.node.name
    backend = open_backend("redis", BackendSettings("remote", LAYOUT, url=server.url, options={"prefix": prefix}))
    size = 8 * DEFAULT_PART
    backend.write_many([key(1)], [memoryview(bytes(size))])
    assert len(names(server, prefix)) == 9, "a head with the first bytes, and parts"
    taken = sum(server.client().memory_usage(name, samples=0) for name in names(server, prefix))
    assert taken < size * 1.02
    backend.clear()
    backend.close()


def test_values_expire(server: servers.RedisServer, request: pytest.FixtureRequest) -> None:
    prefix = request.node.name
    settings = BackendSettings(
        "remote", LAYOUT, url=f"{server.url}?ttl_seconds=30&part_bytes={PART}", options={"prefix": prefix}
    )
    backend = open_backend("redis", settings)
    backend.write_many([key(1), key(2)], [memoryview(value(1, 3 * PART)), memoryview(b"short")])
    lives = [server.client().pttl(name) for name in names(server, prefix)]
    assert len(lives) == 4
    assert all(20_000 < life <= 30_000 for life in lives)
    backend.close()


def test_a_full_server_is_a_capacity_error_and_leaves_nothing(tmp_path: Path) -> None:
    with servers.RedisServer(tmp_path, "--maxmemory", "8mb", "--maxmemory-policy", "noeviction") as small:
        backend = open_backend("redis", BackendSettings("remote", LAYOUT, url=small.url, options={"part_bytes": PART}))
        data = memoryview(value(1, 20 * PART))
        written = 0
        while _writes(backend, key(written), 20):
            written += 1
        assert written > 1
        with pytest.raises(CapacityError, match="full"):
            backend.write_many([key(written)], [data])
        assert read(backend, [key(0)], 1 << 21) == [bytes(data)]
        assert backend.contains_many([key(written)]) == [False]
        left = len(small.client().keys("*"))
        assert left == written * 20, "no part of what did not fit is left"
        backend.delete_many([key(0)])
        servers.until(lambda: _writes(backend, key(99), 10))
        backend.close()


def _writes(backend: Backend, name: ChunkKey, parts: int) -> bool:
    try:
        backend.write_many([name], [memoryview(value(1, parts * PART))])
    except CapacityError:
        return False
    return True


def test_a_connection_is_kept_and_replaced(backend: Any, server: servers.RedisServer) -> None:
    admin = server.client()

    def made() -> int:
        return int(admin.info()["total_connections_received"])

    data = value(1, 3 * PART)
    backend.write_many([key(1)], [memoryview(data)])
    before = made()
    for _ in range(20):
        assert read(backend, [key(1)]) == [data]
        assert backend.contains_many([key(1), key(2)]) == [True, False]
    assert made() == before
    ours = [client["id"] for client in admin.client_list() if client["id"] != str(admin.client_id())]
    for number in ours:  # as a server does with connections that were idle for long
        admin.client_kill_filter(_id=number)
    assert read(backend, [key(1)]) == [data]
    child = os.fork()
    if not child:
        same = all(read(backend, [key(1)]) == [data] for _ in range(3))
        os._exit(0 if same else 1)
    for _ in range(20):
        assert read(backend, [key(1)]) == [data], "a forked process uses connections of its own"
    assert os.waitpid(child, 0)[1] == 0


def test_clear_removes_its_own_keys_only(backend: Any, server: servers.RedisServer, request: pytest.FixtureRequest) -> None:
    server.client().set("somebody-elses", "x")
    backend.write_many([key(i) for i in range(1200)], [memoryview(b"v")] * 1200)
    backend.write_many([key(5000)], [memoryview(value(1, 3 * PART))])
    backend.clear()
    assert names(server, request.node.name) == []
    assert server.client().get("somebody-elses") == b"x"


def test_a_batch_of_512_keys_is_one_round_trip(backend: Backend, server: servers.RedisServer) -> None:
    import proxy

    with proxy.Proxy(server.port) as between:
        settings = BackendSettings("remote", LAYOUT, url=f"redis://127.0.0.1:{between.port}", deadline_seconds=20)
        far = open_backend("redis", settings)
        far.contains_many([key(0)])  # connects
        between.turns = 0
        assert far.contains_many([key(i) for i in range(512)]) == [False] * 512
        assert between.turns == 1
        far.close()


# -- where, and who ----------------------------------------------------------------------------------------------------------


def settings(url: str, **options: Any) -> BackendSettings:
    return BackendSettings("remote", LAYOUT, url=url, options=options)


def test_urls() -> None:
    target = RedisTarget.of(settings("redis://user:p%40ss@host:7000/2?ttl_seconds=60"))
    assert (target.kind, target.nodes, target.ttl_seconds) == ("single", (("host", 7000),), 60)
    assert dict(target.login) == {"username": "user", "password": "p@ss", "db": 2}
    target = RedisTarget.of(settings("redis-sentinel://a:1,b,[::1]:3?master=other"))
    assert (target.kind, target.nodes, target.master) == ("sentinel", (("a", 1), ("b", 26379), ("::1", 3)), "other")
    assert RedisTarget.of(settings("redis-sentinel://localhost:26379")).master == "mymaster"
    assert RedisTarget.of(settings("redis-cluster://a,b:2")).nodes == (("a", 6379), ("b", 2))
    assert RedisTarget.of(settings("unix:///run/redis.sock")).path == "/run/redis.sock"
    assert RedisTarget.of(settings("rediss://host", ssl_ca_certs="ca.pem")).login["ssl_ca_certs"] == "ca.pem"


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("", {}, "expected a url such as redis://"),
        ("redis://", {}, "expected host or host:port"),
        ("redis://u:secret@host:port", {}, "expected host or host:port"),
        ("redis://host:99999", {}, "expected host or host:port"),
        ("redis://host/x", {}, "number of a database"),
        ("redis-cluster://host/1", {}, "no database in front of a cluster"),
        ("redis://u:secret@host?masetr=x", {}, "did you mean 'master'"),
        ("redis://host", {"ttl_seconds": -1}, "ttl_seconds"),
        ("redis://host", {"part_bytes": 1}, "part_bytes"),
        ("redis://host", {"ssl_ca_certs": "x"}, "rediss"),
        ("redis://host", {"password": "secret", "password_file": "x"}, "expected one of password and password_file"),
        ("redis://host", {"password_file": "/nowhere/secret-file"}, "readable file"),
        ("redis://host", {"password_env": "LMKV_TEST_NO_SUCH"}, "it is not set"),
        ("unix://", {}, "no path"),
    ],
)
def test_wrong_urls_and_options_are_refused(url: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_backend("redis", settings(url, **options))
    assert message in str(caught.value)
    assert "u:secret" not in str(caught.value)


def test_a_capacity_is_refused() -> None:
    with pytest.raises(ConfigError, match="maxmemory"):
        open_backend("redis", BackendSettings("remote", LAYOUT, 1000, url="redis://localhost"))


def test_passwords_from_url_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "password").write_text("hush-1\n")
    monkeypatch.setenv("LMKV_TEST_PASSWORD", "hush-1")
    with servers.RedisServer(tmp_path, "--requirepass", "hush-1") as guarded:
        for given in (
            settings(f"redis://:hush-1@127.0.0.1:{guarded.port}"),
            settings(guarded.url, password="hush-1"),
            settings(guarded.url, password_file=str(tmp_path / "password")),
            settings(guarded.url, password_env="LMKV_TEST_PASSWORD"),
        ):
            backend = open_backend("redis", given)
            assert backend.contains_many([key(1)]) == [False]
            assert "hush-1" not in repr(backend) + repr(given)
            backend.close()
        for given in (settings(guarded.url), settings(f"redis://:hush-2@127.0.0.1:{guarded.port}")):
            backend = open_backend("redis", given)
            with pytest.raises(BackendUnavailableError) as caught:
                backend.contains_many([key(1)])
            assert "hush" not in str(caught.value)
            backend.close()


def test_opening_connects_to_nothing() -> None:
    for url in ("redis://127.0.0.1:1", "redis-sentinel://127.0.0.1:1", "redis-cluster://127.0.0.1:1,127.0.0.1:2"):
        backend = open_backend(url.partition(":")[0], settings(url))
        with pytest.raises(BackendUnavailableError, match=r"127\.0\.0\.1"):
            backend.contains_many([key(1)])
        backend.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificate")
    made = os.system(
        f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {folder}/key.pem -out {folder}/cert.pem -days 2 "
        "-subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1 2>/dev/null"
    )
    assert made == 0
    return folder


def tls_options(certificate: Path) -> dict[str, str]:
    return {
        "tls-cert-file": f"{certificate}/cert.pem",
        "tls-key-file": f"{certificate}/key.pem",
        "tls-ca-cert-file": f"{certificate}/cert.pem",
        "tls-auth-clients": "no",
        "tls-replication": "yes",
    }


def as_arguments(options: dict[str, str]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def check_tls(url: str, certificate: Path) -> None:
    good = open_backend(
        url.partition(":")[0], settings(url, ssl_ca_certs=f"{certificate}/cert.pem", part_bytes=PART, prefix="tls")
    )
    data = [value(i, 5 * PART + i) for i in range(4)]
    good.write_many([key(i) for i in range(4)], [memoryview(piece) for piece in data])
    assert read(good, [key(i) for i in range(4)]) == data
    assert isinstance(good, Clearable)
    good.clear()
    good.close()
    stranger = open_backend(url.partition(":")[0], settings(url))
    with pytest.raises(BackendUnavailableError, match=r"certificate|No master found"):
        stranger.contains_many([key(1)])
    stranger.close()


@pytest.mark.parametrize("scheme", ["rediss", "valkeys"])
def test_tls(tmp_path: Path, certificate: Path, scheme: str) -> None:
    port, plain = servers.free_ports(2)
    with servers.RedisServer(tmp_path, "--tls-port", str(port), *as_arguments(tls_options(certificate)), port=plain):
        check_tls(f"{scheme}://127.0.0.1:{port}", certificate)


def test_tls_to_sentinels_and_their_master(tmp_path: Path, certificate: Path) -> None:
    port, plain, watching, watching_plain = servers.free_ports(4)
    options = tls_options(certificate)
    config = tmp_path / "sentinel.conf"
    lines = [f"{name} {value}" for name, value in options.items()]
    config.write_text("\n".join([f"sentinel monitor mymaster 127.0.0.1 {port} 1", f"tls-port {watching}", *lines, ""]))
    with (
        servers.RedisServer(tmp_path, "--tls-port", str(port), *as_arguments(options), port=plain),
        servers.RedisServer(tmp_path, str(config), port=watching_plain, sentinel=True) as sentinel,
    ):
        servers.until(lambda: sentinel.client().sentinel_master("mymaster")["flags"] == "master")
        check_tls(f"rediss-sentinel://127.0.0.1:{watching}", certificate)


def test_tls_to_a_cluster(tmp_path: Path, certificate: Path) -> None:
    port, plain, bus = servers.free_ports(3)
    options = {**tls_options(certificate), "tls-cluster": "yes", "cluster-enabled": "yes", "cluster-port": str(bus)}
    with servers.RedisServer(tmp_path, "--tls-port", str(port), *as_arguments(options), port=plain) as node:
        node.client().execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        servers.until(lambda: node.client().cluster("info")["cluster_state"] == "ok")
        check_tls(f"rediss-cluster://127.0.0.1:{port}", certificate)
