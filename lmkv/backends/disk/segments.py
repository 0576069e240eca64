"""Segment files: equal slots behind a page that says whose they are, read and written past the page cache where that works.

What is in a slot is nobody's business here; :mod:`.slots` says which are free, the index which record lies where.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import stat
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import xxhash

from ...errors import BackendUnavailableError, ConfigError
from .geometry import PAGE, Geometry, Run
from .queue import IoQueue

__all__ = ["SEGMENT_NAME", "SegmentFiles", "segment_name"]

SEGMENT_NAME = re.compile(r"segment-([0-9]{8})\.kv")
_MAGIC = b"LMKVSEG\0"
#: magic, version, number, slot bytes, slots, the directory's id; an xxh3-64 of these follows
_HEADER = struct.Struct("<8sIIQQ16s")
_VERSION = 1
#: Bytes that are copied at a time where a buffer is not aligned.
_BOUNCE = 1024**2
#: Bytes of zeros that are written at a time ahead of use.
_STEP = 4 * 1024**2
_DIRECT = getattr(os, "O_DIRECT", 0)
_OPEN = os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)


def segment_name(number: int) -> str:
    """The name of a segment's file in its directory."""
    return f"segment-{number:08d}.kv"


def _can_be_direct(path: str) -> bool:
    """Whether a file can be read past the page cache, found out by doing it."""
    if not _DIRECT:
        return False
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | _DIRECT)
    except OSError:
        return False
    try:
        return os.preadv(fd, [mmap.mmap(-1, PAGE)], 0) >= 0
    except OSError:
        return False
    finally:
        os.close(fd)


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])


def _whole(fd: int, transfer: Callable[[int, Sequence[memoryview], int], int], views: list[memoryview], offset: int) -> int:
    """Transfer until all is done, or nothing more comes; returns the bytes."""
    done = 0
    while views:
        moved = transfer(fd, views, offset + done)
        if moved <= 0:
            break
        done += moved
        while views and moved >= len(views[0]):
            moved -= len(views[0])
            views = views[1:]
        if views and moved:
            views = [views[0][moved:], *views[1:]]
    return done


