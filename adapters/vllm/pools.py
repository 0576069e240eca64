"""Slots of stores in this process, by key, and who copies from and to them: halves of one process meet here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...pool import HostPool

if TYPE_CHECKING:
    from .early import LoadsAhead

__all__ = ["drop_pool", "drop_worker", "local_pool", "local_worker", "offer_pool", "offer_worker"]

_pools: dict[str, HostPool] = {}
_workers: dict[str, LoadsAhead] = {}


def offer_pool(key: str, pool: HostPool) -> None:
    """Let workers of this process find a store's slots."""
    _pools[key] = pool


def drop_pool(key: str) -> None:
    """Forget a store that is being closed."""
    _pools.pop(key, None)


def local_pool(key: str) -> HostPool | None:
    """The slots of that key, if their store is in this process."""
    return _pools.get(key)


def offer_worker(key: str, worker: LoadsAhead) -> None:
    """Let the store of this process find the worker that fills its slots."""
    _workers[key] = worker


def drop_worker(key: str) -> None:
    """Forget a worker that is being closed."""
    _workers.pop(key, None)


def local_worker(key: str) -> LoadsAhead | None:
    """The worker of that key, if it is in this process."""
    return _workers.get(key)
