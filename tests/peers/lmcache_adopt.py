"""What LMCache's own classes write to a disk and a Redis, LMKV finds by the tokens, bit for bit, and leaves as it is.

Runs where PyPI's ``lmcache`` is installed (``tests/run.py lmcache`` makes such an environment); exits with 1 if they differ.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import known_kv
import servers
from lmcache_writer import Writer

import lmkv
from lmkv.adapters.lmcache.adopt import Adopter, Origin

MODEL = "/data/models/Some-7B"
CONFIG = {"model": "ours", "disk_capacity": 0, "ram_capacity": "16MiB"}
TEXT = [31 * i % 151_936 for i in range(300)]


@contextmanager
def places() -> Iterator[tuple[str, servers.RedisServer]]:
    """A directory and a Redis."""
    with tempfile.TemporaryDirectory() as folder, servers.RedisServer(Path(folder)) as server:
        yield f"{folder}/disk", server


def origin(where: str, chunk_size: int, world: int = 1) -> Origin:
    # before Python 3.12 hash(None) is another number in each process; this is the one that wrote
    return Origin(where, MODEL, chunk_size, world_size=world, hash_of_none=hash(None))


def state(folder: str, server: servers.RedisServer) -> object:
    """All there is, with the times of files."""
    client = server.client()
    files = [(path.name, path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(Path(folder).iterdir())]
    return files, client.dbsize(), sorted((key, client.get(key)) for key in client.keys("*"))


def adopted(layout: lmkv.KVLayout, came_from: Origin, text: list[int]) -> int:
    """How much of a text came over; all of it is proved."""
    with lmkv.Store(lmkv.StoreConfig.from_dict(CONFIG), layout) as store:
        with Adopter(store, came_from) as adopter:
            held = adopter.adopt(text).held
        assert known_kv.fetch(store, text) == held
    return held


def every_type_and_format() -> None:
    """Keys and values, latents; chunk sizes that differ; a text that goes on otherwise behind its first chunks."""
    for dtype, latent in (("float16", False), ("bfloat16", False), ("float32", False), ("bfloat16", True)):
        layout = lmkv.KVLayout.dense(layers=4, heads=2, head_size=16, dtype=dtype, chunk_tokens=64, mla=latent)
        with places() as (folder, server):
            names = Writer(MODEL, 1, 0, layout, folder, server.url).store(TEXT)
            assert len(names) == 5
            before = state(folder, server)
            for where in (folder, server.url):
                for tokens in (64, 32, 256):
                    ours = lmkv.KVLayout(layout.groups, tokens)
                    assert adopted(ours, origin(where, 64), TEXT) == 300, (dtype, where, tokens)
                assert adopted(layout, origin(where, 64), TEXT[:200]) == 192
                assert adopted(layout, origin(where, 64), TEXT[:130] + TEXT[:100]) == 128
                assert adopted(layout, origin(where, 128), TEXT) == 0
                assert adopted(layout, Origin(where, "another/model", 64, hash_of_none=hash(None)), TEXT) == 0
            assert state(folder, server) == before, "something was written where LMCache's values are"


def two_ranks() -> None:
    """Tensor parallelism: a chunk is found if both ranks' parts are."""
    ranks = lmkv.LayerGroup(4, 2, 1, 16, "bfloat16")
    layout, own = lmkv.KVLayout((ranks, ranks), 64), lmkv.KVLayout((ranks,), 64)
    parts = known_kv.group_bits(layout, TEXT)
    with places() as (folder, server):
        for rank in range(2):
            names = Writer(MODEL, 2, rank, own, folder, server.url).store(TEXT, parts[rank])
        for where in (folder, server.url):
            assert adopted(layout, origin(where, 64, 2), TEXT) == 300
        server.client().delete(f"{names[2]}kv_bytes")
        assert adopted(layout, origin(server.url, 64, 2), TEXT) == 128


def damaged() -> None:
    """A truncated file ends the text there; so does metadata that is gone."""
    layout = lmkv.KVLayout.dense(layers=4, heads=2, head_size=16, dtype="bfloat16", chunk_tokens=64)
    with places() as (folder, server):
        writer = Writer(MODEL, 1, 0, layout, folder, server.url)
        names = writer.store(TEXT)
        path = writer.path(names[3])
        path.write_bytes(path.read_bytes()[:-1])
        assert adopted(layout, origin(folder, 64), TEXT) == 192
        server.client().delete(f"{names[1]}metadata")
        assert adopted(layout, origin(server.url, 64), TEXT) == 64


def main() -> int:
    """Run all; a failed assertion ends it."""
    print(f"lmcache {importlib.metadata.version('lmcache')}")
    for check in (every_type_and_format, two_ranks, damaged):
        begin = time.monotonic()
        check()
        print(f"{check.__name__}: {time.monotonic() - begin:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
