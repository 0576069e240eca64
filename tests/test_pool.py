"""Slots: allocation, growth, sharing between processes, and nothing left behind."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from lmkv.errors import ArgumentError, CapacityError, ConfigError, StoreClosedError
from lmkv.pool import HostPool, MappedPool, PoolHandle, populate

PAGE = 4096

# -- slots -------------------------------------------------------------------------------------------------------------------


def test_grows_by_extents_up_to_its_slots() -> None:
    pool = HostPool(PAGE, 10, extent_bytes=4 * PAGE)
    assert (pool.slots, pool.used, pool.available) == (10, 0, 10)
    taken = pool.allocate(3)
    pool._check()
    assert len(pool._used) == 4, "one extent"
    more = pool.allocate(2)
    assert pool.allocate(6) is None, "all or none"
    assert pool.used == 5
    rest = pool.allocate(5)
    assert sorted((taken or []) + (more or []) + (rest or [])) == list(range(10))
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []
    pool._check()
    pool.close()


def test_slots_are_whole_pages_and_do_not_overlap() -> None:
    pool = HostPool(PAGE + 1, 7, extent_bytes=1)
    assert pool.slot_bytes == 2 * PAGE
    slots = pool.allocate(7)
    assert slots is not None
    for slot in slots:
        pool.view(slot)[:] = bytes([slot]) * pool.slot_bytes
    for slot in slots:
        assert bytes(pool.view(slot)) == bytes([slot]) * pool.slot_bytes
    pool.close()


def test_slots_come_back() -> None:
    pool = HostPool(PAGE, 4)
    assert pool.allocate(4) == [0, 1, 2, 3]
    pool.release([1, 3])
    pool._check()
    again = pool.allocate(2)
    assert again is not None
    assert sorted(again) == [1, 3]
    pool.close()


def test_any_sequence_of_calls() -> None:
    rng = random.Random(7)
    pool = HostPool(PAGE, 20, extent_bytes=3 * PAGE)
    held: list[int] = []
    for _ in range(400):
        if rng.random() < 0.55:
            n = rng.randint(0, 6)
            got = pool.allocate(n)
            assert (got is None) == (n > 20 - len(held))
            for slot in got or ():
                assert slot not in held
                pool.view(slot)[:4] = slot.to_bytes(4, "little")
            held += got or []
        else:
            rng.shuffle(held)
            gone, held = held[:3], held[3:]
            pool.release(gone)
        pool._check()
        assert pool.used == len(held)
        assert all(int.from_bytes(pool.view(slot)[:4], "little") == slot for slot in held)
    pool.close()


def test_what_is_not_allocated_can_not_be_released() -> None:
    pool = HostPool(PAGE, 4)
    pool.allocate(2)
    for slots in ([2], [-1], [99], [0, 3]):
        with pytest.raises(ArgumentError, match="allocated"):
            pool.release(slots)
        assert pool.used == 2
    pool.release([0, 1])
    with pytest.raises(ArgumentError, match="slot 0"):
        pool.release([0])
    pool._check()
    pool.close()


def test_a_slot_twice_in_one_release() -> None:
    pool = HostPool(PAGE, 4)
    pool.allocate(2)
    with pytest.raises(ArgumentError):
        pool.release([1, 1])
    pool._check()
    assert pool.used == 2
    pool.close()


def test_slots_that_are_not_there() -> None:
    pool = HostPool(PAGE, 4, extent_bytes=2 * PAGE)
    pool.allocate(1)
    for slot in (-1, 2, 99):
        with pytest.raises(ArgumentError, match="slot"):
            pool.view(slot)
    pool.close()


def test_closed() -> None:
    pool = HostPool(PAGE, 4)
    pool.allocate(1)
    view = pool.view(0)
    view[:3] = b"abc"
    pool.close()
    pool.close()
    for call in (lambda: pool.view(0), lambda: pool.allocate(1)):
        with pytest.raises(StoreClosedError, match="closed"):
            call()
    assert bytes(view[:3]) == b"abc", "a view that is held keeps its memory"


def test_refusals() -> None:
    with pytest.raises(CapacityError, match="at least one slot"):
        HostPool(PAGE, 0)
    with pytest.raises(ConfigError, match="ram_shared"):
        HostPool(PAGE, 1).handle()
    with pytest.raises(CapacityError, match="memory"):
        HostPool(1 << 60, 1 << 20, extent_bytes=1 << 60).allocate(1)
    with pytest.raises(CapacityError, match="memory"):
        HostPool(1 << 60, 1 << 20, extent_bytes=1 << 60, shared=True).allocate(1)
    with pytest.raises(CapacityError, match="can't be mapped"):
        MappedPool(PoolHandle(2**22 + 1, 3, PAGE, 4, 4, 4 * PAGE))  # beyond the largest process id there can be


def test_a_handle_of_a_pool_that_is_gone() -> None:
    """What has its descriptor's number by then is not to be written into."""
    pool = HostPool(PAGE, 4, shared=True)
    pool.allocate(1)
    handle = pool.handle()
    MappedPool(handle).close()
    pool.close()
    other = HostPool(PAGE, 4, shared=True)
    other.allocate(1)
    assert other.handle().fd == handle.fd, "numbers are used again"
    with pytest.raises(CapacityError, match="it is gone"):
        MappedPool(handle)
    other.close()


