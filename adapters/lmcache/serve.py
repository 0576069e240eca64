"""``lmkv serve HOST PORT``: keeps values for clients of LMCache's ``lm://`` protocol, in place of ``lmcache_server``."""

from __future__ import annotations

import argparse
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lmkv.backends.lm_shared import Arena
from lmkv.backends.lm_wire import MOST_BYTES, MOST_KEY_BYTES, TOKEN_KEY
from lmkv.config import parse_bytes
from lmkv.errors import ConfigError

from ..access import is_loopback, read_token
from .behind import Behind
from .config import load_config
from .lm_server import LmServer, ServerLimits
from .shelf import Shelf

__all__ = ["ServeOptions", "main", "parse_arguments"]


#: What is kept ready at most, unless more is asked for.
_MOST_AHEAD = 256 * 1024**2


@dataclass(frozen=True)
class ServeOptions:
    """Everything that the server needs to start.

    Args:
        host, port: to listen on; port 0 picks a free one.
        capacity: bytes of values in memory, with what a key costs.
        policy: the eviction policy's name.
        limits: what clients may ask for.
        tier: url of a tier behind memory, or ``""``.
        ahead: bytes of the capacity that are kept ready for values to come.
        warnings: lines for the person who started it.
    """

    host: str
    port: int
    capacity: int
    policy: str
    limits: ServerLimits
    tier: str = ""
    ahead: int = 0
    warnings: tuple[str, ...] = ()


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print and exit with."""

    def error(self, message: str) -> None:  # type: ignore[override]  # argparse declares NoReturn; raising is that
        raise ConfigError(f"command line: {message}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lmkv serve",
        description="Keeps values in memory for clients of LMCache's lm:// protocol, as lmcache_server does, within a quota.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("host", help="address to listen on")
    add("port", type=int, help="port to listen on, 0 for a free one; 65432 is the usual one")
    add("device", nargs="?", default="cpu", help="cpu, the only one there is")
    add(
        "--config",
        metavar="FILE",
        help="YAML file with LMKV's or LMCache's keys, whose RAM tier counts",
    )
    add("--ram-capacity", metavar="SIZE", help="bytes of values held (default: the config's, or 4GiB)")
    add("--ram-policy", metavar="NAME", help="lru, lfu, fifo, mru or s3fifo (default: the config's, or lru)")
    add(
        "--tier", default="", metavar="URL", help="also keep every value there: file:///path, redis://host:6379, s3://bucket, …"
    )
    add("--ahead", metavar="SIZE", help="of that, memory kept ready for values to come (default: a 16th, 256MiB at most)")
    add("--max-value", default="1GiB", metavar="SIZE", help="largest value taken (default %(default)s)")
    add("--max-connections", type=int, default=ServerLimits.most_connections, help="at once (default %(default)s)")
    add("--patience-seconds", type=float, default=ServerLimits.patience_seconds, help="for slow clients (default %(default)s)")
    add("--token-file", metavar="FILE", help="file that holds the token that LMKV's clients show; LMKV_TOKEN does too")
    add("--insecure", action="store_true", help="listen on other addresses than loopback without a token")
    return parser


def parse_arguments(argv: Sequence[str], environ: Mapping[str, str]) -> ServeOptions:
    """Options from a command line and an environment.

    Raises:
        ConfigError: an unknown flag, a wrong value, or an address that others reach without a token.
        SystemExit: after ``--help``.
    """
    args = _parser().parse_args([word.replace("_", "-") if word.startswith("--") else word for word in argv])
    if args.device != "cpu":
        raise ConfigError(f"device: expected cpu; got {args.device!r}: values are kept in host memory only")
    if not 0 <= args.port <= 65535:
        raise ConfigError(f"port: expected 0 to 65535; got {args.port}")
    if args.max_connections < 1 or not args.patience_seconds > 0:
        raise ConfigError("--max-connections, --patience-seconds: expected more than 0")
    given = {"ram_capacity": args.ram_capacity, "ram_policy": args.ram_policy}
    loaded = load_config(args.config, environ=environ, overrides={key: value for key, value in given.items() if value})
    warnings = list(loaded.warnings)
    behind = sorted(loaded.given & {"disk_path", "disk_paths", "tiers"})
    if behind:
        warnings.append(
            f"{', '.join(behind)} of the configuration have no effect on lmkv serve: --tier URL keeps values behind memory"
        )
    token = (read_token(args.token_file, environ, warnings) or "").encode()
    if len(TOKEN_KEY) + len(token) > MOST_KEY_BYTES:
        raise ConfigError(f"token: expected at most {MOST_KEY_BYTES - len(TOKEN_KEY)} bytes; got {len(token)}")
    if not is_loopback(args.host) and not token and not args.insecure:
        raise ConfigError(
            f"host: expected a loopback address, or a token; got {args.host!r} and no token: others could read and change the "
            "values. Say --insecure if the network is trusted (LMCache's own clients have no token to show), or set LMKV_TOKEN"
        )
    most = min(parse_bytes(args.max_value), MOST_BYTES)
    limits = ServerLimits(token, most, args.max_connections, args.patience_seconds)
    host = "127.0.0.1" if args.host.lower() == "localhost" else args.host.strip("[]")
    capacity = loaded.config.ram_capacity
    ahead = parse_bytes(args.ahead) if args.ahead is not None else min(capacity // 16, _MOST_AHEAD)
    if ahead > capacity // 2:
        raise ConfigError(f"--ahead: expected at most half of the {capacity} bytes of memory; got {args.ahead}")
    return ServeOptions(host, args.port, capacity, loaded.config.ram_policy, limits, args.tier, ahead, tuple(warnings))


def _say(line: str) -> None:
    print(f"lmkv serve: {line}", file=sys.stderr, flush=True)


def _teller() -> Callable[[str], None]:
    """Says lines beside the caller; what comes faster than it can be said is dropped."""
    lines: queue.Queue[str] = queue.Queue(100)

    def write() -> None:
        while True:
            _say(lines.get())

    def tell(line: str) -> None:
        if not lines.full():
            lines.put(line)

    threading.Thread(target=write, name="lmkv-serve-lines", daemon=True).start()
    return tell


def _stop() -> socket.socket:
    """Receives a byte once SIGTERM or SIGINT came.

    The interpreter sends it in whatever thread the system gives the signal to. Python's own handlers run in this one only,
    which is not woken then; and one that sets an event waits for ever if it comes while this thread holds that event's lock.
    """
    told, tells = socket.socketpair()
    tells.setblocking(False)
    signal.set_wakeup_fd(tells.detach(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return told


def make_arena(options: ServeOptions, tell: Callable[[str], None]) -> Arena | None:
    """Memory that clients of this machine share, where there can be some."""
    try:
        return Arena(options.capacity) if options.ahead else None
    except (OSError, ValueError) as error:
        tell(f"clients of this machine send values over a socket, as no memory can be shared: {error}")
        return None


def main(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status (0 done, 1 failed, 2 wrong arguments)."""
    try:
        options = parse_arguments(argv, os.environ if environ is None else environ)
        tell = _teller()
        shelf = Shelf(options.capacity, options.policy, options.ahead, make_arena(options, tell))
        behind = Behind(options.tier, options.limits.most_bytes, tell) if options.tier else None
    except ConfigError as error:
        print(f"lmkv serve: {error}", file=sys.stderr)
        return 2
    for warning in options.warnings:
        _say(f"warning: {warning}")
    stop = _stop()
    try:
        server = LmServer(shelf, options.host, options.port, options.limits, tell, behind)
    except OSError as error:
        _say(f"expected to listen on {options.host} port {options.port}; the system says: {error}")
        return 1
    server.start()
    host, port = server.address
    shown = f"[{host}]" if ":" in host else host
    held = f"{options.capacity / 1024**3:.4g} GiB, {options.policy}"
    print(f"LMKV serves lm://{shown}:{port} ({held}, {'with' if options.limits.token else 'without'} a token)", flush=True)
    stop.recv(1)
    server.close()
    if behind is not None:
        behind.close()
    _say(", ".join(f"{name} {count}" for name, count in shelf.stats().items()))
    return 0
