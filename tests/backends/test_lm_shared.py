"""Values in memory that LMKV's client and server share: every size, every fault, and no other bytes."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lm_servers
import numpy as np
import pytest
import servers
from lm_servers import open_at

from lmkv.adapters.lmcache.lm_server import LmServer, ServerLimits
from lmkv.backends import Backend
from lmkv.backends.lm_shared import LEAST_BYTES, LENT, SHARED_KEY, Arena, Shared, join
from lmkv.backends.lm_wire import Answer, Code, Command, Request, local_name
from lmkv.chunks import ChunkKey
from lmkv.errors import BackendUnavailableError, CapacityError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a memfd is Linux's")

KEYS = [ChunkKey(bytes([i]) * 16) for i in range(1, 17)]
NAMES = [b"lmkv@1@0@%b@uint8" % key.hex().encode() for key in KEYS]
MIB = 1 << 20
READY, FREE = b"\xfe", b"\xff"


def some(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def shares(backend: Backend) -> list[bool]:
    return [connection.shared is not None for connection in backend._resting]  # type: ignore[attr-defined]


def fetch(backend: Backend, keys: list[ChunkKey], room: int = 9 * MIB) -> list[bytes | None]:
    buffers = [memoryview(bytearray(room)) for _ in keys]
    sizes = backend.read_many(keys, buffers)
    return [None if size is None else bytes(buffer[:size]) for size, buffer in zip(sizes, buffers, strict=True)]


@contextlib.contextmanager
def running(size: int = 2 * MIB, capacity: int = 192 * MIB, limits: ServerLimits | None = None) -> Iterator[LmServer]:
    """A server with rooms of one size ready in shared memory."""
    with lm_servers.running(capacity, limits=limits, ahead=64 * MIB) as server:
        spares = server.shelf._spares
        for _ in range(8):
            spares.take(size)
        servers.until(lambda: (len(spares._ready) + len(spares._back)) == 64 * MIB // size)
        yield server


def at_rest(server: LmServer) -> None:
    """Nothing is promised any more, once all clients have gone."""
    servers.until(lambda: server.connections() == 0)
    servers.until(lambda: server.shelf._promised == 0)
    server.shelf._check()


def page_of(server: LmServer, number: int) -> int | None:
    """Where a value lies in shared memory."""
    value = server.shelf.get(NAMES[number])
    assert value is not None
    return server._page(value.data)


class Raw:
    """A client on the Unix socket, which does what it is told to."""

    def __init__(self, server: LmServer, joined: bool = True) -> None:
        shape = Answer.unpack(server._greeting).shape
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(local_name((shape[2], shape[3])))
        self.shared = join(self.sock) if joined else None

    def ask(self, command: Command, name: bytes, size: int = 0, shape: tuple[int, int, int] = (0, 0, 0)) -> Answer:
        self.sock.sendall(Request(command, name, size, LENT, 0, (size, *shape)).pack())
        return Answer.unpack(self.exact(36))

    def exact(self, size: int) -> bytes:
        found = bytearray()
        while len(found) < size and (piece := self.sock.recv(size - len(found))):
            found += piece
        return bytes(found)

    def part(self, answer: Answer) -> np.ndarray:  # type: ignore[type-arg]
        assert self.shared is not None
        assert answer.fmt == LENT
        return self.shared.part(answer.shape[0], answer.length)

    def ended(self) -> bool:
        with contextlib.suppress(ConnectionError):
            while self.sock.recv(4096):
                pass
        return True

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


# -- values --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [{}, {"token": "secret"}])
@pytest.mark.parametrize("size", [LEAST_BYTES, LEAST_BYTES + 1, MIB - 1, 5 * MIB + 4097])
def test_values_come_back(size: int, token: dict[str, str]) -> None:
    with running(size, limits=ServerLimits(token=token.get("token", "").encode())) as server:
        backend, other = open_at(server.address[1], **token), open_at(server.address[1], **token)
        small = [1, LEAST_BYTES - 1, size - 1, size + 1]  # these go over the socket
        for turn in range(3):
            values = [some(size if n % 3 else small[n // 3 % 4], 100 * turn + n) for n in range(9)]
            backend.write_many(KEYS[:9], [memoryview(value) for value in values])
            for reader in (backend, other):
                assert fetch(reader, [*KEYS[:9], KEYS[15]]) == [*values, None]
                assert fetch(reader, KEYS[8::-1], size - 1) == [v if len(v) < size else None for v in values[::-1]]
            assert [page_of(server, n) is not None for n in range(9)] == [n % 3 > 0 for n in range(9)]
        assert shares(backend) == shares(other) == [True]
        backend.delete_many(KEYS[1:3])
        assert other.contains_many(KEYS[:4]) == [True, False, False, True]
        backend.close()
        other.close()
        at_rest(server)


def test_other_clients_meet_the_same_values() -> None:
    with running() as server, lm_servers.RawClient(server.address[1]) as plain, Raw(server, joined=False) as local:
        backend, values = open_at(server.address[1]), [some(2 * MIB, n) for n in range(3)]
        backend.write_many(KEYS[:1], [memoryview(values[0])])
        plain.put(NAMES[1], values[1])
        assert plain.ask(lm_servers.EXIST, NAMES[1]) == 200
        assert page_of(server, 0) is not None
        assert plain.get(NAMES[0]) == values[0]
        assert fetch(backend, KEYS[:2]) == values[:2]
        answer = local.ask(Command.GET, NAMES[0])  # as clients did that knew nothing of the memory
        assert answer.fmt != LENT
        assert local.exact(answer.length) == values[0]
        local.sock.sendall(Request(Command.PUT, NAMES[2], 2 * MIB, 4, 0, (2 * MIB, 0, 0, 0)).pack() + values[2])
        assert local.ask(Command.EXIST, NAMES[2]).code == Code.SUCCESS
        assert fetch(backend, KEYS[2:3]) == values[2:]


def test_connections_do_not_meet_each_others_bytes() -> None:
    with running(MIB, 80 * MIB) as server:  # 16 MiB but for what is ready: values come and go, and their memory with them
        backend, wrong, found = open_at(server.address[1]), list[str](), list[int]()

        def work(number: int) -> None:
            for turn in range(12):
                keys = KEYS[turn % 4 :: 4]
                values = [bytes([number * 16 + turn]) * MIB for _ in keys]
                backend.write_many(keys, [memoryview(value) for value in values])
                for value in fetch(backend, KEYS, MIB):
                    found.append(value is not None)
                    if value is not None and value != value[:1] * MIB:
                        wrong.append(f"mixed bytes in turn {turn} of {number}")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert sum(found) > 48
        assert any(page_of(server, n) is not None for n in range(16) if server.shelf.contains(NAMES[n]))
        assert all(shares(backend))
        backend.close()
        at_rest(server)


def test_what_the_server_does_not_keep_is_a_capacity_error() -> None:
    with running(limits=ServerLimits(most_bytes=2 * MIB)) as server:
        backend, values = open_at(server.address[1]), [some(2 * MIB), some(2 * MIB + 1), some(2 * MIB)]
        with pytest.raises(CapacityError, match="did not keep 1 of 3"):
            backend.write_many(KEYS[:3], [memoryview(value) for value in values])
        backend.write_many(KEYS[:1], [memoryview(values[0])])
        assert fetch(backend, KEYS[:3]) == [values[0], None, None]
        assert "expected at most 2097152 bytes; got 2097153" in server.told[0]  # type: ignore[attr-defined]


# -- who has the memory --------------------------------------------------------------------------------------------------------


def test_it_is_given_to_local_clients_with_the_token() -> None:
    with running(limits=ServerLimits(token=b"secret")) as server:
        with Raw(server, joined=False) as stranger:
            assert stranger.ask(Command.HEALTH, SHARED_KEY).code == Code.FAIL
            assert stranger.ended()
        with Raw(server, joined=False) as client:
            assert client.ask(Command.HEALTH, b"lmkv-token:secret").code == Code.SUCCESS
            assert join(client.sock) is not None
            assert join(client.sock) is None
    with running() as server, lm_servers.RawClient(server.address[1]) as plain:
        plain.sock.sendall(plain.head(lm_servers.HEALTH, SHARED_KEY))
        assert plain.answer()[4] == int.from_bytes(b"LMKV", "little")  # well, and no more
        plain.sock.sendall(FREE * 186)
        assert plain.answer()[0] == 400


def test_another_user_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as server:
        if os.geteuid() == 0:
            os.seteuid(65534)  # what the server sees is who connects
            try:
                client = Raw(server, joined=False)
            finally:
                os.seteuid(0)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: 1 << 20)
            client = Raw(server, joined=False)
        with client:
            assert join(client.sock) is None
            assert client.ask(Command.PUT, NAMES[0], 2 * MIB).code == Code.FAIL


def test_without_a_memfd_values_go_by_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmkv.adapters.lmcache.serve import make_arena, parse_arguments

    def refuse(*_: object) -> int:
        raise OSError("no memfd today")

    told: list[str] = []
    monkeypatch.setattr(os, "memfd_create", refuse)
    assert make_arena(parse_arguments(["localhost", "0"], {}), told.append) is None
    assert "no memfd today" in told[0]
    with lm_servers.running() as server:
        backend, value = open_at(server.address[1]), some(3 * MIB)
        backend.write_many(KEYS[:1], [memoryview(value)])
        assert fetch(backend, KEYS[:1]) == [value]
        assert shares(backend) == [False]
        assert backend._resting[0].sock.family == socket.AF_UNIX  # type: ignore[attr-defined]


BROUGHT = int.from_bytes(b"LMKM", "little")


@pytest.mark.parametrize(
    ("brought", "mebibytes", "size", "seals", "family"),
    [
        (0, 0, 0, 0, socket.AF_UNIX),  # as servers answered that knew nothing of it
        (BROUGHT, 2, MIB, fcntl.F_SEAL_SHRINK, socket.AF_INET),
        (BROUGHT, 1, MIB, fcntl.F_SEAL_GROW, socket.AF_INET),
        (BROUGHT, 0, 0, fcntl.F_SEAL_SHRINK, socket.AF_INET),
        (BROUGHT, -1, MIB, fcntl.F_SEAL_SHRINK, socket.AF_INET),
        (BROUGHT, 1 << 30, MIB, fcntl.F_SEAL_SHRINK, socket.AF_INET),
    ],
)
def test_a_client_takes_no_memory_that_is_not_what_it_should_be(
    monkeypatch: pytest.MonkeyPatch, brought: int, mebibytes: int, size: int, seals: int, family: int
) -> None:
    def give(sock: socket.socket, _: Arena) -> bool:
        if brought:
            memory = os.memfd_create("test", os.MFD_ALLOW_SEALING)
            os.truncate(memory, size)
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, seals)
            socket.send_fds(sock, [Answer(Code.SUCCESS, shape=(brought, mebibytes, 0, 0)).pack()], [memory])
            os.close(memory)
        return brought != 0

    with running() as server:
        before = len(os.listdir("/proc/self/fd"))
        monkeypatch.setattr("lmkv.adapters.lmcache.lm_server.give", give)
        backend, value = open_at(server.address[1]), some(3 * MIB)
        backend.write_many(KEYS[:1], [memoryview(value)])
        assert fetch(backend, KEYS[:1]) == [value]
        assert shares(backend) == [False]
        assert [connection.sock.family for connection in backend._resting] == [family]  # type: ignore[attr-defined]
        backend.close()
        at_rest(server)
        servers.until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_mapping_it_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no addresses today")

    with running() as server:
        monkeypatch.setattr(mmap, "mmap", refuse)
        backend, value = open_at(server.address[1]), some(2 * MIB)
        backend.write_many(KEYS[:1], [memoryview(value)])
        assert fetch(backend, KEYS[:1]) == [value]
        assert shares(backend) == [False]


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
                while full < 2:  # until there are rooms for all, and as many again that come back when they are replaced
                    with Probe() as probe:
                        backend.write_many(KEYS[8:], [memoryview(bytes(2 * MIB))] * 8)
                    full += probe.count == 8
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
            backend.write_many(KEYS[:3], [memoryview(value) for value in values])
        assert probe.count == 3

        def kill() -> None:
            process.kill()
            process.wait()

        with Probe(kill, at=2), pytest.raises(BackendUnavailableError):
            fetch(backend, KEYS[:3])
        assert any("in the middle of a value" in line for line in told)


def stop(process: subprocess.Popen[str]) -> None:
    """Stop all of it, which takes a moment."""
    process.send_signal(signal.SIGSTOP)
    tasks = list(Path(f"/proc/{process.pid}/task").iterdir())
    servers.until(lambda: all((task / "stat").read_text().rsplit(")", 1)[1].split()[0] == "T" for task in tasks))


def test_a_server_that_stops_costs_the_deadline_and_keeps_whole_values() -> None:
    with server_process() as (process, port):
        steady, values = open_at(port), [some(2 * MIB, n) for n in range(4)]
        steady.write_many(KEYS[:2], [memoryview(value) for value in values[:2]])
        for what in ("put", "get"):
            hasty, room = open_at(port, deadline=1.0), [memoryview(bytearray(2 * MIB)) for _ in range(4)]
            assert hasty.contains_many(KEYS[:1]) == [True]
            calls: dict[str, Callable[[], object]] = {
                "put": lambda hasty=hasty: hasty.write_many(KEYS[:2], [memoryview(value) for value in values[2:]]),
                "get": lambda hasty=hasty, room=room: hasty.read_many([*KEYS[:2]] * 2, room),
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
            found = fetch(steady, KEYS[:2])
            assert all(value in (old, new) for value, old, new in zip(found, values[:2], values[2:], strict=True))
            assert [bytes(view) for view in room] == left, "bytes came after the deadline"
        hasty.write_many(KEYS[:2], [memoryview(value) for value in values[2:]])
        assert fetch(hasty, KEYS[:2]) == fetch(steady, KEYS[:2]) == values[2:]


# -- rooms ---------------------------------------------------------------------------------------------------------------------


def test_a_room_is_one_values_until_its_last_reference_is_gone() -> None:
    arena = Arena(MIB)
    rooms = [arena.room(size) for size in (LEAST_BYTES, LEAST_BYTES + 1, 3 * MIB, MIB)]
    for number, room in enumerate(rooms):
        assert room is not None
        room[:] = number
    views = [memoryview(room) for room in rooms if room is not None]
    del room
    pages = [arena.page(view) for view in views]
    assert [bytes(view) for view in views] == [bytes([n]) * len(view) for n, view in enumerate(views)]
    assert arena.page(memoryview(bytearray(10))) is None
    part, held = views[2][MIB:], os.fstat(arena.descriptor).st_blocks
    rooms.clear()
    views.clear()
    assert os.fstat(arena.descriptor).st_blocks < held  # the others' memory was given back
    other = arena.room(3 * MIB)
    assert other is not None
    assert arena.page(memoryview(other)) != pages[2]
    assert bytes(part) == b"\x02" * (2 * MIB)
    del part
    again = arena.room(3 * MIB - 5)
    assert again is not None
    assert arena.page(memoryview(again)) == pages[2]
    assert not again.any()


def test_without_addresses_there_is_no_room() -> None:
    arena = Arena(MIB)
    rooms = [arena.room(256 * MIB) for _ in range(arena.size // (256 * MIB) + 1)]
    assert [room is not None for room in rooms] == [True] * (len(rooms) - 1) + [False]
    rooms.pop(0)
    assert arena.room(200 * MIB) is not None
