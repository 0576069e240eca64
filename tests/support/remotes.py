"""Remote tiers for tests: a server that outlives the stores that use it, reached in several bad ways.

Registered as ``lmkv.backends`` by the ``register`` fixture: ``remotes:healthy``, ``remotes:slow``, ``remotes:flaky``,
``remotes:flipping``. The option ``server`` names the server; the last opened connection of each is in ``CONNECTIONS``.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from lmkv.backends import BackendSettings
from lmkv.backends.lmdb_disk import LmdbBackend
from lmkv.backends.memory import MemoryBackend
from lmkv.testing import DelayedBackend, FlakyBackend, FlippingBackend

_names = itertools.count()


class Server(MemoryBackend):
    """Stays when a store that used it closes."""

    def close(self) -> None:
        """A connection's end is not the server's."""


SERVERS: dict[str, Server] = {}
CONNECTIONS: dict[str, Any] = {}


def new_server() -> str:
    """The name of a fresh, empty server."""
    return f"server-{next(_names)}"


def healthy(settings: BackendSettings) -> Server:
    """A good connection."""
    name = str(settings.options["server"])
    if name not in SERVERS:
        SERVERS[name] = Server(dataclasses.replace(settings, options={}))
    return SERVERS[name]


def slow(settings: BackendSettings) -> DelayedBackend:
    """Late by the option ``seconds``, in the ``operations`` given."""
    options = dict(settings.options)
    seconds, operations = options.pop("seconds", 0.0), options.pop("operations", ())
    inner = healthy(dataclasses.replace(settings, options=options))
    connection: DelayedBackend = DelayedBackend(inner, seconds, operations)
    CONNECTIONS[str(options["server"])] = connection
    return connection


def flaky(settings: BackendSettings) -> FlakyBackend:
    """Works until its ``fails`` is replaced."""
    connection: FlakyBackend = FlakyBackend(healthy(settings), lambda operation, number: False)
    CONNECTIONS[str(settings.options["server"])] = connection
    return connection


def flipping(settings: BackendSettings) -> FlippingBackend:
    """Undamaged until its ``damage`` is replaced."""
    connection: FlippingBackend = FlippingBackend(healthy(settings), None)
    CONNECTIONS[str(settings.options["server"])] = connection
    return connection


def flaky_disk(settings: BackendSettings) -> FlakyBackend:
    """An LMDB directory that works until its ``fails`` is replaced; known by its path."""
    connection: FlakyBackend = FlakyBackend(LmdbBackend(settings), lambda operation, number: False)
    CONNECTIONS[str(settings.options["path"])] = connection
    return connection
