"""Values in a Mooncake store, through its own client (package ``mooncake-transfer-engine``): memory pooled from many machines.

Slots are registered with the client extent by extent, once, so that values go from and to them without a copy in between. Its
calls have no time limit of the caller's: they run on the tier's threads, which nobody waits for beyond the deadline. Setting up
stops the whole process for 90 s where no master answers, so it is tried only once somebody listens there. The client writes
logs to standard error (``GLOG_minloglevel`` in the environment keeps it quiet).
"""

from __future__ import annotations

import difflib
import mmap
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..chunks import ChunkKey
from ..config import parse_bytes
from ..errors import BackendUnavailableError, CapacityError, ConfigError, StoreClosedError
from .base import BackendSettings, shown_url

__all__ = ["MooncakeBackend"]

_NOT_FOUND, _NOT_READY, _TOO_SMALL, _NO_ROOM = -704, -703, -600, -200
_DEFAULT_PORT = 50051
#: Option -> default. The names are those of Mooncake's own configuration, as LMCache passes them on.
_DEFAULTS: Mapping[str, object] = {
    "local_hostname": "127.0.0.1",
    "metadata_server": "P2PHANDSHAKE",
    "protocol": "tcp",
    "device_name": "",
    "global_segment_size": 512 * 1024**2,
    "local_buffer_size": 64 * 1024**2,
    "master_server_address": "",
    "prefer_local_alloc": False,
    "prefix": "lmkv",
}


