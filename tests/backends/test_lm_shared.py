"""Values in memory that LMKV's client and server share: of every size, for whom they are, and no other bytes."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import sys
import threading

import lm_servers
import numpy as np
import pytest
import servers
from lm_servers import open_at
from lm_shared import FREE, KEYS, MIB, NAMES, Raw, at_rest, fetch, page_of, running, shares, some

from lmkv.adapters.lmcache.lm_server import ServerLimits
from lmkv.backends.lm_shared import LEAST_BYTES, LENT, SHARED_KEY, Arena, copy, join
from lmkv.backends.lm_wire import Answer, Code, Command, Request
from lmkv.errors import CapacityError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a memfd is Linux's")


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


def test_memory_that_a_room_is_given_is_empty_and_its_own() -> None:
    arena = Arena(MIB)
    beside, room, behind = (arena.room(size) for size in (MIB, 5 * MIB + 4097, MIB))
    assert beside is not None
    assert room is not None
    assert behind is not None
    for one in (beside, behind):
        one[:] = 7
    before = os.fstat(arena.descriptor).st_blocks * 512
    arena.touch(room)
    assert os.fstat(arena.descriptor).st_blocks * 512 - before >= len(room)
    assert not room.any()
    room[:] = 9
    assert (beside == 7).all()
    assert (behind == 7).all()
    page = arena.page(memoryview(room))
    del room
    assert os.fstat(arena.descriptor).st_blocks * 512 <= before
    again = arena.room(5 * MIB + 4097)
    assert again is not None
    assert arena.page(memoryview(again)) == page
    assert not again.any()


@pytest.mark.parametrize("size", [0, 1, 4095, 5 * MIB + 3])
def test_copies_end_where_they_should(size: int) -> None:
    source = np.random.default_rng(size).integers(0, 256, size + 3, np.uint8)[3:]
    room = np.full(size + 200, 5, np.uint8)
    copy(room[77 : 77 + size], source)
    assert (room[77 : 77 + size] == source).all()
    assert (room[:77] == 5).all()
    assert (room[77 + size :] == 5).all()
    with pytest.raises(ValueError, match="broadcast"):
        copy(room[: size + 2], np.zeros(size + 3, np.uint8))
    fixed = np.frombuffer(bytes(size), np.uint8)
    with pytest.raises(ValueError, match="read-only"):
        copy(fixed, source)


def test_without_addresses_there_is_no_room() -> None:
    arena = Arena(MIB)
    rooms = [arena.room(256 * MIB) for _ in range(arena.size // (256 * MIB) + 1)]
    assert [room is not None for room in rooms] == [True] * (len(rooms) - 1) + [False]
    rooms.pop(0)
    assert arena.room(200 * MIB) is not None
