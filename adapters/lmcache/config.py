"""LMCache's configuration names, translated to those of :class:`lmkv.StoreConfig`: the one place that knows them.

A key is one of three things:

- **translated**: it means something to a store (``max_local_cpu_size`` is ``ram_capacity``);
- **known, without effect**: LMCache has it and LMKV does not serve it, which a warning says, key by key;
- **unknown**: an error that names the nearest key of either project.

The names are those of LMCache 0.3.9 to 0.5.6. Sizes there are GiB as floating-point numbers. The only default that differs
and matters is the disk: LMCache has no disk tier unless ``local_disk`` names one, so a configuration that uses any of its
keys gets none either, unless ``local_disk``, ``disk_path`` or ``disk_capacity`` asks for it.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lmkv.config import CONFIG_FILE_VARIABLE, ENV_PREFIX, StoreConfig, parse_yaml, read_yaml
from lmkv.errors import ConfigError

from .remote import Remote, remote_tiers

__all__ = ["Loaded", "Translated", "load_config", "translate"]

LMCACHE_PREFIX = "LMCACHE_"
LMCACHE_FILE_VARIABLE = "LMCACHE_CONFIG_FILE"

_GIB = 1024**3
_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
_NOTHING = ("", "none", "null")

#: Why a key has no effect, and the keys: LMCache 0.3.9.post2, 0.3.15 and 0.5.6 together.
_INERT_GROUPS = {
    "LMKV does not serve this remote storage of LMCache's; slow tiers are listed under 'tiers'": """
        audit_actual_remote_url remote_storage_plugins external_lookup_client remote_config_url
        mp_host mp_port maru_path maru_pool_size weka_path""",
    "LMKV does not serve peer-to-peer or disaggregated prefill": """
        enable_p2p p2p_host p2p_init_ports p2p_lookup_ports enable_pd pd_role pd_buffer_size pd_buffer_device pd_peer_host
        pd_peer_init_port pd_peer_alloc_port pd_peer_query_port pd_proxy_host pd_proxy_port pd_allocation_timeout_sec
        pd_shutdown_timeout_sec pd_condition_poll_interval_sec pd_max_prefill_len pd_backend_mode pd_skip_proxy_notification
        pd_bidirectional transfer_channel enable_xpyd""",
    "LMKV does not serve NIXL between engines, or GPUDirect Storage": """
        nixl_backends nixl_role nixl_peer_host nixl_peer_init_port nixl_peer_alloc_port
        nixl_proxy_host nixl_proxy_port enable_nixl gds_path gds_path_sharding gds_buffer_size use_gds gds_backend
        cufile_buffer_size""",
    "LMKV has no controller": """
        enable_controller lmcache_instance_id controller_url controller_pull_url controller_reply_url lmcache_worker_port
        lmcache_worker_ports lmcache_worker_ids lmcache_worker_heartbeat_delay_time lmcache_worker_heartbeat_time app_id""",
    "LMKV does not blend texts": """
        enable_blending blend_recompute_ratios blend_thresholds blend_check_layers blend_min_tokens blend_special_str""",
    "LMKV has no plugins of LMCache's kind; backends, policies and codecs register by entry point": """
        runtime_plugin_locations storage_plugins plugin_locations external_backends script_allowed_imports
        run_script_api_enabled""",
    "LMKV has no internal API server; the standalone service has its own statistics": """
        internal_api_server_enabled internal_api_server_host internal_api_server_port_start
        internal_api_server_include_index_list internal_api_server_socket_path_prefix enable_chunk_statistics
        chunk_statistics_auto_start_statistics chunk_statistics_auto_exit_timeout_hours
        chunk_statistics_auto_exit_target_unique_chunks chunk_statistics_strategy enable_kv_events""",
    "LMKV's pool grows lazily and by itself": """
        local_cpu_use_hugepages reserve_local_cpu_size enable_lazy_memory_allocator lazy_memory_initial_ratio
        lazy_memory_expand_trigger_ratio lazy_memory_step_ratio lazy_memory_safe_size numa_mode""",
    "nothing in LMKV corresponds to it": """
        local_disk_path_sharding use_layerwise save_decode_cache retrieve_locations store_location py_enable_gc
        enable_async_loading priority_limit lookup_timeout_ms min_retrieve_tokens hit_miss_ratio lookup_server_worker_ids
        enable_scheduler_bypass_lookup use_gpu_connector_v3 pin_check_interval_sec enable_hidden_state_cache
        max_hidden_state_cpu_size hidden_state_layers hidden_states_retrieve_mode""",
}
_INERT = {key: why for why, keys in _INERT_GROUPS.items() for key in keys.split()}

#: ``LMCACHE_*`` variables outside the configuration table. They steer LMCache's own processes: passed over in silence.
_OTHER_NAMES = """
        CONFIG_FILE USE_EXPERIMENTAL CONTROLLER_CONFIG_FILE COORDINATOR_ADVERTISE_IP
        COORDINATOR_EVENT_FLUSH_INTERVAL COORDINATOR_EVENT_REPORTING COORDINATOR_HEARTBEAT_INTERVAL COORDINATOR_URL
        DEVICE_BACKEND DISABLE_BANNER FORCE_SKIP_SAVE GPU_STAGING_BUFFER_BYTES LOG_LEVEL MP_TRANSFER_MODE MQ_TIMEOUT
        MUSA_HANDLE_TRANSFER MUSA_NATIVE_KV_TRANSFER OFFLOAD_RPC_PORT PLUGIN_CONFIG PLUGIN_ROLE PLUGIN_WORKER_COUNT
        PLUGIN_WORKER_ID REQUEST_TELEMETRY_ENDPOINT REQUEST_TELEMETRY_TYPE RESP_HOST RESP_PASSWORD RESP_PORT RESP_USERNAME
        RUNTIME_PLUGIN_CONFIG RUNTIME_PLUGIN_ROLE RUNTIME_PLUGIN_WORKER_COUNT RUNTIME_PLUGIN_WORKER_ID SERVER_URL TRACK_USAGE
        USAGE_TRACK_INTERVAL USAGE_TRACK_URL"""
_OTHER_VARIABLES = frozenset(LMCACHE_PREFIX + name for name in _OTHER_NAMES.split())
_OTHER_PREFIXES = tuple(LMCACHE_PREFIX + name for name in ("AEROSPIKE_", "CONTROLLER_", "EC_"))


@dataclass
class Translated:
    """A mapping in LMKV's own names.

    Args:
        settings: keys and values for :meth:`lmkv.StoreConfig.from_dict`.
        warnings: one line for each key without effect, and for what was understood only in part.
        names: native key -> the name under which it was written.
        from_lmcache: whether a key was there that only LMCache has.
        remote: what was said of remote storage; becomes a tier once all of it is known.
    """

    settings: dict[str, object] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    from_lmcache: bool = False
    remote: Remote = field(default_factory=Remote)

    def set(self, name: str, key: str, value: object, where: str) -> None:
        """Give the native ``key`` the ``value`` that was written under ``name``."""
        if key in self.settings and self.settings[key] != value:
            raise ConfigError(
                f"{where}: expected one value for {key}; got {self.names[key]} = {self.settings[key]!r} and "
                f"{name} = {value!r} (both set it): keep one"
            )
        self.settings[key] = value
        self.names[key] = name

    def update(self, later: Translated) -> None:
        """Lay ``later``, which wins, over this one."""
        self.settings.update(later.settings)
        self.warnings.extend(line for line in later.warnings if line not in self.warnings)
        self.names.update(later.names)
        self.from_lmcache |= later.from_lmcache
        self.remote.update(later.remote)

    def warn(self, line: str) -> None:
        """Note a line for the person who wrote the settings, once."""
        if line not in self.warnings:
            self.warnings.append(line)

    def add_remote_tier(self, shadowed: bool = False) -> None:
        """Append the tiers of remote storage, behind those listed; ``shadowed``: the list is set elsewhere and wins."""
        tiers = remote_tiers(self.remote, self.warn)
        if not tiers:
            return
        if shadowed:
            name = self.remote.names.get("url") or self.remote.names.get("extra")
            self.warn(f"{name} has no effect: LMKV_TIERS lists the slow tiers")
            return
        listed = self.settings.get("tiers") or ()
        self.settings["tiers"] = [*listed, *tiers] if isinstance(listed, (list, tuple)) else listed


@dataclass(frozen=True)
class Loaded:
    """A store's config as read from file, environment and overrides, and what to tell the person who wrote them.

    Args:
        given: the settings that one of these named; the others have their defaults.
    """

    config: StoreConfig
    warnings: tuple[str, ...]
    given: frozenset[str] = frozenset()


def _nothing(value: object) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() in _NOTHING)


def _is_off(value: object) -> bool:
    """Whether a value asks for nothing: absent or switched off."""
    return _nothing(value) or value is False or (isinstance(value, str) and value.strip().lower() in ("false", "no", "off"))


def _flag(name: str, value: object) -> bool:
    text = str(value).strip().lower()
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise ConfigError(f"{name}: expected true or false; got {value!r}")


def _number(name: str, value: object, unit: str) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(str(value))
    except ValueError:
        raise ConfigError(f"{name}: expected a number of {unit}; got {value!r}") from None
    if not 0 <= number < float("inf"):
        raise ConfigError(f"{name}: expected a number of {unit} of at least 0; got {value!r}")
    return number


def _local_cpu(out: Translated, name: str, value: object, where: str) -> None:
    if not _flag(f"{where}: {name}", value):
        out.warnings.append(f"{where}: {name}: false has no effect: the RAM tier stays, all copies pass through its slots")


def _max_local_cpu_size(out: Translated, name: str, value: object, where: str) -> None:
    size = int(_number(f"{where}: {name}", value, "GiB") * _GIB)
    if size < 1:
        raise ConfigError(f"{where}: {name}: expected more than 0 GiB; got {value!r}: all copies pass through the RAM tier")
    out.set(name, "ram_capacity", size, where)


def _local_disk(out: Translated, name: str, value: object, where: str) -> None:
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {name}: expected a path or file:///path; got {value!r}")
    paths = [part.strip().removeprefix("file://") for part in value.split(",") if part.strip()]
    if not paths or not all(paths):
        raise ConfigError(f"{where}: {name}: expected a path or file:///path; got {value!r}")
    if len(paths) > 1:
        out.warnings.append(f"{where}: {name}: LMKV keeps one directory: {paths[0]} is used, the other paths have no effect")
    out.set(name, "disk_path", os.path.expanduser(paths[0]), where)


def _max_local_disk_size(out: Translated, name: str, value: object, where: str) -> None:
    out.set(name, "disk_capacity", int(_number(f"{where}: {name}", value, "GiB") * _GIB), where)


def _save_unfull_chunk(out: Translated, name: str, value: object, where: str) -> None:
    out.set(name, "save_partial_chunk", _flag(f"{where}: {name}", value), where)


def _cache_policy(out: Translated, name: str, value: object, where: str) -> None:
    for key in ("ram_policy", "disk_policy"):
        out.set(name, key, str(value).strip().lower(), where)


def _blocking_timeout_secs(out: Translated, name: str, value: object, where: str) -> None:
    seconds = _number(f"{where}: {name}", value, "seconds")
    out.set(name, "deadline_seconds", seconds, where)
    out.remote.seconds = seconds


def _remote_url(out: Translated, name: str, value: object, where: str) -> None:
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {name}: expected a url such as redis://localhost:6379; got {type(value).__name__}")
    out.remote.url, out.remote.names["url"] = value, f"{where}: {name}"


def _nixl_buffer(out: Translated, name: str, value: object, where: str) -> None:
    """Sizes and places of NIXL's staging buffer: for its storage slots take that part, which needs no warning."""
    out.remote.buffers[name] = value
    out.remote.names[name] = f"{where}: {name}"


