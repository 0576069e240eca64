"""How several directories share one capacity: by what they had before, else by how fast their devices are."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Sequence

import lmdb

from ...errors import CapacityError
from .directory import registered_capacity
from .geometry import LEAST_CAPACITY, PAGE

__all__ = ["shares_of"]

#: Bytes that are written and read to measure a device, and in what pieces.
_PROBE, _PIECE = 16 * 1024**2, 4 * 1024**2
#: Measurements of each device.
_ROUNDS = 4
#: Speeds that lie closer together count as equal: a measurement is not more exact than that.
_EQUAL = 1.3
#: No device gets less than this part of what the fastest gets.
_LEAST_PART = 0.1


def shares_of(paths: Sequence[str], capacity: int) -> list[int]:
    """Bytes of each directory, at most ``capacity`` together.

    Directories that are there keep what they had where that fits, and new ones get the rest. Where it does not fit, or all are
    new, everything is shared out anew, by the measured speeds.

    Raises:
        CapacityError: there is not enough for all.
    """
    if capacity < len(paths) * LEAST_CAPACITY:
        raise CapacityError(
            f"expected a capacity of at least {len(paths) * LEAST_CAPACITY} bytes for {len(paths)} directories; got {capacity}"
        )
    noted = [_noted_capacity(path) for path in paths]
    new = [i for i, size in enumerate(noted) if not size]
    left = capacity - sum(noted)
    if not new and 0 <= left < len(paths) * PAGE:
        return noted
    if not new:  # another capacity in all: in the same proportions
        return _shared(capacity, noted)
    if len(new) == len(paths) or left < len(new) * LEAST_CAPACITY:
        return _shared(capacity, _even(_speeds(paths)))
    rest = _shared(left, _even(_speeds([paths[i] for i in new])))
    return [rest[new.index(i)] if i in new else size for i, size in enumerate(noted)]


def _shared(capacity: int, weights: Sequence[float]) -> list[int]:
    """Whole pages, each at least what a directory needs."""
    free = capacity - LEAST_CAPACITY * len(weights)
    return [LEAST_CAPACITY + int(free * weight / sum(weights)) // PAGE * PAGE for weight in weights]


def _even(speeds: Sequence[float]) -> list[float]:
    """Speeds as weights: equal where they nearly are, and none very small."""
    fastest = max(speeds)
    if fastest <= 0:
        return [1.0] * len(speeds)
    return [1.0 if speed * _EQUAL >= fastest else max(_LEAST_PART, speed / fastest) for speed in speeds]


def _noted_capacity(path: str) -> int:
    """The capacity that a directory was opened with last; 0 for one that is new or can't be read."""
    open_now = registered_capacity(path)
    if open_now or not os.path.isfile(os.path.join(path, "data.mdb")):
        return open_now
    with contextlib.suppress(lmdb.Error, OSError), lmdb.open(path, readonly=True, max_dbs=8) as env, env.begin() as txn:
        size = txn.get(b"capacity", b"", db=env.open_db(b"meta", txn=txn, create=False))
        return int.from_bytes(size, "little")
    return 0


def _speeds(paths: Sequence[str]) -> list[float]:
    """Of each directory's device the best of some measurements, which take turns: others may be using them as well."""
    devices = [_device(path) for path in paths]
    best = dict.fromkeys(devices, 0.0)
    if len(best) > 1:
        for _ in range(_ROUNDS):
            for device, path in dict(zip(devices, paths, strict=True)).items():
                best[device] = max(best[device], _speed(path))
    return [best[device] for device in devices]


def _device(path: str) -> object:
    with contextlib.suppress(OSError):
        return os.stat(path).st_dev
    return path


def _speed(path: str) -> float:
    """Bytes a second that are written to a device, made durable and read again; 0 where that fails."""
    tmpfile, direct = getattr(os, "O_TMPFILE", 0), getattr(os, "O_DIRECT", 0)
    for flags in (tmpfile | direct, tmpfile) if tmpfile else ():  # a file without a name: nothing is left behind
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
            try:
                return _measured(fd)
            finally:
                os.close(fd)
    return 0.0


def _measured(fd: int) -> float:
    piece = memoryview(mmap.mmap(-1, _PIECE))
    offsets = range(0, _PROBE, _PIECE)
    for _ in range(2):  # blocks that were never written are slower, and never written but once
        begun = time.perf_counter()
        for offset in offsets:
            os.pwritev(fd, [piece], offset)
        os.fsync(fd)
        for offset in offsets:
            os.preadv(fd, [piece], offset)
        seconds = time.perf_counter() - begun
    return 2 * _PROBE / seconds
