"""Values in an InfiniStore, through its own client (package ``infinistore``), over RDMA.

The client moves as many bytes as it is told, whatever the size of what is stored. So a value is in two: its
*head* under ``<prefix>-<chunk key in hex>``, 64 bytes that tell its size and which write it is of, and its *body* under
``<prefix>-<chunk key>-<write>``, which is there before the head is. A body that was evicted makes the value absent.

None of the client's calls has a time limit, and a transfer may never end when its server dies. So they are made on threads
that are left behind when the deadline passes, together with their connection and the memory that it receives into. Values are
sent straight from slots. The client's transfers over TCP are not used: they end the whole process when the connection breaks.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import mmap
import re
import secrets
import socket
import struct
import threading
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

import numpy as np

from ..chunks import ChunkKey
from ..config import environment_kept
from ..errors import BackendUnavailableError, CapacityError, ConfigError, StoreClosedError
from .base import BackendSettings, shown_url
from .place import Place

__all__ = ["InfiniStoreBackend"]

Result = TypeVar("Result")

_DEFAULT_PORT = 12345
#: magic, padding, bytes of the body, write
_HEAD = struct.Struct("<4s4xQ16s32x")
_MAGIC = b"LKI1"
_KNOWN = ("device", "ib_port", "link_type", "prefix")
_PREFIX = re.compile(r"[A-Za-z0-9._:@/-]{1,80}")
_NO_ROOM = "507"
#: Transfers under way at once on a connection, fewer than the client allows.
_AT_ONCE = 64


class InfiniStoreBackend:
    """Values in an InfiniStore. Connects on first use.

    The URL names the server, ``infinistore://host:12345?device=mlx5_1``. Options, there or in the tier's ``options``:
    ``device`` (this machine's RDMA device, ``mlx5_1``), ``ib_port`` (1), ``link_type`` (``Ethernet`` or ``IB``), ``prefix``
    (``lmkv``).

    Raises:
        ConfigError: a malformed URL or option, a capacity (the server bounds itself), or the package is not installed.
    """

    #: Every key that is asked for is a round trip.
    probe_concurrency = 32

    def __init__(self, settings: BackendSettings) -> None:
        where = f"tier {settings.name}"
        if settings.capacity:
            raise ConfigError(f"{where}: expected no capacity for an InfiniStore, which bounds itself; got {settings.capacity}")
        try:
            parts = urllib.parse.urlsplit(settings.url)
            self._address = (parts.hostname or "", parts.port or _DEFAULT_PORT)
        except ValueError:
            self._address = ("", 0)
        if not self._address[0] or parts.scheme != "infinistore" or parts.path.strip("/"):
            raise ConfigError(
                f"{where}: expected a url such as infinistore://host:12345?device=mlx5_1; got {shown_url(settings.url)!r}"
            )
        options = {**dict(urllib.parse.parse_qsl(parts.query)), **settings.options}
        self._settings = _client_settings(where, self._address, options)
        self._prefix = str(options.get("prefix", "lmkv"))
        if not _PREFIX.fullmatch(self._prefix):
            raise ConfigError(f"{where}: prefix: expected 1 to 80 letters, digits and . _ : @ / -; got {self._prefix!r}")
        self._shown = f"infinistore://{self._address[0]}:{self._address[1]}"
        self._deadline = settings.deadline_seconds
        self._library = _library(where)
        self._lock = threading.Lock()
        self._resting: list[_Link] = []
        self._closed = False

    def __repr__(self) -> str:
        return f"InfiniStoreBackend({self._shown})"

    # -- connections -----------------------------------------------------------------------------------------------------

    def _call(self, operation: str, step: Callable[[_Link], Result], seconds: float) -> Result:
        """``step`` on a connection that nobody else uses meanwhile.

        Raises:
            BackendUnavailableError: no connection, it failed, or there was no answer in time.
        """
        with self._lock:
            if self._closed:
                raise StoreClosedError("expected an open backend; it was closed")
            rested = self._resting.pop() if self._resting else None

        def run() -> Result:
            link = rested
            try:
                if link is not None:
                    try:
                        return self._step(link, step)
                    except (CapacityError, StoreClosedError):
                        raise
                    except Exception:  # the server may have ended a connection that rested
                        link = None
                return self._step(self._connect(), step)
            except (CapacityError, BackendUnavailableError):
                raise
            except Exception as error:  # the client's errors have no narrower base than this
                raise BackendUnavailableError(f"{self._shown}: {operation}: {error}") from None

        try:
            return _within(run, seconds)
        except FutureTimeoutError:  # the connection is left to whatever comes
            raise BackendUnavailableError(f"{self._shown}: {operation}: no answer within {seconds:.3g} s") from None

    def _step(self, link: _Link, step: Callable[[_Link], Result]) -> Result:
        """One step; afterwards the connection rests, or is ended if it failed."""
        good = False
        try:
            result = step(link)
            good = True
        except CapacityError:
            good = True
            raise
        finally:
            with self._lock:
                good = good and not self._closed
                if good:
                    self._resting.append(link)
            if not good:
                link.close()
        return result

    def _connect(self) -> _Link:
        try:
            socket.create_connection(self._address, self._deadline).close()  # the client would wait as long as the kernel does
        except OSError as error:
            raise BackendUnavailableError(f"{self._shown}: no connection: {error}") from None
        return _Link(self._library, self._settings)

    # -- names -----------------------------------------------------------------------------------------------------------

    def _name(self, key: ChunkKey) -> str:
        return f"{self._prefix}-{key.hex()}"

    def _bodies(self, link: _Link, names: Sequence[str]) -> list[tuple[str, int] | None]:
        """Name and size of the bodies, ``None`` where there is no head; of what is no head the size is -1."""
        found: list[tuple[str, int] | None] = []
        for name, head in zip(names, link.read(names, [_HEAD.size] * len(names)), strict=True):
            if head is None:
                found.append(None)
                continue
            magic, size, write = _HEAD.unpack(head)
            found.append((f"{name}-{write.hex()}", size if magic == _MAGIC else -1))
        return found

    # -- Backend ---------------------------------------------------------------------------------------------------------

    def contains_many(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """See :class:`lmkv.backends.base.Backend`. A round trip a key."""
        names = [self._name(key) for key in keys]
        return self._call("lookup", lambda link: link.exist(names), self._deadline) if keys else []

    def read_many(self, keys: Sequence[ChunkKey], out: Sequence[memoryview]) -> list[int | None]:
        """See :class:`lmkv.backends.base.Backend`."""
        names, places = [self._name(key) for key in keys], [Place(view) for view in out]

        def step(link: _Link) -> list[int | None]:
            bodies = self._bodies(link, names)
            wanted = [i for i, body in enumerate(bodies) if body is not None and 0 <= body[1] <= places[i].room]
            there = [bodies[i] or ("", 0) for i in wanted]
            sizes: list[int | None] = [None] * len(names)
            evicted = [name for name, body in zip(names, bodies, strict=True) if body is not None and body[1] < 0]
            for i, value in zip(wanted, link.read([name for name, _ in there], [size for _, size in there]), strict=True):
                if value is None:
                    evicted.append(names[i])  # its head would be found for ever
                elif places[i].put(0, len(value), value):
                    sizes[i] = len(value)
            link.delete(evicted)
            return sizes

        if not keys:
            return []
        try:
            return self._call("read", step, self._deadline)
        finally:
            for place in places:
                place.withdraw()

    def write_many(self, keys: Sequence[ChunkKey], data: Sequence[memoryview]) -> None:
        """See :class:`lmkv.backends.base.Backend`. Sent straight from the buffers; each value gets the deadline's time.

        Raises:
            CapacityError: the server has no room.
        """
        names = [self._name(key) for key in keys]

        def step(link: _Link) -> None:
            before = [body[0] for body in self._bodies(link, names) if body is not None]
            writes = [secrets.token_bytes(16) for _ in names]
            bodies = [f"{name}-{write.hex()}" for name, write in zip(names, writes, strict=True)]
            heads = [_HEAD.pack(_MAGIC, len(view), write) for view, write in zip(data, writes, strict=True)]
            try:
                link.write(bodies, data)
                link.write(names, heads)
            except Exception as error:  # as in _call
                with contextlib.suppress(Exception):
                    link.delete([*names, *bodies])
                if _NO_ROOM in str(error):
                    raise CapacityError(f"{self._shown}: the server has no room") from None
                raise
            link.delete(before)

        if keys:
            self._call("write", step, self._deadline * len(keys))

    def delete_many(self, keys: Sequence[ChunkKey]) -> None:
        """See :class:`lmkv.backends.base.Backend`."""
        names = [self._name(key) for key in keys]

        def step(link: _Link) -> None:
            link.delete([*names, *(body[0] for body in self._bodies(link, names) if body is not None)])

        if keys:
            self._call("delete", step, self._deadline)

    def close(self) -> None:
        """See :class:`lmkv.backends.base.Backend`."""
        with self._lock:
            self._closed = True
            resting, self._resting = self._resting, []
        for link in resting:
            link.close()


class _Link:
    """One connection, used by one thread at a time."""

    def __init__(self, library: Any, settings: dict[str, Any]) -> None:
        self._missing: type[Exception] = library.InfiniStoreKeyNotFound
        self._client = library.InfinityConnection(library.ClientConfig(**settings))
        self._loop = asyncio.new_event_loop()
        self._registered: dict[int, memoryview] = {}
        self._room = mmap.mmap(-1, mmap.PAGESIZE)
        try:
            self._loop.run_until_complete(self._client.connect_async())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(Exception):  # it may be broken in any way
            self._client.close()
        self._loop.close()

    def exist(self, names: Sequence[str]) -> list[bool]:
        """Which keys are there."""
        return [bool(self._client.check_exist(name)) for name in names]

    def delete(self, names: Sequence[str]) -> None:
        """Remove keys; absent ones are ignored."""
        if names:
            self._client.delete_keys(list(names))

    def read(self, names: Sequence[str], sizes: Sequence[int]) -> list[memoryview | None]:
        """Values of known sizes, ``None`` for absent keys; they stay where they are until the next call."""
        places = self._places(sizes)
        some = [i for i, size in enumerate(sizes) if size]
        came = self._all(self._client.rdma_read_cache_async, [names[i] for i in some], [places[i] for i in some])
        absent = {i for i, there in zip(some, came, strict=True) if not there}
        return [None if i in absent else place for i, place in enumerate(places)]

    def write(self, names: Sequence[str], data: Sequence[memoryview | bytes]) -> None:
        """Store values; those of no bytes need no storing."""
        pairs = [(name, memoryview(value)) for name, value in zip(names, data, strict=True) if len(value)]
        passing = iter(self._places([len(view) for _, view in pairs if not isinstance(view.obj, mmap.mmap)]))
        views = []
        for _, view in pairs:
            if not isinstance(view.obj, mmap.mmap):
                place = next(passing)
                place[:] = view
                view = place
            views.append(view)
        if not all(self._all(self._client.rdma_write_cache_async, [name for name, _ in pairs], views)):
            raise RuntimeError("expected to write; the server says that the key is not there")

    def _places(self, sizes: Sequence[int]) -> list[memoryview]:
        """Memory of the connection's own, which stays registered: the client can't end a registration before its own end."""
        if sum(sizes) > len(self._room):
            self._room = mmap.mmap(-1, max(sum(sizes), 2 * len(self._room)))
        whole, found, at = memoryview(self._room), [], 0
        for size in sizes:
            found.append(whole[at : at + size])
            at += size
        return found

    def _all(self, transfer: Callable[..., Any], names: Sequence[str], views: Sequence[memoryview]) -> list[bool]:
        """All transfers, several under way at once, to their end; ``False`` for keys that are not there."""

        async def run() -> list[BaseException | Any]:
            done: list[BaseException | Any] = []
            for begin in range(0, len(names), _AT_ONCE):
                some = range(begin, min(begin + _AT_ONCE, len(names)))
                calls = [transfer([(names[i], 0)], len(views[i]), _address(views[i])) for i in some]
                done += await asyncio.gather(*calls, return_exceptions=True)
            return done

        for view in views:
            self._register(view)
        results = self._loop.run_until_complete(run())
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, self._missing):
                raise result
        return [not isinstance(result, BaseException) for result in results]

    def _register(self, view: memoryview) -> None:
        owner = view.obj
        if isinstance(owner, mmap.mmap) and id(owner) not in self._registered:
            whole = memoryview(owner).cast("B")
            self._client.register_mr(_address(whole), len(whole))
            self._registered[id(owner)] = whole  # which keeps it from being unmapped


def _within(call: Callable[[], Result], seconds: float) -> Result:
    """``call()`` on a thread that is left behind if it takes longer.

    Raises:
        concurrent.futures.TimeoutError: it does.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            result = call()
        except BaseException as error:  # whoever waits has to learn of it
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name="lmkv-infinistore", daemon=True).start()
    return future.result(seconds)


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0]) if len(view) else 0


