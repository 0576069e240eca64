"""Settings of the connector: the store's, from file, environment and ``kv_connector_extra_config``, and its own few.

Keys of ``kv_connector_extra_config`` are ``lmkv.<key>`` or ``lmcache.<key>``; a key without prefix is taken as ``lmkv.<key>``.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config import CONFIG_FILE_VARIABLE, ENV_PREFIX, StoreConfig, read_yaml
from ...errors import ConfigError
from ..engine_config import flag, folder_fingerprint, hub_commit, load_beside_engine, plain, whole_number
from ..lmcache.config import LMCACHE_FILE_VARIABLE, known_keys
from ..lmcache.names import PREFIX
from .plans import ShardInfo

__all__ = ["Settings", "read_settings", "unserved"]

_WHERE = "kv_connector_extra_config"

#: Keys that configurations for other connectors carry and that mean nothing here.
_IGNORED = (
    *("lmcache_rpc_port", "discard_partial_chunks", "skip_last_n_tokens", "use_native", "max_tokens_per_load"),
    *("mp.host", "mp.port", "enable_cache_usage_details_in_response"),
)
_CHOICES = {"load": ("auto", "sync", "async"), "pin": ("background", "start")}
#: LMCache's names of the connector's settings.
_ALIASES = {"use_layerwise": "layerwise", "min_retrieve_tokens": "min_load_tokens"}
_OWN_OF_LMCACHE = frozenset((*_ALIASES, "save_decode_cache"))
_OWN = frozenset(("layerwise", "log_requests", "min_load_tokens", *_CHOICES)) | _OWN_OF_LMCACHE


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


def _own(layer: Mapping[str, object], where: str) -> dict[str, Any]:
    """The connector's own settings in one place that gives some."""
    own: dict[str, Any] = {}
    for name in sorted(_OWN & layer.keys(), key=lambda name: name not in _ALIASES):  # its own names win over LMCache's
        value, key, place = layer[name], _ALIASES.get(name, name), f"{where}: {name}"
        if value is None and where != _WHERE:
            continue  # a key without a value in a file
        if key in _CHOICES:
            if str(value) not in _CHOICES[key]:
                raise ConfigError(f"{place}: expected one of {', '.join(_CHOICES[key])}; got {str(value)!r}")
            own[key] = str(value)
        elif key == "min_load_tokens":
            own[key] = 1 if name in _ALIASES and str(value) == "0" else whole_number(place, value)
        else:
            own[key] = flag(place, value)
    return own


def _rest(extra: Mapping[str, object]) -> dict[str, object]:
    """What of ``kv_connector_extra_config`` is the store's.

    Raises:
        ConfigError: a key that nobody knows.
    """
    known = _OWN | known_keys()
    for key in extra:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else "docs/vllm.md lists the connector's, help(lmkv.StoreConfig) the store's"
            )
            raise ConfigError(f"{_WHERE}: unknown key {key!r}; {hint}")
    return {key: value for key, value in extra.items() if key not in _OWN}


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
    file = env.get(CONFIG_FILE_VARIABLE) or env.get(LMCACHE_FILE_VARIABLE)
    own = _own(read_yaml(file), file) if file else {}
    rest = dict(env)
    for prefix, names in ((PREFIX, _OWN_OF_LMCACHE), (ENV_PREFIX, _OWN)):
        written = {name: rest.pop(prefix + name.upper()) for name in names if prefix + name.upper() in env}
        own |= _own({name: value for name, value in written.items() if value}, f"environment: {prefix}*")
    own |= _own(extra, _WHERE)
    config, loaded = load_beside_engine(None, rest, _rest(extra), leave=_OWN)
    return Settings(config, warnings=loaded.warnings, **own)


def with_model(
    config: StoreConfig, vllm_config: Any, *, layers: Sequence[Sequence[str]], shared: bool
) -> tuple[StoreConfig, str]:
    """The store's config with what vLLM knows of the model, and what else the KV depends on, as a namespace's ``extra``.

    Args:
        layers: names of the layers that a chunk's are, rank by rank.
        shared: slots are in memory that other processes can map.
    """
    model = vllm_config.model_config
    folder = folder_fingerprint(str(model.model))
    rope = getattr(model.hf_text_config, "rope_parameters", None) or getattr(model.hf_text_config, "rope_scaling", None)
    changed = dataclasses.replace(
        config,
        model=config.model or (Path(str(model.model)).name if folder else str(model.model)),
        revision=config.revision or str(model.revision or ""),
        rope=config.rope or plain(rope),
        ram_shared=config.ram_shared or shared,
    )
    named = {
        "weights": folder or hub_commit(str(model.model), model.revision),
        "load_format": str(vllm_config.load_config.load_format),
        "cache_dtype": str(vllm_config.cache_config.cache_dtype),
        "dtype": str(model.dtype).removeprefix("torch."),
        # two settings of vLLM's that keep the same layers may put them in another order, or cut them elsewhere
        "layers": hashlib.sha256("\n\n".join("\n".join(names) for names in layers).encode()).hexdigest()[:16],
        **_chosen(vllm_config, long_rope="longrope" in plain(rope)),
    }
    if named["load_format"].endswith("dummy"):
        named["seed"] = str(model.seed)
    return changed, "vllm:" + ";".join(f"{name}={value}" for name, value in named.items() if value not in ("", "None"))


def _chosen(vllm_config: Any, *, long_rope: bool) -> dict[str, str]:
    """What else of vLLM's settings changes the KV; an empty text where nobody has chosen anything."""
    model = vllm_config.model_config
    found = {
        "quantization": str(getattr(model, "quantization", None)),
        "loader": plain(getattr(vllm_config.load_config, "model_loader_extra_config", None)),
    }
    for name in ("hf_overrides", "hf_config_path", "model_weights", "quantization_config", "model_class_overrides"):
        found[name] = plain(getattr(model, name, None))
    if callable(getattr(model, "hf_overrides", None)) or getattr(model, "hf_config_path", None):
        found["hf_config"] = hashlib.sha256(model.hf_config.to_json_string(use_diff=False).encode()).hexdigest()[:16]
    for name in ("config_format", "model_impl"):
        value = getattr(model, name, "auto")
        found[name] = "" if value == "auto" else str(value)
    for name in ("mm_processor_kwargs", "video_pruning_rate", "video_pruning_method"):
        found[name] = plain(getattr(getattr(model, "multimodal_config", None), name, None))
    if not found["video_pruning_rate"]:
        found["video_pruning_method"] = ""
    llama4 = str(getattr(model.hf_text_config, "model_type", "")).startswith("llama4")
    if long_rope or llama4:  # vLLM takes other factors, or scales queries, for an engine of long texts
        found["max_model_len"] = str(model.max_model_len)
    if llama4:
        generation = model.try_get_generation_config() | model.override_generation_config
        found["attn_temperature_tuning"] = str(generation.get("attn_temperature_tuning"))
    return found


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
