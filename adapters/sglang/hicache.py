"""``LMKVHiCacheStorage``: SGLang's interface of a storage behind HiCache's host memory, served by a store of LMKV's.

    --enable-hierarchical-cache --hicache-storage-backend dynamic --hicache-storage-backend-extra-config
    '{"backend_name":"lmkv","module_path":"lmkv.adapters.sglang.hicache","class_name":"LMKVHiCacheStorage","interface_v1":1}'

With ``interface_v1`` pages go between LMKV's slots and the host pool in one copy. Without it, SGLang hands over page by page
as a tensor of its own. Pools beside the model's KV (``…_v2``) are kept as bytes, each kind in a store of its own.

Nothing here raises while SGLang serves: what fails is a page that is not there.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)

from ...config import StoreConfig
from ...errors import CapacityError, LayoutMismatchError, LMKVError
from ..engine_config import folder_fingerprint
from . import telling
from .host_pages import FlatPages, HostPages
from .host_pools import host_pool, page_bytes
from .identity import Rank, identified
from .page_names import tell_tenants_apart
from .pages import HASH_WORDS
from .settings import read_settings
from .transfers import Transfers
from .weights import watch

__all__ = ["LMKVHiCacheStorage"]

logger = logging.getLogger("sglang.lmkv")

_DOOR = "--hicache-storage-backend"
#: Keys of the extra config that are SGLang's own.
_SGLANGS = (
    *("backend_name", "module_path", "class_name", "interface_v1", "prefetch_threshold", "prefetch_timeout_base", "allocator"),
    *("prefetch_timeout_per_ki_token", "hicache_storage_pass_prefix_keys", "tp_lcm_size", "prefetch_timeout_max"),
)
#: What a pool may raise that does not hand out pages as bytes.
_POOL_ERRORS = (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError)
_MOST_SIZES = 8  # kinds of values that are kept as bytes
_RECORD = 4096  # bytes of RAM that a page takes beside its own
_FEWEST = 64  # pages that a store has room for in RAM, however small its share is


class LMKVHiCacheStorage(HiCacheStorage):
    """HiCache's third level: LMKV's RAM, disk and remote tiers.

    Made by SGLang, one for each rank. Its threads for prefetching and for backups call at the same time.

    Args:
        storage_config: the rank, the model, and in ``extra_config`` keys of LMKV's or LMCache's beside SGLang's own.
        kwargs: nothing of use.

    Raises:
        ConfigError: an unknown key, with the nearest known one, or a wrong value.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Mapping[str, Any] | None = None) -> None:
        extra = dict(storage_config.extra_config or {})
        self._direct = bool(extra.get("interface_v1", 0))
        own = {key: value for key, value in extra.items() if key not in _SGLANGS}
        file = own.pop("config_file", None)
        settings = read_settings(None if file is None else str(file), own, os.environ)
        for line in settings.warnings:
            logger.warning("LMKV: %s", line)
        self._rank = storage_config
        self._told = telling.Telling(prometheus=bool(storage_config.enable_storage_metrics))
        self._settings = settings.store
        self._lock = threading.RLock()
        measured = bool(storage_config.enable_storage_metrics)
        self._fetched, self._kept = Transfers(measured), Transfers(measured)
        self._pages: HostPages | None = None
        self._flat: dict[tuple[str, int], FlatPages | None] = {}
        self._sides: dict[str, Any] = {}
        self._main_bytes = 0
        self._why = "no host pool was registered yet"
        self._config, self._extra = self._settings, ""
        if not tell_tenants_apart():
            logger.warning("LMKV: this SGLang names pages by their tokens alone: do not use cache salts or LoRA with it")
        if not watch():
            logger.warning("LMKV: updates of weights go unnoticed in this SGLang: restart it behind one")

    # -- pools ---------------------------------------------------------------------------------------------------------------

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """The host pool of the model's KV; opens the store. Where that fails the reason is told, and nothing is served."""
        with self._lock:
            self.close()
            self.mem_pool_host = mem_pool_host
            try:
                kind = self._open(mem_pool_host)
            except (LMKVError, OSError) as error:
                self._main_bytes, self._why = 0, f"{type(error).__name__}: {error}"
                telling.inactive(_DOOR, self._why)
                return
        if self._rank.is_mla_model and self._rank.tp_size > 1 and not self._config.slow_tiers(""):
            logger.warning("LMKV: one rank stores the latents of all; without a disk or a remote tier the others find nothing")
        if self._rank.tp_rank == 0:  # it speaks for all
            served = f"{kind}, {mem_pool_host.page_size} tokens and {self._main_bytes} bytes each"
            telling.active(_DOOR, f"{type(mem_pool_host).__name__} {mem_pool_host.layout}", self._config, served)

    def _open(self, pool: Any) -> str:
        """Open the store of the model's KV; how pages are moved."""
        self._main_bytes = page_bytes(pool)
        arguments = _server_arguments(self._rank)
        latent = bool(self._rank.is_mla_model)
        self._config, self._extra = identified(self._with_shard(), arguments, _rank(self._rank, arguments), latent=latent)
        draft = getattr(arguments, "speculative_draft_model_path", None)
        if draft:  # its layers may be in the same pages
            self._extra += f";draft={draft}:{folder_fingerprint(draft)}"
        self._why = ""
        if self._direct:
            self._pages = self._open_pages(pool)
        if self._pages is not None:
            return "pages in one copy"
        if self._of_size("kv", self._main_bytes) is None:
            raise CapacityError("expected a store of pages as bytes; it can't be opened")
        return "pages as bytes"

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """A host pool beside the model's KV, or that of the model's KV again."""
        with self._lock:
            self._sides[str(host_pool_name)] = host_pool

    def _with_shard(self) -> StoreConfig:
        """The settings, with what part of the model this rank's pages are, beside its share of the heads."""
        rank, parts = self._rank, []
        if (rank.pp_size or 1) > 1:
            parts.append(f"pp{rank.pp_rank}/{rank.pp_size}")
        if (rank.attn_cp_size or 1) > 1:
            parts.append(f"cp{rank.attn_cp_rank}/{rank.attn_cp_size}")
        if (getattr(rank, "dcp_size", 1) or 1) > 1:
            parts.append(f"dcp{rank.dcp_rank}/{rank.dcp_size}")
        if not parts:
            return self._settings
        if not rank.is_mla_model and rank.tp_size > 1:
            parts.append(f"tp{rank.tp_rank}/{rank.tp_size}")
        return dataclasses.replace(self._settings, shard=";".join(part for part in (self._settings.shard, *parts) if part))

    def _open_pages(self, pool: Any) -> HostPages | None:
        """The store of pages in one copy; ``None`` where the pool's inside is not understood."""
        size = int(pool.page_size)
        try:
            paged = host_pool(pool)
            if size < HASH_WORDS:
                paged.split(-(-HASH_WORDS // size))  # raises if a page has no room for its hash
        except LayoutMismatchError as error:
            logger.warning("LMKV: pages go through a copy of their own: %s", error)
            return None
        extra = f"{self._extra};hicache page={size}"
        return HostPages(self._config, extra, paged, page_tokens=size, told=self._told, on_event=self._told.event)

    def _of_size(self, kind: str, size: int) -> FlatPages | None:
        """The store of values of ``size`` bytes of a kind, opened on first use; ``None`` if it can't be had."""
        with self._lock:
            if self._why:
                return None
            if (kind, size) not in self._flat:
                self._flat[kind, size] = self._open_flat(kind, size)
            return self._flat[kind, size]

    def _open_flat(self, kind: str, size: int) -> FlatPages | None:
        if len(self._flat) >= _MOST_SIZES:
            self._told.trouble(
                "values are not kept", f"expected at most {_MOST_SIZES} kinds and sizes; got {kind} of {size} bytes"
            )
            return None
        share = 1.0 if kind == "kv" and self._pages is None else (size + _RECORD) / (self._main_bytes + _RECORD)
        path = self._config.disk_path
        try:
            config = dataclasses.replace(
                self._config,
                ram_capacity=max(_FEWEST * (size + 2 * _RECORD), int(self._config.ram_capacity * share)),
                disk_capacity=int(self._config.disk_capacity * share),
                disk_path=None if path is None else f"{path}-{kind}-{size}",
            )
            pool = self.mem_pool_host
            said = f"page={pool.page_size} bytes={size} order={pool.layout} dtype={pool.dtype}"
            return FlatPages(config, f"{self._extra};hicache {kind} {said}", size, self._told)
        except LMKVError as error:
            self._told.trouble("values are not kept", f"{kind} of {size} bytes: {error}")
            return None

    # -- pages of the model's KV ---------------------------------------------------------------------------------------------

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        """How many leading pages are held."""
        if self._pages is not None:
            return self._pages.held(keys)
        flat = self._of_size("kv", self._main_bytes)
        return 0 if flat is None else flat.held(keys)

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Bring pages into the host pool; by page, whether it came."""
        if not self._fits(keys, host_indices, self.mem_pool_host if self._main_bytes else None):
            return [False] * len(keys)
        begun = time.perf_counter()
        if self._pages is not None:
            there = self._pages.fetch(keys, host_indices)
        else:
            there = self._get_flat("kv", self.mem_pool_host, keys, host_indices)
        self._fetched.add(sum(there), self._main_bytes, time.perf_counter() - begun)
        return there

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Keep pages of the host pool; by page, whether it is kept."""
        if not self._fits(keys, host_indices, self.mem_pool_host if self._main_bytes else None):
            return [False] * len(keys)
        begun = time.perf_counter()
        if self._pages is not None:
            kept = self._pages.keep(keys, host_indices)
        else:
            kept = self._set_flat("kv", self.mem_pool_host, keys, host_indices)
        self._kept.add(sum(kept), self._main_bytes, time.perf_counter() - begun)
        return kept

    def _fits(self, keys: Sequence[str], indices: torch.Tensor | None, pool: Any) -> bool:
        """Whether there are indices for whole pages of a registered pool, within it."""
        if pool is None:
            self._told.trouble("pages are not served", self._why or "expected a registered pool")
            return False
        size = int(pool.page_size)
        if indices is None or indices.numel() != len(keys) * size:
            got = 0 if indices is None else indices.numel()
            self._told.trouble("pages are not served", f"expected {len(keys)} pages of {size} indices; got {got}")
            return False
        pages = indices.reshape(len(keys), size)
        first = pages[:, :1]
        if len(keys) and (bool((pages != first + torch.arange(size)).any()) or not 0 <= int(first.min()) <= int(first.max())):
            self._told.trouble("pages are not served", "expected the indices of a page in a row")
            return False
        if len(keys) and int(pages.max()) >= int(pool.size):
            self._told.trouble("pages are not served", f"expected indices below {pool.size}; got {int(pages.max())}")
            return False
        return True

    # -- pools beside it -----------------------------------------------------------------------------------------------------

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """How many leading pages can be restored, with what each pool's policy asks for."""
        held = self.batch_exists(keys, extra_info)
        hits: dict[Any, int] = {PoolName.KV: held} if held else {}
        lengths = list(range(1, held + 1))
        for transfer in pool_transfers or []:
            if not lengths:
                break
            if transfer.hit_policy == PoolHitPolicy.ALL_PAGES:
                boundary = self._held_in(transfer.name, keys[:held])
                possible = set(range(1, boundary + 1))
            elif transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
                window = max(1, len(transfer.keys or ()))
                there = [self._held_in(transfer.name, [key]) == 1 for key in keys[:held]]
                possible = {n for n in lengths if all(there[max(0, n - window) : n])}
                boundary = max(possible, default=0)
            else:  # a form of the pages that may be there beside them, and is not kept
                hits[transfer.name] = 0
                continue
            if boundary:
                hits[transfer.name] = boundary
            lengths = [n for n in lengths if n in possible]
        result = PoolTransferResult(lengths[-1] if lengths else 0, hits)
        if hasattr(result, "restorable_prefix_pages"):
            result.restorable_prefix_pages = lengths
        return result

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """Bring pages of several pools into host memory; by pool and page, whether it came."""
        return {transfer.name: self._move(transfer, self.batch_get_v1, self._get_flat) for transfer in transfers}

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """Keep pages of several pools; by pool and page, whether it is kept."""
        return {transfer.name: self._move(transfer, self.batch_set_v1, self._set_flat) for transfer in transfers}

    def _move(self, transfer: PoolTransfer, main: Callable[..., list[bool]], side: Callable[..., list[bool]]) -> list[bool]:
        keys, indices, name = list(transfer.keys or ()), transfer.host_indices, str(transfer.name)
        if name == str(PoolName.KV):
            return main(keys, indices)
        pool = self._sides.get(name)
        if not self._fits(keys, indices, pool):
            return [False] * len(keys)
        return side(name, pool, keys, indices)

    def _held_in(self, name: Any, keys: Sequence[str]) -> int:
        if str(name) == str(PoolName.KV):
            return self.batch_exists(list(keys))
        pool = self._sides.get(str(name))
        size = 0 if pool is None else _flat_bytes(pool)
        flat = self._of_size(str(name), size) if size else None
        return 0 if flat is None else flat.held(keys)

    def _get_flat(self, kind: str, pool: Any, keys: Sequence[str], indices: torch.Tensor) -> list[bool]:
        flat = self._of_size(kind, _flat_bytes(pool))
        if flat is None:
            return [False] * len(keys)
        firsts = indices.reshape(len(keys), -1)[:, 0].tolist()
        dtype = pool.get_dummy_flat_data_page().dtype
        try:
            return flat.fetch(keys, lambda n, data: pool.set_from_flat_data_page(firsts[n], data.clone().view(dtype)))
        except _POOL_ERRORS as error:
            self._told.trouble(f"pages of {kind} were not loaded", f"{type(error).__name__}: {error}")
            return [False] * len(keys)

    def _set_flat(self, kind: str, pool: Any, keys: Sequence[str], indices: torch.Tensor) -> list[bool]:
        flat = self._of_size(kind, _flat_bytes(pool))
        if flat is None:
            return [False] * len(keys)
        firsts = indices.reshape(len(keys), -1)[:, 0].tolist()
        try:
            return flat.keep(keys, lambda n: _bytes_of(pool.get_data_page(firsts[n], flat=True)))
        except _POOL_ERRORS as error:
            self._told.trouble(f"pages of {kind} were not kept", f"{type(error).__name__}: {error}")
            return [False] * len(keys)

    # -- values one by one, as SGLang does it without interface_v1 -----------------------------------------------------------

    def exists(self, key: str) -> bool:
        """Whether a page of the model's KV is held."""
        return self.batch_exists([key]) == 1

    def get(self, key: str, target_location: Any | None = None, target_sizes: Any | None = None) -> torch.Tensor | None:
        """A value, in ``target_location`` if that is given; ``None`` if it is not held."""
        return self.batch_get([key], None if target_location is None else [target_location])[0]

    def batch_get(
        self, keys: list[str], target_locations: Any | None = None, target_sizes: Any | None = None
    ) -> list[torch.Tensor | None]:
        """Values in ``target_locations``, one tensor each; ``None`` for those that are not held: their tensors stay."""
        if target_locations is None:
            if not self._main_bytes:
                return [None] * len(keys)
            target_locations = [self.mem_pool_host.get_dummy_flat_data_page() for _ in keys]
        found: list[torch.Tensor | None] = [None] * len(keys)
        for size, numbers in _by_size(target_locations).items():
            flat = self._of_size(self._kind(size), size)
            if flat is None:
                continue

            def take(number: int, data: torch.Tensor, numbers: list[int] = numbers) -> None:
                target = target_locations[numbers[number]]
                target.copy_(data.clone().view(target.dtype).reshape(target.shape))
                found[numbers[number]] = target

            flat.fetch([keys[number] for number in numbers], take)
        return found

    def set(
        self, key: str, value: Any | None = None, target_location: Any | None = None, target_sizes: Any | None = None
    ) -> bool:
        """Keep a value; whether it is kept."""
        return self.batch_set([key], [value])

    def batch_set(
        self,
        keys: list[str],
        values: Any | None = None,
        target_locations: Any | None = None,
        target_sizes: Any | None = None,
    ) -> bool:
        """Keep values, one tensor each; whether all are kept."""
        if values is None or any(value is None for value in values):
            return False
        kept = True
        for size, numbers in _by_size(values).items():
            flat = self._of_size(self._kind(size), size)
            some = [keys[number] for number in numbers]
            kept &= flat is not None and all(flat.keep(some, lambda n, at=numbers: _bytes_of(values[at[n]])))
        return kept

    def _kind(self, size: int) -> str:
        return "kv" if size == self._main_bytes and not self._direct else "values"

    # -- the rest ------------------------------------------------------------------------------------------------------------

    def clear(self) -> bool:
        """Drop everything, in all tiers; other servers on the same disk directory lose theirs, too."""
        try:
            cleared = [pages.store.clear() for pages in self._stores()]
        except LMKVError as error:
            self._told.trouble("the storage was not cleared", str(error))
            return False
        return all(cleared)

    def get_stats(self) -> Any:
        """Pages and GiB/s of each transfer since the last call, as SGLang's own metrics want them (``StorageMetrics``)."""
        from sglang.srt.observability.metrics_collector import StorageMetrics

        prefetch_pages, prefetch_speeds = self._fetched.taken()
        backup_pages, backup_speeds = self._kept.taken()
        return StorageMetrics(prefetch_pages, backup_pages, prefetch_speeds, backup_speeds)

    def counts(self) -> dict[str, Any]:
        """What was looked up, kept and loaded since the start, and by store what its tiers hold."""
        return {**self._told.counts, "stores": [pages.stats().as_dict() for pages in self._stores()]}

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all pages are durable in the slow tiers; see :meth:`lmkv.Store.flush`."""
        return False not in [pages.flush(timeout) for pages in self._stores()]  # all of them

    def close(self) -> None:
        """Write what waits for the slow tiers and release everything; SGLang calls it when it detaches the storage."""
        with self._lock:
            stores = self._stores()
            self._pages, self._main_bytes, self._why = None, 0, "the storage was closed"
            self._flat.clear()
        for pages in stores:
            pages.close()

    def _stores(self) -> list[HostPages]:
        with self._lock:
            flat = [each.pages for each in self._flat.values() if each is not None]
            return [*([self._pages] if self._pages is not None else []), *flat]


def _bytes_of(value: torch.Tensor) -> torch.Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def _by_size(values: Sequence[torch.Tensor]) -> dict[int, list[int]]:
    """Numbers of the values by their bytes."""
    found: dict[int, list[int]] = {}
    for number, value in enumerate(values):
        found.setdefault(value.numel() * value.element_size(), []).append(number)
    return found


def _flat_bytes(pool: Any) -> int:
    """Bytes of a page as the pool hands it out flat."""
    page = pool.get_dummy_flat_data_page()
    return int(page.numel() * page.element_size())


def _server_arguments(rank: HiCacheStorageConfig) -> Any:
    """SGLang's arguments in this process; of a model by its name alone where there are none."""
    try:
        from sglang.srt.runtime_context import get_server_args

        arguments = get_server_args()
    except (ImportError, AssertionError, AttributeError, LookupError, RuntimeError, ValueError):
        arguments = None
    if getattr(arguments, "model_path", None):
        return arguments
    return SimpleNamespace(model_path=rank.model_name or "")


def _rank(rank: HiCacheStorageConfig, arguments: Any) -> Rank:
    replicas = 1 if getattr(arguments, "enable_dp_attention", False) else getattr(arguments, "dp_size", 1) or 1
    everywhere = (getattr(arguments, "tp_size", 0) or rank.tp_size) * (rank.pp_size or 1) * replicas
    return Rank(rank.tp_rank, rank.tp_size, processes=max(1, everywhere // (getattr(arguments, "nnodes", 1) or 1)))
