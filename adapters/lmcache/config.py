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
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field

from lmkv.config import AS_LMCACHE_VARIABLE, CONFIG_FILE_VARIABLE, ENV_PREFIX, StoreConfig, parse_yaml, read_yaml
from lmkv.errors import ConfigError

from .names import ALIASES, INERT, OTHER_PREFIXES, OTHER_VARIABLES, PREFIX
from .peers import KEYS as PEER_KEYS
from .peers import Peers, read_peers
from .remote import Remote, remote_tiers

__all__ = ["Loaded", "Translated", "load_config", "translate", "translate_environment"]

LMCACHE_FILE_VARIABLE = f"{PREFIX}CONFIG_FILE"

_GIB = 1024**3
_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
_NOTHING = ("", "none", "null")


@dataclass
class Translated:
    """A mapping in LMKV's own names.

    Args:
        settings: keys and values for :meth:`lmkv.StoreConfig.from_dict`.
        warnings: one line for each key without effect, and for what was understood only in part.
        names: native key -> the name under which it was written.
        places: native key -> the file or variable that it was written in.
        from_lmcache: whether a key was there that only LMCache has.
        remote: what was said of remote storage; becomes a tier once all of it is known.
        cleared: keys that were written as nothing (``LMCACHE_REMOTE_URL=``): what earlier sources said of them counts no more.
        peers: what was said of other engines, for :func:`lmkv.adapters.lmcache.peers.read_peers`.
    """

    settings: dict[str, object] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    from_lmcache: bool = False
    remote: Remote = field(default_factory=Remote)
    peers: dict[str, object] = field(default_factory=dict)
    cleared: set[str] = field(default_factory=set)

    def set(self, name: str, key: str, value: object, where: str) -> None:
        """Give the native ``key`` the ``value`` that was written under ``name``."""
        if key in self.settings and self.settings[key] != value:
            raise ConfigError(
                f"{where}: expected one value for {key}; got {self.names[key]} = {self.settings[key]!r} and "
                f"{name} = {value!r} (both set it): keep one"
            )
        self.settings[key] = value
        self.names[key] = name
        self.places[key] = where

    def update(self, later: Translated) -> None:
        """Lay ``later``, which wins, over this one."""
        for key in later.cleared:
            self._clear(key)
        if "extra" in later.remote.names:  # as a whole, as in LMCache
            self._clear("extra_config")
        self.cleared |= later.cleared
        self.settings.update(later.settings)
        self.warnings.extend(line for line in later.warnings if line not in self.warnings)
        self.names.update(later.names)
        self.places.update(later.places)
        self.from_lmcache |= later.from_lmcache
        self.remote.update(later.remote)
        self.peers.update(later.peers)

    def _clear(self, key: str) -> None:
        """Forget what LMCache's ``key`` said."""
        for native in [native for native, name in self.names.items() if name == key or name.startswith(f"{key}.")]:
            for known in (self.settings, self.names, self.places):
                known.pop(native, None)
        if key == "remote_url":
            self.remote.url = None
        elif key == "extra_config":
            self.remote.extra = {}

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
        peers: roles, hosts and ports of LMCache's exchanges between engines, which LMKV's tiers take the place of.
    """

    config: StoreConfig
    warnings: tuple[str, ...]
    given: frozenset[str] = frozenset()
    peers: Peers = field(kw_only=True)


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
    out.set(name, "ram_cache", _flag(f"{where}: {name}", value), where)


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
    places = [os.path.expanduser(path) for path in paths]
    out.set(name, "disk_paths" if len(places) > 1 else "disk_path", places if len(places) > 1 else places[0], where)


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


def _audit_actual_remote_url(out: Translated, name: str, value: object, where: str) -> None:
    out.remote.actual, out.remote.names["actual"] = str(value), f"{where}: {name}"


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


def _numa_mode(out: Translated, name: str, value: object, where: str) -> None:
    if str(value).strip().lower() == "auto":
        out.set(name, "ram_numa_node", "auto", where)
    elif str(value).strip().lower() == "manual":
        out.warnings.append(f"{where}: {name}: manual has no effect: say the node's number as ram_numa_node, or auto")
    else:
        raise ConfigError(f"{where}: {name}: expected auto or manual; got {value!r}")


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
    "numa_mode": _numa_mode,
    "extra_config": _extra_config,
    "nixl_buffer_size": _nixl_buffer,
    "nixl_buffer_device": _nixl_buffer,
    "remote_url": _remote_url,
    "audit_actual_remote_url": _audit_actual_remote_url,
    "remote_serde": _remote_serde,
}
#: Keys whose absence is a choice of its own, so that an empty variable takes a file's away.
_CLEARED = ("local_disk", "remote_url", "extra_config")
#: Keys that both projects have (``chunk_size``) count as native: their meaning is the same.
_NATIVE = frozenset(f.name for f in dataclasses.fields(StoreConfig))


def known_keys() -> frozenset[str]:
    """Every key that :func:`translate` takes, native ones included."""
    return _NATIVE | _TRANSLATED.keys() | INERT.keys() | ALIASES.keys()


def _unknown(key: object, where: str, known: frozenset[str] | set[str]) -> ConfigError:
    near = difflib.get_close_matches(str(key), sorted(known), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(_NATIVE | _TRANSLATED.keys()))}"
    return ConfigError(f"{where}: unknown key {key!r}; {hint}")


def _translate_layer(mapping: Mapping[str, object], where: str) -> Translated:
    out = Translated()
    for written, value in mapping.items():
        key = ALIASES.get(written, written)
        if key in _NATIVE:
            out.set(key, key, value, where)
        elif key in _TRANSLATED:
            out.from_lmcache = True
            if not _nothing(value):
                _TRANSLATED[key](out, key, value, where)
            elif key in _CLEARED:
                out.cleared.add(key)
        elif key in INERT:
            out.from_lmcache = True
            if key in PEER_KEYS:
                out.peers[key] = value
            if not _is_off(value):
                spelled = f" ({key} by now)" if key != written else ""
                out.warnings.append(f"{where}: {written}{spelled} has no effect: {INERT[key]}")
        else:
            raise _unknown(key, where, known_keys())
    return out


def _without_unasked_disk(out: Translated, where: str, also_set: frozenset[str] = frozenset()) -> Translated:
    """Apply LMCache's default: no ``local_disk``, no disk tier. ``also_set`` are native keys that are set elsewhere."""
    asked = out.settings.keys() | also_set
    written_as = out.names.get("disk_capacity")
    if (
        not out.from_lmcache
        or asked & {"disk_path", "disk_paths"}
        or (written_as != "max_local_disk_size" and "disk_capacity" in asked)
    ):
        return out
    if out.settings.get("disk_capacity"):
        out.warnings.append(f"{where}: max_local_disk_size has no effect: local_disk names no directory")
    if out.settings.pop("disk_direct", None) is not None:
        out.warnings.append(f"{where}: {out.names['disk_direct']} has no effect: local_disk names no directory")
    out.settings["disk_capacity"] = 0
    return out


