"""One rank of SGLang's without its model: real pools, allocators and radix tree on the CPU, linked to a page store.

Driven as the scheduler does, with KV that can be recognized: what a slot holds follows from the text up to its token, the
tenant and the adapter, so that any other KV in it is found out.
"""

from __future__ import annotations

import functools
import hashlib
from array import array
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InitLoadBackParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import publish
from sglang.srt.server_args import ServerArgs

from lmkv.adapters.sglang.linker import LMKVLinker

__all__ = ["LinkedRank", "make_pool", "server_args"]


def make_pool(kind: str = "mha", *, size: int, page_size: int, dtype: torch.dtype = torch.float32, layers: int = 3) -> Any:
    """A device pool in host memory."""
    common = {"layer_num": layers, "device": "cpu", "enable_memory_saver": False}
    if kind == "mla":
        return MLATokenToKVPool(size, page_size, dtype=dtype, kv_lora_rank=12, qk_rope_head_dim=4, **common)
    return MHATokenToKVPool(size, page_size, dtype=dtype, head_num=2, head_dim=8, **common)


@functools.cache
def server_args(model: str) -> ServerArgs:
    """Arguments of a server of that model, published to this process as its scheduler would."""
    args = ServerArgs(model_path=model, device="cpu", skip_tokenizer_init=True, attention_backend="torch_native")
    args.resolve_once()
    publish(args, role="scheduler")
    return args


@functools.lru_cache(maxsize=4096)
def _marks(text: tuple[int, ...], tenant: tuple[str | None, str | None]) -> tuple[bytes, ...]:
    """For each token, what names the text up to it."""
    if not text:
        return ()
    before = _marks(text[:-1], tenant) if len(text) % 32 else ()
    running = hashlib.sha256(repr(tenant).encode())
    if not before:
        found = []
        for token in text:
            running.update(token.to_bytes(4, "little"))
            found.append(running.digest())
        return tuple(found)
    for token in text:
        running.update(token.to_bytes(4, "little"))
    return (*before, running.digest())