def _remote_serde(out: Translated, name: str, value: object, where: str) -> None:
    out.remote.serde, out.remote.names["serde"] = str(value), f"{where}: {name}"


def _pin_timeout_sec(out: Translated, name: str, value: object, where: str) -> None:
    out.set(name, "lease_seconds", _number(f"{where}: {name}", value, "seconds"), where)


def _hash_algorithm(out: Translated, name: str, value: object, where: str) -> None:
    if not str(value).lower().startswith(("builtin", "sha256")):
        out.warnings.append(f"{where}: {name}: {value} has no effect: keys are hashed with sha256 (key_hash: xxh3 is faster)")
    out.set(name, "key_hash", "sha256", where)


def _extra_config(out: Translated, name: str, value: object, where: str) -> None:
    bag = parse_yaml(value, f"{where}: {name}") if isinstance(value, str) else value
    if not isinstance(bag, Mapping):
        raise ConfigError(f"{where}: {name}: expected keys and values; got {value!r}")
    extra = {str(key): inner for key, inner in bag.items()}
    direct = extra.pop("use_odirect", None)
    if not _nothing(direct):
        out.set(f"{name}.use_odirect", "disk_direct", str(_flag(f"{where}: {name}.use_odirect", direct)).lower(), where)
    out.remote.extra, out.remote.names["extra"] = extra, f"{where}: {name}"


