"""LMCache's own client with LMKV's server, and LMKV's backend with LMCache's own: the same bits come back.

Runs where PyPI's ``lmcache`` is installed (``tests/run.py lmcache`` makes such an environment); exits with 1 if they differ.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
os.environ.update(LMCACHE_TRACK_USAGE="false", LMCACHE_LOG_LEVEL="ERROR", OMP_NUM_THREADS="1")

import known_kv
import servers
import torch
from lmcache.v1.memory_management import BytesBufferMemoryObj, MemoryFormat
from lmcache_client import Client

import lmkv
from lmkv.backends import BackendSettings, open_backend
from lmkv.backends.lm_wire import Command, Request
from lmkv.chunks import ChunkKey

LMKV_SERVER = ("-c", "import sys; from lmkv.cli import main; sys.exit(main())", "serve")
LMCACHE_SERVER = ("-m", "lmcache.v1.server")
LAYOUT = lmkv.KVLayout.dense(layers=2, heads=2, head_size=8, dtype="float16", chunk_tokens=64)
TYPES = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 4, torch.uint8: 1}


@contextlib.contextmanager
def server(*command: str) -> Iterator[int]:
    """A server process on loopback; its port."""
    (port,) = servers.free_ports(1)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([sys.executable, *command, "127.0.0.1", str(port)], stdout=log, stderr=log)
        try:
            servers.until(lambda: servers.listens(port), 60)
            yield port
        finally:
            process.terminate()
            process.wait(20)


def bits(tensor: torch.Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.contiguous().view(torch.uint8).numpy().tobytes()


def its_client_with_our_server() -> None:
    """Every element type and short chunks; another client finds them; absent keys are absent."""
    with server(*LMKV_SERVER) as port:
        for base, dtype in enumerate(TYPES):
            first, second = (Client(port, 4, 256, 128, dtype) for _ in range(2))
            hashes = [1000 * base + 1, -123456789 - base, 2**63 - 1 - base]
            assert not first.run(first.connector.exists(first.key(hashes[0])))
            assert first.get(hashes[0]) is None
            stored = {number: bits(first.put(number, tokens)) for number, tokens in zip(hashes, (256, 256, 31), strict=True)}
            for client in (first, second):
                for number in hashes:
                    assert client.run(client.connector.exists(client.key(number)))
                    assert bits(client.get(number)) == stored[number], f"{dtype}: other bytes came back"
            replaced = bits(first.put(hashes[0], 256))
            assert bits(first.get(hashes[0])) == replaced


def what_its_serializers_send() -> None:
    """Mere bytes (``remote_serde: cachegen``), latents, and numbers of one byte: one client stores, another loads."""
    with server(*LMKV_SERVER) as port:
        first, second = (Client(port, 4, 256, 128, torch.bfloat16) for _ in range(2))
        for size in (1, 777, 4 << 20):
            sent = os.urandom(size)
            first.run(first.connector.put(first.key(size), BytesBufferMemoryObj(sent)))
            servers.until(lambda size=size: second.run(second.connector.exists(second.key(size))))  # a PUT has no answer
            found = second.run(second.connector.get(second.key(size)))
            assert found is not None
            assert bytes(found.byte_array) == sent, f"{size} bytes: others came back"
        for number, (shape, dtype, fmt) in enumerate(
            [
                ([1, 4, 256, 576], torch.bfloat16, MemoryFormat.KV_MLA_FMT),
                ([2, 4, 31, 128], torch.float8_e4m3fn, MemoryFormat.KV_2LTD),
                ([2, 4, 256, 128], torch.float8_e5m2, MemoryFormat.KV_2LTD),
            ]
        ):
            held = first.memory.allocate(torch.Size(shape), dtype, fmt)
            held.tensor.view(torch.uint8).random_(0, 256)
            sent = bytes(held.byte_array)
            first.run(first.connector.put(first.key(-number - 1), held))
            servers.until(lambda number=number: second.run(second.connector.exists(second.key(-number - 1))))
            found = second.run(second.connector.get(second.key(-number - 1)))
            assert found is not None
            assert (found.get_shape(), found.get_dtype()) == (torch.Size(shape), dtype)
            assert bytes(found.byte_array) == sent, f"{dtype}: other bytes came back"


def it_beside_clients_that_misbehave() -> None:
    """LMCache's client stores and loads while others stop in the middle, send nonsense, and come by the hundred."""
    with server(*LMKV_SERVER, "--max-connections", "300") as port:
        client = Client(port, 4, 256, 128, torch.bfloat16)
        stored = {number: bits(client.put(number, 256)) for number in range(4)}
        name = client.key(0).to_string().encode()
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
        puts = (
            Request(Command.PUT, name, 8 << 20, shape=(2, 8, 256, 1024)).pack() + b"x" * 1000,  # and ends there
            Request(Command.PUT, name, 64, shape=(2, 8, 256, 1024)).pack() + b"x" * 64,  # not what it says
        )
        for bad in (
            *puts,
            Request(Command.GET, name).pack()[:100],
            Request(Command.GET, b"k" * 150).pack() + b"k" * 250,  # a longer key than the protocol has
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + b" " * 200,
            os.urandom(4096),
        ):
            with socket.create_connection(("127.0.0.1", port)) as sock:
                sock.sendall(bad)
                if bad in puts:  # until it was acted on, which may forget the key
                    sock.shutdown(socket.SHUT_WR)
                    while sock.recv(4096):
                        pass
            for number, sent in stored.items():
                found = bits(client.get(number))
                assert found == sent or (number == 0 and found is None), "other bytes came back"
        assert bits(client.put(0, 256)) == bits(client.get(0))
        for sock in idle:
            sock.close()


