"""Values in memory that LMKV's client and server share: peers that misbehave, and processes that end or stop."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lm_servers
import pytest
import servers
from lm_servers import open_at
from lm_shared import FREE, KEYS, MIB, NAMES, READY, Raw, at_rest, fetch, page_of, running, some

from lmkv.adapters.lmcache.lm_server import ServerLimits
from lmkv.backends.lm_shared import LEAST_BYTES, Shared
from lmkv.backends.lm_wire import Code, Command
from lmkv.errors import BackendUnavailableError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a memfd is Linux's")


# -- peers that misbehave ------------------------------------------------------------------------------------------------------


def test_the_memory_keeps_its_size() -> None:
    with running() as server:
        assert server.shelf.arena is not None
        memory = server.shelf.arena.descriptor
        for size in (0, MIB, server.shelf.arena.size * 2):
            with pytest.raises(PermissionError):
                os.truncate(memory, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


@pytest.mark.parametrize("mark", [READY, FREE])
def test_a_mark_for_nothing_ends_the_connection(mark: bytes) -> None:
    with running() as server:
        with Raw(server) as client:
            client.sock.sendall(mark)
            assert client.ended()
        assert "expected no mark" in server.told[0]  # type: ignore[attr-defined]
        at_rest(server)


def test_room_is_refused_for_what_is_not_kept() -> None:
    with running(limits=ServerLimits(most_bytes=4 * MIB)) as server, Raw(server) as client:
        for size in (0, 1, LEAST_BYTES - 1, 4 * MIB + 1, 2**31 - 1):
            assert client.ask(Command.PUT, NAMES[0], size).code == Code.FAIL
        assert client.ask(Command.PUT, NAMES[0], 2 * MIB, shape=(2, 0, 0)).code == Code.FAIL
        assert client.ask(Command.PUT, NAMES[0], 2 * MIB, shape=(-1, 0, 0)).code == Code.FAIL
        assert server.shelf._promised == 0
        answers = [client.ask(Command.PUT, NAMES[n], 2 * MIB) for n in range(3)]
        assert [answer.code == Code.SUCCESS for answer in answers] == [True, True, False]
        assert len({answer.shape[0] for answer in answers[:2]}) == 2
        assert not any(server.shelf.contains(name) for name in NAMES)
        client.sock.close()
        at_rest(server)


def test_a_room_elsewhere_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as server:
        backend, value = open_at(server.address[1]), some(2 * MIB)
        backend.write_many(KEYS[:1], [memoryview(value)])
        for page in (-1, 2**31 - 1):
            monkeypatch.setattr(server, "_page", lambda _, page=page: page)
            for call in (lambda: fetch(backend, KEYS[:1]), lambda: backend.write_many(KEYS[:1], [memoryview(value)])):
                with pytest.raises(BackendUnavailableError, match="expected a room within"):
                    call()
        monkeypatch.undo()
        assert fetch(backend, KEYS[:1]) == [value]


def test_what_a_client_reads_stays_until_it_gives_it_back() -> None:
    with running(limits=ServerLimits(patience_seconds=0.1)) as server, Raw(server) as client:
        backend, value = open_at(server.address[1]), some(2 * MIB)
        backend.write_many(KEYS[:1], [memoryview(value)])
        answer = client.ask(Command.GET, NAMES[0])
        read = client.part(answer)
        pages = set()
        for turn in range(80):  # the key is replaced, and all memory is used in turn
            backend.write_many(KEYS[turn % 8 : turn % 8 + 1], [memoryview(bytes([turn]) * (2 * MIB))])
            pages.add(page_of(server, turn % 8))
        assert read.tobytes() == value
        assert answer.shape[0] not in pages
        client.sock.sendall(FREE)
        assert client.ask(Command.EXIST, NAMES[0]).code == Code.SUCCESS
        spares, arena = server.shelf._spares, server.shelf.arena
        assert arena is not None
        places = {arena.page(memoryview(memory)) for memory in [*spares._ready, *spares._back]}
        assert answer.shape[0] in places | {place // 4096 for place in arena._free[21]}, "it would be lost for ever"


@pytest.mark.parametrize("nonsense", [b"", b"\x63" * 186])
def test_a_room_that_a_client_may_write_to_is_nobody_elses(nonsense: bytes) -> None:
    with running(limits=ServerLimits(patience_seconds=0.1)) as server, Raw(server) as client:
        backend = open_at(server.address[1])
        answer = client.ask(Command.PUT, NAMES[9], 2 * MIB)
        client.sock.sendall(nonsense)  # over which the server parts from it, but not from its room
        time.sleep(1.5)
        for turn in range(80):
            value = bytes([turn]) * (2 * MIB)
            backend.write_many(KEYS[turn % 8 : turn % 8 + 1], [memoryview(value)])
            client.part(answer)[:] = 255
            assert fetch(backend, KEYS[turn % 8 : turn % 8 + 1]) == [value]
        assert backend.contains_many(KEYS[9:10]) == [False]
        assert server.shelf._promised > 2 * MIB
        if not nonsense:
            client.sock.sendall(READY)
            servers.until(lambda: backend.contains_many(KEYS[9:10]) == [True])
            assert fetch(backend, KEYS[9:10]) == [b"\xff" * (2 * MIB)]
        client.sock.close()
        backend.close()
        at_rest(server)


# -- processes that end or stop ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server_process() -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-c", "import sys; from lmkv.cli import main; sys.exit(main())", "serve", "127.0.0.1", "0"]
    command += ["--ram-capacity", "512MiB"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().split("lm://127.0.0.1:")[1].split(" ")[0])
            with contextlib.closing(open_at(port)) as backend:
                full = 0
                while full < 2:  # until all lie in rooms, whose memory comes back when they are replaced
                    with Probe() as probe:
                        backend.write_many(KEYS[8:], [memoryview(bytes(2 * MIB))] * 8)
                    full = full + 1 if probe.count == 8 else 0
            yield process, port
        finally:
            process.kill()


class Probe:
    """What is done when the client comes to a room, before it copies; counts."""

    def __init__(self, do: Callable[[], object] = lambda: None, at: int = 1) -> None:
        self.count = 0
        self.do, self.at, self.real = do, at, Shared.part

    def __enter__(self) -> Probe:
        def part(shared: Shared, page: int, size: int) -> object:
            self.count += 1
            if self.count == self.at:
                self.do()
            return self.real(shared, page, size)

        Shared.part = part  # type: ignore[method-assign,assignment]
        return self

    def __exit__(self, *_: object) -> None:
        Shared.part = self.real  # type: ignore[method-assign]


CLIENT = """
import sys, time
sys.path[:0] = sys.argv[2:]
import lm_servers
from lmkv.backends.lm_shared import Shared
from lmkv.chunks import ChunkKey