def _without_cache_nowhere(out: Translated, also_set: frozenset[str] = frozenset()) -> Translated:
    """Take ``local_cpu: false`` for what it means once all is known: chunks are kept behind RAM, if anything is there."""
    if out.names.get("ram_cache") != "local_cpu":
        return out
    behind = out.settings.get("disk_capacity", True) or out.settings.get("tiers") or also_set & {"disk_capacity", "tiers"}
    if not out.settings["ram_cache"] and not behind:
        out.warn(f"{out.places['ram_cache']}: local_cpu: false has no effect: there is no tier behind RAM to keep chunks in")
    if out.settings["ram_cache"] or not behind:
        del out.settings["ram_cache"], out.names["ram_cache"]
    return out


def _shared_by_controller(out: Translated) -> None:
    """Where ``lmcache_controller`` is LMKV's, it is an ``lm://`` server at its pull address, and engines share KV by it."""
    peers, address = read_peers(out.peers, "config"), str(out.peers.get("controller_pull_url") or "").removeprefix("tcp://")
    if not peers.shares or not peers.controller or not address or out.remote.url or out.settings.get("tiers"):
        return
    out.remote.url, out.remote.names["url"] = f"lm://{address}", "controller_pull_url"
    served = {INERT[key] for key in ("enable_p2p", "enable_controller")}
    out.warnings[:] = [line for line in out.warnings if line.partition(" has no effect: ")[2] not in served]
    out.warn(f"enable_p2p: engines share KV by the server that lmcache_controller starts here, lm://{address}")


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
    return _without_cache_nowhere(out)


