"""``LMKVLinker``: SGLang's device pools linked to a page store, with no host tier of SGLang's between (0.5.23 on).

SGLang hands a linker page hashes; LMKV wants the text. So the radix tree gets a wrapper of ours around the linker
(:mod:`.tree`), which says, before each lookup and each offload, what text it is about. Everything else is SGLang's flow:

- **lookup** finds leading tokens in the tiers, beyond those the tree holds on the device;
- before a **load**, the chunks are brought into RAM and leased, all or none: so what can fail does so before SGLang counts on
  it, and is a miss. The load itself then is a copy into slots that no other request sees until it is done;
- an **offload** copies the slots of a tree node, which the tree locks until the copy is done, with those before it where a
  chunk spans both.

What is not understood makes a linker that finds and keeps nothing, with the reason in the log.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker

from ...config import StoreConfig
from ...errors import LayoutMismatchError, LMKVError
from ...handles import Lease, Match
from . import telling
from .counter import LayerCounter
from .identity import Rank, identified
from .pages import Load, PageStore, Save
from .pools import device_pool
from .refusals import refusal
from .settings import Settings, read_settings

__all__ = ["Asked", "LMKVLinker", "Path"]

#: Seconds that a lookup may wait for a remote tier's answer where requests can't wait for it in the queue.
_PATIENCE = 0.2
#: Requests that wait with something found; of those before them it is forgotten, which makes their loads misses.
_REMEMBERED = 4096


@dataclass(frozen=True)
class Asked:
    """The text of a lookup.

    Args:
        tokens: from the beginning, whole pages.
        device_tokens: leading ones that the tree holds on the device.
        extra_key, cache_salt: of the request.
    """

    tokens: Sequence[int]
    device_tokens: int
    extra_key: str | None
    cache_salt: str | None


@dataclass(frozen=True)
class Path:
    """The text that ends in a tree node, and where its KV is.

    Args:
        tokens: from the beginning.
        slots: one for each, int64 tensor.
        extra_key, cache_salt: of the requests that share it.
    """

    tokens: Sequence[int]
    slots: Any
    extra_key: str | None
    cache_salt: str | None


@dataclass
class _Found:
    match: Match
    first: int
    lease: Lease | None = None


class LMKVLinker(UnifiedCacheLinker):
    """See SGLang's base class; constructed by SGLang in each process that schedules.

    ``linker_extra_config`` takes ``config_file`` and any key of LMKV's or LMCache's.
    """

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: set[Any],
        extra_config: Mapping[str, Any] | None = None,
        forward_stream: Any = None,
    ) -> None:
        self.forward_stream = forward_stream
        self.page_size = int(params.page_size)
        self.pools: dict[Any, Any] = {PoolName.KV: None}
        self.pages: PageStore | None = None
        self.why_not = ""
        self.telling = telling.Telling(prometheus=bool(getattr(server_args, "enable_metrics", False)))
        self.layer_done_counter = LayerCounter(1)
        self.patience = _PATIENCE
        self.ranks = 1
        self._is_bound = False
        self._line: tuple[str, StoreConfig, str] | None = None
        self._asked: Asked | None = None
        self._path: Path | None = None
        self._found: dict[str, _Found] = {}
        self._queued: dict[str, tuple[_Found, Any]] = {}
        self._saves: deque[Save] = deque()
        from . import tree, weights

        tree.install()
        self._sees_weights = bool(weights.watch())
        if not self._sees_weights:
            telling.logger.warning("LMKV: updates of weights can't be seen in this SGLang: a flush forgets what is kept")
        extra = dict(extra_config or {})
        # a mistake in the user's own words ends the start; what can't be opened is a cache that is not there
        self._settings = read_settings(extra.pop("config_file", None), extra, os.environ)
        try:
            self._open(server_args, params, components)
        except (LMKVError, OSError) as error:
            self.give_up(f"{type(error).__name__}: {error}")

    def _open(self, server_args: Any, params: Any, components: set[Any]) -> None:
        others = sorted(component.name for component in components if component is not ComponentType.FULL)
        if others:
            raise LayoutMismatchError(f"expected a model of full attention alone; got {', '.join(others)} beside it")
        why = refusal(server_args, params)
        if why:
            raise LayoutMismatchError(why)
        kvcache = params.token_to_kv_pool_allocator.get_kvcache()
        pool = device_pool(kvcache)
        settings = self._settings
        rank = _rank(server_args, params)
        self.ranks = rank.tp_size
        config, extra = identified(settings.store, server_args, rank, latent=pool.latent)
        for line in settings.warnings:
            telling.logger.warning("LMKV: %s", line)
        self.pages = PageStore(config, extra, pool, on_event=self.telling.event)
        self.layer_done_counter = LayerCounter(len(pool.layers), layerwise=settings.layerwise)
        layout = self.pages.store.layout
        served = f"pages of {self.page_size}, chunks of {layout.chunk_tokens} tokens, {layout.token_bytes} bytes a token"
        ranks = f"one of {rank.tp_size} ranks" if rank.tp_size > 1 else "one rank"
        self._line = (ranks, config, served) if rank.tp_rank == 0 else None

    @property
    def settings(self) -> Settings:
        """What the user set."""
        return self._settings

    def give_up(self, why: str) -> None:
        """Serve nothing from now on, and say why; before the tree has it."""
        pages, self.pages, self.why_not = self.pages, None, why
        if pages is not None:
            pages.close()
        telling.inactive("linker", why)

    def bound(self, *, all_serve: bool) -> None:
        """The tree has it now: say that it serves, or, where another rank does not, serve nothing either."""
        self._is_bound = True
        if not all_serve and not self.why_not:
            self.give_up("another rank does not serve, and says why")
        elif self._line is not None and not self.why_not:  # the first rank speaks for all
            telling.active("linker", *self._line)

    # -- what the wrapper says beforehand ----------------------------------------------------------------------------------

    def asking(self, asked: Asked | None) -> None:
        """The text that the next lookup is about; ``None`` for none."""
        self._asked = asked

    def offering(self, path: Path | None) -> None:
        """The text that the next offload is about; ``None`` for none."""
        self._path = path

    def hold(self, rid: str, tokens: int) -> bool:
        """Bring what was found for a request into RAM and lease it; whether ``tokens`` tokens beyond the device's are held."""
        found = self._found.get(rid)
        if self.pages is None or found is None:
            return False
        self._release(found)
        try:
            lease = self.pages.lease(found.match)
        except LMKVError as error:
            self.telling.trouble("a hit was lost before its load", str(error))
            return False
        if self.pages.tokens(lease) < found.first + tokens:
            lease.release()
            self.telling.trouble("a hit was lost before its load", f"{lease.hit_tokens} tokens of {found.first + tokens} came")
            return False
        found.lease = lease
        return True

    def drop(self, rid: str) -> None:
        """Forget what was found for a request that does not load it."""
        found = self._found.pop(rid, None)
        if found is not None:
            self._release(found)

    @staticmethod
    def _release(found: _Found) -> None:
        lease, found.lease = found.lease, None
        if lease is not None:
            lease.release()

    # -- SGLang's interface --------------------------------------------------------------------------------------------------

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """Pages beyond the device's that are found, the longest number alone: every shorter one is restorable, too."""
        self.drop(rid)
        asked, pages = self._asked, self.pages
        if not self._is_bound and not self.why_not:
            self.give_up("expected this SGLang's tree to take LMKV's wrapper; it has its own")
        if pages is None or asked is None:
            return []
        self.telling.add(lookup_tokens=len(asked.tokens))
        try:
            match = pages.find(pages.text(asked.tokens, asked.extra_key, asked.cache_salt))
        except LMKVError as error:
            self.telling.trouble("a lookup failed", str(error))
            return []
        if match.pending and self.patience:
            match = match.wait(self.patience)
        beyond = (pages.tokens(match) - asked.device_tokens) // self.page_size
        if beyond * self.page_size < max(1, self._settings.min_load_tokens):
            return []
        self._found[rid] = _Found(match, asked.device_tokens)
        while len(self._found) > _REMEMBERED:
            self.drop(next(iter(self._found)))
        return [beyond]

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        """See SGLang's base class. What is loaded was leased by :meth:`hold`."""
        kv = next((transfer for transfer in transfers if transfer.name == PoolName.KV), None)
        found = self._found.pop(rid, None)
        if found is None or found.lease is None or kv is None or rid in self._queued:
            if found is not None:
                self._release(found)
            return False
        self._queued[rid] = (found, kv.device_indices)
        return True

    def start_layer_wise_loading(self) -> int:
        """Begin all queued loads behind what may still use their slots; -1 if there are none."""
        if not self._queued or self.pages is None:
            return -1
        queued, self._queued = self._queued, {}
        stream = self._behind_everything()
        loads: list[Load] = []
        for rid, (found, slots) in queued.items():
            lease, found.lease = found.lease, None
            assert lease is not None
            load = self.pages.load(lease, slots, first=found.first, stream=stream, layerwise=self._settings.layerwise)
            loads.append(load)
            if self._settings.log_requests:
                telling.logger.info("LMKV: loading %d tokens behind %d for request %s", len(slots), found.first, rid)
        return self.layer_done_counter.begin(loads)

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """See SGLang's base class."""
        loads = self.layer_done_counter.loads(counter_index)
        landed = self.layer_done_counter.finish(counter_index)
        failed = [load.error for load in loads if load.error]
        done = [load.tokens for load in loads if not load.error]
        self.telling.add(loads=len(done), loaded_tokens=sum(done), load_failures=len(failed))
        for why in failed:
            self.telling.trouble("a load failed", why)
        return landed

    def cancel_queued_load(self, rid: str) -> bool:
        """See SGLang's base class."""
        found, _ = self._queued.pop(rid, (None, None))
        if found is not None:
            self._release(found)
        return found is not None

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        """Begin to keep the node that :meth:`offering` named.

        A failure is a result of ``False`` later, not a refusal: all ranks have to queue the same offloads.
        """
        path, pages = self._path, self.pages
        if self.why_not or path is None:
            return False
        if pages is None:
            self._saves.append(Save(None, None, "the store is closed"))
            return True
        try:
            text = pages.text(path.tokens, path.extra_key, path.cache_salt)
            self._saves.append(pages.save(text, path.slots, stream=self._behind_everything()))
        except LMKVError as error:
            self._saves.append(Save(None, None, str(error)))
        return True

    def num_completed_offloads(self) -> int:
        """Leading offloads that have ended, well or not."""
        done = 0
        for save in self._saves:
            if not save.done():
                break
            done += 1
        return done

    def pop_completed_offload(self) -> bool:
        """See SGLang's base class."""
        save = self._saves.popleft()
        went_well = save.finish()
        self.telling.add(stores=int(went_well), stored_tokens=save.tokens, store_failures=int(not went_well))
        if not went_well:
            self.telling.trouble("an offload failed", save.error)
        return went_well

    def reset(self) -> None:
        """Wait for all copies and forget the requests. What was kept stays."""
        for rid in list(self._queued):
            self.cancel_queued_load(rid)
        for rid in list(self._found):
            self.drop(rid)
        self.layer_done_counter.reset()
        while self._saves:
            self.pop_completed_offload()
        if not self._sees_weights and self.pages is not None:
            self.pages.renew()  # SGLang flushes behind such an update: the only sign of it that is left

    def clear(self) -> bool:
        """Forget everything that is kept; whether that was possible."""
        try:
            return self.pages is not None and self.pages.store.clear()
        except LMKVError as error:
            self.telling.trouble("what is kept was not dropped", str(error))
            return False

    def close(self) -> None:
        """Wait for all copies, write what waits to the slow tiers, and close the store."""
        self.reset()
        pages, self.pages = self.pages, None
        if pages is not None:
            pages.close()

    def _behind_everything(self) -> int | None:
        """On a GPU, a stream that is behind all that may still read or write the pool; the copies begin behind it."""
        if self.pages is None or not self.pages.on_gpu:
            return None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        if self.forward_stream is not None:
            stream.wait_stream(self.forward_stream)
        self._stream = stream  # kept until the next one: its work is referred to by number
        return int(stream.cuda_stream)


def _rank(server_args: Any, params: Any) -> Rank:
    """This process's part, from the groups that SGLang gave the tree."""
    group = getattr(params, "attn_tp_cache_group", None) or params.tp_cache_group
    rank, size = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized() and group is not None:
        rank, size = torch.distributed.get_rank(group=group), torch.distributed.get_world_size(group=group)
    processes = int(getattr(server_args, "tp_size", 1) or 1)
    replicas = int(getattr(server_args, "dp_size", 1) or 1)
    if replicas > 1 and not getattr(server_args, "enable_dp_attention", False):
        processes *= replicas
    return Rank(rank, size, max(1, processes // max(1, int(getattr(server_args, "nnodes", 1) or 1))))
