"""Values through memory that LMKV's client and server share: every size, every fault, and no other bytes."""

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
from lmkv.backends.lm_window import LEAST_BYTES, WINDOW_BYTES, WINDOW_KEY, LmWire, Window, join
from lmkv.backends.lm_wire import Answer, Code, Command, Request, local_name
from lmkv.chunks import ChunkKey
from lmkv.errors import BackendUnavailableError, CapacityError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the window is a memfd, which is Linux's")

KEYS = [ChunkKey(bytes([i]) * 16) for i in range(1, 17)]
NAMES = [b"lmkv@1@0@%b@uint8" % key.hex().encode() for key in KEYS]
MIB = 1 << 20
PIECE = 512 * 1024
READY, FREE = b"\xfe", b"\xff"
SIZES = [
    *(1, LEAST_BYTES - 1, LEAST_BYTES, LEAST_BYTES + 1, PIECE - 1, PIECE, PIECE + 1),
    *(WINDOW_BYTES - 1, WINDOW_BYTES, WINDOW_BYTES + 1, 3 * WINDOW_BYTES + 5),
]


def some(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def windows(backend: Backend) -> list[bool]:
    return [connection.window is not None for connection in backend._resting]  # type: ignore[attr-defined]


def fetch(backend: Backend, keys: list[ChunkKey], room: int = 16 * MIB) -> list[bytes | None]:
    buffers = [memoryview(bytearray(room)) for _ in keys]
    sizes = backend.read_many(keys, buffers)
    return [None if size is None else bytes(buffer[:size]) for size, buffer in zip(sizes, buffers, strict=True)]


def at_rest(server: LmServer) -> None:
    """Nothing is promised any more, once all clients have gone."""
    servers.until(lambda: server.connections() == 0)
    servers.until(lambda: server.shelf._promised == 0)
    server.shelf._check()


class Raw:
    """One end of a connection with a window, which does what it is told to."""

    def __init__(self, server: LmServer) -> None:
        shape = Answer.unpack(server._greeting).shape
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(local_name((shape[2], shape[3])))

    def window(self) -> Window:
        found = join(self.sock)
        assert found is not None
        return found

    def put(self, name: bytes, size: int, *behind: bytes) -> None:
        self.sock.sendall(Request(Command.PUT, name, size, 4, 0, (size, 0, 0, 0)).pack() + b"".join(behind))

    def ask(self, command: Command, name: bytes) -> Answer:
        self.sock.sendall(Request(command, name).pack())
        return Answer.unpack(self.exact(36))

    def exact(self, size: int) -> bytes:
        found = bytearray()
        while len(found) < size and (piece := self.sock.recv(size - len(found))):
            found += piece
        return bytes(found)

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
def test_values_of_every_size_come_back(token: dict[str, str]) -> None:
    limits = ServerLimits(token=token.get("token", "").encode())
    with lm_servers.running(128 * MIB, limits=limits) as server:
        backend = open_at(server.address[1], **token)
        values = [some(size, size) for size in SIZES]
        keys = KEYS[: len(values)]
        for turn in (values, values[::-1]):  # written, and replaced by values of other sizes
            backend.write_many(keys, [memoryview(value) for value in turn])
            assert fetch(backend, [*keys, KEYS[15]]) == [*turn, None]
            assert fetch(backend, keys[::-1], 2 * MIB) == [v if len(v) <= 2 * MIB else None for v in turn[::-1]]
        assert windows(backend) == [True]
        backend.delete_many(keys[1:3])
        assert backend.contains_many(keys[:4]) == [True, False, False, True]
        other = open_at(server.address[1], **token)
        assert fetch(other, keys[3:]) == values[::-1][3:]
        with pytest.raises(CapacityError):
            backend.write_many(KEYS[:3], [memoryview(some(n * MIB)) for n in (1, 129, 2)])
        assert fetch(backend, KEYS[:3]) == [None] * 3
        backend.close()
        other.close()
        at_rest(server)


def test_what_a_server_does_not_take_passes_by() -> None:
    with lm_servers.running(limits=ServerLimits(most_bytes=3 * MIB)) as server:
        backend = open_at(server.address[1])
        values = [some(2 * MIB), some(11 * MIB), some(MIB)]
        with pytest.raises(CapacityError, match="did not keep 1 of 3"):
            backend.write_many(KEYS[:3], [memoryview(value) for value in values])
        backend.write_many(KEYS[:1], [memoryview(values[0])])
        assert fetch(backend, KEYS[:3]) == [values[0], None, None]
        assert windows(backend) == [True]


def test_other_clients_meet_the_same_values() -> None:
    with lm_servers.running() as server, lm_servers.RawClient(server.address[1]) as plain, Raw(server) as local:
        backend = open_at(server.address[1])
        values = [some(5 * MIB + 3), some(2 * MIB, 1)]
        backend.write_many(KEYS[:1], [memoryview(values[0])])
        plain.put(NAMES[1], values[1])
        assert plain.get(NAMES[0]) == values[0]
        assert fetch(backend, KEYS[:2]) == values
        answer = local.ask(Command.GET, NAMES[0])  # over the Unix socket without a window, as before there were any
        assert local.exact(answer.length) == values[0]
        size = len(values[1])
        local.put(NAMES[2], size, values[1])
        assert local.ask(Command.EXIST, NAMES[2]).code == Code.SUCCESS
        assert fetch(backend, KEYS[2:3]) == values[1:]


def test_connections_do_not_meet_each_others_bytes() -> None:
    with lm_servers.running(256 * MIB) as server:
        backend = open_at(server.address[1])
        wrong: list[str] = []

        def work(number: int) -> None:
            mine = KEYS[number * 2 : number * 2 + 2]
            for turn in range(6):
                values = [some(2 * MIB + 77 * number, 100 * number + turn), some(LEAST_BYTES + turn, turn)]
                backend.write_many(mine, [memoryview(value) for value in values])
                backend.write_many(KEYS[15:], [memoryview(bytes([number]) * (3 * MIB))])  # all write this one
                if fetch(backend, mine, 4 * MIB) != values:
                    wrong.append(f"{number} in turn {turn}")
                (shared,) = fetch(backend, KEYS[15:], 4 * MIB)
                if shared is None or shared != shared[:1] * (3 * MIB):
                    wrong.append(f"mixed bytes in turn {turn}")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert len(windows(backend)) > 1
        assert all(windows(backend))
        backend.close()
        at_rest(server)


# -- who has a window ----------------------------------------------------------------------------------------------------------


def test_a_window_is_refused_without_a_token_and_by_tcp_and_given_once() -> None:
    with lm_servers.running(limits=ServerLimits(token=b"secret")) as server:
        with Raw(server) as stranger:
            assert stranger.ask(Command.HEALTH, WINDOW_KEY).code == Code.FAIL
            assert stranger.ended()
        with Raw(server) as client:
            assert client.ask(Command.HEALTH, b"lmkv-token:secret").code == Code.SUCCESS
            client.window()
            assert join(client.sock) is None
        at_rest(server)
    with lm_servers.running() as server, lm_servers.RawClient(server.address[1]) as plain:
        assert plain.ask(lm_servers.HEALTH, WINDOW_KEY) == 200
        assert server.shelf._lent == 0


def test_windows_are_part_of_the_quota() -> None:
    with lm_servers.running(72 * MIB) as server, contextlib.ExitStack() as stack:
        value = some(8 * MIB)
        backend = open_at(server.address[1])
        for key in KEYS[:8]:
            backend.write_many([key], [memoryview(value)])
        assert server.shelf._lent == WINDOW_BYTES
        raw = [stack.enter_context(Raw(server)) for _ in range(3)]
        assert [join(client.sock) is not None for client in raw] == [True, False, False]
        server.shelf._check()
        assert backend.contains_many(KEYS[:8]) == [False] + [True] * 7  # it made room
        without = open_at(server.address[1])
        assert fetch(without, KEYS[7:8]) == [value]
        assert windows(without) == [False]


def test_without_a_memfd_values_go_by_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError("no memfd today")

    with lm_servers.running() as server:
        monkeypatch.setattr(os, "memfd_create", refuse)
        backend, value = open_at(server.address[1]), some(3 * MIB)
        backend.write_many(KEYS[:1], [memoryview(value)])
        assert fetch(backend, KEYS[:1]) == [value]
        assert windows(backend) == [False]
        assert backend._resting[0].sock.family == socket.AF_UNIX  # type: ignore[attr-defined]
        assert "no memfd today" in server.told[0]  # type: ignore[attr-defined]
        assert server.shelf._lent == 0


def given(server: LmServer, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int, int], size: int, seals: int) -> None:
    """Have a server send what it should not, or ``size`` 0: nothing but an answer, as servers did that knew no window."""

    def give(wire: LmWire, sock: socket.socket) -> bool:
        if size:
            memory = os.memfd_create("test", os.MFD_ALLOW_SEALING)
            os.truncate(memory, size)
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, seals)
            socket.send_fds(sock, [Answer(Code.SUCCESS, shape=shape).pack()], [memory])
            os.close(memory)
            return True
        return False

    monkeypatch.setattr(server, "_give_window", give)


