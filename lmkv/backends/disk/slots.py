"""Which slots a record may be written into: free ones in the index that no living process is writing into.

The index says which slots hold records. A slot that is being written is held by a byte lock of the operating system on the
file ``slots.lock``, one byte a slot: no two processes get the same one, and what a process held is free again the moment it
dies, however it dies. Within a process, the same is kept in a table.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from ...errors import BackendUnavailableError, CapacityError, LMKVError
from .geometry import Run
from .index import RecordIndex
from .segments import SegmentFiles

__all__ = ["PRESENCE", "Slots"]

#: A byte behind all slots that every process which has the directory open shares a lock of.
PRESENCE = 2**62
#: Segments that are searched for neighbouring slots before a record is cut up.
_SEARCHED = 32
#: Seconds during which a file system that had no room for a segment is not asked again.
_FULL_SECONDS = 5.0
#: Seconds that closing waits for a step of writing ahead.
_STEP_SECONDS = 10.0


def _free_runs(free: int, number: int, slots: int) -> Iterator[Run]:
    """The runs of set bits."""
    at = 0
    while free:
        skip = (free & -free).bit_length() - 1
        free >>= skip
        at += skip
        count = (~free & (free + 1)).bit_length() - 1
        yield number * slots + at, count
        free >>= count
        at += count


def _find_run(free: int, count: int) -> int:
    """The lowest place of ``count`` set bits in a row; -1 if there is none."""
    found, have = free, 1
    while have < count and found:
        step = min(have, count - have)
        found &= found >> step
        have += step
    return (found & -found).bit_length() - 1 if found else -1


class Slots:
    """Hands out free slots of one directory to this process.

    Args:
        path: the directory.
        begin: ``begin(write)`` gives a transaction.
        most: segment files there may be.
        floor: bytes of the file system that are left free.
        ahead: whether segments are written over before they are used.
    """

    def __init__(
        self,
        path: str,
        index: RecordIndex,
        files: SegmentFiles,
        begin: Callable[[bool], AbstractContextManager[Any]],
        *,
        most: int,
        floor: int,
        ahead: bool,
    ) -> None:
        self.most = most
        self._path = path
        self._index = index
        self._files = files
        self._begin = begin
        self._floor = floor
        self._ahead = ahead
        self._per_segment = files.geometry.segment_slots
        self._mine: dict[int, int] = {}  # segment -> slots that this process holds, as bits
        self._hint = 0
        self._full_until = 0.0
        self._closed = False
        self._preparing: threading.Thread | None = None
        self._lock = threading.Lock()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        self._fd = os.open(os.path.join(path, "slots.lock"), flags, 0o600)
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, PRESENCE)
        except OSError as error:
            os.close(self._fd)
            raise BackendUnavailableError(f"{path} is being compacted: {error}") from error

    # -- holding ---------------------------------------------------------------------------------------------------------

    def reserve(self, counts: Sequence[int]) -> list[list[Run]]:
        """Runs of slots for records of so many slots each, neighbours where that can be. All or none.

        Raises:
            CapacityError: there are not as many free slots.
        """
        with self._lock:
            while True:
                taken = self._pick(counts)
                if taken is not None:
                    break
                if not self._grow():
                    raise CapacityError(
                        f"expected {sum(counts)} free slots of {self._files.geometry.slot_bytes} bytes; got fewer"
                    )
        self._prepare()
        return taken

    def release(self, runs: Iterable[Run]) -> None:
        """Hold these slots no longer."""
        with self._lock:
            self._release(runs)

    def _release(self, runs: Iterable[Run]) -> None:
        for first, count in runs:
            number, slot = divmod(first, self._per_segment)
            self._mine[number] = self._mine.get(number, 0) & ~(((1 << count) - 1) << slot)
            with contextlib.suppress(OSError):  # whatever the lock is good for, it ends with the process
                fcntl.lockf(self._fd, fcntl.LOCK_UN, count, first)

    def _hold(self, run: Run) -> bool:
        """Try to be the only one to write there."""
        first, count = run
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, count, first)
        except (BlockingIOError, PermissionError):
            return False
        number, slot = divmod(first, self._per_segment)
        self._mine[number] = self._mine.get(number, 0) | ((1 << count) - 1) << slot
        return True

    def _pick(self, counts: Sequence[int]) -> list[list[Run]] | None:
        """Held slots for all, or ``None``; they are free in the index as it is after they were taken hold of."""
        for _ in range(8):
            taken: list[list[Run]] = []
            with self._begin(False) as txn:
                choice = _Choice(self, self._index.segments(txn))
            for count in counts:
                runs = choice.neighbours(count) or choice.pieces(count)
                if runs is None:
                    break
                taken.append(runs)
            flat = [run for runs in taken for run in runs]
            with self._begin(False) as txn:  # somebody may have put a record there before the lock was taken
                free = self._index.are_free(txn, flat)
            if free and len(taken) == len(counts):
                return taken
            self._release(flat)
            if free:
                return None
        return None

    # -- segments --------------------------------------------------------------------------------------------------------

    def _grow(self) -> bool:
        """One more segment, if the quota and the file system allow it."""
        if time.monotonic() < self._full_until:
            return False
        with self._begin(True) as txn:
            held = self._index.segments(txn)
            if len(held) >= self.most:
                return False
            number = next(number for number in range(len(held) + 1) if number not in held)
            if not self._room():
                self._full_until = time.monotonic() + _FULL_SECONDS
                return False
            self._index.set_segment(txn, number, 0)
        try:
            self._files.make(number)
        except OSError as error:
            self._full_until = time.monotonic() + _FULL_SECONDS
            self._take_back(number)
            raise CapacityError(f"expected room for one more segment file in {self._path}; the system says: {error}") from error
        return True

    def _room(self) -> bool:
        if not self._floor:
            return True
        state = os.statvfs(self._path)
        return state.f_bavail * state.f_frsize - self._files.geometry.segment_bytes >= self._floor

    def _take_back(self, number: int) -> None:
        """Undo the registration of a segment whose file could not be made, unless somebody else could."""
        whole = (number * self._per_segment, self._per_segment)
        if not self._hold(whole):
            return
        with contextlib.suppress(LMKVError), self._begin(True) as txn:
            if self._index.segment_bits(txn, number) == 0:
                self._index.set_segment(txn, number, None)
                self._files.remove(number)
        self._release([whole])

    def _prepare(self) -> None:
        """Have the next segment written over on a thread of its own, before the last one is full."""
        if not self._ahead or self._preparing is not None or self._closed:
            return
        with self._begin(False) as txn:
            held = self._index.segments(txn)
        used = sum(bits.bit_count() for bits in held.values())
        if len(held) >= self.most or len(held) * self._per_segment - used > self._per_segment // 2:
            return
        with self._lock:
            if self._preparing is None and not self._closed:
                self._preparing = threading.Thread(target=self._write_ahead, name="lmkv-disk-ahead", daemon=True)
                self._preparing.start()

    def _write_ahead(self) -> None:
        try:
            with self._lock:
                with self._begin(False) as txn:
                    before = self._index.segments(txn)
                if self._closed or not self._grow():
                    return
                with self._begin(False) as txn:
                    fresh = self._index.segments(txn).keys() - before.keys()
            for number in fresh:
                self._write_over(number)
        except (LMKVError, OSError):
            pass  # whoever needs the slots will hear of it
        finally:
            self._preparing = None

    def _write_over(self, number: int) -> None:
        """Zeros into the slots of a fresh segment that nobody uses, a few at a time."""
        at, end = number * self._per_segment, (number + 1) * self._per_segment
        step = self._files.zero_step
        while at < end and not self._closed:
            run = (at, min(step, end - at))
            at += run[1]
            with self._lock:
                if self._closed or self._mine.get(number, 0) & ((1 << run[1]) - 1) << run[0] % self._per_segment:
                    continue
                if not self._hold(run):
                    continue
            try:
                with self._begin(False) as txn:
                    free = self._index.are_free(txn, [run])
                if free:
                    self._files.write_zeros(*run)
            finally:
                self.release([run])

    def close(self) -> bool:
        """Let go of everything; waits for a step of writing ahead. ``False`` if the device hangs in it: then that step still
        writes by the files' descriptors, whose numbers must not become other files'."""
        self._closed = True
        preparing = self._preparing
        if preparing is not None:
            preparing.join(_STEP_SECONDS)
            if preparing.is_alive():
                return False
        os.close(self._fd)
        return True


class _Choice:
    """The free slots of one moment, from which several records choose.

    Args:
        held: registered segments and their slots in use.
    """

    def __init__(self, slots: Slots, held: dict[int, int]) -> None:
        self._slots = slots
        width = slots._per_segment
        full = (1 << width) - 1
        order = sorted(held, key=lambda number: (number < slots._hint, number))
        self._free = {number: full & ~held[number] & ~slots._mine.get(number, 0) for number in order}

    def _take(self, run: Run) -> bool:
        """Get hold of a run; it is no longer to be chosen, whoever has it."""
        number, slot = divmod(run[0], self._slots._per_segment)
        self._free[number] &= ~(((1 << run[1]) - 1) << slot)
        return self._slots._hold(run)

    def neighbours(self, count: int) -> list[Run] | None:
        """Slots that lie side by side."""
        searched = 0
        for number, free in self._free.items():
            if not free:
                continue
            searched += 1
            if searched > _SEARCHED:
                return None
            while (slot := _find_run(self._free[number], count)) >= 0:
                run = (number * self._slots._per_segment + slot, count)
                if self._take(run):
                    self._slots._hint = number
                    return [run]
        return None

    def pieces(self, count: int) -> list[Run] | None:
        """Slots wherever they are, the longest runs first."""
        width = self._slots._per_segment
        if sum(free.bit_count() for free in self._free.values()) < count:
            return None
        runs = [run for number, free in self._free.items() for run in _free_runs(free, number, width)]
        runs.sort(key=lambda run: -run[1])
        taken: list[Run] = []
        for first, length in runs:
            run = (first, min(length, count))
            if self._take(run):
                taken.append(run)
                count -= run[1]
            if not count:
                return taken
        self._slots._release(taken)
        return None
