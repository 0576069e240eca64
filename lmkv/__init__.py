"""LMKV keeps the KV cache that a language model computes while it reads text, and gives it back when the text comes again.

    store = lmkv.Store(lmkv.StoreConfig(model="my-model"), layout)
    store.store(tokens, kv)                        # after a prefill
    match = store.lookup(tokens)                   # before the next one
    with store.lease(match) as lease:
        loaded = store.retrieve(lease, kv)         # the first `loaded` tokens need no prefill

Importing this package imports neither numpy, torch nor an engine: names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AsyncStore": "aio",
    "ChunkKey": "chunks",
    "DenseKV": "transfer",
    "Event": "events",
    "KVLayout": "layout",
    "LayerGroup": "layout",
    "Lease": "store",
    "Match": "store",
    "Namespace": "chunks",
    "PagedKV": "transfer",
    "PrefillSpeed": "worth",
    "Reservation": "store",
    "Store": "store",
    "StoreConfig": "config",
    "TierConfig": "config",
    "TokenChunker": "chunks",
    "ArgumentError": "errors",
    "BackendError": "errors",
    "BackendUnavailableError": "errors",
    "CapacityError": "errors",
    "ConfigError": "errors",
    "CorruptRecordError": "errors",
    "LMKVError": "errors",
    "LayoutMismatchError": "errors",
    "NativeError": "errors",
    "StoreClosedError": "errors",
}

__all__ = sorted([*_HOMES, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from .aio import AsyncStore as AsyncStore
    from .chunks import ChunkKey as ChunkKey
    from .chunks import Namespace as Namespace
    from .chunks import TokenChunker as TokenChunker
    from .config import StoreConfig as StoreConfig
    from .config import TierConfig as TierConfig
    from .errors import ArgumentError as ArgumentError
    from .errors import BackendError as BackendError
    from .errors import BackendUnavailableError as BackendUnavailableError
    from .errors import CapacityError as CapacityError
    from .errors import ConfigError as ConfigError
    from .errors import CorruptRecordError as CorruptRecordError
    from .errors import LayoutMismatchError as LayoutMismatchError
    from .errors import LMKVError as LMKVError
    from .errors import NativeError as NativeError
    from .errors import StoreClosedError as StoreClosedError
    from .events import Event as Event
    from .layout import KVLayout as KVLayout
    from .layout import LayerGroup as LayerGroup
    from .store import Lease as Lease
    from .store import Match as Match
    from .store import Reservation as Reservation
    from .store import Store as Store
    from .transfer import DenseKV as DenseKV
    from .transfer import PagedKV as PagedKV
    from .worth import PrefillSpeed as PrefillSpeed


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'lmkv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
