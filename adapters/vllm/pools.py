"""Slots of stores in this process, by key: halves of one process meet here."""

from __future__ import annotations

from ...pool import HostPool

__all__ = ["drop_pool", "local_pool", "offer_pool"]

_pools: dict[str, HostPool] = {}


def offer_pool(key: str, pool: HostPool) -> None:
    """Let workers of this process find a store's slots."""
    _pools[key] = pool


def drop_pool(key: str) -> None:
    """Forget a store that is being closed."""
    _pools.pop(key, None)


def local_pool(key: str) -> HostPool | None:
    """The slots of that key, if their store is in this process."""
    return _pools.get(key)
