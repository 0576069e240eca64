"""A bucket as a backend, against a real S3 server."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import proxy
import pytest
import weed

from lmkv.backends import Backend, BackendSettings, open_backend
from lmkv.backends.base import AsksEach, Clearable, Creating
from lmkv.chunks import ChunkKey
from lmkv.errors import BackendUnavailableError, ConfigError
from lmkv.layout import KVLayout
from lmkv.testing import BackendSuite

LAYOUT = KVLayout.dense(layers=1, heads=1, head_size=4, dtype="float32", chunk_tokens=16)
LOGIN = {"access_key_id": weed.ACCESS, "secret_access_key": weed.SECRET}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[weed.S3Server]:
    with weed.s3_server(tmp_path_factory.mktemp("s3")) as running:
        yield running


class TestS3(BackendSuite):
    offers = (Clearable,)
    persistent = True
    refuses_when_full = False
    examples = 6
    steps = 15
    server: ClassVar[weed.S3Server]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _server(cls, server: weed.S3Server) -> None:
        cls.server = server

    def make(self, settings: BackendSettings) -> Backend:
        url = self.server.url(f"{self.directory.name}/{settings.name}")
        options = {**LOGIN, **settings.options}
        return open_backend("s3", dataclasses.replace(settings, capacity=0, url=url, options=options, deadline_seconds=30.0))


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(16, "big"))


def settings(url: str, deadline: float = 30.0, **options: Any) -> BackendSettings:
    return BackendSettings("remote", LAYOUT, url=url, options=options, deadline_seconds=deadline)


@pytest.fixture
def backend(server: weed.S3Server, request: pytest.FixtureRequest) -> Iterator[Any]:
    opened = open_backend("s3", settings(server.url(request.node.name), part_bytes="5MiB", **LOGIN))
    yield opened
    opened.close()


@pytest.mark.parametrize("megabytes", [1.0, 5.0, 5.5, 12.3])
def test_values_of_several_parts(backend: Backend, megabytes: float) -> None:
    data = np.random.default_rng(1).bytes(int(megabytes * 2**20))
    out = memoryview(bytearray(len(data) + 100))
    backend.write_many([key(1)], [memoryview(data)])
    assert backend.read_many([key(1)], [out]) == [len(data)]
    assert out[: len(data)] == data
    assert not any(out[len(data) :])
    assert backend.read_many([key(1)], [out[: len(data) - 1]]) == [None]


def test_it_says_that_keys_cost_requests(backend: Any) -> None:
    assert isinstance(backend, AsksEach)
    assert backend.probe_concurrency == 16


def test_the_first_of_two_writers_stays(backend: Any) -> None:
    assert isinstance(backend, Creating)
    out = memoryview(bytearray(100))
    backend.create_many([key(1)], [memoryview(b"first")])
    backend.create_many([key(1), key(2)], [memoryview(b"second"), memoryview(b"other")])
    assert backend.read_many([key(1)], [out]) == [5]
    assert out[:5] == b"first"
    assert backend.contains_many([key(2)]) == [True]
    backend.write_many([key(1)], [memoryview(b"replaced")])
    assert backend.read_many([key(1)], [out]) == [8]


def test_several_create_one_value_at_once(backend: Any) -> None:
    start, values = threading.Barrier(6), [bytes([i]) * 300_000 for i in range(6)]

    def write(value: bytes) -> None:
        start.wait(30)
        backend.create_many([key(5)], [memoryview(value)])

    threads = [threading.Thread(target=write, args=(value,)) for value in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    out = memoryview(bytearray(300_000))
    assert backend.read_many([key(5)], [out]) == [300_000]
    first = bytes(out)
    assert first in values
    backend.create_many([key(5)], [memoryview(values[0] if first != values[0] else values[1])])
    assert backend.read_many([key(5)], [out]) == [300_000]
    assert out == first


def test_a_storage_without_conditions_is_told_them_once(server: weed.S3Server) -> None:
    with weed.WithoutConditions(server) as older:
        backend = open_backend("s3", settings(f"s3://kv-cache/older?endpoint={older.endpoint}", **LOGIN))
        for number in range(4):
            backend.create_many([key(number)], [memoryview(b"value")])
            count = older.refused
            assert count > 0
        backend.create_many([key(9)], [memoryview(b"value")])
        assert older.refused == count, "it is not asked again"
        assert all(backend.contains_many([key(number) for number in (0, 1, 2, 3, 9)]))
        backend.close()


def test_clear_removes_its_own_prefix_only(backend: Any, server: weed.S3Server) -> None:
    other = open_backend("s3", settings(server.url("other"), **LOGIN))
    within = open_backend("s3", settings(server.url("test_clear_removes_its_own_prefix_only/within"), **LOGIN))
    for each in (backend, other, within):
        each.write_many([key(i) for i in range(50)], [memoryview(b"v")] * 50)
    foreign = [f"{backend._folder}/notes.txt", f"{backend._folder}/ab/notes.txt", f"{backend._folder}/ab/" + "ab" * 17]
    for path in foreign:
        backend._obstore.put(backend._store, path, b"somebody else's")
    backend.clear()
    assert not any(backend.contains_many([key(i) for i in range(50)]))
    for each in (other, within):
        assert all(each.contains_many([key(i) for i in range(50)]))
        each.close()
    for path in foreign:
        assert backend._obstore.head(backend._store, path)["size"] > 0


def test_the_usual_variables_are_credentials(server: weed.S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", weed.ACCESS)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", weed.SECRET)
    backend = open_backend("s3", settings(server.url("variables")))
    backend.write_many([key(1)], [memoryview(b"value")])
    backend.close()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something else")
    (tmp_path / "secret").write_text(weed.SECRET + "\n")
    backend = open_backend("s3", settings(server.url("variables"), secret_access_key_file=str(tmp_path / "secret")))
    assert backend.contains_many([key(1), key(2)]) == [True, False]
    backend.close()


def test_wrong_credentials_are_not_repeated(server: weed.S3Server) -> None:
    backend = open_backend("s3", settings(server.url("x"), access_key_id=weed.ACCESS, secret_access_key="a-wrong-secret"))
    for call in (
        lambda: backend.contains_many([key(1)]),
        lambda: backend.read_many([key(1)], [memoryview(bytearray(10))]),
        lambda: backend.write_many([key(1)], [memoryview(b"x")]),
    ):
        with pytest.raises(BackendUnavailableError) as caught:
            call()
        assert "403" in str(caught.value) or "Signature" in str(caught.value) or "Permission" in str(caught.value)
        assert weed.ACCESS not in str(caught.value)
        assert "a-wrong-secret" not in str(caught.value)
    backend.close()


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("s3://", {}, "such as s3://bucket/prefix"),
        ("s3://key:secret@bucket", {}, "such as s3://bucket/prefix"),
        ("s3://bucket?endpiont=http://h", {}, "did you mean 'endpoint'"),
        ("s3://bucket", {"part_bytes": "1MiB"}, "part_bytes"),
        ("s3://bucket", {"concurrency": 0}, "concurrency"),
        ("s3://bucket", {"secret_access_key": "a", "secret_access_key_env": "B"}, "expected one of"),
    ],
)
def test_wrong_urls_and_options_are_refused(url: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_backend("s3", settings(url, **options))
    assert message in str(caught.value)
    assert "secret@" not in str(caught.value)


def test_nobody_there_is_unavailable_in_time() -> None:
    backend = open_backend("s3", settings("s3://kv-cache?endpoint=http://127.0.0.1:1", 1.0, **LOGIN))
    with pytest.raises(BackendUnavailableError):
        backend.contains_many([key(i) for i in range(40)])
    backend.close()


def test_what_comes_too_late_is_not_written_any_more(server: weed.S3Server) -> None:
    with proxy.Proxy(server.port) as between:
        url = f"s3://kv-cache/late?endpoint=http://127.0.0.1:{between.port}"
        backend = open_backend("s3", settings(url, 0.5, **LOGIN))
        backend.write_many([key(1)], [memoryview(b"value" * 1000)])
        buffer = memoryview(bytearray(5000))
        between.stall()
        with pytest.raises(BackendUnavailableError, match=r"not answered within|no answer|Error"):
            backend.read_many([key(1)], [buffer])
        between.flow()
        time.sleep(0.3)
        assert not any(buffer), "the memory may be another chunk's by now"
        assert backend.read_many([key(1)], [buffer]) == [5000]
        backend.close()