class MooncakeBackend:
    """Values in a Mooncake store. Connects on first use.

    The URL names the master, ``mooncakestore://host:50051``. Options: ``local_hostname`` (this machine, as others reach it),
    ``metadata_server`` (``P2PHANDSHAKE`` or ``http://host:8080/metadata``), ``protocol`` (``tcp`` or ``rdma``),
    ``device_name``, ``global_segment_size`` (bytes that this process gives to the pool), ``local_buffer_size``,
    ``master_server_address`` (instead of the URL's), ``prefer_local_alloc``, ``prefix``.

    Raises:
        ConfigError: a malformed URL or option, a capacity, or the package is not installed.
    """

    def __init__(self, settings: BackendSettings) -> None:
        where = f"tier {settings.name}"
        if settings.capacity:
            raise ConfigError(
                f"{where}: expected no capacity: segments bound a Mooncake store (global_segment_size); got {settings.capacity}"
            )
        self._shown = shown_url(settings.url)
        self._options = _options(where, settings)
        self._prefix = str(self._options["prefix"])
        self._deadline = settings.deadline_seconds
        self._library = _library(where)
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._connecting: threading.Thread | None = None
        self._client: Any = None
        self._failed = ""
        self._closed = False
        self._calls = 0  # under way
        self._registered: dict[int, tuple[object, int, int]] = {}  # exporter's id -> exporter, address, uses (0: for good)

    def __repr__(self) -> str:
        return f"MooncakeBackend({self._shown})"

    # -- the client ------------------------------------------------------------------------------------------------------

    def _connected(self) -> Any:
        """The client, once it is set up.

        Raises:
            BackendUnavailableError: it is not set up within the deadline; setting up goes on beside.
        """
        with self._lock:
            if self._closed:
                raise StoreClosedError("expected an open backend; it was closed")
            if self._client is None and self._connecting is None:
                self._ready.clear()
                self._connecting = threading.Thread(target=self._connect, name="lmkv-mooncake-setup", daemon=True)
                self._connecting.start()
        if not self._ready.wait(self._deadline):
            raise BackendUnavailableError(f"{self._shown}: not connected yet")
        if self._client is None:
            raise BackendUnavailableError(f"{self._shown}: {self._failed}")
        return self._client

    @contextmanager
    def _using(self) -> Iterator[Any]:
        """The client for one call, which it outlives: transfers may never end, so closing does not wait for them."""
        client = self._connected()
        with self._lock:
            if self._closed:
                raise StoreClosedError("expected an open backend; it was closed")
            self._calls += 1
        try:
            yield client
        finally:
            with self._lock:
                self._calls -= 1
                last = self._closed and not self._calls
            if last:
                self._end(client)

    def _end(self, client: Any) -> None:
        for _, address, _ in self._registered.values():
            client.unregister_buffer(address)
        self._registered.clear()
        client.close()

    def _connect(self) -> None:
        o = self._options
        try:
            for place in filter(None, (str(o["master_server_address"]), _host_of(str(o["metadata_server"])))):
                host, _, port = place.rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), self._deadline).close()
        except (OSError, ValueError) as error:
            with self._lock:
                self._failed = f"{place} does not answer: {error}"
                self._connecting = None
                self._ready.set()
            return
        client = self._library.MooncakeDistributedStore()
        status = client.setup(
            str(o["local_hostname"]),
            str(o["metadata_server"]),
            o["global_segment_size"],
            o["local_buffer_size"],
            str(o["protocol"]),
            str(o["device_name"]),
            str(o["master_server_address"]),
        )
        with self._lock:
            closed = self._closed
            if status == 0 and not closed:
                self._client = client
            self._failed = f"the client can't be set up (status {status})"
            self._connecting = None
            self._ready.set()
        if status == 0 and closed:
            client.close()

    @contextmanager
    def _addresses(self, client: Any, views: Sequence[memoryview]) -> Iterator[list[int]]:
        """Where the views lie, in memory that is registered meanwhile; mappings, as slots are in, stay registered."""
        taken: list[int] = []
        try:
            with self._lock:
                for view in views:
                    self._register(client, view)
                    taken.append(id(view.obj))
            yield [_address(view) for view in views]
        finally:
            with self._lock:
                for number in taken:
                    self._release(client, number)

    def _register(self, client: Any, view: memoryview) -> None:
        owner = view.obj
        held = self._registered.get(id(owner))
        if held is not None:
            self._registered[id(owner)] = (owner, held[1], held[2] + 1 if held[2] else 0)
            return
        whole = memoryview(owner).cast("B")
        address = _address(whole)
        if len(whole):
            status = client.register_buffer(address, len(whole))
            if status != 0:
                raise BackendUnavailableError(f"{self._shown}: memory can't be registered (status {status})")
        self._registered[id(owner)] = (owner, address, 0 if isinstance(owner, mmap.mmap) else 1)

    def _release(self, client: Any, number: int) -> None:
        owner, address, uses = self._registered[number]
        if uses > 1:
            self._registered[number] = (owner, address, uses - 1)
        elif uses == 1:
            del self._registered[number]
            client.unregister_buffer(address)

    def _name(self, key: ChunkKey) -> str:
        return f"{self._prefix}-{key.hex()}"

    # -- Backend ---------------------------------------------------------------------------------------------------------

    def contains_many(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """See :class:`lmkv.backends.base.Backend`. One call to the master."""
        if not keys:
            return []
        with self._using() as client:
            states = client.batch_is_exist([self._name(key) for key in keys])
        self._check_states("look up", states)
        return [state == 1 for state in states]

    def read_many(self, keys: Sequence[ChunkKey], out: Sequence[memoryview]) -> list[int | None]:
        """See :class:`lmkv.backends.base.Backend`. Received straight into the buffers."""
        if not keys:
            return []
        states = [_NOT_READY] * len(keys)
        first = {key: i for i, key in reversed(list(enumerate(keys)))}  # the client fills one buffer a key
        until = time.monotonic() + self._deadline
        with self._using() as client, self._addresses(client, out) as places:
            left = sorted(first.values())
            while left:
                names, sizes = [self._name(keys[i]) for i in left], [len(out[i]) for i in left]
                for i, state in zip(left, client.batch_get_into(names, [places[i] for i in left], sizes), strict=True):
                    states[i] = state
                left = [i for i in left if states[i] == _NOT_READY]  # it is being replaced at this moment
                if left and time.monotonic() > until:
                    break
                if left:
                    time.sleep(0.001)
        for i, key in enumerate(keys):
            if i != first[key]:
                states[i] = states[first[key]] if states[first[key]] <= len(out[i]) else _TOO_SMALL
                if states[i] >= 0:
                    out[i][: states[i]] = out[first[key]][: states[i]]
        self._check_states("read", states)
        return [state if state >= 0 else None for state in states]

    def _check_states(self, what: str, states: Sequence[int]) -> None:
        bad = [state for state in states if state < 0 and state not in (_NOT_FOUND, _TOO_SMALL)]
        if bad and len(bad) == len(states):
            raise BackendUnavailableError(f"{self._shown}: can't {what} (status {bad[0]})")

    def write_many(self, keys: Sequence[ChunkKey], data: Sequence[memoryview]) -> None:
        """See :class:`lmkv.backends.base.Backend`. Sent straight from the buffers.

        Of several writers of a new key the first one's value stays. Replacing a value is not atomic in Mooncake: who reads it
        at that moment may get a mixture, which the record's checksum tells.

        Raises:
            CapacityError: the pool has no room and nothing in it may go.
        """
        if not keys:
            return
        how = self._library.ReplicateConfig()
        names = [self._name(key) for key in keys]
        with self._using() as client, self._addresses(client, data) as places:
            if self._options["prefer_local_alloc"] and self._options["global_segment_size"]:
                how.preferred_segment = client.get_hostname()
            there = client.batch_is_exist(names)
            states = [0] * len(names)
            for held, write in ((True, client.batch_upsert_from), (False, client.batch_put_from)):
                some = [i for i, state in enumerate(there) if (state == 1) == held]
                if some:
                    done = write([names[i] for i in some], [places[i] for i in some], [len(data[i]) for i in some], how)
                    for i, state in zip(some, done, strict=True):
                        states[i] = state
            if _NO_ROOM in states:
                client.batch_remove(names, True)
        bad = [state for state in states if state < 0]
        if _NO_ROOM in bad:
            raise CapacityError(f"{self._shown}: the pool has no room")
        if bad:
            raise BackendUnavailableError(f"{self._shown}: {len(bad)} of {len(states)} not written (status {bad[0]})")

    def delete_many(self, keys: Sequence[ChunkKey]) -> None:
        """See :class:`lmkv.backends.base.Backend`."""
        if not keys:
            return
        with self._using() as client:
            states = client.batch_remove([self._name(key) for key in keys], True)
        self._check_states("delete", states)

    def clear(self) -> None:
        """See :class:`lmkv.backends.base.Clearable`: every value behind the prefix, whoever wrote it."""
        with self._using() as client:
            status = client.remove_by_regex(f"^{re.escape(self._prefix)}-[0-9a-f]{{32}}$", True)
        if status < 0:
            raise BackendUnavailableError(f"{self._shown}: can't clear (status {status})")

    def close(self) -> None:
        """See :class:`lmkv.backends.base.Backend`. Takes this process's segment, and what lies in it, out of the pool.

        Where calls are under way, the last of them does so at its end.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            client, self._client = self._client, None
            busy = self._calls > 0
        if client is not None and not busy:
            self._end(client)


def _host_of(metadata_server: str) -> str:
    """``host:port`` of a metadata server; empty where there is none."""
    parts = urllib.parse.urlsplit(metadata_server)
    return f"{parts.hostname}:{parts.port or 80}" if parts.scheme.startswith("http") and parts.hostname else ""


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0]) if len(view) else 0


def _library(where: str) -> Any:
    try:
        import mooncake.store
    except ImportError as error:
        raise ConfigError(
            f"{where}: expected the package mooncake-transfer-engine (and the system's libibverbs); got: {error}: "
            "pip install 'lmkv[mooncake]'"
        ) from None
    return mooncake.store


def _options(where: str, settings: BackendSettings) -> dict[str, Any]:
    try:
        parts = urllib.parse.urlsplit(settings.url)
        host, port = parts.hostname, parts.port or _DEFAULT_PORT
    except ValueError:
        host, port = None, 0
    if not host or parts.path not in ("", "/"):
        raise ConfigError(f"{where}: expected a url such as mooncakestore://host:50051; got {shown_url(settings.url)!r}")
    given = {**dict(urllib.parse.parse_qsl(parts.query)), **settings.options}
    for name in given:
        if name not in _DEFAULTS:
            near = difflib.get_close_matches(name, sorted(_DEFAULTS), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(_DEFAULTS))}"
            raise ConfigError(f"{where}: unknown option {name!r} of a Mooncake store; {hint}")
    options = {**_DEFAULTS, **given}
    for name in ("global_segment_size", "local_buffer_size"):
        try:
            options[name] = parse_bytes(options[name])
        except ConfigError as error:
            raise ConfigError(f"{where}: {name}: {error}") from None
    if options["protocol"] not in ("tcp", "rdma"):
        raise ConfigError(f"{where}: protocol: expected tcp or rdma; got {options['protocol']!r}")
    if isinstance(options["prefer_local_alloc"], str):
        options["prefer_local_alloc"] = options["prefer_local_alloc"].lower() in ("true", "yes", "on", "1")
    options["master_server_address"] = options["master_server_address"] or f"{host}:{port}"
    return options
