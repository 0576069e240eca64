"""Values as files that NIXL (package ``nixl``) moves from and to slots: POSIX, GDS, GDS_MT, HF3FS, as far as its plugins load.

The files are those of :mod:`lmkv.backends.files`. Each thread has an agent of its own, with which mappings, as slots are in,
are registered once. A transfer is waited for however long it takes, since what is under way writes into the slot; requests go
on when their deadline passes.
"""

from __future__ import annotations

import difflib
import errno
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from ..errors import BackendUnavailableError, ConfigError, StoreClosedError
from .base import Backend, BackendSettings
from .files import FilesBackend
from .nixl_agent import FILE_PLUGINS, Agent, address_of, plugin_states
from .peer import PeerBackend

__all__ = ["NixlBackend", "open_nixl"]

_KNOWN = ("plugin", "path", "direct_io", "params")
_ALIGNMENT = 4096


def open_nixl(settings: BackendSettings) -> Backend:
    """A directory, or with a URL ``nixl://host:port`` the slots of another store.

    Raises:
        ConfigError: as of :class:`NixlBackend` and :class:`lmkv.backends.peer.PeerBackend`.
    """
    return PeerBackend(settings) if settings.url else NixlBackend(settings)


class NixlBackend(FilesBackend):
    """Files of a directory, moved by a NIXL plugin.

    Options: ``plugin`` (``POSIX``), ``path``, ``direct_io`` (past the page cache, where sizes and addresses are multiples of
    4096), ``params`` (texts handed to the plugin).

    Raises:
        ConfigError: a wrong option, a capacity, no package, or a plugin that can't be loaded; those that can are named.
    """

    def __init__(self, settings: BackendSettings) -> None:
        where = f"tier {settings.name}"
        options = settings.options
        for name in options:
            if name not in _KNOWN:
                near = difflib.get_close_matches(name, _KNOWN, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_KNOWN)}"
                raise ConfigError(f"{where}: unknown option {name!r} of NIXL; {hint}")
        self._plugin = str(options.get("plugin", "POSIX")).upper()
        if self._plugin not in FILE_PLUGINS:
            raise ConfigError(f"{where}: plugin: expected one of {', '.join(FILE_PLUGINS)}; got {options.get('plugin')!r}")
        if not options.get("path") or not os.path.isabs(str(options["path"])):
            raise ConfigError(f"{where}: path: expected an absolute path of a directory; got {options.get('path')!r}")
        params = options.get("params") or {}
        if not isinstance(params, Mapping):
            raise ConfigError(f"{where}: params: expected keys and values; got {params!r}")
        self._params = {str(name): str(value) for name, value in params.items()}
        self._direct = str(options.get("direct_io", False)).lower() in ("true", "yes", "on", "1")
        self._local = threading.local()
        self._lock = threading.Lock()
        self._use(settings, Path(str(options["path"])))
        try:
            self._local.agent = self._agent_of_this_thread()
        except BackendUnavailableError as error:
            states = plugin_states()
            able = ", ".join(name for name, state in states.items() if not state) or "none"
            raise ConfigError(
                f"{where}: expected a NIXL plugin that loads here; {self._plugin} does not ({error}); these do: {able}"
            ) from None

    def _agent_of_this_thread(self) -> Agent:
        agent = getattr(self._local, "agent", None)
        if agent is None:
            name = f"lmkv-{os.getpid()}-{threading.get_ident()}"
            agent = self._local.agent = Agent(name, self._plugin, self._params)
        return agent

    def _flags(self, view: memoryview, size: int) -> int:
        aligned = size and size % _ALIGNMENT == 0 and address_of(view) % _ALIGNMENT == 0
        return os.O_DIRECT if self._direct and aligned else 0

    def _fill(self, file: int, out: memoryview) -> bool:
        self._move("READ", file, out)
        return True

    def _drain(self, file: int, data: memoryview) -> None:
        self._move("WRITE", file, data)

    def _move(self, operation: str, file: int, view: memoryview) -> None:
        if self._closed:
            raise StoreClosedError("expected an open backend; it was closed")
        if not len(view):
            return
        agent = self._agent_of_this_thread()
        try:
            _move(agent, operation, file, view)
        except agent.errors as error:
            if operation == "WRITE" and os.fstat(file).st_size < len(view):
                room = os.fstatvfs(file)
                if room.f_bavail * room.f_frsize < len(view):
                    raise OSError(errno.ENOSPC, "no room") from None
            raise BackendUnavailableError(f"{self._folder}: NIXL {self._plugin} {operation}: {error}") from None

    def close(self) -> None:
        """See :class:`lmkv.backends.base.Backend`."""
        super().close()
        self._local = threading.local()


def _move(agent: Agent, operation: str, file: int, view: memoryview) -> None:
    """Move a whole view from or to the beginning of a file."""
    api = agent.api
    with agent.registered(view):
        there = api.register_memory([(0, len(view), file, "")], "FILE", [agent.plugin])
        try:
            here = api.get_xfer_descs([(address_of(view), len(view), 0)], "DRAM")
            agent.transfer(operation, here, there.trim(), agent.name)
        finally:
            api.deregister_memory(there)
