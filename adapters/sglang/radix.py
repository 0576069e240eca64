"""``--enable-lmcache`` of SGLang up to 0.5.17, served by LMKV: the door that :mod:`.plugin` opens there.

SGLang chooses a prefix tree by its arguments and, for ``--enable-lmcache``, imports one that imports LMCache. While it chooses,
:class:`.radix_tree.LMKVRadixCache` stands in that place; so SGLang decides as ever, and LMCache need not be installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import LMKVError
from . import telling
from .identity import Rank, identified
from .keeping import Order
from .pages import PageStore
from .passes import LayerWaits
from .pools import device_pool
from .refusals import refusal
from .settings import Settings, asked_for, read_settings
from .token_reuse import Agree, TokenReuse
from .weights import watch

__all__ = ["install", "open_tree", "serve"]

_REGISTRY = "sglang.srt.mem_cache.registry"
_FACTORY = "default_radix_cache_factory"
_LMCACHES_TREE = "sglang.srt.mem_cache.storage.lmcache.lmc_radix_cache"
_ARGUMENTS = ("sglang.srt.server_args", "ServerArgs", "check_server_args")
_DOOR = "--enable-lmcache"


def install() -> str:
    """Hook SGLang's choice of a prefix tree; called by the plugin, in each process of SGLang's.

    Returns:
        Why that can't be done, ``""`` if it was.
    """
    try:
        registry = importlib.import_module(_REGISTRY)
        hooks = importlib.import_module("sglang.srt.plugins.hook_registry")
    except ImportError as error:
        return f"expected SGLang's registry of prefix trees and of hooks; got: {error}"
    if not hasattr(registry, _FACTORY):
        return f"expected {_FACTORY} in {_REGISTRY}; this SGLang has none"
    hooks.HookRegistry.register(f"{_REGISTRY}.{_FACTORY}", serve, hooks.HookType.AROUND)
    module, owner, method = _ARGUMENTS
    if hasattr(getattr(importlib.import_module(module), owner, None), method):
        hooks.HookRegistry.register(".".join(_ARGUMENTS), _checked, hooks.HookType.AROUND)
    return ""


def _asked(arguments: Any) -> Settings | None:
    """What the user set, if LMKV is meant by the flag.

    Raises:
        ConfigError: there is a mistake in it.
    """
    file = getattr(arguments, "lmcache_config_file", None)
    # LMCache needs that file too: where it is installed, the file alone does not say who is meant
    meant = None if importlib.util.find_spec("lmcache") else file
    if not getattr(arguments, "enable_lmcache", False) or not asked_for(os.environ, meant):
        return None
    return read_settings(file, {}, os.environ)


def _checked(original: Callable[[Any], Any], arguments: Any) -> Any:
    """SGLang's look at its arguments, before it loads a model: where a mistake in a configuration is said, too."""
    _asked(arguments)
    return original(arguments)


def serve(original: Callable[[Any], Any], context: Any) -> Any:
    """SGLang's choice of a tree, with LMKV's in the place of LMCache's if the user asked for that.

    Args:
        original: ``default_radix_cache_factory``.
        context: its ``TreeCacheBuildContext``.
    """
    settings = _asked(context.server_args)
    if settings is None:
        return original(context)
    with _in_lmcaches_place(functools.partial(open_tree, context, settings)):
        tree = original(context)
    if not hasattr(tree, "lmkv"):
        telling.inactive(_DOOR, f"SGLang took {type(tree).__name__} for this model or these arguments")
    return tree


@contextmanager
def _in_lmcaches_place(make: Callable[..., Any]) -> Iterator[None]:
    """While it is open, SGLang finds ``make`` where it looks for ``LMCRadixCache``."""
    stand_in = types.ModuleType(_LMCACHES_TREE)
    stand_in.LMCRadixCache = make  # type: ignore[attr-defined]
    before = sys.modules.get(_LMCACHES_TREE)
    sys.modules[_LMCACHES_TREE] = stand_in
    try:
        yield
    finally:
        if before is None:
            del sys.modules[_LMCACHES_TREE]
        else:
            sys.modules[_LMCACHES_TREE] = before


