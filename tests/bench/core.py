"""What the core costs, beside a memcpy of the same run: ``python tests/bench/core.py [--json] [--only NAME,…]``.

One object a line with ``--json``: name, value, unit, reference, ratio. ``reference`` is a limit or a peer's figure (what it is
stands in ``docs/benchmarks.md``), ``ratio`` = value / reference. Times are medians in milliseconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np

import lmkv
from lmkv.config import StoreConfig
from lmkv.events import Emitter
from lmkv.index import content
from lmkv.tiers import NewChunk, RamTier

Row = dict[str, object]


def median_ms(call: Callable[[], object], runs: int = 21) -> float:
    """Median milliseconds of ``call``, after one call to warm up."""
    call()
    times = []
    for _ in range(runs):
        begun = time.perf_counter()
        call()
        times.append((time.perf_counter() - begun) * 1e3)
    return statistics.median(times)


def row(name: str, value: float, unit: str, reference: float) -> Row:
    return {"name": name, "value": round(value, 4), "unit": unit, "reference": reference, "ratio": round(value / reference, 4)}


def small_store(slots: int) -> lmkv.Store:
    """A RAM-only store whose chunks cost no memory to speak of: what is timed is control, not copies."""
    layout = lmkv.KVLayout.dense(layers=1, heads=1, head_size=1, dtype="uint8", chunk_tokens=256)
    return lmkv.Store(StoreConfig(model="bench", disk_capacity=0, ram_capacity=slots * 8192), layout)


def keys_and_verbs() -> Iterator[Row]:
    """Keys, lookup, reserve and commit, lease and release: 131,072 tokens in 512 chunks."""
    tokens = np.random.default_rng(0).integers(0, 150_000, 131_072, dtype=np.uint32)
    with small_store(1024) as store:
        chunker = lmkv.TokenChunker(store.namespace, 256)
        yield row("prefix_keys_131072", median_ms(lambda: chunker.prefix_keys(tokens)), "ms", 2.8)

        def reserve_commit() -> None:
            with store.reserve(tokens) as reservation:
                assert len(reservation.chunks) == 512
                reservation.commit()

        times = []
        for _ in range(15):
            store.clear()
            begun = time.perf_counter()
            reserve_commit()
            times.append((time.perf_counter() - begun) * 1e3)
        yield row("reserve_commit_512", statistics.median(times), "ms", 12.5)

        match = store.lookup(tokens)
        assert match.hit_tokens == 131_072
        yield row("lookup_512", median_ms(lambda: store.lookup(tokens)), "ms", 2.1)
        yield row("lease_release_512", median_ms(lambda: store.lease(match).release()), "ms", 1.0)


def windows() -> Iterator[Row]:
    """Fingerprints of all windows of 131,072 tokens, compiled; the reference is numpy's in the same run."""
    tokens = np.random.default_rng(2).integers(0, 150_000, 131_072, dtype=np.uint32)
    by_numpy = median_ms(lambda: content._by_prefix_sums(tokens, 256, 5))
    yield row("windows_131072", median_ms(lambda: content.window_fingerprints(tokens, 256, 5)), "ms", round(by_numpy, 3))


def retrieve() -> Iterator[Row]:
    """8,192 tokens of [28 layers, 2, 4 heads, 128] bf16 into dense tensors, beside one-thread memcpy of as many bytes."""
    layout = lmkv.KVLayout.dense(layers=28, heads=4, head_size=128, dtype="bfloat16")
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 150_000, 8192, dtype=np.uint32)
    given = rng.integers(0, 65_536, (28, 2, 4, 8192, 128), dtype=np.uint16)
    taken = np.zeros_like(given)
    flat, target = given.reshape(-1), np.zeros(given.size, np.uint16)
    with lmkv.Store(StoreConfig(model="bench", disk_capacity=0, ram_capacity=given.nbytes * 2), layout) as store:
        store.store(tokens, given)
        ratios, seconds = [], []
        for _ in range(9):
            begun = time.perf_counter()
            np.copyto(target, flat)
            copied = time.perf_counter() - begun
            begun = time.perf_counter()
            with store.lease(store.lookup(tokens)) as lease:
                assert store.retrieve(lease, taken) == 8192
            loaded = time.perf_counter() - begun
            ratios.append(copied / loaded)
            seconds.append(loaded)
        assert np.array_equal(given, taken)
    gigabytes = given.nbytes / 1e9
    yield row("retrieve_ratio", statistics.median(ratios), "of memcpy", 1.0)
    yield row(
        "retrieve_rate",
        gigabytes / statistics.median(seconds),
        "GB/s",
        gigabytes * statistics.median(ratios) / statistics.median(seconds),
    )


