"""What SGLang runs at its start (entry point ``sglang.srt.plugins``): LMKV serves ``--enable-lmcache``, if that was asked for.

SGLang logs and swallows what goes wrong while a plugin is run, so nothing here relies on having been run: who was asked for
and finds no way in says so in one line, and the doors say for themselves that they are active. Ways in are found by what an
SGLang has, not by its version:

- a tree with an external linker (0.5.23): the arguments are rewritten, before SGLang resolves them, to those of the linker;
- else the factory of its radix trees (0.5.17), by :mod:`.radix`.

Without ``LMKV_SGLANG`` and without a configuration, SGLang's arguments are looked at once and left as they are.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

__all__ = ["LINKER", "register"]

#: The linker's class and module, as SGLang's flags name them.
LINKER = ("LMKVLinker", "lmkv.adapters.sglang.linker")
_ARGUMENTS = "sglang.srt.server_args.ServerArgs"


def register() -> None:
    """Called by SGLang in the process that is started and in every one that this one starts."""
    from ...config import CONFIG_FILE_VARIABLE, SGLANG_VARIABLE

    given = {name: os.environ.get(name) for name in (SGLANG_VARIABLE, CONFIG_FILE_VARIABLE)}
    if given[SGLANG_VARIABLE] is not None and given[SGLANG_VARIABLE].strip().lower() in ("", "0", "no", "off", "false"):
        return
    if _has("sglang.srt.mem_cache.unified_cache.linker_factory"):
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register(f"{_ARGUMENTS}.resolve_once", _resolve_once, HookType.AROUND)
        return
    why = "expected an SGLang with an external linker (0.5.23); this one has none"
    if _has("lmkv.adapters.sglang.radix"):
        why = importlib.import_module("lmkv.adapters.sglang.radix").install()
    if why and any(given.values()):
        from . import telling

        telling.inactive("plugin", why)


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _resolve_once(original: Any, self: Any) -> Any:
    """Before the arguments are resolved: LMCache's flag becomes the linker's."""
    if not getattr(self, "_resolution_finished", False) and not getattr(self, "_resolution_failed", False):
        _take_over(self)
    return original(self)


def _take_over(args: Any) -> None:
    from .settings import asked_for, read_settings

    config_file = getattr(args, "lmcache_config_file", None)
    # LMCache takes that file, too: where it is installed, the file alone does not say who is meant
    meant = None if _has("lmcache") else config_file
    if not getattr(args, "enable_lmcache", False) or not asked_for(os.environ, meant):
        return
    read_settings(config_file, {}, os.environ)  # raises here, where the user sees it at once, if there is a mistake in it
    args.enable_lmcache = False
    args.enable_unified_cache_external_linker = True
    args.unified_cache_external_linker_backend = "dynamic"
    args.unified_cache_external_linker_config = {
        "linker": LINKER[0],
        "linker_module_path": LINKER[1],
        "linker_extra_config": {"config_file": config_file} if config_file else {},
    }