class SegmentFiles:
    """The open segment files of one directory.

    Args:
        path: the directory.
        ident: 16 bytes that the segments' first pages bear.
        geometry: of the segments.
        direct: past the page cache: yes, no, or ``None`` for "where the file system can".
        depth: transfers in flight at once.
        replaced: whether another directory is at the path by now.

    Raises:
        ConfigError: ``direct`` is asked for where it is not to be had.
    """

    def __init__(
        self,
        path: str,
        ident: bytes,
        geometry: Geometry,
        direct: bool | None,
        depth: int,
        replaced: Callable[[], bool] = lambda: False,
    ) -> None:
        self._replaced = replaced
        self.geometry = geometry
        self.direct = direct is not False and _can_be_direct(os.path.join(path, "data.mdb"))
        if direct and not self.direct:
            raise ConfigError(f"direct: expected a file system that can go past the page cache at {path}: use auto or false")
        self._path = path
        self._ident = ident
        self._fds: dict[int, int] = {}
        self._uses: Counter[int] = Counter()  # by descriptor
        self._ended: set[int] = set()  # descriptors to close once nobody uses them
        self._lock = threading.Lock()
        self._queue = IoQueue("lmkv-disk-io", depth)

    # -- files -----------------------------------------------------------------------------------------------------------

    def _header(self, number: int) -> bytes:
        head = _HEADER.pack(_MAGIC, _VERSION, number, self.geometry.slot_bytes, self.geometry.segment_slots, self._ident)
        return (head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head))).ljust(PAGE, b"\0")

    def _file(self, number: int) -> str:
        return os.path.join(self._path, segment_name(number))

    def _open(self, number: int, flags: int) -> int:
        return os.open(self._file(number), flags | (_DIRECT if self.direct else 0), 0o600)

    def _checked(self, number: int, fd: int) -> bool:
        """Whether an open file is this directory's segment of that number, a plain file of its own and of full size."""
        state = os.fstat(fd)
        if not stat.S_ISREG(state.st_mode) or state.st_nlink != 1 or state.st_size < self.geometry.segment_bytes:
            return False
        page = mmap.mmap(-1, PAGE)
        return os.preadv(fd, [page], 0) == PAGE and page[:] == self._header(number)

    def _known(self, number: int) -> int | None:
        """The descriptor that is kept for a segment; ``None`` if there is none, or its file was removed behind our back."""
        fd = self._fds.get(number)
        if fd is not None and os.fstat(fd).st_nlink != 1:
            self._end(number)
            return None
        return fd

    def _end(self, number: int) -> None:
        """Keep a segment's descriptor no longer. Nobody may find its number to be another file's while he uses it."""
        fd = self._fds.pop(number, None)
        if fd is not None and self._uses[fd]:
            self._ended.add(fd)
        elif fd is not None:
            os.close(fd)

    @contextlib.contextmanager
    def _used(self, number: int, find: Callable[[int], int | None]) -> Iterator[int | None]:
        """What ``find`` gives, which stays open meanwhile."""
        with self._lock:
            fd = find(number)
            if fd is not None:
                self._uses[fd] += 1
        try:
            yield fd
        finally:
            with self._lock:
                if fd is not None:
                    self._uses[fd] -= 1
                    if not self._uses[fd]:
                        del self._uses[fd]
                        if fd in self._ended:
                            self._ended.discard(fd)
                            os.close(fd)

    def _to_read(self, number: int) -> int | None:
        """The descriptor to read a segment by; ``None`` if there is no such segment any more. Under the lock."""
        fd = self._known(number)
        if fd is not None:
            return fd
        try:
            fd = self._open(number, _OPEN)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):
                return None
            raise
        if not self._checked(number, fd):
            os.close(fd)
            return None
        self._fds[number] = fd
        return fd

    def make(self, number: int) -> None:
        """Have a segment's file there, with all its bytes allocated. What is in its slots stays.

        Raises:
            OSError: the file system has no room or refuses, or another directory is at the path by now.
        """
        with self._lock:
            self._to_write(number)

    def _to_write(self, number: int) -> int:
        """The descriptor to write a segment by. Under the lock."""
        fd = self._known(number)
        if fd is not None:
            return fd
        if self._replaced():  # or else this would write over the segments of the one that is there now
            raise OSError(errno.ESTALE, f"the directory of {segment_name(number)} was removed or made anew")
        path = self._file(number)
        with contextlib.suppress(FileNotFoundError):
            state = os.lstat(path)
            if not stat.S_ISREG(state.st_mode) or state.st_nlink != 1:
                os.unlink(path)  # a link would lead out of the directory
        fd = self._open(number, _OPEN | os.O_CREAT)
        try:
            if not self._checked(number, fd):
                self._allocate(fd)
                page = mmap.mmap(-1, PAGE)
                page[:] = self._header(number)
                _whole(fd, os.pwritev, [memoryview(page)], 0)
                os.fsync(fd)
                self._sync_directory()
        except BaseException:
            os.close(fd)
            raise
        self._fds[number] = fd
        return fd

    def _allocate(self, fd: int) -> None:
        size = self.geometry.segment_bytes
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size)
        if os.fstat(fd).st_size != size:
            os.ftruncate(fd, size)

    def _sync_directory(self) -> None:
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def remove(self, number: int) -> None:
        """Delete a segment's file."""
        with self._lock:
            self._end(number)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._file(number))

    def let_go(self) -> None:
        """Close the files that nobody uses now, the others afterwards."""
        with self._lock:
            for number in list(self._fds):
                self._end(number)

    def close(self) -> None:
        """Close the files."""
        self._queue.close()
        with self._lock:
            for fd in (*self._fds.values(), *self._ended):
                os.close(fd)
            self._fds.clear()
            self._ended.clear()

    # -- records ---------------------------------------------------------------------------------------------------------

    def read(self, wanted: Sequence[tuple[Sequence[Run], memoryview]]) -> list[bool]:
        """Fill each buffer, which is as long as its record, from its runs of slots; tells which came whole.

        Raises:
            BackendUnavailableError: the device fails.
        """
        with self._translated("read records"):
            return self._queue.run([lambda pair=pair: self._read(*pair) for pair in wanted])  # type: ignore[misc]

    def write(self, records: Sequence[tuple[Sequence[Run], memoryview]]) -> None:
        """Write each record into its runs of slots and have the device keep them.

        Raises:
            BackendUnavailableError: the device fails; what is in the slots is undefined then.
        """
        with self._translated("write records"):
            numbers = {first // self.geometry.segment_slots for runs, _ in records for first, _ in runs}
            for number in numbers:
                self.make(number)
            self._queue.run([lambda pair=pair: self._write(*pair) for pair in records])  # type: ignore[misc]
            for number in numbers:
                with self._used(number, self._to_write) as fd:
                    assert fd is not None
                    os.fdatasync(fd)

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BackendUnavailableError(f"expected to {what} in {self._path}; the system says: {error}") from error

    def _parts(self, runs: Iterable[Run], data: memoryview) -> Iterator[tuple[int, int, memoryview]]:
        """Segment, offset and piece of ``data`` of each run."""
        for first, count in runs:
            size = min(len(data), count * self.geometry.slot_bytes)
            yield first // self.geometry.segment_slots, self.geometry.offset(first), data[:size]
            data = data[size:]
        if data:
            raise ValueError(f"expected runs that hold the whole record; {len(data)} bytes are left over")

    def _read(self, runs: Sequence[Run], out: memoryview) -> bool:
        for number, offset, piece in self._parts(runs, out):
            with self._used(number, self._to_read) as fd:
                if fd is None or not self._read_piece(fd, piece, offset):
                    return False
        return True

    def _read_piece(self, fd: int, piece: memoryview, offset: int) -> bool:
        if not self.direct:
            return _whole(fd, os.preadv, [piece], offset) == len(piece)
        if _address(piece) % PAGE:
            return all(self._read_copied(fd, piece[at : at + _BOUNCE], offset + at) for at in range(0, len(piece), _BOUNCE))
        return self._read_aligned(fd, piece, offset)

    @staticmethod
    def _read_aligned(fd: int, piece: memoryview, offset: int) -> bool:
        pages = len(piece) // PAGE * PAGE
        tail = mmap.mmap(-1, PAGE) if pages < len(piece) else None
        views = [piece[:pages]] if pages else []
        views += [memoryview(tail)] if tail is not None else []
        if _whole(fd, os.preadv, views, offset) < pages + (PAGE if tail is not None else 0):
            return False
        if tail is not None:
            piece[pages:] = tail[: len(piece) - pages]
        return True

    @staticmethod
    def _read_copied(fd: int, piece: memoryview, offset: int) -> bool:
        size = -(-len(piece) // PAGE) * PAGE
        page = mmap.mmap(-1, size)
        if _whole(fd, os.preadv, [memoryview(page)], offset) < size:
            return False
        piece[:] = page[: len(piece)]
        return True

    def _write(self, runs: Sequence[Run], record: memoryview) -> None:
        for number, offset, piece in self._parts(runs, record):
            with self._used(number, self._to_write) as fd:
                assert fd is not None
                self._write_piece(fd, piece, offset)

    def _write_piece(self, fd: int, piece: memoryview, offset: int) -> None:
        if not self.direct:
            self._write_all(fd, [piece], offset)
        elif _address(piece) % PAGE:
            for at in range(0, len(piece), _BOUNCE):
                part = piece[at : at + _BOUNCE]
                page = mmap.mmap(-1, -(-len(part) // PAGE) * PAGE)
                page[: len(part)] = part
                self._write_all(fd, [memoryview(page)], offset + at)
        else:
            pages = len(piece) // PAGE * PAGE
            views = [piece[:pages]] if pages else []
            if pages < len(piece):
                tail = mmap.mmap(-1, PAGE)
                tail[: len(piece) - pages] = piece[pages:]
                views.append(memoryview(tail))
            self._write_all(fd, views, offset)

    @staticmethod
    def _write_all(fd: int, views: list[memoryview], offset: int) -> None:
        size = sum(map(len, views))
        if _whole(fd, os.pwritev, views, offset) < size:
            raise OSError(errno.EIO, "less was written than was given")

    @property
    def zero_step(self) -> int:
        """Slots that :meth:`write_zeros` takes at a time."""
        return max(1, _STEP // self.geometry.slot_bytes)

    def write_zeros(self, first: int, count: int) -> None:
        """Write zeros over slots of one segment, so that later writes find blocks that were written before.

        Raises:
            BackendUnavailableError: the device fails.
        """
        with self._translated("prepare slots"):
            zeros = memoryview(mmap.mmap(-1, _BOUNCE))
            left, offset = count * self.geometry.slot_bytes, self.geometry.offset(first)
            with self._used(first // self.geometry.segment_slots, self._to_write) as fd:
                assert fd is not None
                while left:
                    size = min(left, len(zeros))
                    self._write_all(fd, [zeros[:size]], offset)
                    offset, left = offset + size, left - size
