"""LMCache's remote storage (``remote_url``, ``remote_serde``, ``extra_config``) as a slow tier of LMKV's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lmkv.errors import ConfigError

__all__ = ["Remote", "remote_tier"]

_REDIS = ("redis", "rediss", "unix", "redis-sentinel", "rediss-sentinel", "redis-cluster", "rediss-cluster")
_VALKEY = ("valkey", "valkeys")
_LOGIN = {"username": "username", "password": "password"}
_VALKEY_OPTIONS = {
    **_LOGIN,
    "valkey_username": "username",
    "valkey_password": "password",
    "valkey_database": "db",
    "valkey_ttl_sec": "ttl_seconds",
}
_S3_OPTIONS = {
    "s3_region": "region",
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "s3_num_io_threads": "concurrency",
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
}
#: Keys that ask for what LMKV does anyway: a record describes itself, existence is asked in one call.
_ALWAYS = {"mooncakestore": ("save_chunk_meta", "use_exists_sync")}
#: What LMCache keeps in ``extra_config`` for a kind of storage: its key -> the option of LMKV's backend.
_EXTRA: Mapping[str, Mapping[str, str]] = {
    **dict.fromkeys(_REDIS, _LOGIN),
    **dict.fromkeys(_VALKEY, _VALKEY_OPTIONS),
    "s3": _S3_OPTIONS,
    "mooncakestore": _MOONCAKE_OPTIONS,
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
        extra: ``extra_config``; its keys belong to whatever the URL names.
        names: field -> how it was written, for messages.
    """

    url: str | None = None
    serde: str | None = None
    seconds: float | None = None
    extra: dict[str, object] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def update(self, later: Remote) -> None:
        """Lay ``later``, which wins, over this one."""
        self.url = later.url or self.url
        self.serde = later.serde or self.serde
        self.seconds = later.seconds if later.seconds is not None else self.seconds
        self.extra = later.extra or self.extra
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


def remote_tier(remote: Remote, warn: Callable[[str], None]) -> dict[str, object] | None:
    """The tier that the keys describe, in LMKV's names; ``None`` where they describe none.

    Args:
        warn: told of every key that has no effect.

    Raises:
        ConfigError: a URL without a scheme, or an encoding that nobody has.
    """
    where_extra = remote.names.get("extra", "extra_config")
    tier: dict[str, object] | None = None
    options: dict[str, object] = {}
    known: Mapping[str, str] = {}
    always: tuple[str, ...] = ()
    if remote.url:
        where = remote.names.get("url", "remote_url")
        scheme, there, rest = remote.url.strip().partition("://")
        if not there or not scheme:
            raise ConfigError(f"{where}: expected scheme://host:port, such as redis://localhost:6379; got no scheme")
        codec = _codec(remote, warn)
        if scheme == "lm":
            warn(f"{where}: lm:// has no effect: LMKV does not speak to LMCache's own server; use redis:// or another storage")
        else:
            known = _EXTRA.get(scheme, {})
            tier = {"name": "remote", "url": f"{scheme}://{rest}", "codec": codec, "options": options}
            always = _ALWAYS.get(scheme, ())
            seconds = remote.seconds or (remote.extra.get("transfer_timeout") if scheme == "mooncakestore" else None)
            if seconds:
                tier["deadline_seconds"] = seconds
    for key, value in remote.extra.items():
        if value is None or value is False or value == "":
            continue
        if key in known:
            options[known[key]] = value
        elif key in always or (key == "transfer_timeout" and tier and tier.get("deadline_seconds") == value):
            continue
        else:
            warn(f"{where_extra}.{key} has no effect: LMKV has no use for it")
    return tier
