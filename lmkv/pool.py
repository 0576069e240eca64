"""Slots: equal pieces of host memory, one chunk each, in a slab that grows by extents.

A slot has room for a whole record: the payload stands at ``payload_offset`` (see :mod:`lmkv.record`), and what comes before it
is filled in when the record leaves for a slow tier. So slow tiers read into and write from slots without another copy.

A GPU copies at full speed only from pinned memory: ``lmkv.transfer.Pinner`` pins extents beside the caller, as they appear.

With ``shared=True`` the slab is an anonymous memory file that another process of the same user maps by :meth:`HostPool.handle`;
it vanishes with its last user, however that ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import ArgumentError, CapacityError, ConfigError, StoreClosedError

__all__ = ["HUGE_PAGE", "HostPool", "MappedPool", "PoolHandle", "map_aligned", "populate"]

_PAGE = 4096
HUGE_PAGE = 2 * 1024**2
_MADV_POPULATE_WRITE = 23  # linux/mman.h, since 5.14
_MADV_COLLAPSE = 25  # since 6.1
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
#: Shared extents of at least so many bytes are whole huge pages: what that rounds up is little then.
_LEAST_FOR_HUGE = 8 * HUGE_PAGE
#: What a caller who has the pool grow waits for at most: pages in bulk are cheaper than one by one at first use.
_READY_AT_ONCE = 64 * 1024**2


@dataclass(frozen=True)
class PoolHandle:
    """What another process needs to map a shared pool: plain values, to be sent as they are."""

    pid: int
    fd: int
    slot_bytes: int
    slots_per_extent: int
    slots: int
    extent_bytes: int
    collapse: bool = False
    file: int = 0  # its inode: the descriptor's number may be another file's by the time that it is mapped; 0 is not checked


class _Slab:
    """Extents of slots, mapped one by one.

    Args:
        collapse: extents are whole huge pages of a memory file that :meth:`touch` asks the kernel to make such.
    """

    def __init__(self, slot_bytes: int, slots_per_extent: int, slots: int, extent_bytes: int, collapse: bool) -> None:
        self.slot_bytes = slot_bytes
        self.slots = slots
        self.extent_bytes = extent_bytes
        self.slots_per_extent = slots_per_extent
        self._collapse = collapse
        self._maps: list[mmap.mmap] = []
        self._views: list[memoryview] = []
        self._bases = np.empty(0, np.int64)  # addresses of the views
        self._closed = False
        self._touch_lock = threading.Lock()
        self._touched: dict[int, threading.Event] = {}  # by extent; set once it was

    def extents(self) -> list[tuple[int, int]]:
        """Address and size in bytes of the extents that are mapped now, in order."""
        return [(_address(view), len(view)) for view in list(self._views)]

    def touch(self, number: int) -> None:
        """Have the system back an extent with pages; returns once that is done, by whoever began it first."""
        with self._touch_lock:
            done = self._touched.get(number)
            mine = done is None
            if done is None:
                done = self._touched[number] = threading.Event()
        if mine:
            try:
                view = self._views[number]
                populate([(_address(view), len(view))], collapse=self._collapse)
            except IndexError:
                pass  # closed meanwhile
            finally:
                done.set()
        done.wait()

    def complete(self) -> bool:
        """Whether no more extents will come."""
        return self._closed or len(self._views) * self.slots_per_extent >= self.slots

    def view(self, slot: int) -> memoryview:
        """The memory of a slot, ``slot_bytes`` long. Valid until the pool is closed.

        Raises:
            ArgumentError: no such slot.
            StoreClosedError: the pool was closed.
        """
        extent, index = divmod(slot, self.slots_per_extent)
        if self._closed:
            raise StoreClosedError("expected an open pool; it was closed")
        if not 0 <= extent < len(self._views):
            raise ArgumentError(f"expected a slot from 0 to {len(self._views) * self.slots_per_extent - 1}; got {slot}")
        begin = index * self.slot_bytes
        return self._views[extent][begin : begin + self.slot_bytes]

    def addresses(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where the memory of slots begins, for those who copy without taking views. Raises as :meth:`view`."""
        if self._closed:
            raise StoreClosedError("expected an open pool; it was closed")
        known = len(self._bases) * self.slots_per_extent
        wrong = slots[(slots < 0) | (slots >= known)]
        if len(wrong):
            raise ArgumentError(f"expected slots from 0 to {known - 1}; got {wrong[0]}")
        extents, indices = np.divmod(slots, self.slots_per_extent)
        found: npt.NDArray[np.int64] = self._bases[extents] + indices * self.slot_bytes
        return found

    def _map(self, fd: int) -> None:
        """Map the next extent of a memory file. Raises :class:`OSError`."""
        at = self.extent_bytes * len(self._maps)
        if self._collapse:
            extent, begin = map_aligned(fd, self.extent_bytes, at)
        else:
            extent, begin = mmap.mmap(fd, self.extent_bytes, offset=at), 0
        self._add(extent, begin)

    def _add(self, extent: mmap.mmap, begin: int = 0) -> None:
        self._maps.append(extent)
        self._views.append(memoryview(extent)[begin : begin + self.extent_bytes])
        self._bases = np.append(self._bases, _address(self._views[-1]))

    def _unmap(self) -> None:
        self._closed = True
        self._bases = np.empty(0, np.int64)
        self._views.clear()
        while self._maps:
            extent = self._maps.pop()
            with contextlib.suppress(BufferError):  # somebody still holds a view: the mapping goes when that does
                extent.close()


