"""Storages of slow tiers."""

from __future__ import annotations

from typing import cast

from .._plugins import find
from .base import Backend, BackendSettings

__all__ = ["Backend", "BackendSettings", "open_backend"]

_BUILTIN = {"memory": "lmkv.backends.memory:MemoryBackend", "lmdb": "lmkv.backends.lmdb_disk:LmdbBackend"}


def open_backend(name: str, settings: BackendSettings) -> Backend:
    """Open the backend of that name.

    Raises:
        ConfigError: an unknown name or option.
        BackendUnavailableError: the storage can't be opened now.
    """
    return cast(Backend, find("backends", name, _BUILTIN)(settings))
