"""The lm:// path beside LMCache's own client and server: ``python tests/bench/lm.py [--json]``.

LMCache is installed into a temporary environment of its own. One object a line with ``--json``: name, value, unit, reference,
ratio; ``reference`` is LMCache's client at LMCache's server in the same run, taken in turn with ours. Medians.

Rows ``.fresh`` put values of 8 MiB one by one under new keys, each confirmed by EXIST, so that a server needs new memory for
each; ``reference`` is a plain socket at LMCache's server there. ``--busy 2`` keeps two processors busy beside all of it.
LMKV's client reaches LMKV's server over its Unix socket and by shared memory, as both are on one machine; all others use TCP.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import lmcache_venv
import numpy as np
import servers

import lmkv
from lmkv.backends import BackendSettings, open_backend
from lmkv.backends.lm_wire import ANSWER_BYTES, Answer, Code, Command, Request
from lmkv.chunks import ChunkKey

LAYOUT = lmkv.KVLayout.dense(layers=28, heads=4, head_size=128, dtype="bfloat16")
VALUES, ROUNDS, FRESH = 8, 11, 24
LMKV_SERVER = ("-c", "import sys; from lmkv.cli import main; sys.exit(main())", "serve")


@contextlib.contextmanager
def served(*command: str) -> Iterator[int]:
    """A server process on loopback; its port."""
    (port,) = servers.free_ports(1)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, "127.0.0.1", str(port)], stdout=log, stderr=log)
        try:
            servers.until(lambda: servers.listens(port), 60)
            yield port
        finally:
            process.terminate()
            process.wait(20)


class Ours:
    """LMKV's backend at a server."""

    def __init__(self, port: int, size: int) -> None:
        url = f"lm://127.0.0.1:{port}"
        self.backend = open_backend("lm", BackendSettings("remote", LAYOUT, url=url, deadline_seconds=120.0))
        self.keys = [ChunkKey(number.to_bytes(16, "big")) for number in range(VALUES)]
        self.values = [memoryview(np.random.default_rng(number).bytes(size)) for number in range(VALUES)]
        self.room = [memoryview(bytearray(size)) for _ in self.keys]
        self.size = size

    def seconds(self, what: str) -> float:
        """How long writing, with the confirmation that it arrived, or reading takes."""
        begun = time.perf_counter()
        if what == "put":
            self.backend.write_many(self.keys, self.values)
        elif self.backend.read_many(self.keys, self.room) != [self.size] * VALUES:
            raise AssertionError("expected every value back")
        taken = time.perf_counter() - begun
        if what == "get" and self.room != self.values:
            raise AssertionError("expected the bytes that were stored")
        return taken