class _Texts:
    """An endless supply of texts of 16 chunks, each a short branch of one of the texts before."""

    def __init__(self, chunker: lmkv.TokenChunker, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._chunker = chunker

    def next(self) -> list[NewChunk]:
        data = self._rng.integers(0, 150_000, 16 * 256, dtype=np.uint32).tobytes()
        pieces = self._chunker.pieces(data)
        keys = self._chunker.chain(pieces)
        root = self._chunker.namespace.root
        return [
            NewChunk(key, keys[i - 1] if i else root, root, piece, i * 256, -1)
            for i, (key, piece) in enumerate(zip(keys, pieces, strict=True))
        ]


def _ram_tier(slots: int) -> tuple[RamTier, lmkv.TokenChunker]:
    layout = lmkv.KVLayout.dense(layers=1, heads=1, head_size=1, dtype="uint8", chunk_tokens=256)
    config = StoreConfig(model="bench", ram_capacity=slots * 8192, ram_extent=8192 * 4096)
    return RamTier(config, layout, Emitter(None)), lmkv.TokenChunker(lmkv.Namespace.of(layout, model="bench"), 256)


def _admit(ram: RamTier, chunks: list[NewChunk]) -> None:
    if ram.pool.available < len(chunks):
        ram.make_room(len(chunks), {chunk.key for chunk in chunks})
    slots = ram.pool.allocate(len(chunks))
    assert slots is not None
    for chunk, slot in zip(chunks, slots, strict=True):
        chunk.slot = slot
    ram.commit(chunks)


def _cost(slots: int, rounds: int) -> float:
    """Microseconds a chunk of one round on a full tier: find a held text, touch it, admit a new one and evict for it."""
    ram, chunker = _ram_tier(slots)
    texts = _Texts(chunker, slots)
    held: list[list[NewChunk]] = []
    for _ in range(slots // 16):
        chunks = texts.next()
        _admit(ram, chunks)
        held.append(chunks)
    gc.collect()
    pick = random.Random(3)
    fresh = [texts.next() for _ in range(rounds)]
    recent = [held[pick.randrange(slots // 32, len(held))] for _ in range(rounds)]
    sought = [([c.key for c in chunks], [c.piece for c in chunks]) for chunks in recent]
    batches = []
    step = max(1, rounds // 10)
    for first in range(0, rounds, step):
        begun = time.perf_counter()
        for i in range(first, min(rounds, first + step)):
            ram.touch(ram.index.walk(*sought[i]))
            _admit(ram, fresh[i])
        batches.append((time.perf_counter() - begun) / (min(rounds, first + step) - first) / 16 * 1e6)
    ram.pool.close()
    return statistics.median(batches)


def index_growth(largest: int = 1_000_000) -> Iterator[Row]:
    """Control cost of a chunk at one million chunks against ten thousand, pair by pair."""
    small, large = [], []
    for _ in range(3):
        small.append(_cost(10_000, 300))
        large.append(_cost(largest, 300))
    yield row("index_growth", statistics.median(large) / statistics.median(small), "times", 1.0)
    yield row("index_operation_1000000", statistics.median(large), "us a chunk", round(statistics.median(small), 3))


def index_bytes(chunks: int = 200_000) -> Iterator[Row]:
    """Bytes of RAM a chunk besides its tokens: index, content index, policy, tables."""
    ram, chunker = _ram_tier(chunks)
    texts = _Texts(chunker, 5)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(chunks // 16):
        _admit(ram, texts.next())
    gc.collect()
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    ram.pool.close()
    yield row("index_bytes", used / (chunks // 16 * 16) - 256 * 4, "bytes a chunk", 500)


def imports() -> Iterator[Row]:
    """A fresh interpreter's ``import lmkv``, and the first use of the store behind it."""
    for name, code in (("import", "import lmkv"), ("import_store", "import lmkv; lmkv.Store")):
        script = f"import time; t = time.perf_counter(); {code}; print((time.perf_counter() - t) * 1e3)"
        times = [
            float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
            for _ in range(7)
        ]
        yield row(name, statistics.median(times), "ms", 2000.0)


BENCHES: dict[str, Callable[[], Iterator[Row]]] = {
    "verbs": keys_and_verbs,
    "windows": windows,
    "retrieve": retrieve,
    "index_growth": index_growth,
    "index_bytes": index_bytes,
    "import": imports,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--only", default="", help=f"out of: {','.join(BENCHES)}")
    args = parser.parse_args()
    for name, bench in BENCHES.items():
        if args.only and name not in args.only.split(","):
            continue
        for result in bench():
            print(
                json.dumps(result) if args.json else "{name:28} {value:12} {unit:14} ratio {ratio}".format(**result), flush=True
            )


if __name__ == "__main__":
    main()