# -- shared ------------------------------------------------------------------------------------------------------------------

_OTHER = """
import sys
from lmkv.errors import ArgumentError
from lmkv.pool import MappedPool, PoolHandle
pool = MappedPool(PoolHandle(*map(int, sys.argv[1:8])))
print("ready", flush=True)
for line in sys.stdin:
    word, slot, text = line.split()
    try:
        if word == "read":
            print(bytes(pool.view(int(slot))[:len(text)]).decode(), flush=True)
        else:
            pool.view(int(slot))[:len(text)] = text.encode()
            print("written", flush=True)
    except ArgumentError:
        print("no such slot", flush=True)
"""


class Other:
    """Another process that maps the pool."""

    def __init__(self, pool: HostPool) -> None:
        handle = pool.handle()
        numbers = [str(int(n)) for n in dataclasses.astuple(handle)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _OTHER, *numbers], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, word: str, slot: int, text: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{word} {slot} {text}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.communicate(timeout=30)


def test_another_process_sees_the_same_bytes_and_the_growth() -> None:
    pool = HostPool(PAGE, 8, extent_bytes=2 * PAGE, shared=True)
    pool.allocate(2)
    pool.view(1)[:5] = b"hello"
    other = Other(pool)
    try:
        assert other.ask("read", 1, "hello") == "hello"
        assert other.ask("write", 0, "there") == "written"
        assert bytes(pool.view(0)[:5]) == b"there"
        assert other.ask("read", 4, "12345") == "no such slot"
        pool.allocate(4)
        pool.view(5)[:5] = b"grown"
        assert other.ask("read", 5, "12345") == "grown"
        assert other.ask("write", 4, "mutual") == "written"
        assert bytes(pool.view(4)[:6]) == b"mutual"
        assert other.ask("read", 6, "12345") == "no such slot"
    finally:
        other.end()
        pool.close()


def test_a_map_outlives_the_owner() -> None:
    pool = HostPool(PAGE, 2, shared=True)
    pool.allocate(2)
    pool.view(1)[:5] = b"still"
    other = Other(pool)
    try:
        assert other.ask("read", 1, "12345") == "still"
        pool.close()
        assert other.ask("read", 1, "12345") == "still"
    finally:
        other.end()


_OWNER = """
import sys, time
import lmkv
from lmkv.pool import HostPool
pool = HostPool(1 << 20, 8, extent_bytes=1 << 20, shared=True)
for slot in pool.allocate(8):
    pool.view(slot)[:] = b"x" * (1 << 20)
print(pool.handle().fd, flush=True)
time.sleep(600)
"""