def part(shared, page, size, real=Shared.part):
    room = real(shared, page, size)
    room[: size // 2] = 110
    print("in the middle", flush=True)
    time.sleep(60)
    return room

Shared.part = part
backend = lm_servers.open_at(int(sys.argv[1]), deadline=60.0)
backend.write_many([ChunkKey(bytes([1]) * 16)], [memoryview(b"n" * (2 << 20))])
"""


def test_a_client_that_is_killed_within_a_put_leaves_what_was_there() -> None:
    with running() as server:
        backend, value = open_at(server.address[1]), some(2 * MIB)
        backend.write_many(KEYS[:1], [memoryview(value)])
        command = [sys.executable, "-c", CLIENT, str(server.address[1]), str(Path(lm_servers.__file__).parent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "in the middle\n"
            assert server.shelf._promised > 2 * MIB
            assert fetch(backend, KEYS[:1]) == [value]
            process.kill()
        servers.until(lambda: server.shelf._promised == 0)
        assert fetch(backend, KEYS[:1]) == [value]


def test_a_server_that_is_killed_within_a_get_gives_none_of_it() -> None:
    told: list[str] = []
    with server_process() as (process, port):
        backend, values = open_at(port, told=told), [some(2 * MIB, n) for n in range(3)]
        with Probe() as probe:
            backend.write_many(KEYS[8:11], [memoryview(value) for value in values])
        assert probe.count == 3

        def kill() -> None:
            process.kill()
            process.wait()

        with Probe(kill, at=2), pytest.raises(BackendUnavailableError):
            fetch(backend, KEYS[8:11])
        assert any("in the middle of a value" in line for line in told)


def stop(process: subprocess.Popen[str]) -> None:
    """Stop all of it, which takes a moment."""
    process.send_signal(signal.SIGSTOP)
    tasks = list(Path(f"/proc/{process.pid}/task").iterdir())
    servers.until(lambda: all((task / "stat").read_text().rsplit(")", 1)[1].split()[0] == "T" for task in tasks))


def test_a_server_that_stops_costs_the_deadline_and_keeps_whole_values() -> None:
    with server_process() as (process, port):
        steady, values = open_at(port), [some(2 * MIB, n) for n in range(4)]
        steady.write_many(KEYS[8:10], [memoryview(value) for value in values[:2]])
        for what in ("put", "get"):
            hasty, room = open_at(port, deadline=1.0), [memoryview(bytearray(2 * MIB)) for _ in range(4)]
            assert hasty.contains_many(KEYS[8:9]) == [True]
            calls: dict[str, Callable[[], object]] = {
                "put": lambda hasty=hasty: hasty.write_many(KEYS[8:10], [memoryview(value) for value in values[2:]]),
                "get": lambda hasty=hasty, room=room: hasty.read_many([*KEYS[8:10]] * 2, room),
            }
            begin = time.monotonic()
            with (
                Probe(lambda: stop(process)) as probe,
                pytest.raises(BackendUnavailableError, match="in time"),
            ):
                calls[what]()
            assert probe.count
            assert time.monotonic() - begin < 20
            left = [bytes(view) for view in room]
            process.send_signal(signal.SIGCONT)
            found = fetch(steady, KEYS[8:10])
            assert all(value in (old, new) for value, old, new in zip(found, values[:2], values[2:], strict=True))
            assert [bytes(view) for view in room] == left, "bytes came after the deadline"
        hasty.write_many(KEYS[8:10], [memoryview(value) for value in values[2:]])
        assert fetch(hasty, KEYS[8:10]) == fetch(steady, KEYS[8:10]) == values[2:]
