"""Settings of the connector: the store's, from file, environment and ``kv_connector_extra_config``, and its own few.

Keys of ``kv_connector_extra_config`` are ``lmkv.<key>`` or ``lmcache.<key>``; a key without prefix is taken as ``lmkv.<key>``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config import StoreConfig
from ...errors import ConfigError
from ..lmcache import load_config

__all__ = ["Settings", "read_settings"]

_GIB = 1024**3
#: Room for slots where nothing says how much, as users of such caches know it.
_RAM_CAPACITY = 5 * _GIB

#: Keys that configurations for other connectors carry and that mean nothing here.
_IGNORED = (
    *("lmcache_rpc_port", "discard_partial_chunks", "skip_last_n_tokens", "use_native", "max_tokens_per_load"),
    *("mp.host", "mp.port", "enable_cache_usage_details_in_response"),
)
_SAMPLE = 64 * 1024  # bytes read at the begin, middle and end of a weight file
_CHOICES = {"load": ("auto", "sync", "async"), "pin": ("background", "start")}


@dataclass(frozen=True)
class Settings:
    """What a connector was told.

    Args:
        store: the store's settings; model, revision and the like are filled in from vLLM's configuration.
        layerwise: load layer by layer under the forward pass (needs piecewise CUDA graphs).
        load: ``sync`` loads before the forward pass of the step, ``async`` between steps, ``auto`` chooses.
        pin: on a GPU, pin slots in the ``background`` or before the first step (``start``).
        min_load_tokens: shorter hits are computed instead.
        save_decode_cache: keep the KV of generated tokens, too.
        log_requests: a line for each lookup, load and store.
        warnings: about keys without effect.
    """

    store: StoreConfig
    layerwise: bool = False
    load: str = "auto"
    pin: str = "background"
    min_load_tokens: int = 1
    save_decode_cache: bool = False
    log_requests: bool = True
    warnings: tuple[str, ...] = ()


def _flag(name: str, value: object) -> bool:
    text = str(value).strip().lower()
    if text in ("true", "yes", "on", "1"):
        return True
    if text in ("false", "no", "off", "0"):
        return False
    raise ConfigError(f"kv_connector_extra_config: {name}: expected true or false; got {value!r}")


def _own(extra: dict[str, object]) -> dict[str, Any]:
    """The connector's own keys, taken out of ``extra``."""
    own: dict[str, Any] = {}
    for name in ("layerwise", "save_decode_cache", "log_requests"):
        if name in extra:
            own[name] = _flag(name, extra.pop(name))
    if "use_layerwise" in extra:
        own.setdefault("layerwise", _flag("use_layerwise", extra.pop("use_layerwise")))
    for name, choices in _CHOICES.items():
        if name in extra:
            own[name] = str(extra.pop(name))
            if own[name] not in choices:
                raise ConfigError(f"kv_connector_extra_config: {name}: expected one of {', '.join(choices)}; got {own[name]!r}")
    for name in ("min_load_tokens", "min_retrieve_tokens"):
        if name in extra:
            value = extra.pop(name)
            if isinstance(value, bool) or not str(value).isdigit() or int(str(value)) < 1:
                raise ConfigError(f"kv_connector_extra_config: {name}: expected a whole number of at least 1; got {value!r}")
            own.setdefault("min_load_tokens", int(str(value)))
    return own


def read_settings(extra_config: Mapping[str, object], environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from ``kv_connector_extra_config``, ``LMKV_*`` and ``LMCACHE_*`` variables and the file these name.

    Later ones win: file, ``LMCACHE_*``, ``LMKV_*``, ``kv_connector_extra_config``. Unless something asks for it there is no
    disk tier, and the RAM tier has 5 GiB.

    Raises:
        ConfigError: an unknown key, with the nearest known one, or a wrong value.
    """
    env = os.environ if environ is None else environ
    extra: dict[str, object] = {}
    for key, value in extra_config.items():
        name = key.removeprefix("lmkv.").removeprefix("lmcache.")
        if name in _IGNORED:
            continue
        if name in extra and extra[name] != value:
            raise ConfigError(f"kv_connector_extra_config: expected one value for {name}; got {extra[name]!r} and {value!r}")
        extra[name] = value
    own = _own(extra)
    loaded = load_config(environ=env, overrides=extra)
    changes: dict[str, Any] = {}
    if "ram_capacity" not in loaded.given:
        changes["ram_capacity"] = _RAM_CAPACITY
    if not loaded.given & {"disk_capacity", "disk_path", "disk_paths"}:
        changes["disk_capacity"] = 0
    for name in ("use_layerwise", "save_decode_cache"):
        written = env.get(f"LMCACHE_{name.upper()}")
        if written:
            own.setdefault("layerwise" if name == "use_layerwise" else name, _flag(name, written))
    return Settings(dataclasses.replace(loaded.config, **changes), warnings=loaded.warnings, **own)


def with_model(config: StoreConfig, vllm_config: Any, *, shared: bool) -> tuple[StoreConfig, str]:
    """The store's config with what vLLM knows of the model, and what else the KV depends on, as a namespace's ``extra``."""
    model = vllm_config.model_config
    cache = vllm_config.cache_config
    named = {
        "weights": _weights_fingerprint(str(model.model)),
        "load_format": str(vllm_config.load_config.load_format),
        "quantization": str(getattr(model, "quantization", None)),
        "cache_dtype": str(cache.cache_dtype),
        "dtype": str(model.dtype).removeprefix("torch."),
        "hf_overrides": _plain(getattr(model, "hf_overrides", None)),
    }
    if named["load_format"].endswith("dummy"):
        named["seed"] = str(model.seed)
    rope = getattr(model.hf_text_config, "rope_parameters", None) or getattr(model.hf_text_config, "rope_scaling", None)
    changed = dataclasses.replace(
        config,
        model=config.model or (Path(str(model.model)).name if named["weights"] else str(model.model)),
        revision=config.revision or str(model.revision or ""),
        rope=config.rope or _plain(rope),
        ram_shared=config.ram_shared or shared,
    )
    return changed, "vllm:" + ";".join(f"{name}={value}" for name, value in named.items() if value not in ("", "None"))


def _plain(value: object) -> str:
    """A stable text of nested settings; callables have none and count by their name."""
    if not value:
        return ""
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_plain(value[key]) or value[key]!r}" for key in sorted(value, key=str)) + "}"
    return repr(value)


def _weights_fingerprint(model: str) -> str:
    """What tells two versions of a local model folder apart, wherever it lies: sizes and samples of its files."""
    folder = Path(model)
    if not folder.is_dir():
        return ""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".safetensors", ".bin", ".pt", ".gguf") and path.name != "config.json":
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            for at in sorted({0, max(0, size // 2 - _SAMPLE), max(0, size - _SAMPLE)}):
                file.seek(at)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]