BROUGHT = int.from_bytes(b"LMKW", "little")


@pytest.mark.parametrize(
    ("shape", "size", "seals", "family"),
    [
        ((0, 0, 0, 0), 0, 0, socket.AF_UNIX),
        ((BROUGHT, 8, 4096, 0), 4096, fcntl.F_SEAL_SHRINK, socket.AF_INET),
        ((BROUGHT, 8, 4096, 0), 32768, fcntl.F_SEAL_GROW, socket.AF_INET),
        ((BROUGHT, 0, 4096, 0), 4096, fcntl.F_SEAL_SHRINK, socket.AF_INET),
        ((BROUGHT, 8, -4096, 0), 4096, fcntl.F_SEAL_SHRINK, socket.AF_INET),
        ((BROUGHT, 1 << 20, 1 << 20, 0), 4096, fcntl.F_SEAL_SHRINK, socket.AF_INET),
    ],
)
def test_a_client_takes_no_window_that_is_none(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int, int], size: int, seals: int, family: int
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with lm_servers.running() as server:
        given(server, monkeypatch, shape, size, seals)
        backend, value = open_at(server.address[1]), some(3 * MIB)
        backend.write_many(KEYS[:1], [memoryview(value)])
        assert fetch(backend, KEYS[:1]) == [value]
        assert windows(backend) == [False]
        assert [connection.sock.family for connection in backend._resting] == [family]  # type: ignore[attr-defined]
        backend.close()
        at_rest(server)
    servers.until(lambda: len(os.listdir("/proc/self/fd")) <= before)


