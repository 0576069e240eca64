"""Storages of slow tiers."""

from __future__ import annotations

from typing import cast

from .._plugins import find
from .base import Backend, BackendSettings

__all__ = ["Backend", "BackendSettings", "open_backend"]

_REDIS = "lmkv.backends.redis.backend:RedisBackend"
#: By name, or by the scheme of a tier's URL.
_BUILTIN = {
    "memory": "lmkv.backends.memory:MemoryBackend",
    "lmdb": "lmkv.backends.lmdb_disk:LmdbBackend",
    "lmdb-stripes": "lmkv.backends.stripes:StripedBackend",
    "redis": _REDIS,
    "rediss": _REDIS,
    "unix": _REDIS,
    "valkey": _REDIS,
    "valkeys": _REDIS,
    "redis-sentinel": _REDIS,
    "rediss-sentinel": _REDIS,
    "redis-cluster": _REDIS,
    "rediss-cluster": _REDIS,
    "s3": "lmkv.backends.s3:S3Backend",
    "mooncakestore": "lmkv.backends.mooncake:MooncakeBackend",
    "infinistore": "lmkv.backends.infinistore:InfiniStoreBackend",
    "nixl": "lmkv.backends.nixl:open_nixl",
    "file": "lmkv.backends.files:FilesBackend",
    "lm": "lmkv.backends.lm:LmBackend",
}


def open_backend(name: str, settings: BackendSettings) -> Backend:
    """Open the backend of that name.

    Raises:
        ConfigError: an unknown name or option.
        BackendUnavailableError: the storage can't be opened now.
    """
    return cast(Backend, find("backends", name, _BUILTIN)(settings))
