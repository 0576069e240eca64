"""SGLang's tree of prefixes on the device with LMKV behind it, for versions whose tree knows no external store.

A request's hit is what the tree has on the device plus what LMKV has beyond that, up to a token (a page, where pages are
larger). The scheduler learns both numbers when it matches a request, and has the second part loaded when it admits it; on a GPU
the forward pass waits for that layer by layer, and pages that are still being written are waited for before others get them. A
finished request's KV is stored once the tree has taken its pages over, beside what SGLang goes on to do: pages that are
still being copied are waited for before the tree gives them away. No lock of the tree's is taken for that, since the ranks of a
model have to evict alike, and their copies do not end at the same time.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InitLoadBackParams, InsertParams, MatchPrefixParams, MatchResult
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

from .token_reuse import TokenReuse

__all__ = ["LMKVRadixCache"]


class LMKVRadixCache(RadixCache):
    """SGLang's tree of prefixes on the device, and LMKV beyond it.

    Args:
        params: ``CacheInitParams`` of SGLang's.
        reuse: this rank's store.
        min_load_tokens: shorter hits beyond the tree are computed instead.
        forgets_on_flush: a flush may be the only sign of changed weights.
        last_may_be_late: a request may end before the step that computes its last token is submitted.

    Attributes:
        lmkv: the store, as the tree asks it.
    """

    def __init__(
        self,
        params: Any,
        reuse: TokenReuse,
        *,
        min_load_tokens: int = 1,
        forgets_on_flush: bool = False,
        last_may_be_late: bool = False,
    ) -> None:
        self.lmkv = reuse
        self._last_may_be_late = last_may_be_late
        self._forgets = forgets_on_flush
        self._least = max(1, min_load_tokens)
        #: What is being kept, by the node that ends with its last token.
        self._kept: dict[Any, list[Future[int]]] = {}
        super().__init__(params)

    def reset(self) -> None:
        """Empty the tree (``flush_cache``). LMKV keeps what it has."""
        self._settle()
        super().reset()
        self.lmkv.forget_all()
        if self._forgets:
            self.lmkv.pages.renew()

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """The tree's match, and in ``host_hit_length`` how many tokens LMKV has beyond it."""
        found = super().match_prefix(params)
        if self.disable or params.req is None:
            return found
        key = params.key
        tokens = key.raw_token_ids()
        self.lmkv.begin(params.req)
        held = len(found.device_indices)
        if len(tokens) - held < self._least:
            return found
        hit = self.lmkv.find(params.req, tokens) // self.page_size * self.page_size
        if hit - held < self._least:
            return found
        return found._replace(host_hit_length=hit - held)

    def init_load_back(self, params: InitLoadBackParams) -> tuple[torch.Tensor, Any]:
        """Load what :meth:`match_prefix` promised, and hang it into the tree.

        Returns:
            KV indices of the tokens that came, and the node that ends with the last of them.
        """
        request, node = params.req, params.best_match_node
        nothing = self._empty_match_result.device_indices
        held, wanted = len(request.prefix_indices), params.host_hit_length
        request.host_hit_length = 0
        allocator = self.token_to_kv_pool_allocator
        if allocator.available_size() < wanted:
            self.evict(EvictParams(num_tokens=wanted - allocator.available_size()))
        slots = allocator.alloc(wanted)
        if slots is None:
            return nothing, node
        quick = len(_text(request)) - held - wanted < wanted // 4
        came = self.lmkv.load(request, slots, held, quick_pass=quick) // self.page_size * self.page_size
        if came < wanted:
            self.lmkv.settle()
            allocator.free(slots[came:])
        if not came:
            return nothing, node
        tokens = _text(request)[: held + came]
        key = RadixKey(tokens, request.extra_key)
        value = torch.cat([request.prefix_indices, slots[:came]]).to(torch.int64)
        priority = getattr(request, "priority", 0) or 0
        known = self.insert(InsertParams(key=key, value=value, priority=priority)).prefix_len
        if known > held:  # somebody hung the same tokens in meanwhile: theirs stay
            self.lmkv.settle()
            allocator.free(slots[: known - held])
        match = super().match_prefix(MatchPrefixParams(key=RadixKey(tokens, request.extra_key)))
        request.host_hit_length = came
        return match.device_indices[held:], match.last_device_node

    def cache_finished_req(self, req: Any, is_insert: bool = True, *, kv_len_to_handle: int) -> None:
        """Have the tree take the request's pages over, and begin to store what is in them."""
        self.lmkv.settle(all_=False)
        tokens = _text(req)[:kv_len_to_handle]
        keeps = is_insert and not self.disable
        if keeps and self.disable_finished_insert:
            # generated tokens' KV differs in the last bits from a prompt's; deterministic serving does not reuse it. The tree
            # takes no page, so the copy has to be done before they are given back
            tokens = tokens[: len(req.origin_input_ids)]
            kept = self.lmkv.keep(req, tokens, self.req_to_token_pool.req_to_token[req.req_pool_idx, : len(tokens)])
            if kept is not None:
                kept.result()
        super().cache_finished_req(req, is_insert=is_insert, kv_len_to_handle=kv_len_to_handle)
        if keeps and not self.disable_finished_insert:
            held = super().match_prefix(MatchPrefixParams(key=RadixKey(tokens, req.extra_key)))
            # a copy can't be ordered behind a step that is not submitted yet; the tree's readers are, as later steps
            count = min(len(held.device_indices), len(_text(req)) - self._last_may_be_late)
            kept = self.lmkv.keep(req, tokens[:count], held.device_indices[:count])
            if kept is not None:
                self._kept = {node: left for node, all_ in self._kept.items() if (left := [f for f in all_ if not f.done()])}
                self._kept.setdefault(held.last_device_node, []).append(kept)
        self.lmkv.forget(req.rid)

    def cache_unfinished_req(self, req: Any, chunked: bool = False) -> None:
        """See SGLang's tree; a forward pass has ended, and with it the loads that it waited for."""
        self.lmkv.settle(all_=False)
        super().cache_unfinished_req(req, chunked=chunked)

    def evictable_size(self) -> int:
        """See SGLang's tree; asked in each round of the scheduler, so loads that have arrived are let go soon."""
        self.lmkv.settle(all_=False)
        return super().evictable_size()

    def _delete_leaf(self, node: Any) -> None:
        """A leaf's pages are given away: wait for what is being kept of them. What ends in a node has its pages up to there."""
        self.lmkv.settle()
        for kept in self._kept.pop(node, ()):
            kept.result()
        super()._delete_leaf(node)

    def _settle(self) -> None:
        """Wait for all that is being loaded and kept."""
        self.lmkv.settle()
        kept, self._kept = self._kept, {}
        for all_ in kept.values():
            for each in all_:
                each.result()

    # -- what SGLang asks of a tree with a storage behind it, while a request waits in its queue -----------------------------

    hicache_storage_pass_prefix_keys = False

    @property
    def waits(self) -> bool:
        """Whether requests wait in SGLang's queue for slow tiers."""
        return self.lmkv.queued

    def is_backuped(self, node: Any) -> bool:
        """Whether what lies beyond a node may be asked for; a text is looked up from its beginning, so always."""
        return True

    def prefetch_from_storage(self, *_: Any, **__: Any) -> None:
        """A request was queued: :meth:`match_prefix`, called just before, has begun to bring what was found."""

    def check_prefetch_progress(self, req_id: str) -> bool:
        """Whether a queued request may have its turn."""
        return self.lmkv.ready(req_id)

    def pop_prefetch_loaded_tokens(self, req_id: str) -> int:
        """Tokens that came from a storage into SGLang's own host memory: none do."""
        return 0

    def release_aborted_request(self, req_id: str) -> None:
        """A queued request is gone."""
        self.lmkv.forget(req_id)

    def release_host_resources(self) -> None:
        """The engine shuts down: write what waits for the slow tiers."""
        self.lmkv.close()
        super().release_host_resources()


def _text(request: Any) -> Any:
    """A request's tokens, read and generated."""
    return request.origin_input_ids + request.output_ids
