"""Pages between HiCache's host memory and LMKV, many at a time, named by the hashes that SGLang chains over their tokens."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...config import StoreConfig
from ...errors import LMKVError
from ...events import Event
from ...handles import Lease, Match, Reservation
from ...transfer import Part
from .pages import HASH_WORDS, PageStore, Text, slot_numbers
from .pools import KVPool
from .telling import Telling

__all__ = ["FlatPages", "HostPages", "page_name"]

_HASH = re.compile(r"[0-9a-f]{64}")
#: Pages that are moved in one go; a batch must leave room in RAM for another thread's.
_BATCH = 32


def page_name(key: str) -> str:
    """A key of HiCache's as 64 hexadecimal digits: a page's hash is that already, other keys (``<hash>.draft``) are hashed."""
    return key if _HASH.fullmatch(key) else hashlib.sha256(b"key:" + key.encode()).hexdigest()


class HostPages(PageStore):
    """A page store of named pages with verbs for many. Safe to use from several threads.

    Args:
        config, extra, pool, on_event: as for :class:`.pages.PageStore`.
        page_tokens: tokens a page.
        told: counts, and tells of trouble.
    """

    def __init__(
        self,
        config: StoreConfig,
        extra: str,
        pool: KVPool,
        *,
        page_tokens: int,
        told: Telling,
        on_event: Callable[[Event], None],
    ) -> None:
        super().__init__(config, extra, pool, page_tokens=page_tokens, on_event=on_event)
        self._page = page_tokens
        self._told = told
        self._most = max(1, min(_BATCH, self.store._ram.pool.slots // 4))
        tiers = self.store.config.slow_tiers("")
        self._deadline = max((tier.deadline_seconds for tier in tiers), default=0.0)

    def held(self, keys: Sequence[str]) -> int:
        """How many leading pages some tier holds. Waits for remote tiers, for at most a tier's deadline."""
        until = time.monotonic() + self._deadline
        for begin in range(0, len(keys), _BATCH):
            some = keys[begin : begin + _BATCH]
            matches = self._find(some)
            if len(matches) < len(some):
                return begin
            for number, match in enumerate(matches):
                if not self._whole(self._answered(match, until)):
                    return begin + number
        return len(keys)

    def fetch(self, keys: Sequence[str], slots: Any) -> list[bool]:
        """Copy pages into slots; by page, whether all of it came. The slots of those that did not are undefined.

        Args:
            slots: slot numbers of all tokens of all pages.
        """
        numbers = slot_numbers(slots).reshape(len(keys), self._page)
        there: list[bool] = []
        for begin in range(0, len(keys), self._most):
            end = begin + self._most
            there += self._fetch(keys[begin:end], numbers[begin:end])
        self._told.add(hit_tokens=len(keys) * self._page, loaded_tokens=sum(there) * self._page, loads=int(all(there)))
        self._told.add(load_failures=int(not all(there)))
        return there

    def keep(self, keys: Sequence[str], slots: Any) -> list[bool]:
        """Keep pages that are in slots; by page, whether it is kept now. Returns once the slots may change."""
        numbers = slot_numbers(slots).reshape(len(keys), self._page)
        kept: list[bool] = []
        for begin in range(0, len(keys), self._most):
            end = begin + self._most
            kept += self._keep(keys[begin:end], numbers[begin:end])
        self._told.add(stores=int(all(kept)), store_failures=int(not all(kept)))
        return kept

    # -- steps -----------------------------------------------------------------------------------------------------------

    def _find(self, keys: Sequence[str]) -> list[Match]:
        try:
            return [self.find(self.page(page_name(key))) for key in keys]
        except LMKVError as error:
            self._told.trouble("a lookup failed", str(error))
            return []

    def _whole(self, found: Match | Lease) -> bool:
        """A page is all there or not at all: fewer tokens are the first words of another page's hash."""
        return self.tokens(found) == self._page

    def _answered(self, match: Match, until: float) -> Match:
        return match.wait(max(0.0, until - time.monotonic())) if match.pending else match

    def _fetch(self, keys: Sequence[str], numbers: npt.NDArray[np.int64]) -> list[bool]:
        there = [False] * len(keys)
        until = time.monotonic() + self._deadline
        matches = [self._answered(match, until) for match in self._find(keys)]
        wanted = [i for i, match in enumerate(matches) if self._whole(match)]
        leases: dict[int, Lease] = {}
        try:
            coming = {i: self.store.prefetch(matches[i]) for i in wanted if matches[i].tokens_by_tier().keys() - {"ram"}}
            here = [i for i in wanted if i not in coming or _came(coming[i], until)]
            for i in reversed(here):  # so that the first pages, without which the others are of no use, look used last
                lease = self.lease(matches[i])
                if self._whole(lease):
                    leases[i] = lease
                else:
                    lease.release()
            good = sorted(leases)
            parts = self._parts([leases[i].slots[0].payload for i in good])
            self._engine.scatter(parts, [self._blocks_of(numbers, good)]).wait()
            for i in good:
                there[i] = leases[i].held
        except LMKVError as error:
            self._told.trouble("a load failed", str(error))
        finally:
            for lease in leases.values():
                lease.release()
        return there

    def _keep(self, keys: Sequence[str], numbers: npt.NDArray[np.int64]) -> list[bool]:
        texts = [self.page(page_name(key)) for key in keys]
        reserved: dict[int, Reservation] = {}
        try:
            for i, text in enumerate(texts):
                reservation = self.store.reserve(text.tokens, namespace=text.namespace)
                if reservation.chunks:
                    reserved[i] = reservation
            mine = sorted(reserved)
            parts = self._parts([reserved[i].slots[0].payload for i in mine])
            self._engine.gather(parts, [self._blocks_of(numbers, mine)]).wait()
            tokens = sum(reserved[i].commit() for i in mine) // self.split
            self._told.add(stored_tokens=tokens)
        except LMKVError as error:
            self._told.trouble("pages were not kept", str(error))
        finally:
            for reservation in reserved.values():
                reservation.abort()
        return [self._in_ram(text) for text in texts]

    def _in_ram(self, text: Text) -> bool:
        """Whether a page is kept: by this call, by one before, or by another thread's at the same time."""
        try:
            return self._whole(self.find(text))
        except LMKVError:
            return False

    def _parts(self, payloads: Sequence[memoryview]) -> list[Part]:
        """Pages as parts of one text, one behind the other."""
        n = self._page * self.split
        return [Part(payload, i * n, (i + 1) * n, i * n, (i + 1) * n) for i, payload in enumerate(payloads)]

    def _blocks_of(self, numbers: npt.NDArray[np.int64], chosen: Sequence[int]) -> npt.NDArray[np.int32]:
        return self._blocks(numbers[list(chosen)].reshape(-1))