def translate_environment(mapping: Mapping[str, object], environ: Mapping[str, str], *, where: str = "config") -> Translated:
    """As :func:`translate`, with the ``LMCACHE_*`` variables of ``environ`` laid over the mapping."""
    out = _translate_layer(mapping, where)
    out.update(_environment_layer(environ))
    _without_unasked_disk(out, where)
    out.add_remote_tier()
    return _without_cache_nowhere(out)


#: How LMCache is told which master to ask Sentinels for.
SENTINEL_VARIABLE = "REDIS_SERVICE_NAME"


def _unquoted(text: str) -> str:
    """A variable without the quotes around it that ``docker run --env-file`` and the like leave in it, as LMCache reads it."""
    text = text.strip()
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" and text[0] not in text[1:-1]
    return text[1:-1] if quoted else text


def _environment_layer(environ: Mapping[str, str]) -> Translated:
    out = Translated()
    known = {PREFIX + key.upper(): key for key in ("chunk_size", *_TRANSLATED, *INERT, *ALIASES)}
    for variable, written in environ.items():
        text = _unquoted(written)
        passed_over = variable in OTHER_VARIABLES or variable.startswith(OTHER_PREFIXES)
        if variable in known:
            out.update(_translate_layer({known[variable]: text}, variable))
        elif variable == SENTINEL_VARIABLE:
            out.remote.master = text.strip() or None
        elif variable.startswith(PREFIX) and not passed_over:
            near = difflib.get_close_matches(variable, sorted(known), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            raise ConfigError(f"environment: unknown variable {variable}; {hint}")
    return out


def load_config(
    path: str | os.PathLike[str] | None = None,
    *,
    environ: Mapping[str, str],
    overrides: Mapping[str, object] | None = None,
    leave: Container[str] = (),
) -> Loaded:
    """A store's config from a YAML file, ``LMCACHE_*`` and ``LMKV_*`` variables and overrides, later ones winning.

    Args:
        path: the file, in LMKV's or LMCache's keys; ``None`` reads the one that ``LMKV_CONFIG_FILE`` or else
            ``LMCACHE_CONFIG_FILE`` names, if any.
        environ: the environment, ``os.environ`` or a mapping in its place.
        overrides: keys of either project, from a command line.
        leave: keys of the file that are not the store's and that somebody else reads.

    Raises:
        ConfigError: as :func:`translate` and :meth:`lmkv.StoreConfig.load`.
    """
    path = path or environ.get(CONFIG_FILE_VARIABLE) or environ.get(LMCACHE_FILE_VARIABLE) or None
    merged = Translated()
    if path is not None:
        layer = {key: value for key, value in read_yaml(path).items() if key not in leave}
        merged.update(_translate_layer(layer, str(path)))
    merged.update(_environment_layer(environ))
    native = {ENV_PREFIX + key.upper(): key for key in _NATIVE}
    shadowed = frozenset(native[variable] for variable in environ if variable in native)
    for key in shadowed:  # LMKV_* wins over what came so far; StoreConfig.load reads it
        merged.settings.pop(key, None)
        merged.names.pop(key, None)
    merged.update(_translate_layer(overrides or {}, "command line"))
    _without_unasked_disk(merged, "config", shadowed)
    if environ.get(AS_LMCACHE_VARIABLE):
        _shared_by_controller(merged)
    merged.add_remote_tier("tiers" in shadowed)
    _without_cache_nowhere(merged, shadowed)
    rest = {name: value for name, value in environ.items() if name != CONFIG_FILE_VARIABLE}
    config = StoreConfig.load(environ=rest, overrides=merged.settings)
    given = shadowed | merged.settings.keys()
    return Loaded(config, tuple(merged.warnings), given, peers=read_peers(merged.peers, "config"))
