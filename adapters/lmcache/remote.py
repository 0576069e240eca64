"""LMCache's remote storage (``remote_url``, ``remote_serde``, ``extra_config``) as a slow tier of LMKV's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lmkv.errors import ConfigError

from .names import EXTRA_WAYS
from .nixl import KEYS as NIXL_KEYS
from .nixl import nixl_tier
from .urls import place_of

__all__ = ["Remote", "remote_tiers"]

_REDIS = ("redis", "rediss", "unix", "redis-sentinel", "rediss-sentinel", "redis-cluster", "rediss-cluster")
_VALKEY = ("valkey", "valkeys")
_LOGIN = {"username": "username", "password": "password"}
_REDIS_OPTIONS = {**_LOGIN, "resp_num_threads": "", "save_chunk_meta": ""}
_VALKEY_OPTIONS = {
    **_LOGIN,
    "valkey_username": "username",
    "valkey_password": "password",
    "valkey_database": "db",
    "valkey_ttl_sec": "ttl_seconds",
    "valkey_enable_ttl": "",  # a time of 0 is none
    "valkey_mode": "",  # told apart by the URL's scheme
}
_S3_OPTIONS = {
    "s3_region": "region",
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "s3_num_io_threads": "concurrency",
    "s3_prefer_http2": "",  # the client's own choice
    "s3_enable_s3express": "",  # seen in the host's name
    "disable_tls": "",  # part of the endpoint
    "save_chunk_meta": "",
}
_MOONCAKE_OPTIONS = {
    **{
        name: name
        for name in (
            *("local_hostname", "metadata_server", "protocol", "device_name"),
            *("global_segment_size", "local_buffer_size", "master_server_address"),
        )
    },
    "mooncake_prefer_local_alloc": "prefer_local_alloc",
    "prefer_local_alloc": "prefer_local_alloc",
    "save_chunk_meta": "",  # a record describes itself
    "use_exists_sync": "",  # existence is one call
    "transfer_timeout": "",  # becomes the tier's deadline
}
#: What LMCache keeps in ``extra_config`` for a kind of storage: its key -> the option of LMKV's backend; "" for what is served
#: by itself.
_EXTRA: Mapping[str, Mapping[str, str]] = {
    **dict.fromkeys(_REDIS, _REDIS_OPTIONS),
    **dict.fromkeys(_VALKEY, _VALKEY_OPTIONS),
    "s3": _S3_OPTIONS,
    "mooncakestore": _MOONCAKE_OPTIONS,
    "infinistore": {"infinistore_link_type": "link_type"},
    "fs": {"fs_connector_relative_tmp_dir": "", "fs_connector_read_ahead_size": "", "save_chunk_meta": ""},
}
#: ``remote_serde`` -> codec.
_CODECS = {"naive": "naive", "raw": "raw", "lossless": "lossless", "blosc2": "blosc2"}
#: Lossy encodings of LMCache's, for which a lossless one stands in.
_LOSSY = ("cachegen", "kivi")


@dataclass
class Remote:
    """What the keys of remote storage say, as far as it was read.

    Args:
        url, serde, seconds: ``remote_url``, ``remote_serde`` and ``blocking_timeout_secs``.
        actual: ``audit_actual_remote_url``.
        buffers: ``nixl_buffer_size`` and ``nixl_buffer_device``.
        extra: ``extra_config``; its keys belong to whatever the URL names.
        master: the name that Sentinels know the master by, from ``REDIS_SERVICE_NAME``; the URL's own wins.
        names: field -> how it was written, for messages.
    """

    url: str | None = None
    serde: str | None = None
    seconds: float | None = None
    actual: str = ""
    buffers: dict[str, object] = field(default_factory=dict)
    extra: dict[str, object] = field(default_factory=dict)
    master: str | None = None
    names: dict[str, str] = field(default_factory=dict)

    def update(self, later: Remote) -> None:
        """Lay ``later``, which wins, over this one."""
        self.url = later.url or self.url
        self.actual = later.actual or self.actual
        self.serde = later.serde or self.serde
        self.seconds = later.seconds if later.seconds is not None else self.seconds
        self.buffers.update(later.buffers)
        self.extra = later.extra if "extra" in later.names else self.extra
        self.master = later.master or self.master
        self.names.update(later.names)


def _codec(remote: Remote, warn: Callable[[str], None]) -> str:
    serde = (remote.serde or "naive").strip().lower()
    where = remote.names.get("serde", "remote_serde")
    if serde in _CODECS:
        return _CODECS[serde]
    if serde in _LOSSY:
        warn(f"{where}: {serde} is not here: lossless is used, which keeps every bit and compresses less")
        return "lossless"
    raise ConfigError(f"{where}: expected one of {', '.join([*_CODECS, *_LOSSY])}; got {remote.serde!r}")


def remote_tiers(remote: Remote, warn: Callable[[str], None]) -> list[dict[str, object]]:
    """The tiers that the keys describe, in LMKV's names: none, ``remote``, ``nixl`` or both.

    Args:
        warn: told of every key that has no effect.

    Raises:
        ConfigError: a URL without a scheme, an encoding that nobody has, or NIXL storage without a place.
    """
    where_extra = remote.names.get("extra", "extra_config")
    nixl = nixl_tier({**remote.buffers, **remote.extra}, where_extra, warn)
    if nixl is None:
        for key in remote.buffers:
            warn(f"{remote.names[key]} has no effect: NIXL storage is not asked for (extra_config: enable_nixl_storage)")
    tier, known, options = _tier_of_url(remote, warn)
    for key, value in remote.extra.items():
        if value is None or value is False or value == "" or (nixl is not None and key in NIXL_KEYS):
            continue
        if key in known:
            if known[key]:
                options[known[key]] = value
        else:
            warn(f"{where_extra}.{key} has no effect: {_way(key)}")
    if tier is not None:
        if remote.master and "-sentinel://" in str(tier["url"]) and "master=" not in str(tier["url"]):
            options["master"] = remote.master
        tier["options"] = options
    tiers = [found for found in (tier, nixl) if found is not None]
    for found in tiers:
        if remote.seconds:
            found["deadline_seconds"] = remote.seconds
    return tiers


def _way(key: str) -> str:
    """What to do instead of a key of ``extra_config``."""
    return next((why for beginning, why in EXTRA_WAYS if key.startswith(beginning)), "LMKV has no use for it")


def _tier_of_url(
    remote: Remote, warn: Callable[[str], None]
) -> tuple[dict[str, object] | None, Mapping[str, str], dict[str, object]]:
    """The tier of ``remote_url``, which keys of ``extra_config`` are options of its backend, and what the URL says of them."""
    said = (remote.url or "").strip().lower()
    if remote.actual and not said.startswith("audit://"):
        warn(f"{remote.names['actual']} has no effect: remote_url is not audit://")
    if not remote.url:
        return None, {}, {}
    where = remote.names.get("url", "remote_url")
    codec = _codec(remote, warn)
    place = place_of(remote.url, remote.extra, remote.actual, where, warn)
    known = _EXTRA.get(place.scheme, {})
    if said.startswith("audit://"):
        known = {**known, **dict.fromkeys(("audit_actual_remote_url", "audit_calc_checksum", "audit_verify_checksum"), "")}
    if not place.url:
        return None, known, {}
    tier: dict[str, object] = {"name": "remote", "url": place.url, "codec": codec}
    if place.scheme == "mooncakestore" and remote.extra.get("transfer_timeout"):
        tier["deadline_seconds"] = remote.extra["transfer_timeout"]
    return tier, known, place.options