class LinkedRank:
    """One rank.

    Args:
        args: from :func:`server_args`.
        settings: for the linker, ``linker_extra_config``.
        core: of the tree, ``rust`` or ``python``.
    """

    def __init__(
        self, args: Any, settings: Mapping[str, Any], *, pool: Any, page_size: int = 1, core: str = "rust", **params: Any
    ) -> None:
        self.pool, self.page_size = pool, page_size
        kind = TokenToKVPoolAllocator if page_size == 1 else PagedTokenToKVPoolAllocator
        own = (pool.size,) if page_size == 1 else (pool.size, page_size)
        self.allocator = kind(*own, dtype=pool.dtype, device="cpu", kvcache=pool, need_sort=False)
        self.params = CacheInitParams(
            disable=False,
            req_to_token_pool=ReqToTokenPool(16, 1024, device="cpu", enable_memory_saver=False),
            token_to_kv_pool_allocator=self.allocator,
            page_size=page_size,
            tree_components=(ComponentType.FULL,),
            tree_core_backend=core,
            **params,
        )
        self.tree = UnifiedRadixCache(self.params)
        self.linker = LMKVLinker(
            args, self.params, components={ComponentType.FULL}, extra_config={"chunk_size": 16, **settings}
        )
        self.tree.init_cache_linker(self.linker)
        pool.register_layer_transfer_counter(self.tree.linker.layer_done_counter)
        self.requests = 0

    # -- KV that can be recognized -------------------------------------------------------------------------------------------

    def _tensors(self) -> list[torch.Tensor]:
        pool = self.pool
        return list(pool.kv_buffer) if hasattr(pool, "kv_buffer") else [*pool.k_buffer, *pool.v_buffer]

    def _bits(self, mark: bytes, row: int, like: torch.Tensor) -> torch.Tensor:
        size = like[0].numel() * like.element_size()
        made = hashlib.shake_128(mark + bytes([row])).digest(size)
        return torch.frombuffer(bytearray(made), dtype=torch.uint8)

    def compute(self, text: Sequence[int], slots: Sequence[int], first: int, tenant: tuple[str | None, str | None]) -> None:
        """Write the KV of tokens from ``first`` on into their slots."""
        marks = _marks(tuple(text), tenant)
        for row, tensor in enumerate(self._tensors()):
            for slot, mark in zip(slots, marks[first:], strict=True):
                tensor[slot].view(torch.uint8).flatten().copy_(self._bits(mark, row, tensor))

    def wrong(self, text: Sequence[int], slots: Sequence[int], tenant: tuple[str | None, str | None]) -> list[int]:
        """Positions whose slots hold other KV than the text's."""
        marks = _marks(tuple(text), tenant)
        found = set()
        for row, tensor in enumerate(self._tensors()):
            for i, (slot, mark) in enumerate(zip(slots, marks, strict=False)):
                if not torch.equal(tensor[slot].contiguous().view(torch.uint8).flatten(), self._bits(mark, row, tensor)):
                    found.add(i)
        return sorted(found)

    # -- what the scheduler does ---------------------------------------------------------------------------------------------

    def admit(self, text: Sequence[int], *, extra_key: str | None = None, cache_salt: str | None = None) -> Any:
        """Match a prompt and queue its load; ``cached`` of the request are tokens of the tree and of LMKV."""
        self.requests += 1
        request = SimpleNamespace(
            rid=f"r{self.requests}", extra_key=extra_key, cache_salt=cache_salt, text=list(text), kv=None, session=None,
            swa_branching_seqlen=None, session_id=None, tenant=(extra_key, cache_salt),
        )  # fmt: skip
        key = RadixKey(array("q", text[:-1]), extra_key, cache_salt=cache_salt)
        found = self.tree.match_prefix(MatchPrefixParams(key=key, req=request))
        request.last_node = found.last_device_node
        request.lock = self.tree.inc_lock_ref(request.last_node).to_dec_params()
        request.device = int(found.device_prefix_len)
        slots = self.tree.path_device_indices(request.last_node)[: request.device]
        loaded = 0
        if found.host_hit_length:
            loaded, _ = self.tree.init_load_back(InitLoadBackParams(found.best_match_node, found.host_hit_length, req=request))
            assert loaded in (0, found.host_hit_length)
            if loaded:
                slots = torch.cat([slots, self.tree.linker.private_load_indices[request.rid]])
        request.slots = slots.tolist()
        request.cached = (request.device, loaded)
        return request

    def forward(self, *requests: Any) -> list[str]:
        """A batch: its loads under the forward pass, layer by layer; then ids of requests whose load failed."""
        index = self.tree.ready_to_load_host_cache()
        counter = self.tree.linker.layer_done_counter
        counter.set_consumer(index)
        for layer in range(self.pool.layer_num):
            counter.wait_until(layer)
        for request in requests:
            request.wrong = self.wrong(request.text, request.slots, request.tenant)
            first = len(request.slots)
            count = len(request.text) - first
            pages = -(-count // self.page_size) * self.page_size
            if pages > self.allocator.available_size():
                self.tree.evict(EvictParams(num_tokens=pages))
            fresh = self.allocator.alloc(pages)
            assert fresh is not None, "the pool is too small for this test"
            request.spare = fresh[count:].tolist()
            request.slots += fresh[:count].tolist()
            self.compute(request.text, request.slots[first:], first, request.tenant)
        failed = self.tree.linker.finish_loads()
        counter.set_consumer(-1)
        return failed

    def finish(self, request: Any, *, insert: bool = True) -> None:
        """Hand the request's KV to the tree, or free it."""
        aligned = len(request.text) // self.page_size * self.page_size if insert else request.device
        slots = torch.tensor(request.slots, dtype=torch.int64)
        if insert:
            key = RadixKey(array("q", request.text[:aligned]), request.extra_key, cache_salt=request.cache_salt)
            self.tree.insert(InsertParams(key=key, value=slots[:aligned].clone(), prev_prefix_len=request.device))
        rest = torch.cat([slots[aligned:], torch.tensor(request.spare, dtype=torch.int64)])
        if len(rest):
            self.allocator.free(rest)
        self.tree.dec_lock_ref(request.last_node, request.lock)
        self.tree.linker.release_request(request.rid)
        self.tree.check_hicache_events()

    def abort(self, request: Any) -> None:
        """Give a request up before its batch."""
        self.tree.linker.release_request(request.rid)
        loaded = request.slots[request.device :]
        if loaded:
            self.allocator.free(torch.tensor(loaded, dtype=torch.int64))
        self.tree.dec_lock_ref(request.last_node, request.lock)

    def run(self, text: Sequence[int], **tenant: str | None) -> tuple[int, int]:
        """A request from begin to end; tokens cached in the tree and by LMKV."""
        request = self.admit(text, **tenant)
        failed = self.forward(request)
        assert not failed
        assert request.wrong == [], (request.wrong, request.cached)
        self.finish(request)
        return request.cached

    def flush(self) -> None:
        """What ``/flush_cache`` does; and old bytes become others."""
        self.tree.reset()
        self.allocator.clear()
        for tensor in self._tensors():
            tensor.view(torch.uint8).fill_(77)

    def close(self) -> None:
        self.linker.close()