_Converter = Callable[[Translated, str, object, str], None]
_TRANSLATED: Mapping[str, _Converter] = {
    "local_cpu": _local_cpu,
    "max_local_cpu_size": _max_local_cpu_size,
    "local_disk": _local_disk,
    "max_local_disk_size": _max_local_disk_size,
    "save_unfull_chunk": _save_unfull_chunk,
    "cache_policy": _cache_policy,
    "blocking_timeout_secs": _blocking_timeout_secs,
    "pin_timeout_sec": _pin_timeout_sec,
    "pre_caching_hash_algorithm": _hash_algorithm,
    "extra_config": _extra_config,
    "nixl_buffer_size": _nixl_buffer,
    "nixl_buffer_device": _nixl_buffer,
    "remote_url": _remote_url,
    "remote_serde": _remote_serde,
}
#: Keys that both projects have (``chunk_size``) count as native: their meaning is the same.
_NATIVE = frozenset(f.name for f in dataclasses.fields(StoreConfig))


def known_keys() -> frozenset[str]:
    """Every key that :func:`translate` takes, native ones included."""
    return _NATIVE | _TRANSLATED.keys() | _INERT.keys()


def _unknown(key: object, where: str, known: frozenset[str] | set[str]) -> ConfigError:
    near = difflib.get_close_matches(str(key), sorted(known), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(_NATIVE | _TRANSLATED.keys()))}"
    return ConfigError(f"{where}: unknown key {key!r}; {hint}")


