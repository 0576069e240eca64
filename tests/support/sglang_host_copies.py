"""Test infrastructure: what HiCache needs of a GPU, done by torch on the CPU. SGLang runs it as a plug-in of its own.

Stand-ins for three things and no more: pinning of host memory, the kernels that copy between host and device pools, and the
compiled hash of pages (the same one, in Python). The pools, the tree, the controller and its threads are SGLang's own.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np


def register() -> None:
    """The plug-in's function."""
    from sglang.srt.mem_cache import utils
    from sglang.srt.mem_cache.pool_host import common, mha

    common._cuda_host_register = lambda *_, **__: None
    common._cuda_host_unregister = lambda *_, **__: None
    mha.MHATokenToKVPoolHost.load_to_device_per_layer = _load
    mha.MHATokenToKVPoolHost.backup_from_device_all_layer = _backup
    utils.get_native_hash = _hash


def _layer(host: Any, layer: int) -> tuple[Any, Any]:
    keys, values = host.kv_buffer
    return (keys[layer], values[layer]) if host.layout == "layer_first" else (keys[:, layer], values[:, layer])


def _device(host: Any, device_pool: Any, layer: int) -> tuple[Any, Any]:
    if hasattr(host, "device_k_buffers"):  # later versions
        return host.device_k_buffers[layer], host.device_v_buffers[layer]
    return device_pool.k_buffer[layer], device_pool.v_buffer[layer]


def _load(self: Any, device_pool: Any, host_indices: Any, device_indices: Any, layer_id: int, *_: Any, **__: Any) -> None:
    for there, here in zip(_device(self, device_pool, layer_id), _layer(self, layer_id), strict=True):
        there[device_indices] = here[host_indices]


def _backup(self: Any, device_pool: Any, host_indices: Any, device_indices: Any, *_: Any, **__: Any) -> None:
    for layer in range(self.layer_num):
        for there, here in zip(_device(self, device_pool, layer), _layer(self, layer), strict=True):
            here[host_indices] = there[device_indices]


def _hash(tokens: Any, prior: bytes | None, page_size: int | None = None) -> str | list[str]:
    ids = np.asarray(list(tokens), dtype="<u4")
    found: list[str] = []
    for at in range(0, len(ids), page_size or max(1, len(ids))):
        digest = hashlib.sha256((prior or b"") + ids[at : at + (page_size or len(ids))].tobytes())
        prior = digest.digest()
        found.append(digest.hexdigest())
    return found if page_size else found[0]