# -- peers that misbehave ------------------------------------------------------------------------------------------------------


def test_the_memory_of_a_window_keeps_its_size() -> None:
    with lm_servers.running() as server, Raw(server) as client:
        client.sock.sendall(Request(Command.HEALTH, WINDOW_KEY).pack())
        _, (memory,), _, _ = socket.recv_fds(client.sock, 36, 1)
        for size in (0, WINDOW_BYTES // 2, WINDOW_BYTES * 2):
            with pytest.raises(PermissionError):
                os.truncate(memory, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        os.close(memory)


@pytest.mark.parametrize("behind", [READY + b"\x00", FREE, READY * 3 + b"x", b"\x01" * 186])
def test_a_put_with_other_marks_keeps_nothing(behind: bytes) -> None:
    with lm_servers.running() as server:
        backend, value = open_at(server.address[1]), some(3 * MIB)
        backend.write_many(KEYS[:1], [memoryview(value)])
        with Raw(server) as client:
            client.window()
            client.put(NAMES[0], 4 * MIB, behind)
            assert client.ended()
        assert fetch(backend, KEYS[:1]) == [value]
        assert any("expected marks of a window" in line for line in server.told)  # type: ignore[attr-defined]
        backend.close()
        at_rest(server)


def test_slots_that_were_not_lent_can_not_be_given_back() -> None:
    with lm_servers.running() as server:
        with Raw(server) as client:
            client.window()
            client.sock.sendall(FREE)
            assert client.ended()
        assert "expected at most 0 slots back; got 1" in server.told[0]  # type: ignore[attr-defined]
        with Raw(server) as client:
            client.window()
            client.put(NAMES[0], 4 * MIB, READY * 8)
            assert client.exact(8) == FREE * 8
            assert client.ask(Command.EXIST, NAMES[0]).code == Code.SUCCESS  # whatever the memory held
        at_rest(server)


def test_a_client_that_gives_no_slot_back_costs_the_patience() -> None:
    with lm_servers.running(128 * MIB, limits=ServerLimits(patience_seconds=0.5)) as server:
        backend, value = open_at(server.address[1]), some(9 * MIB)
        backend.write_many(KEYS[:1], [memoryview(value)])
        with Raw(server) as client:
            client.window()
            assert client.ask(Command.GET, NAMES[0]).length == 9 * MIB
            assert client.exact(8) == READY * 8  # as many as there are slots, and no more
            assert client.sock.recv(1) == b""
        with Raw(server) as client:  # and one that gives up within the value
            client.window()
            client.ask(Command.GET, NAMES[0])
        assert fetch(backend, KEYS[:1]) == [value]
        backend.close()
        at_rest(server)


def test_a_request_within_a_value_ends_the_connection() -> None:
    with lm_servers.running() as server, Raw(server) as client:
        backend, value = open_at(server.address[1]), some(9 * MIB)
        backend.write_many(KEYS[:1], [memoryview(value)])
        client.window()
        client.ask(Command.GET, NAMES[0])
        client.sock.sendall(Request(Command.GET, NAMES[0]).pack())
        assert client.ended()
        assert fetch(backend, KEYS[:1]) == [value]


# -- processes that end or stop ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server_process() -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-c", "import sys; from lmkv.cli import main; sys.exit(main())", "serve", "127.0.0.1", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline().split("lm://127.0.0.1:")[1].split(" ")[0])
        finally:
            process.kill()


def at_piece(monkeypatch: pytest.MonkeyPatch, number: int, do: Callable[[], object]) -> None:
    """Have something happen in the middle of a value: when the client comes to its so-manieth slot."""
    real, seen = Window.slot, [0]

    def slot(window: Window) -> object:
        seen[0] += 1
        if seen[0] == number:
            do()
        return real(window)

    monkeypatch.setattr(Window, "slot", slot)


CLIENT = """
import sys, time
sys.path[:0] = sys.argv[2:]
import lm_servers
from lmkv.backends.lm_window import Window
from lmkv.chunks import ChunkKey

def slot(window, real=Window.slot, seen=[0]):
    seen[0] += 1
    if seen[0] == 11:
        print("in the middle", flush=True)
        time.sleep(60)
    return real(window)

Window.slot = slot
backend = lm_servers.open_at(int(sys.argv[1]), deadline=60.0)
backend.write_many([ChunkKey(bytes([1]) * 16)], [memoryview(b"n" * (9 << 20))])
"""


def test_a_client_that_is_killed_within_a_put_leaves_what_was_there() -> None:
    with lm_servers.running() as server:
        backend, value = open_at(server.address[1]), some(9 * MIB)
        backend.write_many(KEYS[:1], [memoryview(value)])
        support = str(Path(lm_servers.__file__).parent)
        command = [sys.executable, "-c", CLIENT, str(server.address[1]), support]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "in the middle\n"
            assert server.shelf._promised > 9 * MIB
            process.kill()
        servers.until(lambda: server.shelf._promised == WINDOW_BYTES)
        assert fetch(backend, KEYS[:1]) == [value]
        backend.close()
        at_rest(server)


def test_a_server_that_is_killed_within_a_get_gives_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    with server_process() as (process, port):
        backend, values = open_at(port, deadline=20, told=told), [some(MIB), some(16 * MIB)]
        backend.write_many(KEYS[:2], [memoryview(value) for value in values])
        at_piece(monkeypatch, 5, process.kill)
        assert fetch(backend, KEYS[:2]) == [values[0], None]
        assert any("in the middle of a value" in line for line in told)


@pytest.mark.parametrize("what", ["put", "get"])
def test_a_server_that_stops_costs_the_deadline_and_keeps_whole_values(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with server_process() as (process, port):
        steady, values = open_at(port), [some(16 * MIB, 1), some(16 * MIB, 2)]
        steady.write_many(KEYS[:1], [memoryview(values[0])])
        hasty = open_at(port, deadline=2.0)
        assert hasty.contains_many(KEYS[:1]) == [True]
        at_piece(monkeypatch, 5, lambda: process.send_signal(signal.SIGSTOP))
        begin = time.monotonic()
        room = memoryview(bytearray(16 * MIB))
        calls: dict[str, Callable[[], object]] = {
            "put": lambda: hasty.write_many(KEYS[:1], [memoryview(values[1])]),
            "get": lambda: hasty.read_many(KEYS[:1], [room]),
        }
        with pytest.raises(BackendUnavailableError, match="in time"):
            calls[what]()
        assert time.monotonic() - begin < 20
        left = bytes(room)
        process.send_signal(signal.SIGCONT)
        monkeypatch.undo()
        (found,) = fetch(steady, KEYS[:1])
        assert found == values[0]  # the new one was not all there
        assert room == left, "bytes came after the deadline"
        hasty.write_many(KEYS[:1], [memoryview(values[1])])
        assert fetch(hasty, KEYS[:1]) == fetch(steady, KEYS[:1]) == [values[1]]


def test_a_window_is_touched_once_and_gone_with_its_connection() -> None:
    with lm_servers.running() as server:

        def mapped() -> int:
            with open("/proc/self/maps") as lines:
                return sum("memfd:lmkv-window" in line for line in lines)

        before = mapped()
        backend = open_at(server.address[1])
        backend.write_many(KEYS[:1], [memoryview(some(5 * MIB))])
        assert mapped() == before + 2  # both ends are in this process
        backend.close()
        del backend
        at_rest(server)
        servers.until(lambda: mapped() == before)


def test_mapping_it_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no memory today")

    with lm_servers.running() as server:
        monkeypatch.setattr(mmap, "mmap", refuse)
        backend, value = open_at(server.address[1]), some(3 * MIB)
        backend.write_many(KEYS[:1], [memoryview(value)])
        assert fetch(backend, KEYS[:1]) == [value]
        assert windows(backend) == [False]
