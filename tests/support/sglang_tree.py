"""SGLang's real pools, allocators and prefix tree on the CPU, driven as its scheduler does, with KV that can be checked."""

from __future__ import annotations

import dataclasses
import time
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from known_kv import group_bits
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.sampling.sampling_params import SamplingParams

from lmkv import KVLayout, StoreConfig
from lmkv.adapters.sglang.pages import PageStore
from lmkv.adapters.sglang.passes import LayerWaits
from lmkv.adapters.sglang.pools import device_pool
from lmkv.adapters.sglang.radix_tree import LMKVRadixCache
from lmkv.adapters.sglang.telling import Telling
from lmkv.adapters.sglang.token_reuse import TokenReuse


def make_pool(kind: str = "mha", *, size: int, page_size: int, dtype: torch.dtype = torch.float32) -> Any:
    """A device pool of three layers in host memory."""
    common = {"layer_num": 3, "device": "cpu", "enable_memory_saver": False}
    if kind == "mla":
        return MLATokenToKVPool(size, page_size, dtype=dtype, kv_lora_rank=12, qk_rope_head_dim=4, **common)
    return MHATokenToKVPool(size, page_size, dtype=dtype, head_num=2, head_dim=8, **common)


class Machine:
    """One rank: pools, tree, store.

    Args:
        pool: device pool; of ``size`` tokens in pages of ``page_size``.
        config: the store's.
        agree, queued, waits: as for :class:`TokenReuse`.
    """

    def __init__(
        self,
        pool: Any,
        config: StoreConfig,
        *,
        page_size: int = 1,
        chunk_tokens: int = 16,
        agree: Any = int,
        queued: bool = False,
        waits: LayerWaits | None = None,
        **settings: Any,
    ) -> None:
        self.pool, self.page_size = pool, page_size
        kind = TokenToKVPoolAllocator if page_size == 1 else PagedTokenToKVPoolAllocator
        own = (pool.size,) if page_size == 1 else (pool.size, page_size)
        self.allocator = kind(*own, dtype=pool.dtype, device="cpu", kvcache=pool, need_sort=False)
        self.requests = ReqToTokenPool(16, 1024, device="cpu", enable_memory_saver=False)
        self.pages = PageStore(dataclasses.replace(config, chunk_size=chunk_tokens), "test", device_pool(pool))
        self.told = Telling()
        self.reuse = TokenReuse(self.pages, agree, self.told, queued=queued, waits=waits)
        self.waits = waits
        self.params = CacheInitParams(
            disable=False,
            req_to_token_pool=self.requests,
            token_to_kv_pool_allocator=self.allocator,
            page_size=page_size,
            **settings,
        )
        self.tree = LMKVRadixCache(self.params, self.reuse)
        self.taken: dict[str, int] = {}

    def close(self) -> None:
        self.reuse.close()

    # -- what the scheduler does -----------------------------------------------------------------------------------------

    def ask(self, text: Sequence[int], *, extra_key: str | None = None, rid: str | None = None) -> Req:
        """A request that has come."""
        return Req(rid or str(len(self.taken)), "", array("q", text), SamplingParams(max_new_tokens=1), extra_key=extra_key)

    def admit(self, text: Sequence[int], *, extra_key: str | None = None, rid: str | None = None, **fields: Any) -> Req:
        """Match, load and "compute" a prompt; the request is then running.

        Sets ``cached`` on it: tokens from the tree, tokens from LMKV.
        """
        request = self.ask(text, extra_key=extra_key, rid=rid)
        for name, value in fields.items():
            setattr(request, name, value)
        limit = len(text) - 1
        key = RadixKey(array("q", text[:limit]), extra_key)
        if self.tree.waits:  # once when it is queued, and again when its turn has come
            self.tree.match_prefix(MatchPrefixParams(key=key, req=request))
            self.tree.prefetch_from_storage(request.rid, None, [])
            until = time.monotonic() + 30
            while not self.tree.check_prefetch_progress(request.rid):
                assert time.monotonic() < until, "the request waits for ever"
                time.sleep(0.001)
        found = self.tree.match_prefix(MatchPrefixParams(key=key, req=request))
        request.prefix_indices, request.last_node = found.device_indices, found.last_device_node
        request.best_match_node, request.host_hit_length = found.best_match_node, found.host_hit_length
        request.cache_protected_len = len(found.device_indices)
        device = len(found.device_indices)
        self.tree.inc_lock_ref(found.last_device_node)  # the admission's own lock, as _lock_node takes it
        if found.host_hit_length:
            more, request.last_node = self.tree.init_load_back(
                InitLoadBackParams(best_match_node=found.best_match_node, host_hit_length=found.host_hit_length, req=request)
            )
            request.prefix_indices = torch.cat([request.prefix_indices, more])
            request.cache_protected_len = len(request.prefix_indices)
        self.tree.inc_lock_ref(request.last_node)
        self.tree.dec_lock_ref(found.last_device_node)
        request.cached = (device, len(request.prefix_indices) - device)
        self._compute(request, len(text))
        if (
            self.waits is not None
        ):  # as a forward pass: it has written new tokens' KV of a layer before it waits for what it reads
            for layer in range(3):
                self.waits.wait_until(layer)
        self._verify(request, request.prefix_indices)
        self._verify(request, self.requests.req_to_token[request.req_pool_idx, : len(text)])
        return request

    def finish(self, request: Req, output: Sequence[int] = ()) -> None:
        """Append generated tokens, compute the KV of all but the last, and hand the request to the tree."""
        request.output_ids = array("q", output)
        length = len(request.origin_input_ids) + max(0, len(output) - 1)
        self._compute(request, length)
        self.tree.cache_finished_req(request, kv_len_to_handle=length)
        self.requests.free_slots.append(request.req_pool_idx)

    def run(self, text: Sequence[int], output: Sequence[int] = (), **more: Any) -> tuple[int, int]:
        """A request from begin to end; tokens cached in the tree and by LMKV."""
        request = self.admit(text, **more)
        self.finish(request, output)
        return request.cached

    def flush(self) -> None:
        """What ``/flush_cache`` does, and old bytes become others."""
        self.tree.reset()
        self.allocator.clear()
        for row in self._tensors():
            row.fill_(77)

    def check_pages(self, running: int = 0) -> None:
        """No page is lost or held twice; ``running`` tokens belong to requests under way and not to the tree."""
        tree = self.tree
        assert tree.protected_size() + tree.evictable_size() == tree.total_size()
        assert self.allocator.available_size() + tree.total_size() + running == self.pool.size
        held = torch.sort(tree.all_values_flatten())[0] if tree.total_size() else torch.empty(0)
        assert len(torch.unique(held)) == len(held)

    # -- KV --------------------------------------------------------------------------------------------------------------

    def _compute(self, request: Req, length: int) -> None:
        """Give tokens up to ``length`` slots and the KV a model would have computed there."""
        if request.req_pool_idx is None:
            request.req_pool_idx = self.requests.free_slots.pop()
            held = len(request.prefix_indices)
            self.requests.req_to_token[request.req_pool_idx, :held] = request.prefix_indices
            self.taken[request.rid] = held
        done = self.taken[request.rid]
        row = self.requests.req_to_token[request.req_pool_idx]
        pages = -(-length // self.page_size) - -(-done // self.page_size)
        if pages > 0:
            need = pages * self.page_size
            if self.allocator.available_size() < need:
                from sglang.srt.mem_cache.base_prefix_cache import EvictParams

                self.tree.evict(EvictParams(num_tokens=need))
            fresh = self.allocator.alloc(need)
            assert fresh is not None, "the test needs a larger pool"
            begin = -(-done // self.page_size) * self.page_size
            row[begin : begin + need] = fresh
        for part, wanted in zip(self._tensors(), self._known(request, length), strict=True):
            part[row[done:length].long()] = wanted[done:length]
        self.taken[request.rid] = max(done, length)

    def _verify(self, request: Req, slots: torch.Tensor) -> None:
        """The KV in slots is that of the request's first tokens, bit by bit."""
        for number, (part, wanted) in enumerate(zip(self._tensors(), self._known(request, len(slots)), strict=True)):
            got = part[slots.long()]
            assert got.contiguous().numpy().tobytes() == wanted.contiguous().numpy().tobytes(), f"tensor {number}: other bytes"

    def _tensors(self) -> list[torch.Tensor]:
        if hasattr(self.pool, "kv_buffer"):
            return [layer.view(torch.int32) for layer in self.pool.kv_buffer]
        return [part.view(torch.int32) for part in (*self.pool.k_buffer, *self.pool.v_buffer)]

    def _known(self, request: Req, length: int) -> list[torch.Tensor]:
        """What each tensor holds for the request's first tokens; other tenants' KV differs."""
        salt = sum((request.extra_key or "").encode()) * 1009
        text = [token + salt for token in (request.origin_input_ids + request.output_ids)[:length]]
        found = []
        for number, tensor in enumerate(self._tensors()):
            heads, size = tensor.shape[1:]
            layout = KVLayout.dense(layers=1, heads=heads, head_size=size, dtype="float32")
            bits = group_bits(layout, [token + 31 * number for token in text] or [0])[0][0, 0]
            found.append(torch.from_numpy(np.ascontiguousarray(bits.transpose(1, 0, 2)).view(np.int32))[:length])
        return found