class HostPool(_Slab):
    """The slots of one store. Not thread-safe by itself: the store's lock guards it.

    Args:
        slot_bytes: bytes a slot; rounded up to whole pages.
        slots: the most slots there will ever be.
        extent_bytes: how much memory is added at a time; at least one slot.
        shared: in memory that another process can map.
        huge_pages: ``transparent`` asks the kernel for them (for shared extents of at least 16 MiB, since Linux 6.1),
            ``reserved`` takes those that the administrator set aside (``vm.nr_hugepages``), ``off`` asks for none.
        numa_node: the node whose memory is preferred, ``None`` for no preference.

    Raises:
        CapacityError: less than one slot.
        ConfigError: shared memory, or huge pages, are not to be had on this platform.
    """

    def __init__(
        self,
        slot_bytes: int,
        slots: int,
        *,
        extent_bytes: int = 64 * 1024**2,
        shared: bool = False,
        huge_pages: str = "transparent",
        numa_node: int | None = None,
    ) -> None:
        if slots < 1:
            raise CapacityError(
                f"expected room for at least one slot of {slot_bytes} bytes; got {slots} slots: raise the capacity"
            )
        slot_bytes = -(-slot_bytes // _PAGE) * _PAGE
        each = min(slots, max(1, extent_bytes // slot_bytes))
        collapse = shared and huge_pages == "transparent" and each * slot_bytes >= _LEAST_FOR_HUGE
        page = HUGE_PAGE if huge_pages == "reserved" or collapse else _PAGE
        super().__init__(slot_bytes, each, slots, -(-each * slot_bytes // page) * page, collapse)
        self._huge_pages = huge_pages
        self._numa_node = numa_node
        self._free: list[int] = []
        self._used = bytearray()
        self._ready: set[tuple[int, int]] = set()  # extents, and huge pages there that were made such before all of them were
        self._fd = -1
        if shared or huge_pages == "reserved":
            if not hasattr(os, "memfd_create"):
                raise ConfigError(
                    "ram_shared, ram_huge_pages: expected a platform with memfd (Linux); set ram_shared to false and "
                    "ram_huge_pages to off"
                )
            kind = os.MFD_HUGETLB if huge_pages == "reserved" else 0
            self._fd = os.memfd_create("lmkv-slots", os.MFD_CLOEXEC | kind)

    @property
    def used(self) -> int:
        """Slots that are allocated."""
        return len(self._used) - len(self._free)

    @property
    def available(self) -> int:
        """Slots that :meth:`allocate` could still give out, grown or not."""
        return self.slots - self.used

    @property
    def free_bytes(self) -> int:
        """Bytes of slots that can be allocated without growing."""
        return len(self._free) * self.slot_bytes

    def allocate(self, n: int) -> list[int] | None:
        """Ids of ``n`` slots, all or ``None``. Grows the slab when needed; contents are whatever was there before.

        Raises:
            StoreClosedError: the pool was closed.
            CapacityError: the operating system gives no more memory.
        """
        if self._closed:
            raise StoreClosedError("expected an open pool; it was closed")
        if n > self.available:
            return None
        while len(self._free) < n:
            self._grow()
        taken = self._free[len(self._free) - n :]
        del self._free[len(self._free) - n :]
        used = self._used
        for slot in taken:
            used[slot] = 1
        taken.reverse()
        if self._collapse and any(slot // self.slots_per_extent not in self._touched for slot in taken):
            self._make_ready(taken)
        return taken

    def _make_ready(self, slots: Sequence[int]) -> None:
        """Back the first of these slots with huge pages where nobody has begun to: at first use pages would come one by one."""
        missing: dict[tuple[int, int], None] = {}  # extents and huge pages there, in order
        for slot in slots:
            extent, index = divmod(slot, self.slots_per_extent)
            if extent not in self._touched and len(missing) * HUGE_PAGE < _READY_AT_ONCE:
                first, last = index * self.slot_bytes // HUGE_PAGE, ((index + 1) * self.slot_bytes - 1) // HUGE_PAGE
                missing |= dict.fromkeys((extent, page) for page in range(first, last + 1))
        missing = {page: None for page in missing if page not in self._ready}
        self._ready |= missing.keys()
        runs: list[list[int]] = []  # address and size
        for extent, page in missing:
            address = _address(self._views[extent]) + page * HUGE_PAGE
            if runs and address == sum(runs[-1]):
                runs[-1][1] += HUGE_PAGE
            else:
                runs.append([address, HUGE_PAGE])
        populate([(address, size) for address, size in runs], collapse=True)

    def grow_ahead(self, size: int) -> range:
        """Grow until ``size`` bytes of slots are free; returns the numbers of the new extents, for :meth:`touch`.

        Raises:
            CapacityError: the operating system gives no more memory.
        """
        first, before = len(self._views), len(self._free)
        while self.free_bytes < size and len(self._used) < self.slots and not self._closed:
            self._grow()
        fresh = self._free[before:]  # not ready yet, so they are taken last
        del self._free[before:]
        fresh.sort(reverse=True)
        self._free[:0] = fresh
        return range(first, len(self._views))

    def release(self, slots: Sequence[int]) -> None:
        """Give slots back.

        Raises:
            ArgumentError: one of them is not allocated or named twice; none is given back then.
        """
        used = self._used
        if len(slots) > 1 and len(set(slots)) < len(slots):
            raise ArgumentError(f"expected different slots; got {sorted(slots)}")
        for slot in slots:
            if not 0 <= slot < len(used) or not used[slot]:
                raise ArgumentError(f"expected allocated slots; slot {slot} is not")
        for slot in slots:
            used[slot] = 0
        self._free.extend(slots)

    def handle(self) -> PoolHandle:
        """How another process maps this pool.

        Raises:
            ConfigError: the pool is not shared.
        """
        if self._fd < 0:
            raise ConfigError("expected a shared pool; this one is private: open the store with ram_shared: true")
        sizes = (self.slot_bytes, self.slots_per_extent, self.slots, self.extent_bytes)
        return PoolHandle(os.getpid(), self._fd, *sizes, self._collapse, os.fstat(self._fd).st_ino)

    def close(self) -> None:
        """Unmap. Views that are still held elsewhere keep their memory until they go."""
        self._unmap()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _grow(self) -> None:
        first = len(self._used)
        count = min(self.slots_per_extent, self.slots - first)
        size = self.extent_bytes
        try:
            if self._fd >= 0:
                os.ftruncate(self._fd, size * (len(self._maps) + 1))
                self._map(self._fd)
            else:
                self._add(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            if hasattr(mmap, "MADV_HUGEPAGE") and size >= HUGE_PAGE and self._huge_pages == "transparent":
                with contextlib.suppress(OSError):  # a kernel without them
                    self._maps[-1].madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            cure = ": raise vm.nr_hugepages or set ram_huge_pages to transparent" if self._huge_pages == "reserved" else ""
            raise CapacityError(f"expected {size} more bytes of memory for slots; the system says: {error}{cure}") from error
        if self._numa_node is not None:
            _prefer_node(_address(self._views[-1]), size, self._numa_node)
        self._used.extend(bytes(count))
        self._free.extend(range(first + count - 1, first - 1, -1))

    def _check(self) -> None:
        assert len(self._used) <= self.slots
        assert len(set(self._free)) == len(self._free)
        assert all(not self._used[slot] for slot in self._free)
        assert sum(self._used) == self.used


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])


def map_aligned(fd: int, size: int, offset: int) -> tuple[mmap.mmap, int]:
    """Map part of a memory file where huge pages can be; returns a larger mapping that holds it, and where it begins there.

    Raises:
        OSError: it can't be mapped.
    """
    room = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    address = _address(memoryview(room))
    begin = -address % HUGE_PAGE
    call = ctypes.CDLL(None, use_errno=True).mmap
    call.restype = ctypes.c_void_p
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    writable = mmap.PROT_READ | mmap.PROT_WRITE
    if call(address + begin, size, writable, mmap.MAP_SHARED | _MAP_FIXED, fd, offset) != address + begin:
        error = ctypes.get_errno()
        room.close()
        raise OSError(error, os.strerror(error))
    return room, begin


def populate(ranges: Sequence[tuple[int, int]], collapse: bool = False) -> None:
    """Have the system back memory with pages now, without changing what is in it. Best effort; releases the interpreter lock.

    Args:
        ranges: address and size in bytes of mapped memory.
        collapse: these are whole huge pages of a memory file: have the kernel make them such (madvise(2), MADV_COLLAPSE),
            whatever its setting for shared memory says. That takes a fraction of the time, and so does pinning them.
    """
    if not sys.platform.startswith("linux"):
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for address, size in ranges:
        if collapse:  # a hole does not collapse: one page of each has to be there
            for at in range(address, address + size, HUGE_PAGE):
                madvise(at, _PAGE, _MADV_POPULATE_WRITE)
            madvise(address, size, _MADV_COLLAPSE)
        madvise(address, size, _MADV_POPULATE_WRITE)  # kernels before 5.14 refuse: pages come at first use then


def _prefer_node(address: int, size: int, node: int) -> None:
    """Have pages of fresh memory come from one NUMA node while it has some. Best effort (mbind(2), MPOL_PREFERRED)."""
    number = {"x86_64": 237, "aarch64": 235}.get(os.uname().machine)
    if not sys.platform.startswith("linux") or number is None or not 0 <= node < 64:
        return
    mask = ctypes.c_ulong(1 << node)
    preferred = 1
    ctypes.CDLL(None).syscall(number, ctypes.c_void_p(address), ctypes.c_ulong(size), preferred, ctypes.byref(mask), 65, 0)


class MappedPool(_Slab):
    """Another process's slots, seen from here. Reading and writing them is the owner's business to permit.

    Args:
        handle: what the owner's :meth:`HostPool.handle` gave.

    Raises:
        CapacityError: the owner is gone or belongs to another user.
    """

    def __init__(self, handle: PoolHandle) -> None:
        super().__init__(handle.slot_bytes, handle.slots_per_extent, handle.slots, handle.extent_bytes, handle.collapse)
        self._growing = threading.Lock()
        try:
            self._fd = os.open(f"/proc/{handle.pid}/fd/{handle.fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise CapacityError(f"expected the pool of process {handle.pid}; it can't be mapped: {error}") from error
        if handle.file and os.fstat(self._fd).st_ino != handle.file:
            self.close()
            raise CapacityError(f"expected the pool of process {handle.pid}; it is gone, and another file has its descriptor")

    def view(self, slot: int) -> memoryview:
        """As the owner's; extents that the owner added since are mapped on the way."""
        if slot >= len(self._views) * self.slots_per_extent:
            self.refresh()
        return super().view(slot)

    def addresses(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """As the owner's; extents that the owner added since are mapped on the way."""
        if len(slots) and slots.max() >= len(self._bases) * self.slots_per_extent:
            self.refresh()
        return super().addresses(slots)

    def refresh(self) -> None:
        """Map the extents that the owner added since."""
        size = self.extent_bytes
        with self._growing:
            while not self._closed and os.fstat(self._fd).st_size >= size * (len(self._maps) + 1):
                self._map(self._fd)

    def extents(self) -> list[tuple[int, int]]:
        """As the owner's."""
        self.refresh()
        return super().extents()

    def close(self) -> None:
        """Unmap."""
        self._unmap()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
