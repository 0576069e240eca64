"""The lm:// path beside LMCache's own client and server: ``python tests/bench/lm.py [--json]``.

LMCache is installed into a temporary environment of its own. One object a line with ``--json``: name, value, unit, reference,
ratio; ``reference`` is LMCache's client at LMCache's server in the same run, taken in turn with ours. Medians.
"""

from __future__ import annotations

import argparse
import contextlib
import json
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
from lmkv.chunks import ChunkKey

LAYOUT = lmkv.KVLayout.dense(layers=28, heads=4, head_size=128, dtype="bfloat16")
VALUES, ROUNDS = 8, 11
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


def main() -> int:
    """Print all figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        python = lmcache_venv.make(folder)
        theirs = stack.enter_context(served(python, "-m", "lmcache.v1.server"))
        ours = stack.enter_context(served(sys.executable, *LMKV_SERVER))
        for shape in ((8, 256, 1024), (4, 256, 128)):
            size = 4 * shape[0] * shape[1] * shape[2]
            connectors = {name: Theirs(python, port, shape) for name, port in (("theirs", theirs), ("mixed", ours))}
            for connector in connectors.values():
                stack.callback(connector.close)
            pairs: dict[str, Ours | Theirs] = {**connectors, "ours": Ours(ours, size), "at_theirs": Ours(theirs, size)}
            for what in ("put", "get"):
                found = in_turn(pairs, what, size)
                for name, value in (("", "ours"), (".their_client", "mixed"), (".our_client_their_server", "at_theirs")):
                    row = {
                        "name": f"lm.{what}.{size // 1024}KiB{name}", "value": round(found[value], 3), "unit": "GB/s",
                        "reference": round(found["theirs"], 3), "ratio": round(found[value] / found["theirs"], 2),
                    }  # fmt: skip
                    plain = "{name:<44} {value:8} {unit}  lmcache {reference:8}  x {ratio}"
                    print(json.dumps(row) if args.json else plain.format(**row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
