"""What LMCache's keys of peer-to-peer sharing, disaggregated prefill and the controller say: roles, hosts and ports, checked.

A store shares through tiers and needs none of it; whoever writes a proxy, a deployment or a migration does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lmkv.errors import ConfigError

__all__ = ["KEYS", "Peers", "read_peers"]

_ROLES = ("sender", "receiver", "both")
_PORTS = (
    *("p2p_init_ports", "p2p_lookup_ports", "pd_peer_init_port", "pd_peer_alloc_port", "pd_peer_query_port"),
    "lmcache_worker_ports",
)
KEYS = frozenset(
    (
        *_PORTS,
        *("enable_p2p", "p2p_host", "enable_pd", "pd_role", "pd_peer_host", "pd_proxy_host", "pd_proxy_port", "pd_buffer_size"),
        *("pd_buffer_device", "transfer_channel", "enable_controller", "lmcache_instance_id"),
        *("controller_pull_url", "controller_reply_url"),
    )
)


@dataclass(frozen=True)
class Peers:
    """Who an engine exchanges KV with under LMCache.

    Args:
        shares: whether ``enable_p2p`` is on.
        role: ``sender`` (prefills), ``receiver`` (decodes) or ``both`` with ``enable_pd``; ``""`` without.
        hosts: ``p2p``, ``peer`` and ``proxy`` -> host, where given.
        ports: key, without ``_port`` or ``_ports`` at its end -> one port a worker.
        buffer_bytes, buffer_device, channel: of the transfer; 0 and ``""`` where not given.
        instance, controller: this engine's name, and the controller's pull and reply addresses, with ``enable_controller``.
    """

    shares: bool
    role: str
    hosts: Mapping[str, str]
    ports: Mapping[str, tuple[int, ...]]
    buffer_bytes: int
    buffer_device: str
    channel: str
    instance: str
    controller: tuple[str, ...]


def _on(value: object) -> bool:
    return str(value).strip().lower() in ("true", "yes", "on", "1")


def _numbers(name: str, value: object, where: str) -> tuple[int, ...]:
    """One port, a list of them, or a text with commas."""
    found = value if isinstance(value, (list, tuple)) else str(value).strip("[] ").split(",")
    try:
        ports = tuple(int(str(port)) for port in found)
    except ValueError:
        ports = ()
    if not ports or not all(0 < port < 65536 for port in ports):
        raise ConfigError(f"{where}: {name}: expected a port or a list of ports; got {value!r}")
    return ports


def read_peers(given: Mapping[str, object], where: str) -> Peers:
    """The peers that the keys describe; those that are absent or null are not given.

    Raises:
        ConfigError: a port, role or size that is none, or an enabled exchange without its role.
    """
    values = {key: value for key, value in given.items() if key in KEYS and value not in (None, "", "null", "None")}
    role = str(values.get("pd_role", "")).strip().lower()
    if role and role not in _ROLES:
        raise ConfigError(f"{where}: pd_role: expected one of {', '.join(_ROLES)}; got {values['pd_role']!r}")
    enabled = _on(values.get("enable_pd"))
    if enabled and not role:
        raise ConfigError(f"{where}: pd_role: expected one of {', '.join(_ROLES)} with enable_pd; got none")
    ports = {key.rpartition("_")[0]: _numbers(key, values[key], where) for key in _PORTS if key in values}
    if "pd_proxy_port" in values:
        ports["pd_proxy"] = _numbers("pd_proxy_port", values["pd_proxy_port"], where)
    hosts = {"p2p": "p2p_host", "peer": "pd_peer_host", "proxy": "pd_proxy_host"}
    try:
        size = int(str(values.get("pd_buffer_size", 0)))
    except ValueError:
        raise ConfigError(f"{where}: pd_buffer_size: expected a number of bytes; got {values['pd_buffer_size']!r}") from None
    controlled = _on(values.get("enable_controller"))
    urls = [str(values[key]) for key in ("controller_pull_url", "controller_reply_url") if key in values]
    return Peers(
        shares=_on(values.get("enable_p2p")),
        role=role if enabled else "",
        hosts={name: str(values[key]) for name, key in hosts.items() if key in values},
        ports=ports,
        buffer_bytes=size,
        buffer_device=str(values.get("pd_buffer_device", "")),
        channel=str(values.get("transfer_channel", "")),
        instance=str(values.get("lmcache_instance_id", "")) if controlled else "",
        controller=tuple(urls) if controlled else (),
    )
