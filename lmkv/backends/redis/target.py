"""Where a Redis is and how to be let in: from the tier's URL and options, never shown with its credentials."""

from __future__ import annotations

import difflib
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...config import parse_bytes, read_secret
from ...errors import ConfigError
from ..base import BackendSettings, shown_url

__all__ = ["LEAST_PART", "RedisTarget"]

_SCHEMES = {
    "redis": ("single", False),
    "rediss": ("single", True),
    "valkey": ("single", False),
    "valkeys": ("single", True),
    "unix": ("single", False),
    "redis-sentinel": ("sentinel", False),
    "rediss-sentinel": ("sentinel", True),
    "redis-cluster": ("cluster", False),
    "rediss-cluster": ("cluster", True),
}
_PORTS = {"single": 6379, "sentinel": 26379, "cluster": 6379}
_SECRETS = ("password", "sentinel_password")
_TLS = ("ssl_cert_reqs", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname")
_KNOWN = frozenset(
    (
        "username",
        "sentinel_username",
        "db",
        "master",
        "prefix",
        "ttl_seconds",
        "part_bytes",
        *_TLS,
        *tuple(name + end for name in _SECRETS for end in ("", "_env", "_file")),
    )
)
DEFAULT_PART = 1020 * 1024
LEAST_PART, _MOST_PART = 64 * 1024, 64 * 1024**2


@dataclass(frozen=True)
class RedisTarget:
    """One Redis.

    Args:
        kind: ``single``, ``sentinel`` or ``cluster``.
        shown: the URL without credentials, for messages.
        nodes: host and port of the server, the sentinels, or some of the cluster's nodes; empty for a Unix socket.
        path: the Unix socket, or ``""``.
        login: what connections are made with besides their address: user, password, database, TLS.
        sentinel_login: the same for sentinels.
        master: the name that sentinels know the master by.
        prefix: what every key begins with.
        ttl_seconds: after which a value may go, counted from its writing; 0 = never.
        part_bytes: larger values are kept in parts of this size.
    """

    kind: str
    shown: str
    nodes: tuple[tuple[str, int], ...]
    path: str
    login: Mapping[str, Any] = field(repr=False)
    sentinel_login: Mapping[str, Any] = field(repr=False)
    tls: bool
    master: str
    prefix: str
    ttl_seconds: float
    part_bytes: int

    @classmethod
    def of(cls, settings: BackendSettings) -> RedisTarget:
        """The target that a tier's URL and options name. An option may also stand in the URL's query; the option wins.

        Raises:
            ConfigError: a part of the URL is missing or malformed, or an option unknown. Credentials are not repeated.
        """
        where = f"tier {settings.name}"
        url = settings.url
        if not url:
            raise ConfigError(f"{where}: expected a url such as redis://localhost:6379; got none")
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in _SCHEMES:
            raise ConfigError(f"{where}: expected a url of {', '.join(sorted(_SCHEMES))}; got {parts.scheme!r}")
        kind, tls = _SCHEMES[parts.scheme]
        options = {**dict(urllib.parse.parse_qsl(parts.query)), **settings.options}
        _check_names(where, options)
        login = dict(_credentials(where, parts, options))
        nodes = () if parts.scheme == "unix" else _nodes(where, parts.netloc, _PORTS[kind])
        path = urllib.parse.unquote(parts.path)
        if parts.scheme == "unix" and not path:
            raise ConfigError(f"{where}: expected unix:///path/of/the/socket; got no path")
        database = _database(where, options.get("db", "" if parts.scheme == "unix" else path.strip("/")))
        if kind == "cluster" and database:
            raise ConfigError(f"{where}: expected no database in front of a cluster, which has none; got {database}")
        if kind != "cluster":
            login["db"] = database
        login.update({name: options[name] for name in _TLS if name in options})
        if "ssl_check_hostname" in login:
            login["ssl_check_hostname"] = str(login["ssl_check_hostname"]).lower() in ("true", "yes", "on", "1")
        if not tls and any(name in options for name in _TLS):
            raise ConfigError(
                f"{where}: expected a url that begins with rediss where ssl_… options are set; got {parts.scheme}"
            )
        return cls(
            kind=kind,
            shown=shown_url(url),
            nodes=nodes,
            path=path if parts.scheme == "unix" else "",
            login=login,
            sentinel_login=_sentinel_login(where, options),
            tls=tls,
            master=str(options.get("master") or "mymaster"),
            prefix=str(options.get("prefix", "lmkv")),
            ttl_seconds=_seconds(where, options.get("ttl_seconds", 0)),
            part_bytes=_part_bytes(where, options.get("part_bytes", DEFAULT_PART)),
        )


def _check_names(where: str, options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in _KNOWN:
            near = difflib.get_close_matches(name, sorted(_KNOWN), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(_KNOWN))}"
            raise ConfigError(f"{where}: unknown option {name!r} of a Redis; {hint}")


def _nodes(where: str, netloc: str, port: int) -> tuple[tuple[str, int], ...]:
    nodes = []
    for text in netloc.rpartition("@")[2].split(","):
        try:
            part = urllib.parse.urlsplit("//" + text.strip())
            host, number = part.hostname, part.port if part.port is not None else port
        except ValueError:
            host, number = None, 0
        if not host or not 0 < number < 65536:
            raise ConfigError(f"{where}: expected host or host:port, separated by commas where there are several; got {text!r}")
        nodes.append((host, number))
    return tuple(nodes)


def _credentials(where: str, parts: urllib.parse.SplitResult, options: Mapping[str, Any]) -> Mapping[str, Any]:
    before = parts.netloc.rpartition("@")[0]
    name, _, password = before.partition(":")
    given = {
        "username": options.get("username") or urllib.parse.unquote(name),
        "password": read_secret(options, "password", where) or urllib.parse.unquote(password),
    }
    return {key: value for key, value in given.items() if value}


def _sentinel_login(where: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    given = {"username": options.get("sentinel_username"), "password": read_secret(options, "sentinel_password", where)}
    return {key: value for key, value in given.items() if value}


def _database(where: str, value: object) -> int:
    text = str(value or "0")
    if not text.isdigit():
        raise ConfigError(f"{where}: expected the number of a database behind the address; got {text!r}")
    return int(text)


def _seconds(where: str, value: object) -> float:
    try:
        seconds = float(str(value))
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e10:
        raise ConfigError(f"{where}: ttl_seconds: expected a number of seconds of at least 0 (0 = for ever); got {value!r}")
    return seconds


def _part_bytes(where: str, value: object) -> int:
    size = parse_bytes(value)
    if not LEAST_PART <= size <= _MOST_PART:
        raise ConfigError(f"{where}: part_bytes: expected {LEAST_PART} to {_MOST_PART} bytes; got {value!r}")
    return size
