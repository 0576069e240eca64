"""The rows of ``copies.py`` that need a GPU: what the wire gives, and what copies of KV reach of it. Real bytes, checked."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import lmkv
from lmkv.layout import KVLayout
from lmkv.pool import HostPool
from lmkv.transfer import CopyEngine, Part
from lmkv.transfer.gpu import Gpu

Row = dict[str, object]
LAYOUT = KVLayout.dense(layers=36, heads=8, head_size=128, dtype="bfloat16")  # Qwen3-8B: 147,456 bytes a token
CHUNKS = 40
TOKENS = CHUNKS * LAYOUT.chunk_tokens
OFFSET = 8192  # of the payload in a slot


def row(name: str, value: float, unit: str, reference: float) -> Row:
    return {
        "name": name,
        "value": round(value, 3),
        "unit": unit,
        "reference": round(reference, 3),
        "ratio": round(value / reference, 4),
    }


def seconds(call: Callable[[], Any], runs: int = 9) -> float:
    """Median time of ``call``, which ends when its work has ended."""
    call()
    times = []
    for _ in range(runs):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


class Wire:
    """Plain pinned copies of ``size`` bytes each way."""

    def __init__(self, size: int = 1 << 30) -> None:
        self.size = size
        self._up, self._down = (torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2))
        self._up.random_()
        self._there, self._here = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
        self._streams = torch.cuda.Stream(), torch.cuda.Stream()

    def copy(self, *ways: str) -> None:
        """Up, down, or both at once; returns once that is done."""
        if "up" in ways:
            with torch.cuda.stream(self._streams[0]):
                self._there.copy_(self._up, non_blocking=True)
        if "down" in ways:
            with torch.cuda.stream(self._streams[1]):
                self._down.copy_(self._here, non_blocking=True)
        torch.cuda.synchronize()


def beside(name: str, moved: int, call: Callable[[], Any], wire: Wire, *ways: str, rounds: int = 9) -> Row:
    """The rate at which ``call`` moves so many bytes, beside plain copies each of these ways: in turn, since both drift. The
    ratio is the median of the rounds' ratios."""
    plain = len(ways) * wire.size / 1e9
    pairs = [(moved / 1e9 / seconds(call, 1), plain / seconds(lambda: wire.copy(*ways), 1)) for _ in range(rounds)]
    ours, theirs = (statistics.median(rates) for rates in zip(*pairs, strict=True))
    return row(name, ours, "GB/s", theirs) | {"ratio": round(statistics.median(a / b for a, b in pairs), 4)}


class Slots:
    """A pinned pool with one text's chunks in it."""

    def __init__(self, gpu: Gpu, chunks: int = CHUNKS, extent: int = 1 << 30) -> None:
        slot = OFFSET + LAYOUT.chunk_bytes
        self._gpu = gpu
        self.pool = HostPool(slot, chunks, extent_bytes=extent)
        slots = self.pool.allocate(chunks) or []
        for number, (address, size) in enumerate(self.pool.extents()):
            self.pool.touch(number)
            gpu.pin(address, size)
        width = LAYOUT.chunk_tokens
        self.parts = [
            Part(
                self.pool.view(s)[OFFSET : OFFSET + LAYOUT.chunk_bytes], i * width, (i + 1) * width, i * width, (i + 1) * width
            )
            for i, s in enumerate(slots)
        ]

    def close(self) -> None:
        """Give the memory back."""
        for address, _ in self.pool.extents():
            self._gpu.unpin(address)
        self.parts.clear()
        self.pool.close()

    def shuffled(self) -> list[Part]:
        """The same payloads for other chunks, so that neighbours in the text are none in memory."""
        order = np.random.default_rng(7).permutation(len(self.parts))
        return [replace(part, payload=self.parts[i].payload) for part, i in zip(self.parts, order, strict=True)]

    def fill(self) -> None:
        rng = np.random.default_rng(3)
        for part in self.parts:
            np.frombuffer(part.payload, np.uint8)[:] = rng.integers(0, 256, len(part.payload), dtype=np.uint8)

    def wipe(self) -> None:
        for part in self.parts:
            np.frombuffer(part.payload, np.uint8)[:] = 0xEE


