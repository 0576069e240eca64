"""NIXL agents (package ``nixl``): what movers to files and to peers have in common."""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..errors import BackendUnavailableError, ConfigError

__all__ = ["FILE_PLUGINS", "Agent", "address_of", "plugin_states"]

#: Plugins that move between memory and files.
FILE_PLUGINS = ("POSIX", "GDS", "GDS_MT", "HF3FS")
#: Plugins whose state ``lmkv doctor`` tells: those to files, to other agents, to buckets.
_ALL_PLUGINS = (*FILE_PLUGINS, "UCX", "OBJ")
#: Levels of Python's logging, which the core does not import.
_INFO, _WARNING = 20, 30


class Agent:
    """An agent with one plugin, used by one thread.

    Args:
        progress: have the plugin answer others on a thread of its own.

    Raises:
        BackendUnavailableError: the plugin can't be loaded.
        ConfigError: the package is not installed.
    """

    def __init__(self, name: str, plugin: str, params: Mapping[str, str], *, progress: bool = False) -> None:
        api = library()
        self.name = name
        self.plugin = plugin
        self.errors: tuple[type[BaseException], ...] = (RuntimeError, ValueError, *_error_classes(api))
        self.api = api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=progress, backends=[]))
        self._kept: dict[int, memoryview] = {}  # which keep the mappings from being closed
        try:
            self.api.create_backend(plugin, dict(params))
        except self.errors as error:
            raise BackendUnavailableError(str(error)) from None

    def keep_registered(self, owner: mmap.mmap) -> bool:
        """Register a mapping until :meth:`close`, which it can't be unmapped before; ``False`` if it is already."""
        if id(owner) in self._kept:
            return False
        whole = memoryview(owner).cast("B")
        self.api.register_memory([(address_of(whole), len(whole), 0, "")], "DRAM", [self.plugin])
        self._kept[id(owner)] = whole
        return True

    def close(self) -> None:
        """End the agent, and what others still read or write by it; then its mappings may go. Not while it is used here."""
        self.api = None
        self._kept.clear()

    @contextmanager
    def registered(self, view: memoryview) -> Iterator[None]:
        """Memory that is registered meanwhile; mappings, as slots are in, stay so."""
        if isinstance(view.obj, mmap.mmap):
            self.keep_registered(view.obj)
            yield
            return
        held = self.api.register_memory([(address_of(view), len(view), 0, "")], "DRAM", [self.plugin])
        try:
            yield
        finally:
            self.api.deregister_memory(held)

    def transfer(self, operation: str, here: Any, there: Any, remote: str) -> None:
        """Move between descriptors, however long it takes: what is under way writes into the memory.

        Raises:
            RuntimeError: it failed, or one of ``errors``.
        """
        handle = self.api.initialize_xfer(operation, here, there, remote, b"", [self.plugin])
        try:
            state = self.api.transfer(handle)
            while state == "PROC":
                time.sleep(5e-5)
                state = self.api.check_xfer_state(handle)
        finally:
            with contextlib.suppress(*self.errors):
                self.api.release_xfer_handle(handle)
        if state != "DONE":
            raise RuntimeError(f"the transfer ended as {state}")


def address_of(view: memoryview) -> int:
    """Where a view begins; 0 for one of no bytes."""
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0]) if len(view) else 0


def library() -> Any:
    """The package.

    Raises:
        ConfigError: it is not installed.
    """
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
    """NIXL's plugins: name -> why it does not load here, empty if it does.

    Raises:
        ConfigError: the package is not installed.
    """
    states: dict[str, str] = {}
    for plugin in _ALL_PLUGINS:
        try:
            Agent(f"lmkv-doctor-{plugin}", plugin, {})
            states[plugin] = ""
        except BackendUnavailableError as error:
            states[plugin] = _missing(plugin) or str(error)
    return states


def _missing(plugin: str) -> str:
    """What a plugin that does not load lacks, as the system's loader says it; empty if it does not."""
    import ctypes
    from pathlib import Path

    folder = Path(library().nixlBind.__file__).parent
    found = sorted(folder.parent.glob(f".nixl*.mesonpy.libs/plugins/libplugin_{plugin}.so"))
    if not found:
        return "not in the package"
    try:
        ctypes.CDLL(str(found[0]))
    except OSError as error:
        return str(error).replace(": cannot open shared object file: No such file or directory", " is missing")
    return ""