class Theirs:
    """LMCache's connector at a server, in a process of its own."""

    def __init__(self, python: str, port: int, shape: tuple[int, int, int]) -> None:
        path = Path(__file__).parents[1] / "support" / "lmcache_client.py"
        command = [python, str(path), str(port), *map(str, shape), str(VALUES)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def seconds(self, what: str) -> float:
        """As :meth:`Ours.seconds`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise AssertionError("expected seconds; the client ended")

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(20)


def in_turn(pairs: Mapping[str, Ours | Theirs], what: str, size: int) -> dict[str, float]:
    """Median GB/s of each pair of client and server, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in pairs}
    names = list(pairs)
    for number in range(ROUNDS + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            taken = pairs[name].seconds(what)
            if number:
                times[name].append(taken)
    return {name: size * VALUES / 1e9 / statistics.median(taken) for name, taken in times.items()}


class Plain:
    """A plain socket at a server, one new value at a time."""

    def __init__(self, port: int, size: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.value, self.room = os.urandom(size), memoryview(bytearray(size))
        self.number = 0

    def _ask(self, command: Command, length: int = 0) -> bytes:
        shape = (2, 8, 256, length // 8192) if length else (0, 0, 0, 0)
        return Request(command, b"m@1@0@%x@half" % self.number, length, shape=shape).pack()

    def _answer(self) -> Answer:
        return Answer.unpack(self.sock.recv(ANSWER_BYTES, socket.MSG_WAITALL))

    def seconds(self, what: str) -> float:
        """How long writing a new value takes, with the confirmation, or reading it."""
        begun = time.perf_counter()
        if what == "put":
            self.number += 1
            self.sock.sendall(self._ask(Command.PUT, len(self.value)))
            self.sock.sendall(self.value)
            self.sock.sendall(self._ask(Command.EXIST))
            assert self._answer().code == Code.SUCCESS
            return time.perf_counter() - begun
        self.sock.sendall(self._ask(Command.GET))
        assert self._answer().length == len(self.room)
        got = 0
        while got < len(self.room):
            got += self.sock.recv_into(self.room[got:])
        taken = time.perf_counter() - begun
        assert self.room == self.value
        return taken


class OursFresh:
    """LMKV's backend at a server, one new value at a time."""

    def __init__(self, port: int, size: int) -> None:
        url = f"lm://127.0.0.1:{port}"
        self.backend = open_backend("lm", BackendSettings("remote", LAYOUT, url=url, deadline_seconds=120.0))
        self.value, self.room = memoryview(os.urandom(size)), memoryview(bytearray(size))
        self.number = 1 << 32

    def seconds(self, what: str) -> float:
        """As :meth:`Plain.seconds`."""
        self.number += what == "put"
        key = ChunkKey(self.number.to_bytes(16, "big"))
        begun = time.perf_counter()
        if what == "put":
            self.backend.write_many([key], [self.value])
            return time.perf_counter() - begun
        assert self.backend.read_many([key], [self.room]) == [len(self.room)]
        taken = time.perf_counter() - begun
        assert self.room == self.value
        return taken


def fresh(theirs: int, ours: int, size: int) -> dict[str, dict[str, float]]:
    """Median GB/s of new values by operation, clients taking turns."""
    clients = {"theirs": Plain(theirs, size), "mixed": Plain(ours, size), "ours": OursFresh(ours, size)}
    times: dict[str, dict[str, list[float]]] = {what: {name: [] for name in clients} for what in ("put", "get")}
    for number in range(FRESH + 1):
        for name in [*clients][number % 3 :] + [*clients][: number % 3]:
            for what in ("put", "get"):
                taken = clients[name].seconds(what)
                if number:
                    times[what][name].append(taken)
    return {
        what: {name: size / 1e9 / statistics.median(taken) for name, taken in found.items()} for what, found in times.items()
    }


def show(name: str, value: float, reference: float, *, as_json: bool) -> None:
    """Print a figure."""
    row = {
        "name": name, "value": round(value, 3), "unit": "GB/s", "reference": round(reference, 3),
        "ratio": round(value / reference, 2),
    }  # fmt: skip
    plain = "{name:<44} {value:8} {unit}  lmcache {reference:8}  x {ratio}"
    print(json.dumps(row) if as_json else plain.format(**row), flush=True)


def main() -> int:
    """Print all figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="keep that many processors busy beside it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        python = lmcache_venv.make(folder)
        for _ in range(args.busy):
            loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(loop.wait)
            stack.callback(loop.kill)
        theirs = stack.enter_context(served(python, "-m", "lmcache.v1.server"))
        ours = stack.enter_context(served(sys.executable, *LMKV_SERVER))
        for what, found in fresh(theirs, ours, 8 * 1024**2).items():
            for name, value in (("", "ours"), (".plain_client", "mixed")):
                show(f"lm.{what}.8192KiB.fresh{name}", found[value], found["theirs"], as_json=args.json)
        for shape in ((8, 256, 1024), (4, 256, 128)):
            size = 4 * shape[0] * shape[1] * shape[2]
            connectors = {name: Theirs(python, port, shape) for name, port in (("theirs", theirs), ("mixed", ours))}
            for connector in connectors.values():
                stack.callback(connector.close)
            pairs: dict[str, Ours | Theirs] = {**connectors, "ours": Ours(ours, size), "at_theirs": Ours(theirs, size)}
            for what in ("put", "get"):
                found = in_turn(pairs, what, size)
                for name, value in (("", "ours"), (".their_client", "mixed"), (".our_client_their_server", "at_theirs")):
                    show(f"lm.{what}.{size // 1024}KiB{name}", found[value], found["theirs"], as_json=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