def test_nothing_is_left_of_an_owner_that_was_killed() -> None:
    shm = Path("/dev/shm")
    before = set(os.listdir(shm)) if shm.exists() else set()
    owner = subprocess.Popen([sys.executable, "-c", _OWNER], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        fd = int(owner.stdout.readline())
        handle = PoolHandle(owner.pid, fd, 1 << 20, 1, 8, 1 << 20)
        mapped = MappedPool(handle)
        assert bytes(mapped.view(7)) == b"x" * (1 << 20)
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.communicate()
    assert bytes(mapped.view(7)) == b"x" * (1 << 20), "whoever maps it keeps it"
    mapped.close()
    after = set(os.listdir(shm)) if shm.exists() else set()
    assert not {name for name in after - before if "lmkv" in name}
    with pytest.raises(CapacityError, match="can't be mapped"):
        MappedPool(handle)


def test_a_closed_map_says_so() -> None:
    pool = HostPool(PAGE, 2, shared=True)
    pool.allocate(1)
    mapped = MappedPool(pool.handle())
    assert len(mapped.view(0)) == PAGE
    mapped.close()
    mapped.close()
    with pytest.raises(StoreClosedError, match="closed"):
        mapped.view(0)
    pool.close()


def test_addresses_are_those_of_the_views() -> None:
    pool = HostPool(4096, 7, extent_bytes=3 * 4096, shared=True)
    slots = pool.allocate(7)
    assert slots is not None
    mapped = MappedPool(pool.handle())
    for place in (pool, mapped):
        addresses = place.addresses(np.array([6, 0, 3, 6]))
        views = [np.frombuffer(place.view(slot), np.uint8) for slot in (6, 0, 3, 6)]
        assert addresses.tolist() == [view.__array_interface__["data"][0] for view in views]
        assert place.addresses(np.empty(0, np.int64)).tolist() == []
        for wrong in (-1, 9):
            with pytest.raises(ArgumentError, match=f"expected slots from 0 to 8; got {wrong}"):
                place.addresses(np.array([0, wrong]))
        del views
        place.close()
        with pytest.raises(StoreClosedError, match="expected an open pool"):
            place.addresses(np.array([0]))


def test_growing_ahead_makes_slots_free_and_changes_no_byte() -> None:
    pool = HostPool(5000, 100, extent_bytes=64 * 1024)
    (slot,) = pool.allocate(1)
    pool.view(slot)[:] = b"\x5a" * pool.slot_bytes
    fresh = pool.grow_ahead(300 * 1024)
    assert pool.free_bytes >= 300 * 1024
    ranges = [pool.extents()[number] for number in fresh]
    assert all(size == pool.extent_bytes for _, size in ranges)
    for number in fresh:
        pool.touch(number)
        pool.touch(number)  # done already
    populate(ranges)
    assert bytes(pool.view(slot)) == b"\x5a" * pool.slot_bytes
    assert not pool.grow_ahead(300 * 1024)
    slots_per_extent = pool.extent_bytes // pool.slot_bytes
    taken = pool.allocate(slots_per_extent)
    assert taken is not None
    assert max(taken) < 2 * slots_per_extent, "what was made ready first is not given out first"
    pool.release(taken)
    pool._check()
    assert len(pool.grow_ahead(2**40)) > 0
    assert pool.available == 99  # never more than the pool's limit
    pool._check()
    pool.close()
    populate(ranges)  # gone meanwhile: nothing happens
    pool.touch(50)


# -- huge pages of shared memory ----------------------------------------------------------------------------------------------


def _huge_shared_bytes(address: int) -> int:
    """Bytes that huge pages back in the shared mapping at an address (proc(5), ShmemPmdMapped)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "ShmemPmdMapped:":
            return int(line.split()[1]) * 1024
    return 0


def _collapses() -> bool:
    """Whether this kernel makes huge pages of shared memory on demand."""
    numbers = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    return numbers >= (6, 1) and Path("/sys/kernel/mm/transparent_hugepage/enabled").exists()


def test_large_shared_extents_become_huge_pages_and_change_no_byte() -> None:
    pool = HostPool(1 << 20, 70, extent_bytes=32 << 20, shared=True)
    assert pool.extent_bytes % (2 << 20) == 0
    (slot,) = pool.allocate(1)
    if _collapses():
        assert _huge_shared_bytes(pool.extents()[0][0]) > 0, "what is taken before anybody made it ready"
    pool.grow_ahead(1 << 40)
    mapped = MappedPool(pool.handle())
    mapped.refresh()
    for place in (pool, mapped):
        assert all(address % (2 << 20) == 0 and size == pool.extent_bytes for address, size in place.extents())
    rng = np.random.default_rng(5)
    data = rng.integers(0, 256, (70, 1 << 20), np.uint8)
    slots = [slot, *(pool.allocate(69) or [])]
    stop = threading.Event()

    def write() -> None:
        while True:
            last = stop.is_set()
            for i, one in enumerate(slots):
                (pool if i % 2 else mapped).view(one)[:] = data[i].tobytes()
            if last:
                return

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(len(pool.extents())):
            for place in (mapped, pool):
                place.touch(number)
    finally:
        stop.set()
        writer.join()
    for i, one in enumerate(slots):
        for place in (pool, mapped):
            assert np.array_equal(np.frombuffer(place.view(one), np.uint8), data[i])
    if _collapses():
        for place in (pool, mapped):
            assert _huge_shared_bytes(place.extents()[0][0]) > 0
    mapped.close()
    pool.close()


def test_shared_extents_without_huge_pages_when_told_so_or_when_small() -> None:
    for pool in (HostPool(1 << 20, 40, extent_bytes=32 << 20, shared=True, huge_pages="off"), HostPool(5000, 9, shared=True)):
        assert not pool.handle().collapse
        taken = pool.allocate(9)
        assert taken is not None
        pool.touch(0)
        assert _huge_shared_bytes(pool.extents()[0][0]) == 0
        pool.close()
    assert HostPool(5000, 9, shared=True).extent_bytes == 9 * 8192, "no rounding up of little"
