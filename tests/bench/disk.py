"""The disk tier beside the bare device, LMDB values and one file a chunk.

``python tests/bench/disk.py [--json] [--only NAME,…]``; ``--help`` says what else.

One object a line with ``--json``: name, value, unit, reference, ratio. ``reference`` is what stands beside it in the same run
(what it is says ``docs/benchmarks.md``), ``ratio`` = value / reference. Everything is written below ``--directory``, on whose
device it depends what is measured, and removed again.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

import lmkv
from lmkv.backends import BackendSettings
from lmkv.backends.lmdb_disk import LmdbBackend
from lmkv.backends.stripes import StripedBackend
from lmkv.chunks import ChunkKey
from lmkv.record import payload_offset, read_header, seal
from lmkv.testing._chunks import text_chunks

Row = dict[str, object]
MIB = 1024**2
IN_FLIGHT = 4
BATCH = 8


def row(name: str, value: float, unit: str, reference: float) -> Row:
    ratio = round(value / reference, 4) if reference else 0
    return {"name": name, "value": round(value, 4), "unit": unit, "reference": round(reference, 4), "ratio": ratio}


def layout_of(mib: int) -> lmkv.KVLayout:
    """Chunks of so many MiB: as many layers of 8 heads of 128 in bfloat16, 256 tokens."""
    return lmkv.KVLayout.dense(layers=mib, heads=8, head_size=128, dtype="bfloat16")


def small_layout_of(kib: int) -> lmkv.KVLayout:
    """Chunks of so many KiB: one layer of one head as large as that takes in bfloat16, 256 tokens."""
    return lmkv.KVLayout.dense(layers=1, heads=1, head_size=kib, dtype="bfloat16")


class Records:
    """Sealed records in page-aligned memory, as RAM slots are, and empty memory to read them into."""

    def __init__(self, layout: lmkv.KVLayout, count: int) -> None:
        offset = payload_offset(layout.chunk_tokens)
        self.size = offset + layout.chunk_bytes
        self.batch = max(BATCH, min(32, 64 * MIB // layout.chunk_bytes))  # as the tier takes them from its queue
        memory = mmap.mmap(-1, self.size * count)
        noise = np.random.default_rng(0).bytes(layout.chunk_bytes)
        chunks = text_chunks(layout, range(layout.chunk_tokens * count))
        self.keys: list[ChunkKey] = [chunk.key for chunk in chunks]
        self.views = [memoryview(memory)[i * self.size : (i + 1) * self.size] for i in range(count)]
        for chunk, view in zip(chunks, self.views, strict=True):
            view[offset:] = noise
            view[offset : offset + 16] = chunk.key
            seal(
                view,
                key=chunk.key,
                parent=chunk.parent,
                root=chunk.root,
                layout=layout.fingerprint,
                start=chunk.start,
                tokens=chunk.tokens,
                offset=offset,
                payload_bytes=layout.chunk_bytes,
            )
        self._target = mmap.mmap(-1, self.size * BATCH)
        self._target[:] = bytes(len(self._target))
        self.targets = [memoryview(self._target)[i * self.size : (i + 1) * self.size] for i in range(BATCH)]

    def batches(self) -> Iterator[tuple[list[ChunkKey], list[memoryview]]]:
        """Keys and records, some at a time."""
        for i in range(0, len(self.keys), self.batch):
            yield self.keys[i : i + self.batch], self.views[i : i + self.batch]

    def copy(self) -> None:
        """One large memcpy a record."""
        for i, view in enumerate(self.views):
            np.copyto(np.frombuffer(self.targets[i % BATCH], np.uint8), np.frombuffer(view, np.uint8))

    @property
    def gigabytes(self) -> float:
        return self.size * len(self.keys) / 1e9


def rate(records: Records, work: Callable[[], object]) -> float:
    """GB/s of one pass over all records."""
    begun = time.perf_counter()
    work()
    return records.gigabytes / (time.perf_counter() - begun)


def forget(ways: Sequence[Any]) -> None:
    """Have the system drop what its page cache holds of all files. It keeps what is mapped, so mappings have to go first."""
    for way in ways:
        way.unmap()
    os.sync()
    for path in (path for way in ways for path in way.files()):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    for way in ways:
        way.map()


class Way:
    """A way to keep records."""

    #: Whether what is there has to be deleted before it is written again.
    deletes = True

    def unmap(self) -> None:
        """Let go of mapped files."""

    def map(self) -> None:
        """Map them again."""


class Device(Way):
    """Plain direct I/O on one file that was written before, several in flight."""

    name = "device"
    deletes = False

    def __init__(self, folder: Path, records: Records) -> None:
        self.records = records
        self.path = folder / "plain"
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_DIRECT", 0))
        os.posix_fallocate(self._fd, 0, records.size * len(records.keys))
        self._pool = ThreadPoolExecutor(IN_FLIGHT)
        self.write()

    def _each(self, call: Callable[[int], object]) -> None:
        list(self._pool.map(call, range(len(self.records.keys))))

    def write(self) -> None:
        size, views = self.records.size, self.records.views
        self._each(lambda i: os.pwritev(self._fd, [views[i]], i * size))
        os.fdatasync(self._fd)

    def read(self) -> None:
        size, targets = self.records.size, self.records.targets
        self._each(lambda i: os.preadv(self._fd, [targets[i % BATCH]], i * size))

    def files(self) -> list[Path]:
        return [self.path]

    def close(self) -> None:
        self._pool.shutdown()
        os.close(self._fd)


class Tier(Way):
    """The disk backend."""

    def __init__(self, folder: Path, records: Records, layout: lmkv.KVLayout, direct: object) -> None:
        self.name = "lmkv" if direct else "lmkv_buffered"
        self.records = records
        self.path = folder / self.name
        capacity = int(records.size * len(records.keys) * 1.3) + 64 * MIB
        options = {"path": str(self.path), "direct": direct, "depth": IN_FLIGHT}
        self.backend = LmdbBackend(BackendSettings("disk", layout, capacity, options))
        self.fresh = rate(records, self._fill)

    def _fill(self) -> None:
        for keys, views in self.records.batches():
            self.backend.write_many(keys, views)

    def write(self) -> None:
        """Into slots that were used before, as they are from the first eviction on."""
        self._fill()

    def delete(self) -> None:
        self.backend.delete_many(self.records.keys)

    def read(self) -> None:
        for i in range(0, len(self.records.keys), BATCH):
            sizes = self.backend.read_many(self.records.keys[i : i + BATCH], self.records.targets)
            assert None not in sizes

    def files(self) -> list[Path]:
        return list(self.path.iterdir())

    def close(self) -> None:
        self.backend.close()


class LmdbValues(Way):
    """Records as values in LMDB, synced at the end."""

    name = "lmdb_values"

    def __init__(self, folder: Path, records: Records) -> None:
        self.records = records
        self.path = folder / "values"
        self.map()
        self._pool = ThreadPoolExecutor(IN_FLIGHT)
        self.write()

    def delete(self) -> None:
        with self._env.begin(write=True) as txn:
            for key in self.records.keys:
                txn.delete(key)
        self._env.sync(True)

    def write(self) -> None:
        for keys, views in self.records.batches():
            with self._env.begin(write=True) as txn:
                for key, view in zip(keys, views, strict=True):
                    txn.put(key, view)
        self._env.sync(True)

    def read(self) -> None:
        def one(i: int) -> None:
            with self._env.begin(buffers=True) as txn:
                value = txn.get(self.records.keys[i])
                target = np.frombuffer(self.records.targets[i % BATCH], np.uint8)
                np.copyto(target, np.frombuffer(value, np.uint8))
                del value

        list(self._pool.map(one, range(len(self.records.keys))))

    def map(self) -> None:
        size = int(self.records.size * len(self.records.keys) * 2.5) + 64 * MIB
        self._env = lmdb.open(str(self.path), map_size=size, sync=False, metasync=False)

    def unmap(self) -> None:
        self._env.close()

    def files(self) -> list[Path]:
        return [self.path / "data.mdb"]

    def close(self) -> None:
        self._pool.shutdown()
        self._env.close()


class ValuesInIndex(Way):
    """The disk backend's own index, with the records as values in the transactions that enter them."""

    name = "values_in_index"

    def __init__(self, folder: Path, records: Records, layout: lmkv.KVLayout) -> None:
        self._tier = Tier(folder / self.name, records, layout, False)
        self.records = records
        self._directory = self._tier.backend._directory
        self._directory.env.set_mapsize(4 * records.size * len(records.keys) + 64 * MIB)
        self._values = self._directory.env.open_db(b"values")
        self._pool = ThreadPoolExecutor(IN_FLIGHT)

    def delete(self) -> None:
        self._tier.delete()
        with self._directory.begin(True) as txn:
            txn.drop(self._values, delete=False)

    def write(self) -> None:
        directory, backend = self._directory, self._tier.backend
        for keys, views in self.records.batches():
            headers = [read_header(view) for view in views]
            places = directory.slots.reserve([backend._geometry.slots(len(view)) for view in views])
            with directory.begin(True) as txn:
                for key, header, view, runs in zip(keys, headers, views, places, strict=True):
                    directory.index.insert(txn, key, header, len(view), runs, 0)
                    txn.put(key, view, db=self._values)
            directory.slots.release([run for runs in places for run in runs])

    def read(self) -> None:
        def some(begin: int) -> None:
            with self._directory.begin(False) as txn:
                for i, key in enumerate(self.records.keys[begin : begin + 2]):
                    value = txn.get(key, db=self._values)
                    target = np.frombuffer(self.records.targets[(begin + i) % BATCH], np.uint8)
                    np.copyto(target, np.frombuffer(value, np.uint8))
                    del value

        list(self._pool.map(some, range(0, len(self.records.keys), 2)))

    def files(self) -> list[Path]:
        return self._tier.files()

    def close(self) -> None:
        self._pool.shutdown()
        self._tier.close()


