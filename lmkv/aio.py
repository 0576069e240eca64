"""The same verbs for asyncio: every call that may block runs on a thread, so the event loop never waits for storage."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from .chunks import Namespace
from .config import StoreConfig
from .events import EventSink
from .handles import Lease, Match, Reservation, Stats
from .layout import KVLayout
from .store import Store

__all__ = ["AsyncStore"]

T = TypeVar("T")


class AsyncStore:
    """An async face of one :class:`Store`.

    Args:
        store: the store to face; :meth:`close` closes it.
        threads: how many blocking calls may run at once.
    """

    def __init__(self, store: Store, *, threads: int = 4) -> None:
        self.sync = store
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="lmkv-aio")

    @classmethod
    async def open(
        cls, config: StoreConfig, layout: KVLayout, *, on_event: EventSink | None = None, threads: int = 4
    ) -> AsyncStore:
        """Open a store without blocking the loop; arguments and errors as for :class:`Store`."""
        store = await asyncio.get_running_loop().run_in_executor(None, partial(Store, config, layout, on_event=on_event))
        return cls(store, threads=threads)

    async def _run(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def _move(self, call: Callable[[], T]) -> T:
        """As :meth:`_run`, for calls that read or write the caller's memory. A thread can't be stopped: whoever is cancelled
        waits until the call is over, so that nothing reads or writes that memory once it is used for something else."""
        future = self._threads.submit(call)
        result = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(result)
        except asyncio.CancelledError:
            future.cancel()  # where it has not begun
            while not future.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({result})
            raise

    async def _hold(self, call: Callable[[], T], give_back: Callable[[T], None]) -> T:
        """As :meth:`_run`; what the thread brings after the task was cancelled is given back."""
        future = self._threads.submit(call)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(lambda done: None if done.cancelled() or done.exception() else give_back(done.result()))
            raise

    async def lookup(
        self, tokens: object, *, anywhere: bool = False, namespace: Namespace | None = None, wait: float = 0.0
    ) -> Match:
        """As :meth:`Store.lookup`; with ``wait`` seconds for remote tiers."""
        return await self._run(lambda: self.sync.lookup(tokens, anywhere=anywhere, namespace=namespace).wait(wait))

    async def prefetch(self, match: Match) -> int:
        """As :meth:`Store.prefetch`; returns when the chunks are in slots."""
        return await asyncio.wrap_future(self.sync.prefetch(match))

    def worthwhile(self, match: Match, tokens_per_second: float) -> Match:
        """As :meth:`Store.worthwhile`."""
        return self.sync.worthwhile(match, tokens_per_second)

    @contextlib.asynccontextmanager
    async def lease(self, match: Match) -> AsyncIterator[Lease]:
        """As :meth:`Store.lease`: ``async with store.lease(match) as lease``."""
        lease = await self._hold(lambda: self.sync.lease(match), Lease.release)
        try:
            yield lease
        finally:
            lease.release()

    async def retrieve(self, lease: Lease, sink: Any, *, start: int = 0, stop: int | None = None) -> int:
        """As :meth:`Store.retrieve`; once it has begun, a cancelled task ends only when it is over."""
        return await self._move(lambda: self.sync.retrieve(lease, sink, start=start, stop=stop))

    @contextlib.asynccontextmanager
    async def reserve(
        self, tokens: object, *, start: int = 0, namespace: Namespace | None = None, priority: int = 0
    ) -> AsyncIterator[Reservation]:
        """As :meth:`Store.reserve`: ``async with store.reserve(tokens) as r``."""
        reserve = partial(self.sync.reserve, tokens, start=start, namespace=namespace, priority=priority)
        reservation = await self._hold(reserve, Reservation.abort)
        try:
            yield reservation
        finally:
            reservation.abort()

    async def store(
        self, tokens: object, source: Any, *, start: int = 0, namespace: Namespace | None = None, priority: int = 0
    ) -> int:
        """As :meth:`Store.store`; once it has begun, a cancelled task ends only when it is over."""
        store = partial(self.sync.store, tokens, source, start=start, namespace=namespace, priority=priority)
        return await self._move(store)

    async def flush(self, timeout: float | None = None) -> bool:
        """As :meth:`Store.flush`."""
        return await self._run(lambda: self.sync.flush(timeout))

    async def clear(self) -> bool:
        """As :meth:`Store.clear`."""
        return await self._run(self.sync.clear)

    def stats(self) -> Stats:
        """As :meth:`Store.stats`."""
        return self.sync.stats()

    async def close(self) -> None:
        """As :meth:`Store.close`."""
        await self._run(self.sync.close)
        self._threads.shutdown(wait=False)

    async def __aenter__(self) -> AsyncStore:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