def engine_memory(block_tokens: int, order: str) -> tuple[list[Any], np.ndarray]:
    """Paged KV of random bits as vLLM 0.25 has it, [blocks, 2, …] a layer, and a shuffled block table."""
    blocks = TOKENS // block_tokens + 7
    inner = (block_tokens, 8, 128) if order == "NHD" else (8, block_tokens, 128)
    layers = []
    for _ in range(LAYOUT.groups[0].layers):
        bits = torch.randint(-32768, 32767, (blocks, 2, *inner), dtype=torch.int16, device="cuda")
        both = bits.view(torch.bfloat16)
        layers.append((both[:, 0], both[:, 1]))
    table = np.random.default_rng(block_tokens).permutation(blocks)[: TOKENS // block_tokens].astype(np.int32)
    return layers, table


def copies(gpu: Gpu, slots: Slots, wire: Wire, rates: dict[str, float]) -> Iterator[Row]:
    """Gather and scatter at several runs of contiguous engine memory; ``rates`` are those of plain copies, GB/s."""
    total = TOKENS * LAYOUT.token_bytes
    for block_tokens, order, name in ((16, "NHD", "32k"), (16, "HND", "4k"), (4, "HND", "1k"), (1, "NHD", "2k_block1")):
        layers, table = engine_memory(block_tokens, order)
        engine = CopyEngine(layers, LAYOUT, order=order)
        slots.wipe()
        engine.gather(slots.parts, [table]).wait()
        originals = [part.clone() for pair in layers for part in pair]
        for pair in layers:
            for part in pair:
                part.zero_()
        engine.scatter(slots.parts, [table]).wait()
        used = torch.from_numpy(table).long().cuda()
        again = [part for pair in layers for part in pair]
        right = all(
            torch.equal(x[used].view(torch.int16), y[used].view(torch.int16)) for x, y in zip(again, originals, strict=True)
        )
        assert right, f"{name}: what came back is not what was there"
        del originals, again
        for way, move, direction in (("scatter", engine.scatter, "up"), ("gather", engine.gather, "down")):
            yield beside(f"{way}_{name}", total, lambda m=move, t=table: m(slots.parts, [t]).wait(), wire, direction)
        if name == "32k":
            yield from both_ways(gpu, engine, table, slots, wire)
            yield from submission(engine, table, slots)
            yield from beside_compute(engine, table, slots)
            yield from tuning(gpu, engine, table, slots, rates)
        del engine, layers
        torch.cuda.empty_cache()


def both_ways(gpu: Gpu, engine: CopyEngine, table: np.ndarray, slots: Slots, wire: Wire) -> Iterator[Row]:
    """A load and a store of 10,240 tokens at once, beside two plain copies at once."""
    others = Slots(gpu)
    layers, other_table = engine_memory(16, "NHD")
    storing = CopyEngine(layers, LAYOUT)

    def run() -> None:
        up = engine.scatter(slots.parts, [table])
        down = storing.gather(others.parts, [other_table])
        up.wait()
        down.wait()

    yield beside("both_ways", 2 * TOKENS * LAYOUT.token_bytes, run, wire, "up", "down", rounds=15)
    others.close()


def submission(engine: CopyEngine, table: np.ndarray, slots: Slots) -> Iterator[Row]:
    """What a load of 10,240 tokens costs the caller, and when its first layer is there."""
    for name, layerwise, parts in (
        ("submit", False, slots.parts),
        ("submit_layerwise", True, slots.parts),
        ("submit_layerwise_scattered", True, slots.shuffled()),
    ):
        times, firsts, wholes = [], [], []
        stream = torch.cuda.Stream()
        for _ in range(9):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            copy = engine.scatter(parts, [table], layerwise=layerwise)
            times.append(time.perf_counter() - begun)
            with torch.cuda.stream(stream):
                copy.wait_layer(0)
            stream.synchronize()
            firsts.append(time.perf_counter() - begun)
            copy.wait()
            wholes.append(time.perf_counter() - begun)
        yield row(name, statistics.median(times) * 1e3, "ms", 1.0)
        yield row(f"{name}_first_layer", statistics.median(firsts) * 1e3, "ms", 1.5)
        yield row(f"{name}_whole", TOKENS * LAYOUT.token_bytes / statistics.median(wholes) / 1e9, "GB/s", 55.0)


def beside_compute(engine: CopyEngine, table: np.ndarray, slots: Slots) -> Iterator[Row]:
    """How much slower 8192 x 8192 x 8192 bf16 products are while loads, or stores, run beside them, and how fast these are."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    beside = torch.cuda.Stream().cuda_stream

    def products(until: Callable[[], bool], least: int) -> tuple[float, float]:
        """Seconds a product, and in all."""
        begun, made = time.perf_counter(), 0
        while made < least or not until():
            for _ in range(4):
                torch.matmul(left, right, out=out)
            made += 4
            torch.cuda.current_stream().synchronize()
        spent = time.perf_counter() - begun
        return spent / made, spent

    products(lambda: True, 60)
    for name, move in (("scatter", engine.scatter), ("gather", engine.gather)):
        ratios, rates = [], []
        for _ in range(5):
            before = products(lambda: True, 60)[0]
            torch.cuda.synchronize()
            copies = [move(slots.parts, [table], stream=beside) for _ in range(4)]
            during, spent = products(lambda copies=copies: copies[-1].done(), 4)
            after = products(lambda: True, 60)[0]
            ratios.append(2 * during / (before + after))
            rates.append(4 * TOKENS * LAYOUT.token_bytes / spent / 1e9)
        yield row(f"matmul_beside_{name}", statistics.median(ratios), "times", 1.0)
        yield row(f"{name}_beside_matmul", statistics.median(rates), "GB/s", 55.0)


def tuning(gpu: Gpu, engine: CopyEngine, table: np.ndarray, slots: Slots, rates: dict[str, float]) -> Iterator[Row]:
    """The same copy with other rings, by a kernel alone, and of few tokens."""
    total = TOKENS * LAYOUT.token_bytes
    chosen = gpu.options
    ways = (("scatter", engine.scatter, rates["up"]), ("gather", engine.gather, rates["down"]))
    tried = {
        f"{entry}MiB_x{entries}_{blocks}": replace(chosen, entry_bytes=entry << 20, entries=entries, beside_blocks=blocks)
        for entry, entries, blocks in ((8, 2, 16), (20, 2, 16), (40, 2, 132), (40, 4, 16), (80, 2, 16))
    }
    for name, options in (tried | {"by_kernel_alone": replace(chosen, direct_bytes=1 << 40)}).items():
        gpu.tune(options)
        for way, move, rate in ways:
            spent = seconds(lambda move=move: move(slots.parts, [table]).wait(), 5)
            yield row(f"{way}_{name}", total / spent / 1e9, "GB/s", rate)
    for tokens, path in ((16, "direct"), (64, "direct"), (256, "direct"), (256, "staged")):
        gpu.tune(replace(chosen, direct_bytes=1 << 40 if path == "direct" else 0))
        parts = [replace(slots.parts[0], stop=tokens)]
        spent = seconds(lambda parts=parts: engine.scatter(parts, [table]).wait(), 25)
        yield row(f"scatter_{tokens}_tokens_{path}", spent * 1e6, "us", tokens * LAYOUT.token_bytes / rates["up"] / 1e3)
    gpu.tune(chosen)


def pool_start(size: int = 8 << 30) -> Iterator[Row]:
    """A store of 8 GiB on a GPU: when its first chunk is stored, and when all of it is pinned, beside one cudaHostAlloc. Twice,
    since a virtual machine gets memory from its host when it is first used (``fresh``), which says little about either."""
    layers, table = engine_memory(16, "NHD")
    CopyEngine(layers, LAYOUT)  # what is done once a machine and once a process, imports included
    open_store = lmkv.Store
    for again in ("_fresh", ""):
        begun = time.perf_counter()
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        at_once = time.perf_counter() - begun
        del pinned
        torch._C._host_emptyCache()
        for shared in (False, True):
            config = lmkv.StoreConfig(model="bench", disk_capacity=0, ram_capacity=size, ram_ahead=size, ram_shared=shared)
            begun = time.perf_counter()
            with open_store(config, LAYOUT) as store:
                assert store.store(range(256), lmkv.PagedKV(layers, table)) == 256
                first = time.perf_counter() - begun
                pinner = store._pins._pinners[torch.cuda.current_device()]
                assert pinner.wait(60)
                slots = [np.frombuffer(store._ram.pool.view(i), np.uint8) for i in range(store._ram.pool.slots)]
                assert all(Gpu.of(0).pinned(slot.__array_interface__["data"][0], len(slot)) for slot in slots)
                del slots
                whole = time.perf_counter() - begun
            name = f"pool_8GiB_{'shared' if shared else 'private'}{again}"
            yield row(f"{name}_first_chunk", first * 1e3, "ms", 50.0)
            yield row(f"{name}_pinned", whole, "s", at_once)


def rows() -> Iterator[Row]:
    """All rows; the plain copies of 1 GiB come first and are what the ratios refer to."""
    gpu = Gpu.of(torch.cuda.current_device())
    wire = Wire()
    rates = {name: wire.size / seconds(lambda name=name: wire.copy(name)) / 1e9 for name in ("up", "down")}
    for name, rate in rates.items():
        yield row(f"plain_{name}", rate, "GB/s", rate)
    slots = Slots(gpu)
    slots.fill()
    yield from copies(gpu, slots, wire, rates)
    yield from pool_start()
