"""SGLang's real host pools (HiCache's memory) on the CPU, filled with KV that can be checked."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from known_kv import group_bits
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.runtime_context import get_parallel

from lmkv import KVLayout

ORDERS = {
    "mha": ("layer_first", "page_first", "page_first_direct", "page_head"),
    "mla": ("layer_first", "page_first", "page_first_direct"),
}
LAYERS, HEADS, SIZE = 3, 2, 16


def make_host(
    kind: str = "mha", order: str = "layer_first", page: int = 16, *, pages: int = 24, dtype: torch.dtype = torch.float32
) -> Any:
    """A host pool of ``pages`` pages and one more, over a small device pool; not pinned, since there is no GPU."""
    common = {"layer_num": LAYERS, "device": "cpu", "enable_memory_saver": False}
    own = {
        "host_to_device_ratio": 1.0,
        "host_size": 0,
        "page_size": page,
        "layout": order,
        "pin_memory": False,
        "device": "cpu",
    }
    if kind == "mla":
        device = MLATokenToKVPool(pages * page, page, dtype=dtype, kv_lora_rank=24, qk_rope_head_dim=8, **common)
    else:
        device = MHATokenToKVPool(pages * page, page, dtype=dtype, head_num=HEADS, head_dim=SIZE, **common)
    given: Any = device
    if hasattr(device, "get_device_pool_infos"):  # later versions hand over what the device pool says of itself
        given = device.get_device_pool_infos()[0].buffer_info
        own.update(device_capacity_tokens=device.size, start_layer=device.start_layer, end_layer=device.end_layer)
        if kind == "mla":
            own.update(target_layer_num=device.layer_num, override_kv_cache_dim=device.kv_cache_dim)
    return (MLATokenToKVPoolHost if kind == "mla" else MHATokenToKVPoolHost)(given, **own)


def make_config(extra: dict[str, Any], *, kind: str = "mha", **fields: Any) -> HiCacheStorageConfig:
    """What SGLang hands a storage."""
    given = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": kind == "mla",
        "enable_storage_metrics": False,
        "is_page_first_layout": False,
        "model_name": "tiny",
        "extra_config": {"backend_name": "lmkv", "module_path": "x", "class_name": "y", "interface_v1": 1, **extra},
    }
    return HiCacheStorageConfig(**{**given, **fields})


def make_device(page: int, pages: int = 24) -> Any:
    """The device pool that belongs to :func:`make_host`'s ``mha``."""
    own = {"head_num": HEADS, "head_dim": SIZE, "layer_num": LAYERS, "device": "cpu", "enable_memory_saver": False}
    return MHATokenToKVPool(pages * page, page, dtype=torch.float32, **own)


@contextlib.contextmanager
def controlling(host: Any, extra: dict[str, Any]) -> Iterator[Any]:
    """SGLang's own controller of HiCache with its threads, on a host pool and a storage that it makes by its flags."""
    device = make_device(host.page_size)
    allocator = PagedTokenToKVPoolAllocator(
        device.size, host.page_size, dtype=device.dtype, device="cpu", kvcache=device, need_sort=False
    )
    alone = {f"{name}_{what}": int(what == "size") for name in ("tp", "pp", "dcp", "attn_dcp") for what in ("rank", "size")}
    given = {"backend_name": "lmkv", "module_path": "lmkv.adapters.sglang.hicache", "class_name": "LMKVHiCacheStorage"}
    with get_parallel().override(**alone):
        controller = HiCacheController(
            *(allocator, host, host.page_size, None, threading.Event()),
            io_backend="direct",
            storage_backend="dynamic",
            prefetch_threshold=host.page_size,
            model_name="tiny",
            storage_backend_extra_config={**given, **extra},
        )
    try:
        yield controller
    finally:
        controller.detach_storage_backend()


def keys_of(count: int, seed: int = 0) -> list[str]:
    """Page names as SGLang makes them: SHA-256, each over the one before."""
    found = [hashlib.sha256(str(seed).encode()).hexdigest()]
    while len(found) < count:
        found.append(hashlib.sha256(found[-1].encode()).hexdigest())
    return found


def indices_of(pool: Any, pages: list[int]) -> torch.Tensor:
    """Host indices of whole pages."""
    return torch.cat([torch.arange(page * pool.page_size, (page + 1) * pool.page_size) for page in pages])


def known_page(pool: Any, key: str) -> torch.Tensor:
    """What a page named ``key`` holds: bits [kv, layers, tokens, heads, size] (MLA: kv = 1)."""
    latent = isinstance(pool, MLATokenToKVPoolHost)
    heads, size = (1, pool.kv_cache_dim) if latent else (pool.head_num, pool.head_dim)
    dtype = str(pool.dtype).removeprefix("torch.")
    layout = KVLayout.dense(layers=pool.layer_num, heads=heads, head_size=size, dtype=dtype, mla=latent)
    bits = group_bits(layout, [int(key[:7], 16), *range(pool.page_size - 1)])[0]
    return torch.from_numpy(np.ascontiguousarray(bits.transpose(1, 0, 3, 2, 4)).view(np.uint8))


def fill(pool: Any, page: int, key: str) -> None:
    """Put the KV of ``key`` into a page, the way the pool's own order has it."""
    wanted = known_page(pool, key)
    latent = isinstance(pool, MLATokenToKVPoolHost)
    flat = {
        "layer_first": lambda x: x,
        "page_first": lambda x: x.transpose(1, 2),
        "page_first_direct": lambda x: x,
        "page_head": lambda x: x.permute(0, 3, 2, 1, 4),
    }[pool.layout](wanted)
    data = flat.contiguous().view(torch.uint8).reshape(-1).view(pool.dtype)
    assert data.numel() == pool.get_dummy_flat_data_page().numel(), latent
    pool.set_from_flat_data_page(page * pool.page_size, data)


def page_data(pool: Any, page: int) -> bytes:
    """A page's bytes as the pool hands them out."""
    return pool.get_data_page(page * pool.page_size, flat=True).contiguous().view(torch.uint8).numpy().tobytes()


def holds(pool: Any, page: int, key: str) -> bool:
    """Whether a page holds the KV of ``key``, bit by bit; another page of the pool, which is overwritten, serves to compare."""
    got = page_data(pool, page)
    spare = pool.page_num - 1
    assert page != spare
    fill(pool, spare, key)
    return got == page_data(pool, spare)
