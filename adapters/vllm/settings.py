"""Settings of the connector: the store's, from file, environment and ``kv_connector_extra_config``, and its own few.

Keys of ``kv_connector_extra_config`` are ``lmkv.<key>`` or ``lmcache.<key>``; a key without prefix is taken as ``lmkv.<key>``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config import StoreConfig
from ...errors import ConfigError
from ..engine_config import flag, folder_fingerprint, hub_commit, load_beside_engine, plain, whole_number
from .plans import ShardInfo

__all__ = ["Settings", "read_settings", "unserved"]

_WHERE = "kv_connector_extra_config"

#: Keys that configurations for other connectors carry and that mean nothing here.
_IGNORED = (
    *("lmcache_rpc_port", "discard_partial_chunks", "skip_last_n_tokens", "use_native", "max_tokens_per_load"),
    *("mp.host", "mp.port", "enable_cache_usage_details_in_response"),
)
_CHOICES = {"load": ("auto", "sync", "async"), "pin": ("background", "start")}


@dataclass(frozen=True)
class Settings:
    """What a connector was told.

    Args:
        store: the store's settings; model, revision and the like are filled in from vLLM's configuration.
        layerwise: load layer by layer under the forward pass (needs piecewise CUDA graphs).
        load: ``sync`` loads before the forward pass of the step, ``async`` between steps, ``auto`` chooses.
        load_ahead: begin a load as soon as its request has blocks, while others are scheduled; one process an engine only.
        pin: on a GPU, pin slots in the ``background`` or before the first step (``start``).
        min_load_tokens: shorter hits are computed instead.
        save_decode_cache: keep the KV of generated tokens, too.
        log_requests: a line for each lookup, load and store.
        warnings: about keys without effect.
    """

    store: StoreConfig
    layerwise: bool = False
    load: str = "auto"
    load_ahead: bool = False
    pin: str = "background"
    min_load_tokens: int = 1
    save_decode_cache: bool = False
    log_requests: bool = True
    warnings: tuple[str, ...] = ()


def _own(extra: dict[str, object]) -> dict[str, Any]:
    """The connector's own keys, taken out of ``extra``."""
    own: dict[str, Any] = {}
    for name in ("layerwise", "load_ahead", "save_decode_cache", "log_requests"):
        if name in extra:
            own[name] = flag(f"{_WHERE}: {name}", extra.pop(name))
    if "use_layerwise" in extra:
        own.setdefault("layerwise", flag(f"{_WHERE}: use_layerwise", extra.pop("use_layerwise")))
    for name, choices in _CHOICES.items():
        if name in extra:
            own[name] = str(extra.pop(name))
            if own[name] not in choices:
                raise ConfigError(f"{_WHERE}: {name}: expected one of {', '.join(choices)}; got {own[name]!r}")
    for name in ("min_load_tokens", "min_retrieve_tokens"):
        if name in extra:
            own.setdefault("min_load_tokens", whole_number(f"{_WHERE}: {name}", extra.pop(name)))
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
            raise ConfigError(f"{_WHERE}: expected one value for {name}; got {extra[name]!r} and {value!r}")
        extra[name] = value
    own = _own(extra)
    config, loaded = load_beside_engine(None, env, extra)
    for name in ("use_layerwise", "save_decode_cache"):
        written = env.get(f"LMCACHE_{name.upper()}")
        if written:
            own.setdefault("layerwise" if name == "use_layerwise" else name, flag(f"LMCACHE_{name.upper()}", written))
    return Settings(config, warnings=loaded.warnings, **own)


def with_model(config: StoreConfig, vllm_config: Any, *, shared: bool) -> tuple[StoreConfig, str]:
    """The store's config with what vLLM knows of the model, and what else the KV depends on, as a namespace's ``extra``."""
    model = vllm_config.model_config
    cache = vllm_config.cache_config
    folder = folder_fingerprint(str(model.model))
    named = {
        "weights": folder or hub_commit(str(model.model), model.revision),
        "load_format": str(vllm_config.load_config.load_format),
        "quantization": str(getattr(model, "quantization", None)),
        "cache_dtype": str(cache.cache_dtype),
        "dtype": str(model.dtype).removeprefix("torch."),
        "hf_overrides": plain(getattr(model, "hf_overrides", None)),
    }
    if named["load_format"].endswith("dummy"):
        named["seed"] = str(model.seed)
    rope = getattr(model.hf_text_config, "rope_parameters", None) or getattr(model.hf_text_config, "rope_scaling", None)
    changed = dataclasses.replace(
        config,
        model=config.model or (Path(str(model.model)).name if folder else str(model.model)),
        revision=config.revision or str(model.revision or ""),
        rope=config.rope or plain(rope),
        ram_shared=config.ram_shared or shared,
    )
    return changed, "vllm:" + ";".join(f"{name}={value}" for name, value in named.items() if value not in ("", "None"))


def unserved(vllm_config: Any, shards: Mapping[tuple[int, int], ShardInfo]) -> str:
    """Why reuse is not possible under these settings of vLLM's and with what its workers have; empty if it is."""
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            return f"{name} spreads one text's tokens over ranks, which is not served"
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        return "calculate_kv_scales makes fp8 scales of the first texts read, so that KV means something else in each process"
    first = next(iter(shards.values()))
    for shard in shards.values():
        if (shard.windows, shard.block_tokens) != (first.windows, first.block_tokens):
            return "the workers' KV cache groups differ"
    return ""