def _translate_layer(mapping: Mapping[str, object], where: str) -> Translated:
    out = Translated()
    for key, value in mapping.items():
        if key in _NATIVE:
            out.set(key, key, value, where)
        elif key in _TRANSLATED:
            out.from_lmcache = True
            if not _nothing(value):
                _TRANSLATED[key](out, key, value, where)
        elif key in _INERT:
            out.from_lmcache = True
            if not _is_off(value):
                out.warnings.append(f"{where}: {key} has no effect: {_INERT[key]}")
        else:
            raise _unknown(key, where, known_keys())
    return out


def _without_unasked_disk(out: Translated, where: str, also_set: frozenset[str] = frozenset()) -> Translated:
    """Apply LMCache's default: no ``local_disk``, no disk tier. ``also_set`` are native keys that are set elsewhere."""
    asked = out.settings.keys() | also_set
    written_as = out.names.get("disk_capacity")
    if not out.from_lmcache or "disk_path" in asked or (written_as != "max_local_disk_size" and "disk_capacity" in asked):
        return out
    if out.settings.get("disk_capacity"):
        out.warnings.append(f"{where}: max_local_disk_size has no effect: local_disk names no directory")
    if out.settings.pop("disk_direct", None) is not None:
        out.warnings.append(f"{where}: {out.names['disk_direct']} has no effect: local_disk names no directory")
    out.settings["disk_capacity"] = 0
    return out


def translate(mapping: Mapping[str, object], *, where: str = "config") -> Translated:
    """LMCache's keys, native keys or both, as native keys.

    Args:
        mapping: as YAML gives it; values may be texts, as from the environment or a command line.
        where: what messages call the mapping, for example the file's name.

    Raises:
        ConfigError: a key that neither project has (the nearest known one is named), a value of the wrong type, or two names
            of one setting with different values.
    """
    out = _without_unasked_disk(_translate_layer(mapping, where), where)
    out.add_remote_tier()
    return out


def _environment_layer(environ: Mapping[str, str]) -> Translated:
    out = Translated()
    known = {LMCACHE_PREFIX + key.upper(): key for key in ("chunk_size", *_TRANSLATED, *_INERT)}
    for variable, text in environ.items():
        passed_over = variable in _OTHER_VARIABLES or variable.startswith(_OTHER_PREFIXES)
        if variable in known:
            out.update(_translate_layer({known[variable]: text}, variable))
        elif variable.startswith(LMCACHE_PREFIX) and not passed_over:
            near = difflib.get_close_matches(variable, sorted(known), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            raise ConfigError(f"environment: unknown variable {variable}; {hint}")
    return out


def load_config(
    path: str | os.PathLike[str] | None = None,
    *,
    environ: Mapping[str, str],
    overrides: Mapping[str, object] | None = None,
) -> Loaded:
    """A store's config from a YAML file, ``LMCACHE_*`` and ``LMKV_*`` variables and overrides, later ones winning.

    Args:
        path: the file, in LMKV's or LMCache's keys; ``None`` reads the one that ``LMKV_CONFIG_FILE`` or else
            ``LMCACHE_CONFIG_FILE`` names, if any.
        environ: the environment, ``os.environ`` or a mapping in its place.
        overrides: keys of either project, from a command line.

    Raises:
        ConfigError: as :func:`translate` and :meth:`lmkv.StoreConfig.load`.
    """
    path = path or environ.get(CONFIG_FILE_VARIABLE) or environ.get(LMCACHE_FILE_VARIABLE) or None
    merged = Translated()
    if path is not None:
        merged.update(_translate_layer(read_yaml(path), str(path)))
    merged.update(_environment_layer(environ))
    native = {ENV_PREFIX + key.upper(): key for key in _NATIVE}
    shadowed = frozenset(native[variable] for variable in environ if variable in native)
    for key in shadowed:  # LMKV_* wins over what came so far; StoreConfig.load reads it
        merged.settings.pop(key, None)
        merged.names.pop(key, None)
    merged.update(_translate_layer(overrides or {}, "command line"))
    _without_unasked_disk(merged, "config", shadowed)
    merged.add_remote_tier("tiers" in shadowed)
    rest = {name: value for name, value in environ.items() if name != CONFIG_FILE_VARIABLE}
    given = shadowed | merged.settings.keys()
    return Loaded(StoreConfig.load(environ=rest, overrides=merged.settings), tuple(merged.warnings), given)
