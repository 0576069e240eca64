"""What adapters for engines share of settings: a store's defaults beside an engine, and texts that name a model."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..config import StoreConfig
from ..errors import ConfigError
from .lmcache import Loaded, load_config

__all__ = [
    "RAM_CAPACITY",
    "flag",
    "folder_fingerprint",
    "hub_commit",
    "load_beside_engine",
    "on_gpus_node",
    "plain",
    "whole_number",
]

_GIB = 1024**3
#: Room for slots where nothing says how much, as users of such caches know it.
RAM_CAPACITY = 5 * _GIB
_SAMPLE = 64 * 1024  # bytes read at the begin, middle and end of a weight file
_PIECE, _STEP = 4096, 16 << 20  # and between them: a layer that alone was trained is larger than a step
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_DESCRIPTIONS = ("config.json", "adapter_config.json")


def load_beside_engine(
    path: str | None, environ: Mapping[str, str], overrides: Mapping[str, object], *, leave: Container[str] = ()
) -> tuple[StoreConfig, Loaded]:
    """A store's config as :func:`lmkv.adapters.lmcache.load_config` reads it, with the defaults of a cache beside an engine.

    Unless something asks for it there is no disk tier, and the RAM tier has 5 GiB.

    Args:
        leave: keys of the file that are an adapter's own.

    Raises:
        ConfigError: an unknown key, with the nearest known one, or a wrong value.
    """
    loaded = load_config(path, environ=environ, overrides=overrides, leave=leave)
    changes: dict[str, Any] = {}
    if "ram_capacity" not in loaded.given:
        changes["ram_capacity"] = RAM_CAPACITY
    if not loaded.given & {"disk_capacity", "disk_path", "disk_paths"}:
        changes["disk_capacity"] = 0
    return dataclasses.replace(loaded.config, **changes), loaded


def on_gpus_node(config: StoreConfig, nodes: Iterable[int | None]) -> StoreConfig:
    """A config whose ``ram_numa_node: auto`` is the node that most of the engine's GPUs hang on, if that is known.

    Args:
        nodes: of its GPUs (:meth:`lmkv.transfer.Gpu.numa_node`).
    """
    known = Counter(node for node in nodes if node is not None)
    if config.ram_numa_node != "auto" or not known:
        return config
    return dataclasses.replace(config, ram_numa_node=str(known.most_common(1)[0][0]))


def flag(where: str, value: object) -> bool:
    """A truth value as people write it.

    Raises:
        ConfigError: it is none.
    """
    text = str(value).strip().lower()
    if text in ("true", "yes", "on", "1"):
        return True
    if text in ("false", "no", "off", "0"):
        return False
    raise ConfigError(f"{where}: expected true or false; got {value!r}")


def whole_number(where: str, value: object) -> int:
    """A whole number of at least 1.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(value, bool) or not str(value).isdigit() or int(str(value)) < 1:
        raise ConfigError(f"{where}: expected a whole number of at least 1; got {value!r}")
    return int(str(value))


def plain(value: object) -> str:
    """A stable text of nested settings; callables have none and count by their name."""
    if not value:
        return ""
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{plain(value[key]) or value[key]!r}" for key in sorted(value, key=str)) + "}"
    return repr(value)


def folder_fingerprint(model: str | os.PathLike[str]) -> str:
    """What tells two versions of a local folder of weights apart, wherever it lies: sizes and samples of its files.

    A file of weights counts as a folder of one. Empty where there is neither, as for a name that a hub knows.
    """
    place = Path(model)
    if not place.is_dir() and not (place.is_file() and place.suffix in _WEIGHTS):
        return ""
    digest = hashlib.sha256()
    for path in sorted(place.iterdir()) if place.is_dir() else [place]:
        if path.suffix not in _WEIGHTS and path.name not in _DESCRIPTIONS:
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        samples = [(at, _PIECE) for at in range(_STEP, size, _STEP)]
        samples += [(at, _SAMPLE) for at in sorted({0, max(0, size // 2 - _SAMPLE), max(0, size - _SAMPLE)})]
        with path.open("rb", buffering=0) as file:
            for at, length in samples:
                file.seek(at)
                digest.update(file.read(length))
    return digest.hexdigest()[:16]


def hub_commit(model: str, revision: str | None) -> str:
    """The commit of a model that a hub knows by name, as it lies in the local cache; empty where that can't be seen.

    A name and a branch say nothing of what was uploaded there since.
    """
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return ""
    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision or None)
    except (HFValidationError, OSError):
        return ""
    return Path(found).parent.name if isinstance(found, str) else ""
