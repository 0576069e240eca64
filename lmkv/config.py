"""Settings of a store: one frozen value, from arguments, YAML and ``LMKV_*`` environment variables.

This is the only module that reads the environment. Later sources win: defaults, then the YAML file, then the environment,
then explicit overrides. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ConfigError

__all__ = ["StoreConfig", "TierConfig", "parse_bytes"]

_UNITS = {"": 1, "b": 1} | {
    letter + end: base**power
    for power, letter in enumerate("kmgt", start=1)
    for end, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}
ENV_PREFIX = "LMKV_"
CONFIG_FILE_VARIABLE = "LMKV_CONFIG_FILE"
#: Says whether SGLang's ``--enable-lmcache`` is served by LMKV.
SGLANG_VARIABLE = "LMKV_SGLANG"
#: Set in commands that ``lmkv run --as-lmcache`` runs.
AS_LMCACHE_VARIABLE = "LMKV_AS_LMCACHE"

_BYTES = {"bytes": True}
_LIST = {"list": True}


def parse_bytes(value: object) -> int:
    """A size in bytes from a number or a text such as ``"5 GiB"``, ``"512MB"``, ``"1e9"``.

    Raises:
        ConfigError: the text is no size, or negative.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number, unit = float(value), ""
    else:
        found = re.fullmatch(r"\s*([0-9]+\.?[0-9]*(?:e[0-9]+)?|\.[0-9]+)\s*([a-zA-Z]*)\s*", str(value))
        if not found or found[2].lower() not in _UNITS:
            raise ConfigError(f"expected a size such as 5GiB, 512MB or a number of bytes; got {value!r}")
        number, unit = float(found[1]), found[2].lower()
    if not 0 <= number < float("inf"):
        raise ConfigError(f"expected a size of at least 0 bytes; got {value!r}")
    return int(number * _UNITS[unit])


def _convert(owner: str, name: str, hint: Any, metadata: Mapping[str, Any], value: object) -> object:
    """``value`` as the field's type wants it; texts from the environment and YAML scalars are understood."""
    if metadata.get("bytes"):
        try:
            return parse_bytes(value)
        except ConfigError as error:
            raise ConfigError(f"{owner}{name}: {error}") from None
    if metadata.get("list"):
        texts = value.split(",") if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ConfigError(f"{owner}{name}: expected a list of texts, or texts separated by commas; got {value!r}")
        return tuple(text.strip() for text in texts)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
        if type(None) in options:
            return None
        if value is None:
            raise ConfigError(
                f"{owner}{name}: expected {getattr(hint, '__name__', hint)}; got nothing: give a value or leave the key out"
            )
    wanted = next(option for option in options if option is not type(None))
    if wanted is bool:
        text = str(value).strip().lower()
        if text in _TRUE or text in _FALSE:
            return text in _TRUE
        raise ConfigError(f"{owner}{name}: expected true or false; got {value!r}")
    if wanted in (int, float):
        try:
            if isinstance(value, bool):
                raise ValueError
            number = wanted(str(value))
        except ValueError:
            kind = "a whole number" if wanted is int else "a number"
            raise ConfigError(f"{owner}{name}: expected {kind}; got {value!r}") from None
        return typing.cast(object, number)
    if wanted is str:
        if isinstance(value, (Mapping, list, tuple)):
            raise ConfigError(f"{owner}{name}: expected a text; got {value!r}")
        return str(value)
    return value


def _check_keys(cls: type, data: Mapping[str, object], where: str) -> None:
    known = [f.name for f in dataclasses.fields(cls)]
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")


def _build(cls: type, data: Mapping[str, object], where: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected keys and values; got {type(data).__name__} {data!r}")
    _check_keys(cls, data, where)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    return {k: _convert(f"{where}: ", k, hints[k], fields[k].metadata, v) for k, v in data.items()}


def _settle(config: Any, owner: str, but: str) -> None:
    """Have values that were given in code be what those from files are: of their fields' types, or an error."""
    hints = typing.get_type_hints(type(config))
    for one in dataclasses.fields(config):
        if one.name != but:
            value = _convert(owner, one.name, hints[one.name], one.metadata, getattr(config, one.name))
            object.__setattr__(config, one.name, value)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name}: expected one of {', '.join(allowed)}; got {value!r}{hint}")


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ConfigError(f"{name}: expected at least {least}; got {value!r}")