def our_backend_with_its_server() -> None:
    """Values of all sizes, replaced and deleted; a whole store; a server that was away."""
    with server(*LMCACHE_SERVER) as port:
        url = f"lm://127.0.0.1:{port}"
        backend = open_backend("lm", BackendSettings("remote", LAYOUT, url=url, deadline_seconds=30))
        values = [os.urandom(size) for size in (1, 4096, 1_000_003, 8 << 20)]
        keys = [ChunkKey(os.urandom(16)) for _ in values]
        room = [memoryview(bytearray(8 << 20)) for _ in values]
        assert backend.contains_many(keys) == [False] * 4
        assert backend.read_many(keys, room) == [None] * 4
        backend.write_many(keys, [memoryview(value) for value in values])
        assert backend.contains_many(keys) == [True] * 4
        sizes = backend.read_many(keys, room)
        assert [bytes(view[: size or 0]) for view, size in zip(room, sizes, strict=True)] == values
        backend.delete_many(keys[1:2])
        assert backend.contains_many(keys) == [True, False, True, True]
        assert backend.read_many(keys[:2], room[:2]) == [1, None]
        backend.close()
        tiers = [{"url": url, "deadline_seconds": 30}]
        config = lmkv.StoreConfig.from_dict({"model": "m", "disk_capacity": 0, "ram_capacity": "8MiB", "tiers": tiers})
        text = list(range(600))
        with lmkv.Store(config, LAYOUT) as store:
            assert store.store(text, known_kv.source(LAYOUT, text)) == 600
        with lmkv.Store(config, LAYOUT) as store:
            match = store.lookup(text).wait(30)
            assert match.tokens_by_tier() == {"lm": 600}, match.tokens_by_tier()
            assert known_kv.fetch(store, text, match) == 600


def both_clients_on_one_server() -> None:
    """What one project keeps there the other one neither finds nor disturbs."""
    with server(*LMKV_SERVER) as port:
        client = Client(port, 4, 256, 128, torch.float16)
        stored = bits(client.put(7, 256))
        backend = open_backend("lm", BackendSettings("remote", LAYOUT, url=f"lm://127.0.0.1:{port}", deadline_seconds=30))
        key = ChunkKey((7).to_bytes(16, "big"))
        assert backend.contains_many([key]) == [False]
        backend.write_many([key], [memoryview(b"ours")])
        assert bits(client.get(7)) == stored
        backend.close()


def main() -> int:
    """Run all; a failed assertion ends it."""
    print(f"lmcache {importlib.metadata.version('lmcache')}")
    for check in (
        its_client_with_our_server,
        what_its_serializers_send,
        it_beside_clients_that_misbehave,
        our_backend_with_its_server,
        both_clients_on_one_server,
    ):
        begin = time.monotonic()
        check()
        print(f"{check.__name__}: {time.monotonic() - begin:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
