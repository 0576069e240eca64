"""LMCache's ``remote_url`` where it is no URL of a tier of LMKV's: other schemes for the same storages, and other forms."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lmkv.errors import ConfigError

__all__ = ["Place", "place_of"]

#: Hosts of Amazon's buckets; LMCache names a bucket by its host.
_AMAZON = re.compile(
    r"(?P<bucket>.+)\.s3(?P<express>express-[a-z0-9-]+)?(?:\.dualstack)?(?:[.-](?P<region>[a-z]{2}(?:-[a-z]+)+-\d))?"
    r"\.amazonaws\.com(?:\.cn)?"
)
#: What LMCache has and LMKV has not, and what to do.
_ELSEWHERE = {
    **dict.fromkeys(
        ("external", "plugin"), "a storage of your own is a backend: register it as an entry point (docs/writing-a-backend.md)"
    ),
    "mock": "a storage that only takes time is for tests of LMCache's",
    "eic": "list another slow tier, such as redis:// or s3://",
    "sagemaker-hyperpod": "list another slow tier, such as s3:// or file:///mnt/shared",
    "hf3fs": "3FS is a tier {backend: nixl, options: {plugin: HF3FS, path: …}}, or file:///mountpoint/folder",
}


@dataclass
class Place:
    """A tier of LMKV's.

    Args:
        scheme: whose keys of ``extra_config`` count, as LMCache has it.
        url: in LMKV's terms; ``""`` where nothing is kept.
        options: of its backend, as far as the URL says them.
    """

    scheme: str
    url: str
    options: dict[str, object] = field(default_factory=dict)


def _on(value: object) -> bool:
    return str(value).strip().lower() in ("true", "yes", "on", "1")


def place_of(url: str, extra: Mapping[str, object], actual: str, where: str, warn: Callable[[str], None]) -> Place:
    """The tier that LMCache's URL means.

    Args:
        extra: ``extra_config``.
        actual: ``audit_actual_remote_url``, which ``audit://`` stands before.
        where: what messages call the URL.
        warn: told of what is served in another way.

    Raises:
        ConfigError: no scheme, a storage that LMKV does not have, or a URL without its directory.
    """
    given, there, rest = url.strip().partition("://")
    scheme = given.lower()
    if not there or not scheme:
        raise ConfigError(f"{where}: expected scheme://host:port, such as redis://localhost:6379; got no scheme")
    if scheme == "audit":
        real = str(extra.get("audit_actual_remote_url") or actual)
        if not real or real.lower().startswith("audit://"):
            raise ConfigError(f"{where}: expected audit_actual_remote_url to name the storage behind audit://; got {real!r}")
        warn(f"{where}: audit:// is left out: what it stands before is used, whose values carry checksums here")
        return place_of(real, extra, "", f"{where}: audit_actual_remote_url", warn)
    if scheme == "blackhole":
        warn(f"{where}: blackhole:// has no effect: it keeps nothing, so there is no such tier")
        return Place(scheme, "")
    if scheme in _ELSEWHERE:
        raise ConfigError(f"{where}: expected a storage that LMKV has; got {scheme}://: {_ELSEWHERE[scheme]}")
    if scheme == "resp":
        return Place("redis", f"redis://{rest}")
    if scheme == "valkey" and str(extra.get("valkey_mode", "")).lower() == "cluster":
        return Place(scheme, f"redis-cluster://{rest.replace('valkey://', '')}")
    if scheme == "fs":
        return _directory(rest, where)
    if scheme == "s3":
        return _bucket(rest, extra, where, warn)
    return Place(scheme, f"{scheme}://{rest}")


def _directory(rest: str, where: str) -> Place:
    """``fs://host:port/path``, of which LMCache takes the path alone."""
    path = urllib.parse.urlsplit(f"fs://{rest}").path
    if path.strip("/") == "" or "," in path:
        raise ConfigError(f"{where}: expected one directory, fs://host:port/path (file:///path here); got fs://{rest}")
    return Place("fs", f"file://{path}")


def _bucket(rest: str, extra: Mapping[str, object], where: str, warn: Callable[[str], None]) -> Place:
    """A bucket's host (``bucket.s3.region.amazonaws.com``, or of another storage with its port), or a bucket's name."""
    host, slash, path = rest.partition("/")
    amazons = _AMAZON.fullmatch(host)
    if amazons is not None:
        if amazons["express"]:
            warn(f"{where}: an S3 Express bucket is taken for a usual one: if it refuses that, use one of those")
        options: dict[str, object] = {"region": amazons["region"]} if amazons["region"] else {}
        return Place("s3", f"s3://{amazons['bucket']}{slash}{path}", options)
    if ":" in host and "@" not in host:
        way = "http" if _on(extra.get("disable_tls")) else "https"
        options = {"endpoint": f"{way}://{host}", "virtual_hosted_style_request": "true"}
        return Place("s3", f"s3://{host.partition('.')[0].partition(':')[0]}{slash}{path}", options)
    return Place("s3", f"s3://{rest}")
