"""HiCache's storage: pages between a real host pool of SGLang's and LMKV, beside SGLang's own ``file`` backend, in turn.

    python tests/bench/sglang_hicache.py [--pages 32] [--rounds 5] [--order page_first] [--folder DIR]

Runs where SGLang is installed (``python tests/run.py sglang`` makes such environments). Pages of 64 tokens of a model of 32
layers, 8 KV heads of 128, bfloat16: 8 MiB each. The ``file`` backend takes and gives pages one by one, as SGLang does it for
storages without ``interface_v1``; its files stay in the system's page cache. LMKV is asked in one call a batch: "fresh" fills
slots that were never used, "put" and "RAM" are its first tier once all slots were, "disk" its second tier after a restart, read
past the page cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

PAGE, LAYERS, HEADS, SIZE = 64, 32, 8, 128


def host(order: str, pages: int) -> Any:
    """A host pool of that many pages and one more."""
    import sglang_hosts

    sglang_hosts.LAYERS, sglang_hosts.HEADS, sglang_hosts.SIZE = LAYERS, HEADS, SIZE
    pool = sglang_hosts.make_host("mha", order, PAGE, pages=pages, dtype=torch.bfloat16)
    pool.kv_buffer.view(torch.int16).random_(-30000, 30000)
    return pool


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def file_backend(pool: Any, folder: Path, keys: list[str], first: int) -> dict[str, float]:
    """SGLang's own storage, driven as its controller drives it."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheFile
    from sglang_hosts import make_config

    storage = HiCacheFile(dataclasses.replace(make_config({}), extra_config=None), str(folder))

    def put() -> None:
        assert storage.batch_set(keys, [pool.get_data_page(page * PAGE) for page in range(len(keys))])

    def get() -> None:
        found = storage.batch_get(keys, [pool.get_dummy_flat_data_page() for _ in keys])
        for number, page in enumerate(found):
            assert page is not None
            pool.set_from_flat_data_page((first + number) * PAGE, page)

    return {"put": seconds(put), "get": seconds(get)}


def lmkv_backend(pool: Any, folder: Path, keys: list[str], first: int, size: int) -> dict[str, float]:
    """The same pages through LMKV."""
    from sglang_hosts import indices_of, keys_of, make_config

    from lmkv.adapters.sglang.hicache import LMKVHiCacheStorage

    settings = {"ram_capacity": int(2.2 * size), "disk_capacity": 4 * size, "disk_path": str(folder / "lmkv")}
    here, there = indices_of(pool, list(range(len(keys)))), indices_of(pool, list(range(first, first + len(keys))))

    def storage() -> Any:
        opened = LMKVHiCacheStorage(make_config(settings), {})
        opened.register_mem_pool_host(pool)
        return opened

    def put(names: list[str]) -> float:
        took = seconds(lambda: opened.batch_set_v1(names, here))
        opened.flush()
        return took

    def get() -> float:
        took = seconds(lambda: opened.batch_get_v1(keys, there))
        for a, b in zip(range(len(keys)), range(first, first + len(keys)), strict=True):
            one, other = pool.get_data_page(a * PAGE), pool.get_data_page(b * PAGE)
            assert torch.equal(one.view(torch.int16), other.view(torch.int16))
        return took

    opened = storage()
    taken = {"fresh": put(keys_of(len(keys), seed=1000))}
    put(keys_of(len(keys), seed=1001))
    taken["put"] = put(keys)
    taken["RAM"] = get()
    opened.close()
    opened = storage()
    taken["disk"] = get()
    opened.close()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--order", default="page_first", choices=["page_first", "layer_first"])
    parser.add_argument("--folder", default=None)
    given = parser.parse_args()
    from sglang_hosts import keys_of

    torch.set_num_threads(1)
    pool = host(given.order, 2 * given.pages)
    size = given.pages * PAGE * LAYERS * HEADS * SIZE * 2 * 2
    rates: dict[str, list[float]] = {}
    for number in range(given.rounds + 1):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            keys = keys_of(given.pages, seed=number)
            theirs = file_backend(pool, Path(folder), keys, given.pages)
            ours = lmkv_backend(pool, Path(folder), keys, given.pages, size)
        if number == 0:
            continue  # first touches
        for name, took in {**{f"file {k}": v for k, v in theirs.items()}, **{f"LMKV {k}": v for k, v in ours.items()}}.items():
            rates.setdefault(name, []).append(size / took / 1e9)
    print(
        f"{given.pages} pages of {size // given.pages >> 20} MiB, {given.order}, GB/s: median (least to most) of {given.rounds}"
    )
    for name, found in rates.items():
        print(f"  {name:10} {statistics.median(found):6.2f}  ({min(found):.2f} to {max(found):.2f})")
    for ours_name, theirs_name in (("put", "put"), ("RAM", "get"), ("disk", "get")):
        ratios = [a / b for a, b in zip(rates[f"LMKV {ours_name}"], rates[f"file {theirs_name}"], strict=True)]
        spread = f"{statistics.median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"  LMKV {ours_name} / file {theirs_name}: {spread}")


if __name__ == "__main__":
    main()