@dataclass(frozen=True)
class TierConfig:
    """A slow tier behind the built-in ones.

    Args:
        backend: a built-in backend's name (``lmdb``, ``memory``) or one registered under the entry point ``lmkv.backends``; the
            scheme of ``url`` by default.
        url: where a remote storage is, such as ``redis://host:6379``. Credentials in it are never shown.
        name: what events and statistics call it; the backend's name by default.
        capacity: bytes it may hold; 0 leaves bounding to the backend itself.
        policy: eviction policy, used where the backend can list what it holds.
        codec: how payloads are kept (``raw`` or ``naive``: as they are; ``lossless``, today ``blosc2``; or a registered one).
        deadline_seconds: how long one operation may take before it counts as a miss.
        write_budget: bytes a second that may be written in the long run; what waits meanwhile stays in RAM, and is given up
            when RAM needs the room. 0 for no limit.
        admission: ``all``, or ``second`` to write only what was stored or used before, so that prompts that never come again
            do not reach the device.
        options: handed to the backend, which refuses what it does not know.
        encryption: where the keys are that records are encrypted with, ``file:/path`` or ``env:NAME`` (docs/remote.md);
            ``off`` for none; as the store's ``encryption`` by default.
    """

    backend: str = ""
    name: str = ""
    capacity: int = field(default=0, metadata=_BYTES)
    policy: str = "lru"
    codec: str = "raw"
    deadline_seconds: float = 2.0
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # may hold credentials
    url: str = field(default="", repr=False)
    write_budget: int = field(default=0, metadata=_BYTES)
    admission: str = "all"
    encryption: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        _settle(self, "tiers: ", "options")
        scheme, there, _ = self.url.partition("://")
        if self.url and not (there and scheme):
            raise ConfigError("tiers: url: expected scheme://…, such as redis://localhost:6379; got no scheme")
        if not self.backend:
            if not scheme:
                raise ConfigError("tiers: expected a backend for each tier; got none: set 'backend' or 'url'")
            object.__setattr__(self, "backend", scheme)
        object.__setattr__(self, "name", self.name or self.backend)
        _one_of("tiers: admission", self.admission, ("all", "second"))
        if not isinstance(self.options, Mapping):
            raise ConfigError(f"tiers: options: expected keys and values; got {self.options!r}")
        if not self.deadline_seconds > 0:
            raise ConfigError(f"tiers: deadline_seconds: expected more than 0; got {self.deadline_seconds!r}")