def _came(loading: Future[int], until: float) -> bool:
    try:
        loading.result(max(0.0, until - time.monotonic()))
    except FutureTimeoutError:
        return False
    return True


class FlatPages:
    """Pages as mere bytes of one size, for pools whose inside is not understood and for values handed over one by one.

    Args:
        config, extra, told: as for :class:`HostPages`.
        size: bytes a page.
    """

    def __init__(self, config: StoreConfig, extra: str, size: int, told: Telling) -> None:
        self.size = size
        self._words = -(-size // HASH_WORDS)
        self._staging = torch.zeros((_BATCH, HASH_WORDS * self._words), dtype=torch.uint8)
        pool = KVPool((self._staging.view(-1, 1, 1, self._words),))
        self.pages = HostPages(config, extra, pool, page_tokens=HASH_WORDS, told=told, on_event=told.event)
        self._lock = threading.Lock()

    def held(self, keys: Sequence[str]) -> int:
        """See :meth:`HostPages.held`."""
        return self.pages.held(keys)

    def fetch(self, keys: Sequence[str], take: Callable[[int, torch.Tensor], None]) -> list[bool]:
        """Bring pages; ``take(number, bytes)`` gets each one that came whole, and must have copied it when it returns."""
        there: list[bool] = []
        with self._lock:
            for begin in range(0, len(keys), _BATCH):
                some = keys[begin : begin + _BATCH]
                came = self.pages.fetch(some, np.arange(len(some) * HASH_WORDS))
                for number, ok in enumerate(came):
                    if ok:
                        take(begin + number, self._staging[number, : self.size])
                there += came
        return there

    def keep(self, keys: Sequence[str], give: Callable[[int], torch.Tensor]) -> list[bool]:
        """Keep pages; ``give(number)`` returns each one's bytes."""
        kept: list[bool] = []
        with self._lock:
            for begin in range(0, len(keys), _BATCH):
                some = keys[begin : begin + _BATCH]
                for number in range(len(some)):
                    self._staging[number, : self.size] = give(begin + number)
                kept += self.pages.keep(some, np.arange(len(some) * HASH_WORDS))
        return kept

    def close(self) -> None:
        """See :meth:`.pages.PageStore.close`."""
        self.pages.close()
