"""Requests that wait in SGLang's queue until slow tiers have answered and what they hold is in RAM, while others run.

SGLang asks its tree, each time it considers a waiting request, whether that request's prefetch is done; it does so where its
scheduler knows of a storage behind the tree. :func:`install` has it know of LMKV's, if there are tiers behind RAM.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from ...errors import LMKVError
from ...handles import Match
from .pages import PageStore

__all__ = ["Waiting", "install"]


class _Flow:
    """One request's wait."""

    def __init__(self, pages: PageStore, match: Match, until: float) -> None:
        self._pages = pages
        self._match = match
        self._until = until
        self._prefetch: Future[int] | None = None

    def ready(self) -> bool:
        """Whether there is nothing to wait for any more; never blocks."""
        if time.monotonic() > self._until:
            return True
        if self._match.pending:
            self._match = self._match.wait(0.0)
            if self._match.pending:
                return False
        if self._prefetch is None:
            if all(tier == "ram" for tier in self._match.tokens_by_tier()):
                return True
            self._prefetch = self._pages.store.prefetch(self._match)
        return self._prefetch.done()


class Waiting:
    """The waits of one rank.

    Args:
        pages: where texts are looked up.
        agree: takes this rank's answer, 1 or 0, and returns the least of all ranks'.
        ranks: how many there are.
    """

    def __init__(self, pages: PageStore, agree: Callable[[int], int], ranks: int) -> None:
        self._pages = pages
        self._agree = agree
        self._ranks = ranks
        self._flows: dict[str, _Flow | None] = {}

    def begin(self, rid: str, tokens: Sequence[int], extra_key: str | None, cache_salt: str | None) -> None:
        """A request has come."""
        flow: _Flow | None = None
        if tokens and rid not in self._flows:
            try:
                match = self._pages.find(self._pages.text(tokens, extra_key, cache_salt))
                flow = _Flow(self._pages, match, time.monotonic() + self._pages.store.config.deadline_seconds)
                if flow.ready():
                    flow = None
            except LMKVError:
                flow = None
        if flow is not None or self._ranks > 1:  # where there are others, they may have to wait
            self._flows[rid] = flow

    def ready(self, rid: str) -> bool:
        """Whether it may run, on all ranks alike."""
        if rid not in self._flows:
            return True
        flow = self._flows[rid]
        try:
            mine = flow is None or flow.ready()
        except LMKVError:
            mine = True
        if not self._agree(int(mine)):
            return False
        del self._flows[rid]
        return True

    def forget(self, rid: str) -> None:
        """It is gone."""
        self._flows.pop(rid, None)

    def clear(self) -> None:
        """All are gone."""
        self._flows.clear()


class _Knows:
    """The scheduler's own flag, or that its tree has an LMKV linker with tiers behind RAM."""

    def __get__(self, scheduler: Any, owner: type | None = None) -> Any:
        if scheduler is None:
            return self
        if scheduler.__dict__.get("enable_lmcache", False):
            return True
        linker = getattr(scheduler.__dict__.get("tree_cache"), "linker", None)
        return getattr(linker, "waiting", None) is not None

    def __set__(self, scheduler: Any, value: bool) -> None:
        scheduler.__dict__["enable_lmcache"] = value


def install(cache: Any, waiting: Waiting, clear: Callable[[], bool]) -> bool:
    """Have SGLang's scheduler ask, and this tree answer; ``False`` where its scheduler asks otherwise: then it waits itself."""
    from sglang.srt.managers.scheduler import Scheduler

    asks = ("_prefetch_kvcache",)
    answers = ("prefetch_from_storage", "check_prefetch_progress", "is_backuped", "clear_storage_backend")
    if not all(hasattr(Scheduler, name) for name in asks) or not all(hasattr(type(cache), name) for name in answers):
        return False

    def prefetch_from_storage(
        request: Any,
        last_host_node_id: Any,
        new_input_tokens: Sequence[int],
        *_: Any,
        matched_prefix_tokens: Sequence[int] | None = None,
        extra_key: str | None = None,
        cache_salt: str | None = None,
        **__: Any,
    ) -> None:
        waiting.begin(request.rid, [*(matched_prefix_tokens or ()), *new_input_tokens], extra_key, cache_salt)

    cache.prefetch_from_storage = prefetch_from_storage
    cache.check_prefetch_progress = lambda request: waiting.ready(request.rid)
    cache.is_backuped = lambda node_id: True  # the text is looked up from its beginning, wherever the tree's part ends
    cache.clear_storage_backend = clear
    cache.has_pending_cache_operations = lambda: False
    if not isinstance(vars(Scheduler).get("enable_lmcache"), _Knows):
        Scheduler.enable_lmcache = _Knows()
    return True
