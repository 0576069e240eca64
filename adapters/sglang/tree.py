"""SGLang's radix tree around the linker: it says what text a lookup or an offload is about, and makes a load all or nothing."""

from __future__ import annotations

from array import array
from typing import Any

import torch
from sglang.srt.mem_cache import unified_radix_cache
from sglang.srt.mem_cache.unified_cache import unified_cache_linker as theirs

from .linker import Asked, LMKVLinker, Path
from .waiting import Waiting
from .waiting import install as install_waiting

__all__ = ["LinkedTree", "install"]

#: What of the tree's core is asked for here.
_NEEDED = ("collect_path_info", "snapshot_buffer_backup", "collect_full_device_indices")


class LinkedTree(theirs.UnifiedCacheLinkerWrapper):
    """See SGLang's wrapper; its ``cache_linker`` is an :class:`LMKVLinker`."""

    cache_linker: LMKVLinker

    def __init__(self, cache: Any, cache_linker: LMKVLinker) -> None:
        super().__init__(cache, cache_linker)
        #: Requests that wait for slow tiers; ``None`` where there are none, or no way to wait but in the scheduler itself.
        self.waiting: Waiting | None = None

    def wait_for_slow_tiers(self) -> None:
        """Have requests wait in the queue for tiers behind RAM, if there are some."""
        pages = self.cache_linker.pages
        if pages is None or len(pages.stats().tiers) < 2:
            return

        def agree(mine: int) -> int:
            least = torch.tensor([mine], dtype=torch.int)
            self.cache._all_reduce_attn_groups(least, torch.distributed.ReduceOp.MIN)
            return int(least.item())

        waiting = Waiting(pages, agree, self.cache_linker.ranks)
        if install_waiting(self.cache, waiting, self.cache_linker.clear):
            self.waiting = waiting
            self.cache_linker.patience = 0.0

    def match(self, key: Any, req: Any, result: Any) -> Any:
        """What SGLang found in its tree, with what LMKV has behind that."""
        device = int(result.device_prefix_len)
        self.hit_markers.pop(req.rid, None)  # what an earlier match promised, this one takes back
        self.cache_linker.drop(req.rid)
        if self.cache_linker.why_not or getattr(key, "is_bigram", False):
            return result
        tokens = key.raw_token_ids()[: len(key) // self.cache.page_size * self.cache.page_size]
        if len(tokens) <= device:
            return result
        self.cache_linker.asking(Asked(tokens, device, key.extra_key, key.cache_salt))
        try:
            found = super().match(key, req, result)
        finally:
            self.cache_linker.asking(None)
        if not self.has_hit(req.rid):
            self.cache_linker.drop(req.rid)
        return found

    def _sync_restorable_prefix(self, restorable: list[int], *, num_pages: int, device_hit_pages: int) -> int:
        """Every shorter prefix is restorable, too: so the ranks share the shortest."""
        pages = torch.tensor([max(restorable, default=0)], dtype=torch.int64)
        self.cache._all_reduce_attn_groups(pages, torch.distributed.ReduceOp.MIN)
        common = min(int(pages.item()), num_pages)
        return common if common > device_hit_pages else 0

    def load_back(self, req: Any) -> tuple[int, Any]:
        """Lease what was found and load it, on all ranks or none."""
        marker = self.hit_markers.get(req.rid)
        if marker is None:
            return super().load_back(req)
        tokens = len(marker.tail_hashes) * self.cache.page_size
        held = torch.tensor([int(self.cache_linker.hold(req.rid, tokens))], dtype=torch.int)
        self.cache._all_reduce_attn_groups(held, torch.distributed.ReduceOp.MIN)
        if not held.item():
            self.hit_markers.pop(req.rid, None)
            self.cache_linker.drop(req.rid)
            return 0, req.last_node
        loaded = super().load_back(req)
        self.cache_linker.drop(req.rid)
        if loaded[0]:
            self.cache_linker.telling.add(hit_tokens=loaded[0])
        return loaded

    def release_request(self, rid: str) -> None:
        """See SGLang's wrapper."""
        super().release_request(rid)
        self.cache_linker.drop(rid)
        if self.waiting is not None:
            self.waiting.forget(rid)

    def reset(self) -> None:
        """See SGLang's wrapper."""
        super().reset()
        if self.waiting is not None:
            self.waiting.clear()

    def _offload_node(self, node_id: Any, transfers: list[Any]) -> None:
        if self.cache_linker.why_not:
            return
        self.cache_linker.offering(self._path(node_id))
        try:
            super()._offload_node(node_id, transfers)
        finally:
            self.cache_linker.offering(None)

    def _path(self, node_id: Any) -> Path | None:
        """The text that ends in a node and its slots; ``None`` if some of it is not on the device."""
        tree = self.cache.tree_core
        (nodes,) = tree.collect_path_info([node_id])
        tokens = array("q")
        extra_key = cache_salt = None
        for node in nodes:
            whole = tree.snapshot_buffer_backup(node.node_id, False)
            if whole is None or whole.key.is_bigram or node.full_value_len is None:
                return None
            if len(tokens) and (whole.key.extra_key, whole.key.cache_salt) != (extra_key, cache_salt):
                return None
            extra_key, cache_salt = whole.key.extra_key, whole.key.cache_salt
            tokens.extend(whole.key.raw_token_ids()[: node.path_end - node.path_start])
            if len(tokens) != node.path_end:
                return None
        slots = tree.collect_full_device_indices(node_id, self.cache.root_node_handle())
        return Path(tokens, slots, extra_key, cache_salt) if len(tokens) and len(tokens) == len(slots) else None


def install() -> None:
    """Have SGLang's tree wrap an LMKV linker in :class:`LinkedTree`. A second call does nothing.

    The tree looks its wrapper up by name when it is given a linker, and that is after the linker was made.
    """
    original = unified_radix_cache.UnifiedCacheLinkerWrapper
    if getattr(original, "_lmkv", False):
        return

    def wrapper(cache: Any, cache_linker: Any) -> Any:
        if not isinstance(cache_linker, LMKVLinker):
            return original(cache, cache_linker)
        tree = LinkedTree(cache, cache_linker)
        lacking = ", ".join(name for name in _NEEDED if not hasattr(cache.tree_core, name))
        if lacking:
            cache_linker.give_up(f"expected an SGLang whose tree has {lacking}")
        # from here on the ranks meet in collectives at every lookup: all of them serve, or none
        serves = torch.tensor([int(not cache_linker.why_not)], dtype=torch.int)
        cache._all_reduce_attn_groups(serves, torch.distributed.ReduceOp.MIN)
        cache_linker.bound(all_serve=bool(serves.item()))
        tree.wait_for_slow_tiers()
        return tree

    wrapper._lmkv = True  # type: ignore[attr-defined]
    unified_radix_cache.UnifiedCacheLinkerWrapper = wrapper
