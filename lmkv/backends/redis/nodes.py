"""Connections to the nodes of a Redis, whichever topology it has, from the client library's own pools."""

from __future__ import annotations

import contextlib
import os
import random
import re
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from ...errors import BackendUnavailableError, ConfigError
from .target import RedisTarget
from .wire import Wire, WireError

__all__ = ["Nodes", "open_nodes"]

#: How long a node that did not answer is left alone: at first, and at most.
_FIRST_REST, _LONGEST_REST = 0.25, 4.0
#: In words about sentinels the library describes its whole client before what is wrong with it.
_DESCRIBED_CLIENT = re.compile(r"<redis\.client\.Redis\(.*?\)> - ")
#: A cluster's map is not fetched more often than this.
_REFRESH_SECONDS = 0.5


class Nodes(Protocol):
    """Where keys live, and connections to there."""

    def group(self, keys: Sequence[bytes], wanted: Sequence[int]) -> dict[Any, list[int]]:
        """The wanted indices of ``keys`` by the node that owns them; may ask the servers.

        Raises:
            BackendUnavailableError: nobody says where they are.
        """

    def wire(self, node: Any, until: float) -> contextlib.AbstractContextManager[Wire]:
        """A connection to a node; given back at the end, dropped where the block fails.

        Raises:
            BackendUnavailableError: no connection, or this node is left alone for the moment.
        """

    def refresh(self) -> None:
        """What was known of roles and places is out of date."""

    def masters(self) -> list[Any]:
        """A client of each node that holds data."""

    def close(self) -> None:
        """Drop all connections."""


def _library() -> Any:
    try:
        import redis
        import redis.backoff
        import redis.cluster
        import redis.sentinel
    except ImportError:
        raise ConfigError("expected the package redis for this url; it is not installed: pip install 'lmkv[redis]'") from None
    return redis


def open_nodes(target: RedisTarget, deadline: float) -> Nodes:
    """The nodes of a target; nothing is connected yet.

    Args:
        deadline: seconds that connecting and logging in may take.

    Raises:
        ConfigError: the client library is not installed.
    """
    redis = _library()
    # retries are the tier's: the library's own would outlast the deadline
    limits = {
        "socket_timeout": deadline,
        "socket_connect_timeout": deadline,
        "protocol": 2,
        "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 0),
    }
    if target.kind == "cluster":
        return _Cluster(redis, target, limits)
    return _Single(_pool(redis, target, limits), redis)


def _pool(redis: Any, target: RedisTarget, limits: dict[str, Any]) -> Any:
    common = {**limits, **target.login}
    if target.kind == "sentinel":
        each = {
            **limits,
            "socket_timeout": limits["socket_timeout"] / 4,
            "socket_connect_timeout": limits["socket_timeout"] / 4,
        }
        if target.tls:
            each["ssl"] = common["ssl"] = True
            each.update({name: value for name, value in target.login.items() if name.startswith("ssl_")})
        sentinels = redis.sentinel.Sentinel(target.nodes, sentinel_kwargs={**each, **target.sentinel_login})
        return redis.sentinel.SentinelConnectionPool(target.master, sentinels, **common)
    if target.path:
        socket = redis.connection.UnixDomainSocketConnection
        return redis.connection.ConnectionPool(connection_class=socket, path=target.path, **common)
    kind = redis.connection.SSLConnection if target.tls else redis.connection.Connection
    host, port = target.nodes[0]
    return redis.connection.ConnectionPool(connection_class=kind, host=host, port=port, **common)


