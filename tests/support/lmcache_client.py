"""LMCache's own lm:// connector, as its engine drives it; runs where PyPI's ``lmcache`` is installed."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from typing import Any

os.environ.update(LMCACHE_TRACK_USAGE="false", LMCACHE_LOG_LEVEL="ERROR", OMP_NUM_THREADS="1")

import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.connector import CreateConnector
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend

__all__ = ["Client"]


class Client:
    """LMCache's connector, as its engine drives it."""

    def __init__(self, port: int, layers: int, tokens: int, hidden: int, dtype: torch.dtype) -> None:
        url = f"lm://127.0.0.1:{port}"
        config = LMCacheEngineConfig.from_defaults(chunk_size=tokens, max_local_cpu_size=0.2, remote_url=url)
        metadata = LMCacheMetadata("a/model", 1, 1, 0, 0, dtype, (layers, 2, tokens, 2, hidden // 2))
        self.shape, self.dtype = torch.Size([2, layers, tokens, hidden]), dtype
        self.memory = LocalCPUBackend(config, metadata, "cpu")
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.connector = CreateConnector(url, self.loop, self.memory, config, metadata)

    def run(self, coroutine: Any) -> Any:
        """Wait for a coroutine."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def key(self, number: int) -> CacheEngineKey:
        """The key of a chunk hash."""
        return CacheEngineKey("a/model", 1, 0, number, self.dtype)

    def put(self, number: int, tokens: int) -> torch.Tensor:
        """Store random bits under a chunk hash; a copy of them."""
        shape = torch.Size([*self.shape[:2], tokens, self.shape[3]])
        held = self.memory.allocate(shape, self.dtype, MemoryFormat.KV_2LTD)
        held.tensor.view(torch.uint8).random_(0, 256)
        copy = held.tensor.clone()
        self.run(self.connector.put(self.key(number), held))
        return copy

    def get(self, number: int) -> torch.Tensor | None:
        """A copy of what is stored, or nothing."""
        found = self.run(self.connector.get(self.key(number)))
        return None if found is None else found.tensor.clone()

    def put_seconds(self, numbers: range) -> float:
        """How long storing full chunks takes until the server says that the last one is there."""
        held = []
        for number in numbers:
            memory = self.memory.allocate(self.shape, self.dtype, MemoryFormat.KV_2LTD)
            memory.tensor.view(torch.uint8).fill_(number % 256)
            held.append(memory)
        begun = time.perf_counter()
        for number, memory in zip(numbers, held, strict=True):
            self.run(self.connector.put(self.key(number), memory))
        if not self.run(self.connector.exists(self.key(numbers[-1]))):
            raise AssertionError("expected the value there")
        return time.perf_counter() - begun

    def get_seconds(self, numbers: range) -> float:
        """How long loading full chunks takes."""
        begun = time.perf_counter()
        found = [self.run(self.connector.get(self.key(number))) for number in numbers]
        seconds = time.perf_counter() - begun
        for number, memory in zip(numbers, found, strict=True):
            if memory is None or memory.tensor.view(torch.uint8)[0, 0, 0, 0] != number % 256:
                raise AssertionError("expected the value that was stored")
            memory.ref_count_down()
        return seconds


def main() -> int:
    """``PORT LAYERS TOKENS HIDDEN COUNT``: answers ``put`` and ``get`` on standard input with seconds, for benchmarks."""
    port, layers, tokens, hidden, count = map(int, sys.argv[1:])
    client = Client(port, layers, tokens, hidden, torch.bfloat16)
    for line in sys.stdin:
        seconds = client.put_seconds(range(count)) if line.strip() == "put" else client.get_seconds(range(count))
        print(f"seconds {seconds}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
