"""Copies between slots and engines' memory, beside plain ones: ``python tests/bench/copies.py [--json] [--only NAME,…]``.

One object a line with ``--json``: name, value, unit, reference, ratio. On the host a value is GB/s with one thread and the
reference memcpy of as many bytes, done right before; the ratio is the median over rounds, not the quotient of the two. Time is
that of the thread, without what others take of its core: neither waits for anything but memory. The rows of ``copy_gpu.py``
follow where there is a CUDA device. (A script called ``copy.py`` would hide the standard library's.)
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmkv.layout import KVLayout
from lmkv.pool import HostPool
from lmkv.transfer import CopyEngine, Part

Row = dict[str, object]
ROUNDS = 11
WIDE = KVLayout.dense(layers=36, heads=8, head_size=128, dtype="bfloat16")  # Qwen3-8B: 147,456 bytes a token
MLA = KVLayout.dense(layers=36, heads=1, head_size=576, dtype="bfloat16", mla=True)  # 41,472 bytes a token


@dataclass(frozen=True)
class Engine:
    """How an engine lays its KV out.

    Args:
        block: tokens in a block; 0 for one block of all tokens.
        views: a flat array of 36 layers and so many blocks as tensors.
        shuffled: blocks in any order, not one after the other.
    """

    layout: KVLayout
    tokens: int
    block: int
    order: str
    views: Callable[[Any, int, int], list[Any]]
    shuffled: bool = True


def _both(flat: Any, blocks: int, n: int) -> list[Any]:
    return [[layer[:, 0], layer[:, 1]] for layer in flat.reshape(36, blocks, 2, n, 8, 128)]


def _apart(flat: Any, blocks: int, n: int) -> list[Any]:
    return list(flat.reshape(36, 2, blocks, n, 8, 128))


def _heads_first(flat: Any, blocks: int, n: int) -> list[Any]:
    return [[layer[:, 0], layer[:, 1]] for layer in flat.reshape(36, blocks, 2, 8, n, 128)]


def _packed(flat: Any, blocks: int, n: int) -> list[Any]:
    return [[layer[..., :128], layer[..., 128:]] for layer in flat.reshape(36, blocks, 8, n, 256)]


def _latents(flat: Any, blocks: int, n: int) -> list[Any]:
    return list(flat.reshape(36, blocks, n, 576))


ENGINES = {
    "nhd_16": Engine(WIDE, 2048, 16, "NHD", _both),  # [blocks, 2, 16, H, D]
    "nhd_128": Engine(WIDE, 2048, 128, "NHD", _both),
    "nhd_1": Engine(WIDE, 2048, 1, "NHD", _both),
    "hnd_16": Engine(WIDE, 2048, 16, "HND", _heads_first),  # [blocks, 2, H, 16, D]
    "hnd_128": Engine(WIDE, 2048, 128, "HND", _heads_first),
    "packed_16": Engine(WIDE, 2048, 16, "HND", _packed),  # [blocks, H, 16, 2D]
    "packed_128": Engine(WIDE, 2048, 128, "HND", _packed),
    "mla_16": Engine(MLA, 8192, 16, "NHD", _latents),  # [blocks, 16, D]
    "mla_64": Engine(MLA, 8192, 64, "NHD", _latents),
    "dense": Engine(WIDE, 2048, 0, "HND", _heads_first),
    "slots_in_order": Engine(WIDE, 2048, 1, "NHD", _apart, shuffled=False),  # K and V pools [slots, H, D]
    "slots_anywhere": Engine(WIDE, 2048, 1, "NHD", _apart),
    "mla_slots_in_order": Engine(MLA, 8192, 1, "NHD", _latents, shuffled=False),
    "mla_slots_anywhere": Engine(MLA, 8192, 1, "NHD", _latents),
}


class Memory:
    """Buffers of one size for all rows, in huge pages like the pool's: an engine's, and one to copy plainly to and from."""

    def __init__(self, size: int) -> None:
        self.engine, self.plain = self._room(size), self._room(size)
        self._memcpy = ctypes.CDLL(None).memcpy
        self._memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

    @staticmethod
    def _room(size: int) -> np.ndarray:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        room = np.frombuffer(memory, np.uint16)
        room[:] = np.arange(len(room), dtype=np.uint32) * np.uint32(2654435761) >> np.uint32(16)
        return room

    def memcpy(self, target: np.ndarray, source: np.ndarray, size: int) -> float:
        """Seconds."""
        begun = time.thread_time()
        self._memcpy(target.ctypes.data, source.ctypes.data, size)
        return time.thread_time() - begun


def payloads(layout: KVLayout, tokens: int) -> list[Part]:
    """A text's chunks in slots of a pool."""
    width = layout.chunk_tokens
    pool = HostPool(4096 + layout.chunk_bytes, tokens // width)
    slots = pool.allocate(tokens // width) or []
    rooms = [pool.view(slot)[4096 : 4096 + layout.chunk_bytes] for slot in slots]
    for room in rooms:
        np.frombuffer(room, np.uint8)[:] = 0xEE
    return [Part(room, i * width, (i + 1) * width, i * width, (i + 1) * width) for i, room in enumerate(rooms)]


def host_copies(name: str, engine: Engine, memory: Memory) -> Iterator[Row]:
    """Gather and scatter, each right after memcpy of as many bytes."""
    size = engine.layout.token_bytes * engine.tokens
    block = engine.block or engine.tokens
    blocks = engine.tokens // block
    flat = memory.engine[: size // 2]
    table = np.random.default_rng(7).permutation(blocks) if engine.shuffled else np.arange(blocks)
    copies = CopyEngine(engine.views(flat, blocks, block), engine.layout, order=engine.order)
    parts = payloads(engine.layout, engine.tokens)
    seconds: dict[str, list[tuple[float, float]]] = {"gather": [], "scatter": []}
    kept = flat.copy()
    for number in range(ROUNDS + 1):  # the first one warms up
        for way, copy in (("gather", copies.gather), ("scatter", copies.scatter)):
            plain = memory.memcpy(memory.plain, flat, size)
            begun = time.thread_time()
            copy(parts, [table]).wait()
            took = time.thread_time() - begun
            if number:
                seconds[way].append((plain, took))
    flat[:] = 0
    copies.scatter(parts, [table]).wait()
    assert np.array_equal(flat, kept)
    for way, pairs in seconds.items():
        yield {
            "name": f"host_{way}_{name}",
            "value": round(size / 1e9 / statistics.median(took for _, took in pairs), 2),
            "unit": "GB/s",
            "reference": round(size / 1e9 / statistics.median(plain for plain, _ in pairs), 2),
            "ratio": round(statistics.median(plain / took for plain, took in pairs), 3),
        }


def host_rows() -> dict[str, Callable[[], Iterator[Row]]]:
    """Rows by the name of the layout."""
    memory: list[Memory] = []

    def measure(name: str, engine: Engine) -> Iterator[Row]:
        if not memory:
            memory.append(Memory(max(e.layout.token_bytes * e.tokens for e in ENGINES.values())))
        yield from host_copies(name, engine, memory[0])

    return {name: lambda name=name, engine=engine: measure(name, engine) for name, engine in ENGINES.items()}


def gpu_rows() -> Iterator[Row]:
    """Nothing where there is no CUDA device."""
    try:
        import torch
    except ImportError:
        return
    if torch.cuda.is_available():
        import copy_gpu

        yield from copy_gpu.rows()


def main() -> int:
    """Print the rows."""
    groups = {**host_rows(), "gpu": gpu_rows}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--only", help=f"out of {', '.join(groups)}")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else list(groups)
    unknown = [name for name in chosen if name not in groups]
    if unknown:
        parser.error(f"expected names out of {', '.join(groups)}; got {', '.join(unknown)}")
    for name in chosen:
        for row in groups[name]():
            text = "{name:34} {value:9} {unit:8} reference {reference:9} ratio {ratio}".format(**row)
            print(json.dumps(row) if options.json else text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
