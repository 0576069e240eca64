"""A cluster of Redis servers of which one ends at a bad moment."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Any

import pytest
import servers

from lmkv.backends import BackendSettings
from lmkv.chunks import ChunkKey
from lmkv.layout import KVLayout

pytest.importorskip("redis")

from lmkv.backends.redis.backend import RedisBackend

LAYOUT = KVLayout.dense(layers=2, heads=2, head_size=8, dtype="float16", chunk_tokens=16)


def test_a_node_that_ends_in_the_middle_of_a_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The beginning of a value is none; what other nodes hold is read all the same."""
    reports: list[tuple[str, str]] = []
    with servers.redis_cluster(tmp_path) as (nodes, url):
        backend = RedisBackend(BackendSettings("remote", LAYOUT, url=url, report=lambda *said: reports.append(said)))
        keys = [ChunkKey(bytes([i]) * 16) for i in range(24)]
        values = [bytes([i]) * (3 << 20) for i in range(24)]
        backend.write_many(keys, [memoryview(value) for value in values])
        receive = backend._receive_part
        lost: list[int] = []

        def ending(wire: Any, ask: Any, out: memoryview) -> bool:
            if not lost:
                port = wire._sock.getpeername()[1]
                nodes_by_port = {int(node.url.rpartition(":")[2]): node for node in nodes}
                lost.append(port)
                with contextlib.suppress(OSError):
                    wire._sock.shutdown(socket.SHUT_RDWR)  # no more comes, whatever is on its way
                nodes_by_port[port].kill()
            return receive(wire, ask, out)

        monkeypatch.setattr(backend, "_receive_part", ending)
        out = [memoryview(bytearray(4 << 20)) for _ in keys]
        sizes = backend.read_many(keys, out)
        assert lost
        assert {size for size in sizes if size is not None} == {3 << 20}
        for size, buffer, value in zip(sizes, out, values, strict=True):
            assert size is None or buffer[:size] == value, "a value of which only the beginning came"
        assert None in sizes
        assert [operation for operation, _ in reports] == ["read"]
        backend.close()