def open_tree(context: Any, settings: Settings, *, params: Any, **_: Any) -> Any:
    """The prefix tree, with a store of this rank's behind it; SGLang's own, with the reason told, if LMKV can't serve it.

    Args:
        context: ``TreeCacheBuildContext``.
        params: ``CacheInitParams``.
    """
    from sglang.srt.mem_cache.radix_cache import RadixCache

    from .radix_tree import LMKVRadixCache

    for line in settings.warnings:
        telling.logger.warning("LMKV: %s", line)
    arguments = context.server_args
    rank = _rank(arguments, params.tp_cache_group)
    agree = _agreement(params.tp_cache_group, rank.tp_size)
    told = telling.Telling(prometheus=bool(getattr(arguments, "enable_metrics", False)))
    why, pages = refusal(arguments, params), None
    try:
        if not why:
            pages = _open_pages(params.token_to_kv_pool_allocator, settings, arguments, rank, told)
    except (LMKVError, OSError) as error:  # what can't be opened is a cache that is not there
        why = f"{type(error).__name__}: {error}"
    # from here on the ranks meet at every lookup: all of them serve, or none
    together = bool(agree(int(pages is not None)))
    if pages is None or not together:
        if pages is not None:
            pages.close()
        telling.inactive(_DOOR, why or "another rank does not serve, and says why")
        return RadixCache(params)
    sees_weights = bool(watch())
    if not sees_weights:
        telling.logger.warning("LMKV: updates of weights can't be seen in this SGLang: a flush forgets what is kept")
    queued = bool(pages.store.config.slow_tiers("")) and _queue_asks()
    order = Order(pages.device, getattr(getattr(context.tp_worker, "model_runner", None), "forward_stream", None))
    waits = _layer_waits(params.token_to_kv_pool_allocator.get_kvcache(), pages, settings, arguments)
    reuse = TokenReuse(pages, agree, told, queued=queued, order=order, waits=waits)
    least = settings.min_load_tokens
    late = _results_before_steps()
    tree = LMKVRadixCache(params, reuse, min_load_tokens=least, forgets_on_flush=not sees_weights, last_may_be_late=late)
    layout, ranks = pages.store.layout, "one rank" if rank.tp_size == 1 else f"one of {rank.tp_size} ranks"
    served = f"pages of {params.page_size}, chunks of {layout.chunk_tokens} tokens, {layout.token_bytes} bytes a token"
    if rank.tp_rank == 0:  # it speaks for all
        telling.active(_DOOR, ranks, pages.store.config, served)
    return tree


def _open_pages(allocator: Any, settings: Settings, arguments: Any, rank: Rank, told: telling.Telling) -> PageStore:
    pool = device_pool(allocator.get_kvcache())
    config, extra = identified(settings.store, arguments, rank, latent=pool.latent)
    return PageStore(config, extra, pool, on_event=told.event)


def _layer_waits(kvcache: Any, pages: PageStore, settings: Settings, arguments: Any) -> LayerWaits | None:
    """What forward passes wait on layer by layer, if they can: a pass that is one CUDA graph asks for no layer."""
    graphs = getattr(getattr(arguments, "cuda_graph_config", None), "prefill", None)
    backend = getattr(graphs, "backend", None)
    whole = str(getattr(backend, "value", backend)) == "full"
    if not pages.on_gpu or not settings.layerwise or whole or not hasattr(kvcache, "register_layer_transfer_counter"):
        return None
    waits = LayerWaits()
    kvcache.register_layer_transfer_counter(waits)
    return waits


def _results_before_steps() -> bool:
    """Whether the overlap schedule may handle a prefill's result before it submits the next step, whose batch is made already.

    With chunks of prompts mixed into decode steps, that step computes last tokens of requests that end by that result.
    """
    from sglang.srt.environ import envs

    flag = getattr(envs, "SGLANG_DISABLE_CONSECUTIVE_PREFILL_OVERLAP", None)
    return flag is not None and bool(flag.get())


class _Knows:
    """The scheduler's own flag of a storage behind its tree, or that LMKV's tree has slow tiers."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, scheduler: Any, owner: type | None = None) -> Any:
        if scheduler is None:
            return self
        own = scheduler.__dict__
        return own.get(self._name, False) or getattr(own.get("tree_cache"), "waits", False) is True

    def __set__(self, scheduler: Any, value: bool) -> None:
        scheduler.__dict__[self._name] = value


def _queue_asks() -> bool:
    """Have the scheduler ask the tree before a request's turn whether what it waits for has come; ``False`` if it can't."""
    from sglang.srt.managers.scheduler import Scheduler

    if not hasattr(Scheduler, "_prefetch_kvcache"):
        return False
    name = "enable_hicache_storage"
    if not isinstance(vars(Scheduler).get(name), _Knows):
        setattr(Scheduler, name, _Knows(name))
    return True


def _rank(arguments: Any, group: Any) -> Rank:
    """This process within the group that splits attention heads, and how many stores share the machine's RAM."""
    import torch.distributed as dist

    together = group is not None and dist.is_initialized()
    size, rank = (dist.get_world_size(group), dist.get_rank(group)) if together else (1, 0)
    replicas = 1 if getattr(arguments, "enable_dp_attention", False) else getattr(arguments, "dp_size", 1) or 1
    everywhere = (getattr(arguments, "tp_size", 1) or 1) * replicas
    return Rank(rank, size, processes=max(1, everywhere // (getattr(arguments, "nnodes", 1) or 1)))


def _agreement(group: Any, size: int) -> Agree:
    if size == 1:
        return int

    import torch
    import torch.distributed as dist

    def least(number: int) -> int:
        shared = torch.tensor(number, dtype=torch.int64)
        dist.all_reduce(shared, op=dist.ReduceOp.MIN, group=group)
        return int(shared.item())

    return least
