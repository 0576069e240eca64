"""Settings of the adapter: the store's, from file and environment, and its own few; and whether the user asked for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...config import CONFIG_FILE_VARIABLE, SGLANG_VARIABLE, StoreConfig, read_yaml
from ..engine_config import flag, load_beside_engine, whole_number

__all__ = ["SGLANG_VARIABLE", "Settings", "asked_for", "read_settings"]

#: Keys of LMCache's that belong to the connection with its own server process, which is not there.
_IGNORED = ("mp_host", "mp_port", "mp.host", "mp.port", "chunk_hash_algorithm")
#: Keys of LMCache's that mean nothing to a store, and something here.
_SERVED = ("use_layerwise", "min_retrieve_tokens")


@dataclass(frozen=True)
class Settings:
    """What the adapter was told.

    Args:
        store: the store's settings; model, shard and the like are filled in from SGLang's configuration.
        layerwise: on a GPU, order each layer's forward pass behind that layer of a load, not behind all of it.
        min_load_tokens: shorter hits are computed instead.
        log_requests: a line for each load.
        warnings: about keys without effect.
    """

    store: StoreConfig
    layerwise: bool = True
    min_load_tokens: int = 1
    log_requests: bool = True
    warnings: tuple[str, ...] = ()


def asked_for(environ: Mapping[str, str], config_file: str | None = None) -> bool:
    """Whether the user opted in: ``LMKV_SGLANG=1``, or a configuration of LMKV's given. ``LMKV_SGLANG=0`` always says no.

    Args:
        config_file: what ``--lmcache-config-file`` names, if anything.
    """
    said = environ.get(SGLANG_VARIABLE, "").strip()
    if said:
        return flag(SGLANG_VARIABLE, said)
    return bool(environ.get(CONFIG_FILE_VARIABLE) or config_file)


def read_settings(config_file: str | None, extra: Mapping[str, object], environ: Mapping[str, str]) -> Settings:
    """Settings from a YAML file, ``LMCACHE_*`` and ``LMKV_*`` variables and ``extra``, later ones winning.

    Args:
        config_file: what ``--lmcache-config-file`` names; by default the file that ``LMKV_CONFIG_FILE`` or
            ``LMCACHE_CONFIG_FILE`` names, if any.
        extra: keys of either project, bare or as ``lmkv.<key>`` or ``lmcache.<key>``, from a JSON flag of SGLang's.

    Raises:
        ConfigError: an unknown key, with the nearest known one, or a wrong value.
    """
    rest: dict[str, object] = {}
    for key, value in extra.items():
        name = key.removeprefix("lmkv.").removeprefix("lmcache.")
        if name not in _IGNORED:
            rest[name] = value
    own: dict[str, Any] = {}
    for name, field in (("use_layerwise", "layerwise"), ("layerwise", "layerwise"), ("log_requests", "log_requests")):
        if name in rest:
            own[field] = flag(name, rest.pop(name))
    for name in ("min_retrieve_tokens", "min_load_tokens"):
        if name in rest:
            own["min_load_tokens"] = whole_number(name, rest.pop(name))
    config, loaded = load_beside_engine(config_file, environ, rest)
    written = _lmcaches_own(config_file, environ)
    if "use_layerwise" in written:
        own.setdefault("layerwise", flag("use_layerwise", written["use_layerwise"]))
    if written.get("min_retrieve_tokens"):
        own.setdefault("min_load_tokens", whole_number("min_retrieve_tokens", written["min_retrieve_tokens"]))
    warnings = tuple(line for line in loaded.warnings if not any(name in line for name in _SERVED))
    return Settings(config, warnings=warnings, **own)


def _lmcaches_own(config_file: str | None, environ: Mapping[str, str]) -> dict[str, object]:
    """What the file and the environment say of keys of LMCache's that mean nothing to a store and something here."""
    path = config_file or environ.get(CONFIG_FILE_VARIABLE) or environ.get("LMCACHE_CONFIG_FILE")
    written = dict(read_yaml(path)) if path else {}
    written.update({name: environ[f"LMCACHE_{name.upper()}"] for name in _SERVED if f"LMCACHE_{name.upper()}" in environ})
    return {name: written[name] for name in _SERVED if written.get(name) is not None}