@dataclass(frozen=True)
class StoreConfig:
    """All settings of a :class:`lmkv.Store`. Sizes are bytes; in YAML and environment also texts such as ``5GiB``.

    What the KV was computed with (all of it enters every key):
        model, revision: the weights' name and version.
        rope: the RoPE parameters where they differ from the model's own, as a text.
        lora: name and version of the adapter in use.
        shard: this process's part of the model, for example ``tp0/2``.
        salt: a tenant's secret; stores with other salts never find each other's chunks.
        key_hash: ``sha256`` (default), or ``xxh3`` where nobody hostile writes prompts.

    RAM tier:
        chunk_size: tokens a chunk; ``None`` takes the layout's, a number must equal it.
        save_partial_chunk: keep the last, short chunk of a text.
        ram_capacity, ram_policy: bytes of slots, and lru, lfu, fifo, mru or s3fifo.
        ram_cache: keep chunks in RAM; ``false`` leaves it to copies under way: a stored chunk goes as soon as the slow tiers
            have it, a loaded one as soon as its lease ends.
        ram_shared: slots in memory that another process can map.
        ram_extent: bytes by which the pool grows.
        ram_ahead: bytes of free slots that are made ready beside the caller, since fresh memory is slow to touch; 0 for none.
        ram_huge_pages: ``transparent`` (default), ``reserved`` (those of ``vm.nr_hugepages``) or ``off``.
        ram_numa_node: node that slots are taken from, if it has room: a number, or ``auto`` for that of an engine's GPU.
        ram_pin: pin slots for a GPU once one is used, beside the caller, as the pool grows.
        chain_aware: never evict a chunk before those that extend it.

    Disk tier:
        disk_capacity: byte quota, 0 for no disk tier.
        disk_path: its directory; ``None`` is a folder of this layout's own in the user's cache directory.
        disk_paths: several directories instead, best on a device each: they share the capacity by speed.
        disk_policy, disk_codec: as for ``tiers``.
        disk_direct: read and write past the page cache: ``auto`` (where the file system can), ``true`` or ``false``.
        disk_depth: reads and writes in flight at once.
        disk_floor: bytes of the file system that are left free, whatever the quota still allows.
        disk_write_budget, disk_admission: as for ``tiers``.
        disk_ttl_seconds: records older than so many seconds are not there any more; 0 keeps them.

    Conduct:
        tiers: further slow tiers, in order.
        encryption: as for ``tiers``, for all of them; the disk tier is not encrypted.
        peer_listen: ``host:port`` where other stores, with tiers ``nixl://host:port``, read what is in RAM here; "" for nobody.
        peer_token: what they have to show, ``file:/path`` or ``env:NAME``; needed where others than this machine can connect.
        lease_seconds: how long a lease holds without renewal.
        deadline_seconds: how long one disk operation may take before it counts as a miss.
        write_queue: chunks that may wait to be written to one slow tier; beyond it the oldest are dropped.
        io_threads: reading threads a slow tier.
        breaker_failures, breaker_seconds: failures in a row that switch a tier off, and for how long.
    """

    model: str = ""
    revision: str = ""
    rope: str = ""
    lora: str = ""
    shard: str = ""
    salt: str = ""
    key_hash: str = "sha256"
    chunk_size: int | None = None
    save_partial_chunk: bool = True
    ram_capacity: int = field(default=4 * 1024**3, metadata=_BYTES)
    ram_policy: str = "lru"
    ram_cache: bool = True
    ram_shared: bool = False
    ram_extent: int = field(default=256 * 1024**2, metadata=_BYTES)
    ram_ahead: int = field(default=256 * 1024**2, metadata=_BYTES)
    ram_huge_pages: str = "transparent"
    ram_numa_node: str | None = None
    ram_pin: bool = True
    chain_aware: bool = True
    disk_capacity: int = field(default=10 * 1024**3, metadata=_BYTES)
    disk_path: str | None = None
    disk_paths: tuple[str, ...] = field(default=(), metadata=_LIST)
    disk_policy: str = "lru"
    disk_codec: str = "raw"
    disk_direct: str = "auto"
    disk_depth: int = 4
    disk_floor: int = field(default=0, metadata=_BYTES)
    disk_write_budget: int = field(default=0, metadata=_BYTES)
    disk_admission: str = "all"
    disk_ttl_seconds: float = 0.0
    tiers: tuple[TierConfig, ...] = ()
    encryption: str = field(default="", repr=False)
    peer_listen: str = ""
    peer_token: str = field(default="", repr=False)
    lease_seconds: float = 60.0
    deadline_seconds: float = 10.0
    write_queue: int = 4096
    io_threads: int = 2
    breaker_failures: int = 5
    breaker_seconds: float = 10.0

    def __post_init__(self) -> None:
        _settle(self, "", "tiers")
        if not isinstance(self.tiers or (), (list, tuple)):
            raise ConfigError(f"tiers: expected a list of tiers; got {self.tiers!r}")
        tiers = tuple(
            tier if isinstance(tier, TierConfig) else TierConfig(**_build(TierConfig, tier, f"tiers[{i}]"))
            for i, tier in enumerate(self.tiers or ())
        )
        object.__setattr__(self, "tiers", tiers)
        _one_of("key_hash", self.key_hash, ("sha256", "xxh3"))
        _one_of("ram_huge_pages", self.ram_huge_pages, ("transparent", "reserved", "off"))
        node = self.ram_numa_node
        if node is not None and not node.isdecimal() and node != "auto":
            raise ConfigError(f"ram_numa_node: expected a node's number or auto; got {node!r}")
        if self.chunk_size is not None:
            _at_least("chunk_size", self.chunk_size, 1)
        object.__setattr__(self, "disk_direct", str(self.disk_direct).lower())
        if self.disk_path and self.disk_paths:
            raise ConfigError(f"disk_paths: expected it instead of disk_path; got both, {self.disk_path!r} too: keep one")
        _one_of("disk_admission", self.disk_admission, ("all", "second"))
        _one_of("disk_direct", self.disk_direct, ("auto", "true", "false"))
        _at_least("disk_depth", self.disk_depth, 1)
        _at_least("ram_capacity", self.ram_capacity, 1)
        _at_least("ram_extent", self.ram_extent, 1)
        _at_least("disk_ttl_seconds", self.disk_ttl_seconds, 0)
        _at_least("write_queue", self.write_queue, 1)
        _at_least("io_threads", self.io_threads, 1)
        _at_least("breaker_failures", self.breaker_failures, 1)
        for name in ("lease_seconds", "deadline_seconds", "breaker_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: expected more than 0 seconds; got {getattr(self, name)!r}")
        if not (self.ram_cache or self.disk_capacity or tiers):
            raise ConfigError(
                "ram_cache: expected a slow tier that keeps chunks where RAM does not; got false, a disk_capacity of 0 and no "
                "tiers: set disk_capacity or tiers, or leave ram_cache out"
            )
        names = ["ram", "disk", *(tier.name for tier in tiers)]
        if len(set(names)) != len(names):
            raise ConfigError(f"tiers: expected names that differ (ram and disk are taken); got {names[2:]}")

    def slow_tiers(self, folder: str) -> tuple[TierConfig, ...]:
        """The tiers behind RAM, in order: the disk, if it has a capacity, and ``tiers``.

        Args:
            folder: name of the disk tier's directory in the user's cache directory where ``disk_path`` names none.
        """
        if not self.disk_capacity:
            return self.tiers
        place: dict[str, object] = {"paths": list(self.disk_paths)}
        if len(self.disk_paths) < 2:
            place = {"path": self.disk_path or (self.disk_paths or (str(cache_home() / "lmkv" / folder),))[0]}
        disk = TierConfig(
            backend="lmdb" if "path" in place else "lmdb-stripes",
            name="disk",
            capacity=self.disk_capacity,
            policy=self.disk_policy,
            codec=self.disk_codec,
            deadline_seconds=self.deadline_seconds,
            write_budget=self.disk_write_budget,
            admission=self.disk_admission,
            options={
                **place,
                "direct": {"auto": "auto", "true": True, "false": False}[self.disk_direct],
                "depth": self.disk_depth,
                "free_space_floor": self.disk_floor,
                "ttl_seconds": self.disk_ttl_seconds,
            },
        )
        return (disk, *self.tiers)

    @classmethod
    def from_dict(cls, data: Mapping[str, object], *, where: str = "config") -> StoreConfig:
        """A config from plain keys and values, as YAML gives them.

        Raises:
            ConfigError: an unknown key (the nearest known one is named) or a value of the wrong type or range.
        """
        return cls(**_build(cls, data, where))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        overrides: Mapping[str, object] | None = None,
    ) -> StoreConfig:
        """A config from a YAML file, the environment and overrides, later ones winning.

        Args:
            path: the file; ``None`` reads the one that ``LMKV_CONFIG_FILE`` names, if any.
            environ: instead of the process's environment. ``LMKV_<KEY>`` sets ``key``; ``LMKV_TIERS`` takes YAML.
            overrides: keys and values that win over both.

        Raises:
            ConfigError: the file is missing or no YAML mapping, or a key or value is wrong.
        """
        env = os.environ if environ is None else environ
        path = path if path is not None else env.get(CONFIG_FILE_VARIABLE) or None
        data: dict[str, object] = {}
        if path is not None:
            data.update(_build(cls, read_yaml(path), str(path)))
        known = {ENV_PREFIX + f.name.upper(): f.name for f in dataclasses.fields(cls)}
        for variable, text in env.items():
            if not variable.startswith(ENV_PREFIX) or variable in (CONFIG_FILE_VARIABLE, *_FOREIGN):
                continue
            if variable not in known:
                near = difflib.get_close_matches(variable, known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
                raise ConfigError(f"environment: unknown variable {variable}; {hint}")
            value: object = parse_yaml(text, variable) if known[variable] == "tiers" else text
            data.update(_build(cls, {known[variable]: value}, variable))
        data.update(_build(cls, overrides or {}, "overrides"))
        return cls(**typing.cast(dict[str, Any], data))


#: ``LMKV_*`` variables that are no keys of a store's configuration: secrets, which it only points to, and an adapter's own.
_FOREIGN = ("LMKV_TOKEN", "LMKV_ENCRYPTION_KEYS", "LMKV_PEER_SECRET", SGLANG_VARIABLE, AS_LMCACHE_VARIABLE)


def service_token(environ: Mapping[str, str] | None = None) -> str | None:
    """The bearer token of the HTTP service (``LMKV_TOKEN``), or ``None``; kept out of files and command lines."""
    return (os.environ if environ is None else environ).get("LMKV_TOKEN") or None


def read_secret(options: Mapping[str, object], name: str, where: str, environ: Mapping[str, str] | None = None) -> str | None:
    """A credential: the option ``name`` itself, or what ``<name>_env`` (a variable) or ``<name>_file`` points to.

    Raises:
        ConfigError: more than one of them is given, or what it points to is not there. The credential is not repeated.
    """
    given = [key for key in (name, f"{name}_env", f"{name}_file") if options.get(key) not in (None, "")]
    if not given:
        return None
    if len(given) > 1:
        raise ConfigError(f"{where}: expected one of {' and '.join(given)}; got both")
    value = str(options[given[0]])
    if given[0].endswith("_env"):
        found = (os.environ if environ is None else environ).get(value)
        if found is None:
            raise ConfigError(f"{where}: {given[0]}: expected the environment variable {value}; it is not set")
        return found
    if given[0].endswith("_file"):
        try:
            return Path(value).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: {given[0]}: expected a readable file; got: {error}") from None
    return value


def read_secret_source(name: str, source: str, environ: Mapping[str, str] | None = None) -> str:
    """What ``file:/path`` or ``env:NAME`` points to; "" for "".

    Raises:
        ConfigError: nothing readable is there, or it is neither. What is there is not repeated.
    """
    if not source:
        return ""
    kind, _, place = source.partition(":")
    if kind not in ("file", "env") or not place:
        raise ConfigError(f"{name}: expected file:/path or env:NAME, never the secret itself; got something else")
    return read_secret({f"secret_{kind}": place}, "secret", name, environ) or ""


@contextlib.contextmanager
def environment_kept() -> Iterator[None]:
    """Put back what is changed meanwhile: for packages that set variables of the whole process when they are imported."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def parse_yaml(text: str, where: str) -> object:
    """YAML as plain data.

    Raises:
        ConfigError: it is no YAML; the message says where.
    """
    import yaml

    try:
        return typing.cast(object, yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: expected YAML; got a syntax error: {' '.join(str(error).split())}") from None


def read_yaml(path: str | os.PathLike[str]) -> dict[str, object]:
    """The top-level mapping of a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: the file can't be read or holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a readable YAML file; got: {error}") from None
    data = parse_yaml(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines; got {type(data).__name__}")
    return typing.cast(dict[str, object], data)


def cache_home(environ: Mapping[str, str] | None = None) -> Path:
    """Where the user keeps caches: ``$XDG_CACHE_HOME`` or ``~/.cache`` (XDG base directory specification)."""
    env = os.environ if environ is None else environ
    base = env.get("XDG_CACHE_HOME") or ""
    return Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~")) / ".cache"
