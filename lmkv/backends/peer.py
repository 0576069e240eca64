"""Slots of another store, read from its memory by NIXL's UCX plugin: RDMA where there is some, TCP or shared memory where not.

The other store lends records that it has in RAM (``peer_listen`` in its configuration): it is asked over TCP, keeps what was
asked for in place, and says where it lies; this side reads it straight into its own slots. Nothing is written to a peer.

A transfer is waited for however long it takes, since what is under way writes into the slot; requests go on when their deadline
passes. Each thread has a connection and an agent of its own.
"""

from __future__ import annotations

import base64
import contextlib
import difflib
import os
import secrets
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ..chunks import ChunkKey
from ..config import read_secret
from ..errors import BackendUnavailableError, ConfigError, StoreClosedError
from .base import BackendSettings, shown_url
from .nixl_agent import Agent, address_of, library
from .peer_wire import GREETING, MOST_KEYS, VERSION, receive, send

__all__ = ["PeerBackend"]

Result = TypeVar("Result")

_KNOWN = ("plugin", "params", "token", "token_env", "token_file")


class PeerBackend:
    """What another store has in RAM. Connects on first use.

    The URL names the other store, ``nixl://host:port``. Options: ``plugin`` (``UCX``), ``params`` (texts handed to it),
    ``token`` (or ``token_env``, ``token_file``), where the other side wants one.

    Raises:
        ConfigError: a malformed URL or option, a capacity, or the package is not installed.
    """

    #: A tier writes nothing here.
    read_only = True

    def __init__(self, settings: BackendSettings) -> None:
        where = f"tier {settings.name}"
        if settings.capacity:
            raise ConfigError(f"{where}: expected no capacity: the peer's RAM is what it is; got {settings.capacity}")
        try:
            parts = urllib.parse.urlsplit(settings.url)
            self._address = (parts.hostname or "", parts.port or 0)
        except ValueError:
            self._address = ("", 0)
        if parts.scheme != "nixl" or not all(self._address) or parts.path.strip("/"):
            raise ConfigError(f"{where}: expected a url such as nixl://host:18300; got {shown_url(settings.url)!r}")
        options = {**dict(urllib.parse.parse_qsl(parts.query)), **settings.options}
        for name in options:
            if name not in _KNOWN:
                near = difflib.get_close_matches(name, _KNOWN, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_KNOWN)}"
                raise ConfigError(f"{where}: unknown option {name!r} of a peer; {hint}")
        plugin = str(options.get("plugin", "UCX")).upper()
        if plugin != "UCX":
            raise ConfigError(f"{where}: plugin: expected UCX for a peer; got {options['plugin']!r}")
        params = options.get("params") or {}
        if not isinstance(params, Mapping):
            raise ConfigError(f"{where}: params: expected keys and values; got {params!r}")
        self._params = {str(name): str(value) for name, value in params.items()}
        self._token = read_secret(options, "token", where) or ""
        self._shown = shown_url(settings.url)
        self._layout = settings.layout.fingerprint
        self._deadline = settings.deadline_seconds
        library()
        self._lock = threading.Lock()
        self._resting: list[_Link] = []
        self._closed = False

    def __repr__(self) -> str:
        return f"PeerBackend({self._shown})"

    def _call(self, step: Callable[[_Link, float], Result], otherwise: Result) -> Result:
        """``step`` on a connection that nobody else uses meanwhile; once more where one that rested had ended.

        Raises:
            BackendUnavailableError: no connection, no answer in time, or it failed.
        """
        until = time.monotonic() + self._deadline
        for _ in range(2):
            with self._lock:
                if self._closed:
                    raise StoreClosedError("expected an open backend; it was closed")
                link = self._resting.pop() if self._resting else None
            rested = link is not None
            try:
                link = link or _Link(self._address, self._layout, self._token, self._params, until)
                result = step(link, until)
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                if link is not None:
                    link.close()
                if rested and time.monotonic() < until:
                    continue
                raise BackendUnavailableError(f"{self._shown}: {error}") from None
            except BaseException:
                if link is not None:
                    link.close()
                raise
            with self._lock:
                if not self._closed:
                    self._resting.append(link)
                    return result
            link.close()
            return result
        return otherwise

    # -- Backend ---------------------------------------------------------------------------------------------------------

    def contains_many(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """See :class:`lmkv.backends.base.Backend`. One round trip."""
        absent = [False] * len(keys)
        return self._call(lambda link, until: link.has(keys, until), absent) if keys else []

    def read_many(self, keys: Sequence[ChunkKey], out: Sequence[memoryview]) -> list[int | None]:
        """See :class:`lmkv.backends.base.Backend`. Read straight into the buffers."""
        absent: list[int | None] = [None] * len(keys)
        return self._call(lambda link, until: link.read(keys, out, until), absent) if keys else []

    def write_many(self, keys: Sequence[ChunkKey], data: Sequence[memoryview]) -> None:
        """Not here: a peer keeps what its own engine computes.

        Raises:
            BackendUnavailableError: always.
        """
        raise BackendUnavailableError(f"{self._shown}: expected nothing to write: a peer is only read")

    def delete_many(self, keys: Sequence[ChunkKey]) -> None:
        """Nothing: what a peer has is its own."""

    def close(self) -> None:
        """See :class:`lmkv.backends.base.Backend`."""
        with self._lock:
            self._closed = True
            resting, self._resting = self._resting, []
        for link in resting:
            link.close()


class _Link:
    """A connection to a peer and the agent that reads its memory."""

    def __init__(self, address: tuple[str, int], layout: bytes, token: str, params: Mapping[str, str], until: float) -> None:
        self._sock = socket.create_connection(address, max(0.001, until - time.monotonic()))
        try:
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._agent = Agent(f"lmkv-{os.getpid()}-{secrets.token_hex(8)}", "UCX", params)
            self._ask({GREETING: VERSION, "layout": layout.hex(), "token": token}, until)
        except BaseException:
            self._sock.close()
            raise
        self._remote = ""

    def close(self) -> None:
        """End the connection; the peer then holds nothing for it any more."""
        self._sock.close()
        if self._remote:
            with contextlib.suppress(*self._agent.errors):
                self._agent.api.remove_remote_agent(self._remote)

    def _ask(self, message: dict[str, Any], until: float) -> dict[str, Any]:
        send(self._sock, message, until)
        answer = receive(self._sock, until)
        if "error" in answer:
            raise OSError(f"the peer says: {answer['error']}")
        return answer

    def has(self, keys: Sequence[ChunkKey], until: float) -> list[bool]:
        """Which keys are there."""
        found: list[bool] = []
        for begin in range(0, len(keys), MOST_KEYS):
            some = keys[begin : begin + MOST_KEYS]
            there = str(self._ask({"has": [key.hex() for key in some]}, until)["has"])
            if len(there) != len(some):
                raise ValueError(f"expected {len(some)} answers of the peer; got {len(there)}")
            found += [mark == "1" for mark in there]
        return found

    def read(self, keys: Sequence[ChunkKey], out: Sequence[memoryview], until: float) -> list[int | None]:
        """Read what is there into the buffers; returns sizes."""
        answer = self._ask({"hold": [key.hex() for key in keys]}, until)
        if answer.get("metadata"):
            name = self._agent.api.add_remote_agent(base64.b64decode(answer["metadata"]))
            self._remote = name.decode() if isinstance(name, bytes) else str(name)
        held = answer["held"]
        if len(held) != len(keys):
            raise ValueError(f"expected {len(keys)} answers of the peer; got {len(held)}")
        sizes: list[int | None] = [None] * len(keys)
        for i, place in enumerate(held):
            if place is not None and 0 < place[1] <= len(out[i]):
                sizes[i] = int(place[1])
        self._move([(int(held[i][0]), out[i][:size]) for i, size in enumerate(sizes) if size is not None])
        send(self._sock, {"release": answer["hold"]}, time.monotonic() + 1.0)
        return sizes

    def _move(self, pairs: Sequence[tuple[int, memoryview]]) -> None:
        if not pairs:
            return
        agent = self._agent
        with contextlib.ExitStack() as registered:
            for _, view in pairs:
                registered.enter_context(agent.registered(view))
            here = agent.api.get_xfer_descs([(address_of(view), len(view), 0) for _, view in pairs], "DRAM")
            there = agent.api.get_xfer_descs([(address, len(view), 0) for address, view in pairs], "DRAM")
            try:
                agent.transfer("READ", here, there, self._remote)
            except agent.errors as error:
                raise OSError(f"the peer's memory can't be read: {error}") from None