class Stripes(Way):
    """The disk backend over two directories, here on one device."""

    name = "lmkv_two_paths"

    def __init__(self, folder: Path, records: Records, layout: lmkv.KVLayout) -> None:
        self.records = records
        self.paths = [folder / f"stripe-{i}" for i in range(2)]
        capacity = int(records.size * len(records.keys) * 1.6) + 128 * MIB
        options = {"paths": [str(path) for path in self.paths], "direct": True, "depth": IN_FLIGHT // 2}
        self.backend = StripedBackend(BackendSettings("disk", layout, capacity, options))
        self.write()

    def write(self) -> None:
        for keys, views in self.records.batches():
            self.backend.write_many(keys, views)

    def delete(self) -> None:
        self.backend.delete_many(self.records.keys)

    def read(self) -> None:
        for i in range(0, len(self.records.keys), BATCH):
            sizes = self.backend.read_many(self.records.keys[i : i + BATCH], self.records.targets)
            assert None not in sizes

    def files(self) -> list[Path]:
        return [file for path in self.paths for file in path.iterdir()]

    def close(self) -> None:
        self.backend.close()


class FileEach(Way):
    """One file a chunk, direct, synced and renamed into place, several in flight."""

    name = "file_each"

    def __init__(self, folder: Path, records: Records) -> None:
        self.records = records
        self.path = folder / "files"
        self.path.mkdir()
        self._pool = ThreadPoolExecutor(IN_FLIGHT)
        self.write()

    def delete(self) -> None:
        for path in self.path.iterdir():
            path.unlink()

    def write(self) -> None:
        def one(i: int) -> None:
            part = self.path / f"{i}.part"
            fd = os.open(part, os.O_RDWR | os.O_CREAT | getattr(os, "O_DIRECT", 0))
            os.pwritev(fd, [self.records.views[i]], 0)
            os.fdatasync(fd)
            os.close(fd)
            part.rename(self.path / self.records.keys[i].hex())

        list(self._pool.map(one, range(len(self.records.keys))))

    def read(self) -> None:
        def one(i: int) -> None:
            fd = os.open(self.path / self.records.keys[i].hex(), os.O_RDONLY | getattr(os, "O_DIRECT", 0))
            os.preadv(fd, [self.records.targets[i % BATCH]], 0)
            os.close(fd)

        list(self._pool.map(one, range(len(self.records.keys))))

    def files(self) -> list[Path]:
        return list(self.path.iterdir())

    def close(self) -> None:
        self._pool.shutdown()


def speeds(folder: Path, args: argparse.Namespace) -> Iterator[Row]:
    """Write, cold read and warm read of chunks of several sizes, everything in turn in each round; medians over the rounds."""
    for mib in args.sizes:
        layout = layout_of(mib)
        records = Records(layout, max(BATCH, args.megabytes // mib // BATCH * BATCH))
        tier = Tier(folder, records, layout, True)
        buffered, values = Tier(folder, records, layout, False), LmdbValues(folder, records)
        ways: list[Any] = [Device(folder, records), tier, buffered, values, FileEach(folder, records)]
        found: dict[tuple[str, str], list[float]] = {}
        for _ in range(args.rounds):
            for way in ways:
                if way.deletes:
                    way.delete()
                forget(ways)
                found.setdefault((way.name, "write"), []).append(rate(records, way.write))
            for way in ways:
                forget(ways)
                found.setdefault((way.name, "cold_read"), []).append(rate(records, way.read))
            for way in (buffered, values):
                way.read()
                found.setdefault(("memcpy", f"warm_read_{way.name}"), []).append(rate(records, records.copy))
                found.setdefault((way.name, "warm_read"), []).append(rate(records, way.read))
        for way in ways:
            way.close()
        yield from _ratios(found, mib)
        yield row(f"write_fresh_{mib}MiB_lmkv", tier.fresh, "GB/s", statistics.median(found["device", "write"]))
        del records, ways, tier, buffered, values
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def small(folder: Path, args: argparse.Namespace) -> Iterator[Row]:
    """Records of small layouts in segments, past the page cache and not, and as values in the index: medians of rounds."""
    for kib in args.kib:
        layout = small_layout_of(kib)
        records = Records(layout, args.small_megabytes * 1024 // kib // 32 * 32)
        ways: list[Any] = [Tier(folder, records, layout, True), Tier(folder, records, layout, False)]
        ways += [ValuesInIndex(folder, records, layout)]
        found: dict[tuple[str, str], list[float]] = {}
        for _ in range(args.rounds):
            for way in ways:
                way.delete()
                found.setdefault((way.name, "write"), []).append(rate(records, way.write))
            for way in ways[:2]:  # what is mapped, as the third one's values are, does not leave the page cache
                forget(ways)
                found.setdefault((way.name, "cold_read"), []).append(rate(records, way.read))
            for way in ways:
                way.read()
                found.setdefault((way.name, "warm_read"), []).append(rate(records, way.read))
        for way in ways:
            way.close()
        for (name, operation), values in found.items():
            other = found[("lmkv", operation)]
            result = row(f"small_{operation}_{kib}KiB_{name}", statistics.median(values), "GB/s", statistics.median(other))
            result["ratio"] = round(statistics.median(a / b for a, b in zip(values, other, strict=True)), 4)
            yield result
        for path in folder.iterdir():
            shutil.rmtree(path)


def stripes(folder: Path, args: argparse.Namespace) -> Iterator[Row]:
    """Two directories beside one, on one device: what spreading costs; and a lookup of 512 chunks in both."""
    for mib in args.sizes:
        layout = layout_of(mib)
        records = Records(layout, max(BATCH, args.megabytes // mib // BATCH * BATCH))
        ways: list[Any] = [Tier(folder, records, layout, True), Stripes(folder, records, layout)]
        found: dict[tuple[str, str], list[float]] = {}
        for _ in range(args.rounds):
            for way in ways:
                way.delete()
                found.setdefault((way.name, "write"), []).append(rate(records, way.write))
            for way in ways:
                forget(ways)
                found.setdefault((way.name, "cold_read"), []).append(rate(records, way.read))
        for operation in ("write", "cold_read"):
            one, two = found[("lmkv", operation)], found[("lmkv_two_paths", operation)]
            result = row(f"two_paths_{operation}_{mib}MiB", statistics.median(two), "GB/s", statistics.median(one))
            result["ratio"] = round(statistics.median(a / b for a, b in zip(two, one, strict=True)), 4)
            yield result
        for way in ways:
            way.close()
        for path in folder.iterdir():
            shutil.rmtree(path)
    layout = lmkv.KVLayout.dense(layers=1, heads=1, head_size=1, dtype="uint8", chunk_tokens=256)
    records = Records(layout, 512)
    pieces = [bytes(view[128 : 128 + 1024]) for view in records.views]
    backends = [way.backend for way in (Tier(folder, records, layout, True), Stripes(folder, records, layout))]
    times: list[list[float]] = [[], []]
    for _ in range(50):
        for backend, seconds in zip(backends, times, strict=True):
            begun = time.perf_counter()
            assert backend.match_prefix(records.keys, pieces) == 512
            seconds.append(1e3 * (time.perf_counter() - begun))
    yield row("two_paths_lookup_512_chunks", statistics.median(times[1]), "ms", statistics.median(times[0]))
    for backend in backends:
        backend.close()


def _ratios(found: dict[tuple[str, str], list[float]], mib: int) -> Iterator[Row]:
    """A row a way and operation: median speed, beside the median of what it is compared with; the ratio is taken by round."""
    for (name, operation), values in found.items():
        if name == "memcpy":
            continue
        other = found[("memcpy", f"{operation}_{name}") if operation == "warm_read" else ("device", operation)]
        result = row(f"{operation}_{mib}MiB_{name}", statistics.median(values), "GB/s", statistics.median(other))
        result["ratio"] = round(statistics.median(a / b for a, b in zip(values, other, strict=True)), 4)
        yield result


# -- through the store -------------------------------------------------------------------------------------------------------


def size_of(path: Path) -> int:
    """Bytes of all files of a directory."""
    return sum(max(file.stat().st_size, file.stat().st_blocks * 512) for file in path.iterdir())


def quota(folder: Path, args: argparse.Namespace) -> Iterator[Row]:
    """Texts of mixed lengths, ten times the quota: the last tenth's speed beside the first's, the most bytes."""
    layout = layout_of(8)
    capacity = int(args.quota_gigabytes * 1e9)
    path = folder / "quota"
    rng = np.random.default_rng(4)
    config = lmkv.StoreConfig(
        model="bench", ram_capacity=768 * MIB, disk_capacity=capacity, disk_path=str(path), deadline_seconds=60
    )
    most, rates = 0, []
    with lmkv.Store(config, layout) as store:
        tier = store._slow[0]
        for _ in range(10):
            written, begun = 0, time.perf_counter()
            while written < capacity:
                tokens = rng.integers(0, 2**32, int(rng.integers(1, 12 * 256)), dtype=np.uint32)
                with store.reserve(tokens) as reservation:
                    written += sum(len(chunk.piece) // 4 * layout.token_bytes for chunk in reservation.chunks)
                    reservation.commit()
                if len(tier.writer) > 48:
                    store.flush()
                most = max(most, size_of(path))
            store.flush()
            rates.append(written / 1e9 / (time.perf_counter() - begun))
        stats = store.stats().tiers[1]
        assert stats.written_chunks > 10 * capacity / layout.chunk_bytes
    yield row("quota_last_tenth", rates[-1], "GB/s", rates[0])
    yield row("quota_slowest_tenth", min(rates), "GB/s", rates[0])
    yield row("quota_most_bytes", most, "bytes", capacity)
    shutil.rmtree(path)


class Folder(Way):
    """Files that nobody has open."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def files(self) -> list[Path]:
        return list(self.path.iterdir())


_REOPEN = """
import sys, time
begun = time.perf_counter()
import numpy as np, lmkv
lmkv.Store
loaded = time.perf_counter()
layout = lmkv.KVLayout.dense(layers=1, heads=1, head_size=1, dtype="uint8", chunk_tokens=256)
config = lmkv.StoreConfig(model="bench", ram_capacity="64MiB", disk_capacity=int(sys.argv[2]), disk_path=sys.argv[1])
tokens = np.random.default_rng(int(sys.argv[3])).integers(0, 2**32, 4096, dtype=np.uint32)
store = lmkv.Store(config, layout)
with store.lease(store.lookup(tokens)) as lease:
    assert lease.hit_tokens == 4096, lease.hit_tokens
done = time.perf_counter()
print((done - loaded) * 1e3, (done - begun) * 1e3, store.stats().tiers[1].chunks)
"""


def reopen(folder: Path, args: argparse.Namespace) -> Iterator[Row]:
    """From opening a store on 100,000 chunks to the first hit, in a fresh process: found, loaded and proved."""
    layout = lmkv.KVLayout.dense(layers=1, heads=1, head_size=1, dtype="uint8", chunk_tokens=256)
    path, capacity = folder / "reopen", 3 * 10**9
    config = lmkv.StoreConfig(
        model="bench", ram_capacity="256MiB", disk_capacity=capacity, disk_path=str(path), write_queue=1 << 20
    )
    with lmkv.Store(config, layout) as store:
        for number in range(args.chunks // 16):
            tokens = np.random.default_rng(number).integers(0, 2**32, 4096, dtype=np.uint32)
            with store.reserve(tokens) as reservation:
                reservation.commit()
            if number % 64 == 63:
                store.flush()
        store.flush()
        assert store.stats().tiers[1].chunks == args.chunks // 16 * 16
    for name, cold in (("reopen_warm", False), ("reopen_cold", True)):
        opened, whole = [], []
        for seed in range(5):
            if cold:
                forget([Folder(path)])
            command = [sys.executable, "-c", _REOPEN, str(path), str(capacity), str(seed * 7)]
            done = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            opened.append(float(done[0]))
            whole.append(float(done[1]))
        yield row(f"{name}_to_first_hit", statistics.median(opened), "ms", 200)
        yield row(f"{name}_with_imports", statistics.median(whole), "ms", 200)
    yield row("reopen_index_bytes", os.stat(path / "data.mdb").st_blocks * 512 / args.chunks, "bytes a chunk", 0)
    shutil.rmtree(path)


def restart(folder: Path, args: argparse.Namespace) -> Iterator[Row]:
    """The share of tokens found on the disk by the same requests, in one process and with a restart in the middle."""
    layout = lmkv.KVLayout.dense(layers=1, heads=1, head_size=64, dtype="float16", chunk_tokens=16)
    requests = np.random.default_rng(8).zipf(1.2, 3000) % 400
    found = []
    for restarts in (False, True):
        path = folder / f"restart-{restarts}"
        config = lmkv.StoreConfig(model="bench", ram_capacity=256 * 1024, disk_capacity=16 * MIB, disk_path=str(path))
        store, hit, total = lmkv.Store(config, layout), 0, 0
        for i, number in enumerate(requests):
            if restarts and i == len(requests) // 2:
                store.close()
                store = lmkv.Store(config, layout)
            tokens = np.random.default_rng(int(number)).integers(0, 2**32, 480, dtype=np.uint32)
            with store.lease(store.lookup(tokens)) as lease:
                hit, total = hit + (i >= len(requests) // 2) * lease.hit_tokens, total + (i >= len(requests) // 2) * 480
            with store.reserve(tokens) as reservation:
                reservation.commit()
            store.flush()
        store.close()
        found.append(hit / total)
        shutil.rmtree(path)
    yield row("hit_ratio_after_restart", found[1], "of tokens", found[0])


BENCHES: dict[str, Callable[[Path, argparse.Namespace], Iterator[Row]]] = {
    "speeds": speeds,
    "small": small,
    "stripes": stripes,
    "quota": quota,
    "reopen": reopen,
    "restart": restart,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--only", default="", help=f"out of: {','.join(BENCHES)}")
    parser.add_argument("--directory", default=None, help="where to write; a temporary directory by default")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 8, 14], help="MiB a chunk")
    parser.add_argument("--kib", type=int, nargs="+", default=[16, 32, 64, 128], help="KiB a chunk of small layouts")
    parser.add_argument("--small-megabytes", type=int, default=64, help="MiB written and read by each pass of small layouts")
    parser.add_argument("--megabytes", type=int, default=448, help="MiB written and read by each pass")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quota-gigabytes", type=float, default=2.0, help="ten times as much is written")
    parser.add_argument("--chunks", type=int, default=100_000, help="of the directory that is opened again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        for name, bench in BENCHES.items():
            if args.only and name not in args.only.split(","):
                continue
            for result in bench(Path(folder), args):
                print(
                    json.dumps(result) if args.json else "{name:36} {value:14} {unit:14} ratio {ratio}".format(**result),
                    flush=True,
                )


if __name__ == "__main__":
    main()
