"""LMCache's own token database, disk backend and Redis connector, as its engine drives them; runs where PyPI's ``lmcache`` is
installed, 0.3.9 or 0.3.15. Writes KV that can be checked (``known_kv``)."""

from __future__ import annotations

import asyncio
import base64
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.update(LMCACHE_TRACK_USAGE="false", LMCACHE_LOG_LEVEL="ERROR", OMP_NUM_THREADS="1")

import known_kv
import numpy as np
import servers
import torch
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.storage_backend.connector import CreateConnector
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend
from lmcache.v1.token_database import ChunkedTokenDatabase
from lmcache_values import FIXTURE_LAYOUTS, FIXTURE_TEXT

import lmkv

__all__ = ["Writer"]


def _metadata(model: str, world: int, worker: int, dtype: torch.dtype, shape: tuple[int, ...], mla: bool) -> Any:
    try:
        from lmcache.v1.metadata import LMCacheMetadata
    except ImportError:  # before 0.3.13
        from lmcache.config import LMCacheEngineMetadata

        return LMCacheEngineMetadata(model, world, worker, "vllm", dtype, shape, use_mla=mla)
    return LMCacheMetadata(model, world, world, worker, worker, dtype, shape, use_mla=mla)


class Writer:
    """One worker of an engine with LMCache.

    Args:
        model, world, worker: of the engine.
        layout: of this worker's KV, in one group; its ``chunk_tokens`` is LMCache's chunk size.
        disk: a directory, or ``""``.
        redis: a url, or ``""``.
        algorithm: ``pre_caching_hash_algorithm``.
    """

    def __init__(
        self,
        model: str,
        world: int,
        worker: int,
        layout: lmkv.KVLayout,
        disk: str = "",
        redis: str = "",
        algorithm: str = "builtin",
    ) -> None:
        (group,) = layout.groups
        self.layout, self.group, self.mla = layout, group, group.kv == 1
        self.dtype = getattr(torch, group.dtype)
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=layout.chunk_tokens, max_local_cpu_size=0.05, local_disk=disk or None, max_local_disk_size=1.0,
            remote_url=redis or None, pre_caching_hash_algorithm=algorithm, save_unfull_chunk=True,
        )  # fmt: skip
        shape = (group.layers, group.kv, layout.chunk_tokens, group.heads, group.head_size)
        metadata = _metadata(model, world, worker, self.dtype, shape, self.mla)
        self.tokens = ChunkedTokenDatabase(config, metadata)
        self.memory = LocalCPUBackend(config, metadata, "cpu")
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.disk = LocalDiskBackend(config, self.loop, self.memory, "cpu") if disk else None
        self.redis = CreateConnector(redis, self.loop, self.memory, config, metadata) if redis else None

    def _held(self, arrays: Any, start: int, stop: int) -> Any:
        """LMCache's memory of one chunk, filled."""
        bits = np.ascontiguousarray(arrays[:, :, :, start:stop].transpose(1, 0, 3, 2, 4))
        shape = torch.Size([self.group.kv, self.group.layers, stop - start, self.group.heads * self.group.head_size])
        form = MemoryFormat.KV_MLA_FMT if self.mla else MemoryFormat.KV_2LTD
        held = self.memory.allocate(shape, self.dtype, form)
        held.tensor.view(torch.uint8).view(-1).copy_(torch.from_numpy(bits.view(np.uint8).reshape(-1)))
        return held

    def store(self, text: Sequence[int], arrays: Any = None) -> list[str]:
        """Write a text's chunks; their keys. ``arrays``: [layers, kv, heads, tokens, head_size] instead of ``known_kv``'s."""
        if arrays is None:
            (arrays,) = known_kv.group_bits(self.layout, text)
        names = []
        for start, stop, key in self.tokens.process_tokens(list(text)):
            held = self._held(arrays, start, stop)
            if self.disk is not None:
                self.disk.submit_put_task(key, held)
                end = time.monotonic() + 30
                while self.disk.exists_in_put_tasks(key) or not self.disk.contains(key):
                    assert time.monotonic() < end, "LMCache did not write its file"
                    time.sleep(0.005)
            if self.redis is not None:
                asyncio.run_coroutine_threadsafe(self.redis.put(key, held), self.loop).result(30)
            names.append(key.to_string())
        return names

    def path(self, name: str) -> Path:
        """Where the disk backend keeps a key."""
        assert self.disk is not None
        return Path(self.disk.path) / (name.replace("/", "-") + ".pt")


def fixture(algorithm: str) -> dict[str, object]:
    """What this LMCache wrote of the text: keys, files, Redis values."""
    found: dict[str, object] = {}
    for name, layout in FIXTURE_LAYOUTS.items():
        with tempfile.TemporaryDirectory() as folder, servers.RedisServer(Path(folder)) as server:
            writer = Writer("org/model", 1, 0, layout, disk=f"{folder}/disk", redis=server.url, algorithm=algorithm)
            writer.store(FIXTURE_TEXT)
            client = server.client()
            files = {path.name: path.read_bytes() for path in Path(folder, "disk").iterdir()}
            values = {key.decode(): client.get(key) for key in client.keys("*")}
        found[name] = {
            "disk": {key: base64.b64encode(data).decode() for key, data in sorted(files.items())},
            "redis": {key: base64.b64encode(data).decode() for key, data in sorted(values.items())},
        }
    return found


def main() -> None:
    """Print a fixture: ``PYTHONHASHSEED=0 python tests/support/lmcache_writer.py [ALGORITHM]``, in Python 3.12 or later."""
    algorithm = sys.argv[1] if len(sys.argv) > 1 else "builtin"
    about = {
        "lmcache": importlib.metadata.version("lmcache"),
        "python": sys.version.split()[0],
        "vllm": importlib.util.find_spec("vllm") is not None and importlib.metadata.version("vllm"),
        "algorithm": algorithm,
        "seed": os.environ.get("PYTHONHASHSEED", ""),
    }
    print(json.dumps({**about, "values": fixture(algorithm)}, indent=1))


if __name__ == "__main__":
    main()