def _library(where: str) -> Any:
    try:
        with environment_kept():  # it sets OMP_NUM_THREADS and the like for the whole process
            import infinistore
    except ImportError as error:
        raise ConfigError(
            f"{where}: expected the package infinistore (and the system's libibverbs); got: {error}: "
            "pip install --no-deps infinistore"
        ) from None
    return infinistore


def _client_settings(where: str, address: tuple[str, int], options: dict[str, Any]) -> dict[str, Any]:
    for name in options:
        if name not in _KNOWN:
            near = difflib.get_close_matches(name, _KNOWN, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_KNOWN)}"
            raise ConfigError(f"{where}: unknown option {name!r} of an InfiniStore; {hint}")
    link = {"ethernet": "Ethernet", "ib": "IB"}.get(str(options.get("link_type", "Ethernet")).lower())
    port = str(options.get("ib_port", 1))
    if link is None:
        raise ConfigError(f"{where}: link_type: expected Ethernet or IB; got {options['link_type']!r}")
    if not port.isdigit() or not 0 < int(port) < 256:
        raise ConfigError(f"{where}: ib_port: expected a number from 1; got {options['ib_port']!r}")
    return {
        "host_addr": address[0],
        "service_port": address[1],
        "connection_type": "RDMA",
        "dev_name": str(options.get("device") or "mlx5_1"),
        "ib_port": int(port),
        "link_type": link,
        "log_level": "error",
    }
