"""Values as files that NIXL (package ``nixl``) moves from and to slots: POSIX, GDS, GDS_MT, HF3FS, as far as its plugins load.

The files are those of :mod:`lmkv.backends.files`. Each thread has an agent of its own, with which mappings, as slots are in,
are registered once. A transfer is waited for however long it takes, since what is under way writes into the slot; requests go
on when their deadline passes.
"""

from __future__ import annotations

import difflib
import errno
import mmap
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BackendUnavailableError, ConfigError, StoreClosedError
from .base import BackendSettings
from .files import FilesBackend

__all__ = ["NixlBackend", "plugin_states"]

#: Plugins that move between memory and files.
FILE_PLUGINS = ("POSIX", "GDS", "GDS_MT", "HF3FS")
_KNOWN = ("plugin", "path", "direct_io", "params")
_ALIGNMENT = 4096
#: Levels of Python's logging, which the core does not import.
_INFO, _WARNING = 20, 30


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

    def _agent_of_this_thread(self) -> _Agent:
        agent = getattr(self._local, "agent", None)
        if agent is None:
            agent = self._local.agent = _Agent(self._plugin, self._params)
        return agent

    def _flags(self, view: memoryview, size: int) -> int:
        aligned = size and size % _ALIGNMENT == 0 and _address(view) % _ALIGNMENT == 0
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
            agent.move(operation, file, view)
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


class _Agent:
    """A NIXL agent of one thread, with one plugin."""

    def __init__(self, plugin: str, params: Mapping[str, str]) -> None:
        api = _library()
        self.errors: tuple[type[BaseException], ...] = (RuntimeError, ValueError, *_error_classes(api))
        self._name = f"lmkv-{os.getpid()}-{threading.get_ident()}"
        self._plugin = plugin
        self._agent = api.nixl_agent(self._name, api.nixl_agent_config(enable_prog_thread=False, backends=[]))
        self._kept: dict[int, object] = {}
        try:
            self._agent.create_backend(plugin, dict(params))
        except self.errors as error:
            raise BackendUnavailableError(str(error)) from None

    @contextmanager
    def _registered(self, view: memoryview) -> Iterator[None]:
        owner = view.obj
        if id(owner) in self._kept:
            yield
            return
        whole = memoryview(owner).cast("B") if isinstance(owner, mmap.mmap) else view
        held = self._agent.register_memory([(_address(whole), len(whole), 0, "")], "DRAM", [self._plugin])
        if isinstance(owner, mmap.mmap):
            self._kept[id(owner)] = owner
            yield
            return
        try:
            yield
        finally:
            self._agent.deregister_memory(held)

    def move(self, operation: str, file: int, view: memoryview) -> None:
        """Move a whole view from or to the beginning of a file."""
        agent = self._agent
        with self._registered(view):
            there = agent.register_memory([(0, len(view), file, "")], "FILE", [self._plugin])
            try:
                here = agent.get_xfer_descs([(_address(view), len(view), 0)], "DRAM")
                handle = agent.initialize_xfer(operation, here, there.trim(), self._name, b"", [self._plugin])
                try:
                    state = agent.transfer(handle)
                    while state == "PROC":
                        time.sleep(5e-5)
                        state = agent.check_xfer_state(handle)
                finally:
                    agent.release_xfer_handle(handle)
            finally:
                agent.deregister_memory(there)
        if state != "DONE":
            raise RuntimeError(f"the transfer ended as {state}")


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0]) if len(view) else 0


def _library() -> Any:
    try:
        import nixl._api
    except ImportError as error:
        raise ConfigError(f"expected the package nixl; got: {error}: pip install 'lmkv[nixl]'") from None
    logger = nixl._api.logger
    if logger.getEffectiveLevel() == _INFO:  # its default, on standard output, where programs write their results
        logger.setLevel(_WARNING)
    return nixl._api


def _error_classes(api: Any) -> tuple[type[BaseException], ...]:
    bindings = vars(api.nixlBind)
    return tuple(kind for name, kind in bindings.items() if name.endswith("Error") and isinstance(kind, type))


def plugin_states() -> dict[str, str]:
    """NIXL's plugins for storage: name -> why it does not load here, empty if it does.

    Raises:
        ConfigError: the package is not installed.
    """
    states: dict[str, str] = {}
    for plugin in FILE_PLUGINS:
        try:
            _Agent(plugin, {})
            states[plugin] = ""
        except BackendUnavailableError as error:
            states[plugin] = str(error)
    return states