class _Connections:
    """Connections of a pool, kept between calls: the library's bookkeeping for each would take as long as a megabyte does."""

    def __init__(self, pool: Any, redis: Any) -> None:
        self.pool = pool
        self._redis = redis
        self._lock = threading.Lock()
        self._idle: list[tuple[Any, Wire]] = []
        self._closed = False

    @contextlib.contextmanager
    def wire(self, until: float) -> Iterator[Wire]:
        """A connection at rest, as a wire. Where the block fails it is dropped, and with it those that may have the same fault.

        Raises:
            BackendUnavailableError: no connection, or the wire failed.
        """
        connection, wire = self._kept() or self._new()
        wire.allow(until)
        try:
            yield wire
            wire.finish()
        except BaseException as error:
            self._discard(connection)
            self.drop()
            if isinstance(error, WireError):
                raise BackendUnavailableError(str(error)) from None
            raise
        with self._lock:
            if not self._closed:
                self._idle.append((connection, wire))
                return
        self._discard(connection)

    def _kept(self) -> tuple[Any, Wire] | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection, wire = self._idle.pop()
            if connection.pid != os.getpid():  # the parent's, in a forked process
                continue
            if wire.at_rest():
                return connection, wire
            self._discard(connection)

    def _new(self) -> tuple[Any, Wire]:
        try:
            connection = self.pool.get_connection()
        except (self._redis.RedisError, OSError) as error:
            text = _DESCRIBED_CLIENT.sub("", str(error))
            raise BackendUnavailableError(f"no connection: {type(error).__name__}: {text}") from None
        return connection, Wire(connection._sock, 0.0)

    def _discard(self, connection: Any) -> None:
        with contextlib.suppress(self._redis.RedisError, OSError):  # a pool that no longer knows who is master may refuse it
            connection.disconnect()
            self.pool.release(connection)

    def drop(self) -> None:
        """End what is not in use."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection, _ in idle:
            if connection.pid == os.getpid():
                self._discard(connection)

    def close(self) -> None:
        """End everything, what is in use once it is no more."""
        with self._lock:
            self._closed = True
        self.drop()


class _Single:
    """One server, or the master that sentinels name."""

    def __init__(self, pool: Any, redis: Any) -> None:
        self._pool = pool
        self._redis = redis
        self._connections = _Connections(pool, redis)

    def group(self, keys: Sequence[bytes], wanted: Sequence[int]) -> dict[Any, list[int]]:
        """All keys are on the one node."""
        return {"": list(wanted)} if wanted else {}

    def wire(self, node: Any, until: float) -> contextlib.AbstractContextManager[Wire]:
        """See :class:`Nodes`."""
        return self._connections.wire(until)

    def refresh(self) -> None:
        """Connect anew, which asks sentinels who is master now."""
        self._connections.drop()
        self._pool.disconnect(inuse_connections=False)

    def masters(self) -> list[Any]:
        """See :class:`Nodes`."""
        return [self._redis.Redis(connection_pool=self._pool)]

    def close(self) -> None:
        """See :class:`Nodes`."""
        self._connections.close()
        self._pool.disconnect()


class _Cluster:
    """Several masters, each with a share of the keys; one that does not answer is left alone for a while."""

    def __init__(self, redis: Any, target: RedisTarget, limits: dict[str, Any]) -> None:
        self._redis = redis
        self._target = target
        # with several nodes each gets a part of the time, so that one that hangs does not take it all
        share = limits["socket_connect_timeout"] / (1 + len(target.nodes))
        self._limits = {**limits, "socket_timeout": share, "socket_connect_timeout": share}
        self._lock = threading.Lock()
        self._cluster: Any = None
        self._stale = True
        self._asked = 0.0
        self._resting: dict[str, tuple[float, float]] = {}
        self._connections: dict[str, _Connections] = {}

    def _connected(self) -> Any:
        """The library's cluster with a map that nobody has called stale."""
        with self._lock:
            if self._cluster is not None and (not self._stale or time.monotonic() - self._asked < _REFRESH_SECONDS):
                return self._cluster
            self._asked = time.monotonic()
            try:
                if self._cluster is None:
                    self._cluster = self._open()
                else:
                    self._cluster.nodes_manager.initialize()
                self._stale = False
            except (self._redis.RedisError, self._redis.cluster.RedisClusterException, OSError) as error:
                if self._cluster is None:
                    raise BackendUnavailableError(f"no node of the cluster answers: {error}") from None
            return self._cluster

    def _open(self) -> Any:
        cluster = self._redis.cluster
        nodes = [cluster.ClusterNode(host, port) for host, port in self._target.nodes]
        if self._target.tls:
            return cluster.RedisCluster(
                startup_nodes=nodes, require_full_coverage=False, ssl=True, **self._limits, **self._target.login
            )
        return cluster.RedisCluster(startup_nodes=nodes, require_full_coverage=False, **self._limits, **self._target.login)

    def group(self, keys: Sequence[bytes], wanted: Sequence[int]) -> dict[Any, list[int]]:
        """See :class:`Nodes`. Keys in a slot that nobody serves belong to the node ``None``."""
        if not wanted:
            return {}
        manager = self._connected().nodes_manager
        slots = self._redis.crc
        found: dict[Any, list[int]] = {}
        for i in wanted:
            serving = manager.slots_cache.get(slots.key_slot(keys[i]))
            found.setdefault(serving[0].name if serving else None, []).append(i)
        return found

    @contextlib.contextmanager
    def wire(self, node: Any, until: float) -> Iterator[Wire]:
        """See :class:`Nodes`."""
        if node is None:
            self.refresh()
            raise BackendUnavailableError("no node serves these keys now")
        with self._lock:
            begin, _ = self._resting.get(node, (0.0, 0.0))
        if time.monotonic() < begin:
            raise BackendUnavailableError(f"node {node} did not answer a moment ago and is left alone")
        try:
            cluster = self._connected()
            found = cluster.get_node(node_name=node)
            if found is None:
                raise BackendUnavailableError(f"node {node} is no longer part of the cluster")
            with self._connections_to(node, cluster.get_redis_connection(found).connection_pool).wire(until) as wire:
                yield wire
        except BackendUnavailableError:
            self._leave_alone(node)
            raise
        with self._lock:
            self._resting.pop(node, None)

    def _connections_to(self, node: str, pool: Any) -> _Connections:
        with self._lock:
            known = self._connections.get(node)
            if known is None or known.pool is not pool:
                if known is not None:
                    known.close()
                known = self._connections[node] = _Connections(pool, self._redis)
            return known

    def _leave_alone(self, node: str) -> None:
        with self._lock:
            _, rest = self._resting.get(node, (0.0, _FIRST_REST / 2))
            rest = min(_LONGEST_REST, rest * 2)
            self._resting[node] = (time.monotonic() + rest * random.uniform(0.75, 1.25), rest)
            self._stale = True

    def refresh(self) -> None:
        """See :class:`Nodes`."""
        with self._lock:
            self._stale = True

    def masters(self) -> list[Any]:
        """See :class:`Nodes`."""
        cluster = self._connected()
        return [cluster.get_redis_connection(node) for node in cluster.get_primaries()]

    def close(self) -> None:
        """See :class:`Nodes`."""
        with self._lock:
            for connections in self._connections.values():
                connections.close()
            self._connections.clear()
            if self._cluster is not None:
                self._cluster.close()
                self._cluster = None
