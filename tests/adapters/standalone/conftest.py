"""Real services on free loopback ports, and KV whose bytes follow from the text."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmkv
from lmkv.adapters.standalone import StoreClient

#: The service needs the extra ``standalone``; the framing does not.
NEED_AIOHTTP = ["test_client.py", "test_docs.py", "test_limits.py", "test_options.py", "test_service.py"]
collect_ignore = [] if importlib.util.find_spec("aiohttp") else NEED_AIOHTTP

#: Chunks of 8 tokens; 3 layers, 2 heads of 4 float16: 96 bytes a token.
SPEC = "(2,3,8,2,4):float16:3"
LAYOUT = lmkv.KVLayout.parse(SPEC)


def clean_environ(**extra: str) -> dict[str, str]:
    """This process's environment without settings of a store."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("LMKV_", "LMCACHE_"))}
    return {**environ, **extra}


class Service:
    """One service process."""

    def __init__(self, args: tuple[str, ...], env: dict[str, str]) -> None:
        command = [sys.executable, "-m", "lmkv.standalone", "--port", "0", *args]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environ(**env)
        )
        assert self.process.stdout is not None
        self.banner = self.process.stdout.readline()
        found = re.search(r"http://\S+:(\d+)", self.banner)
        if not found:
            self.process.wait(20)
            raise AssertionError(f"no banner: {self.banner!r}, {self.errors()!r}")
        self.url, self.port = found[0], int(found[1])

    def errors(self) -> str:
        """Standard error; only once the process has ended."""
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def client(self, token: str | None = None, **options: Any) -> StoreClient:
        return StoreClient(self.url, token, **options)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(30)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


Serve = Callable[..., Service]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """``serve(*args, env={})`` starts a service that ends with the test. No disk unless the arguments name one."""
    started: list[Service] = []

    def start(*args: str, env: dict[str, str] | None = None) -> Service:
        words = " ".join(args)
        if "shape" not in words:
            args = ("--kvcache-shape-spec", SPEC, *args)
        if "disk" not in words:
            args = ("--disk-capacity", "0", *args)
        if "ram" not in words and "config" not in words:
            args = ("--ram-capacity", "4MiB", *args)
        started.append(Service(args, env or {}))
        return started[-1]

    yield start
    for service in started:
        service.end()


@pytest.fixture(scope="module")
def running() -> Iterator[Service]:
    """One service for the tests of a module that leave it as they found it."""
    service = Service(("--kvcache-shape-spec", SPEC, "--disk-capacity", "0", "--ram-capacity", "8MiB"), {})
    yield service
    service.end()


@pytest.fixture
def layout() -> lmkv.KVLayout:
    return LAYOUT


@pytest.fixture
def make_kv() -> Callable[..., Any]:
    """``make_kv(tokens)``: KV bytes [layers, kv, heads, tokens, head_size] that follow from tokens and their positions."""
    return kv_of


def kv_of(tokens: Any, layout: lmkv.KVLayout = LAYOUT) -> Any:
    ids = np.asarray(tokens, dtype=np.uint64)
    group = layout.groups[0]
    shape = (group.layers, group.kv, group.heads, 1, group.head_size)
    salt = np.arange(np.prod(shape), dtype=np.uint64).reshape(shape)
    position = np.arange(len(ids), dtype=np.uint64)
    mixed = (ids + position * 7919)[:, None] * 2654435761 + salt * 40503
    return (mixed >> 7).astype(np.uint16)


@pytest.fixture
def text(request: pytest.FixtureRequest) -> Callable[[int], list[int]]:
    """``text(n)``: n tokens that no other test uses."""
    rng = np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))
    return lambda n: rng.integers(0, 2**32, n, dtype=np.uint64).tolist()


@pytest.fixture
def tmp_disk(tmp_path: Path) -> tuple[str, ...]:
    """Arguments for a small disk tier of the test's own."""
    return ("--disk-path", str(tmp_path / "disk"), "--disk-capacity", "32MiB")
