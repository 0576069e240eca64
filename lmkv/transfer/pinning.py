"""Pinning a pool for a GPU, beside whoever uses it.

Pinning all of a large pool at the start takes minutes; a copy needs only its own slots. So extents are pinned as they appear,
by several threads, and copies from and to slots that are not pinned yet go through the driver's own staging, at a fraction of
the speed.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from ..errors import NativeError
from ..events import Emitter
from .gpu import Gpu
from .rows import Row, device_of

__all__ = ["Pinner", "Pins"]

#: What one call pins: the driver serves nobody else meanwhile, so a copy may have to wait for as long as that takes.
_MOST = 64 << 20
#: The same where nobody copies yet: slots side by side in one pinned range can share a transfer.
_MOST_AT_START = 1 << 30
#: Seconds that a store's first copy has the machine to itself.
_DELAY = 0.1
_SHORTEST, _LONGEST = 0.002, 0.25  # seconds between looks at a pool that still grows


class Extents(Protocol):
    """A pool, as far as it matters here."""

    slot_bytes: int

    def extents(self) -> list[tuple[int, int]]: ...

    def touch(self, number: int) -> None: ...

    def complete(self) -> bool: ...


class Pinner:
    """Pins the extents of a pool for one device, now and as they appear, until closed.

    Args:
        pool: a :class:`lmkv.pool.HostPool`, or a :class:`lmkv.pool.MappedPool` of another process's.
        gpu: the device.
        threads: how many make memory ready; by default one for every two processors, at most eight.
        delay: seconds before it begins, so that who has just started comes first.
        emit: told ``unpinned`` of an extent that the driver refuses to pin.
        at_start: return once all that the pool has now is pinned, or refused; in larger pieces, since no copy waits.
    """

    def __init__(
        self,
        pool: Extents,
        gpu: Gpu,
        *,
        threads: int | None = None,
        delay: float = 0.0,
        emit: Emitter | None = None,
        at_start: bool = False,
    ) -> None:
        self._pool = pool
        self._gpu = gpu
        self._threads = threads or max(1, min(8, (os.cpu_count() or 2) // 2))
        self._emit = Emitter(None) if emit is None else emit
        self._pinned: list[int] = []
        self._delay = delay
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._done = 0  # extents
        self._most = _MOST_AT_START if at_start else _MOST
        self._thread = threading.Thread(target=self._run, name="lmkv-pin", daemon=True)
        self._thread.start()
        if at_start:
            self.wait()
            self._most = _MOST

    def wait(self, timeout: float | None = None) -> bool:
        """Block until what the pool has now is pinned, or refused; ``False`` if ``timeout`` seconds were not enough."""
        extents = len(self._pool.extents())
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._done < extents and not self._stop.is_set():
            if deadline is not None and time.monotonic() > deadline:
                return False
            time.sleep(_SHORTEST)
        return True

    def close(self) -> None:
        """Unpin everything. No copy may be under way; the pool must still be mapped."""
        self._stop.set()
        self._thread.join()
        for address in self._pinned:
            self._gpu.unpin(address)
        self._pinned.clear()

    def _run(self) -> None:
        pause = _SHORTEST
        self._stop.wait(self._delay)
        with ThreadPoolExecutor(self._threads, thread_name_prefix="lmkv-pin") as threads:
            while not self._stop.is_set():
                extents = self._pool.extents()
                if len(extents) > self._done:
                    numbers = range(self._done, len(extents))
                    list(threads.map(self._pin, numbers, extents[self._done :]))
                    self._done = len(extents)
                    pause = _SHORTEST
                    continue
                if self._pool.complete():
                    self._stop.wait()
                    return
                self._stop.wait(pause)
                pause = min(2 * pause, _LONGEST)

    def _pin(self, number: int, extent: tuple[int, int]) -> None:
        """Pin an extent in pieces of whole slots: a slot that lies in two pinned ranges could not be copied at once."""
        if self._stop.is_set():
            return
        self._pool.touch(number)
        address, size = extent
        most = max(1, self._most // self._pool.slot_bytes) * self._pool.slot_bytes
        for at in range(0, size, most):
            if self._stop.is_set():
                return
            try:
                with self._lock:
                    self._gpu.pin(address + at, min(most, size - at))
                    self._pinned.append(address + at)
            except NativeError as error:
                self._emit("unpinned", "ram", bytes=size - at, reason=str(error))
                return


class Pins:
    """A store's pinners: its pool is pinned for a GPU from the first use of tensors there on.

    Args:
        pool, emit: as for :class:`Pinner`.
        enabled: ``False`` leaves the pool as it is.
    """

    def __init__(self, pool: Extents, emit: Emitter, enabled: bool) -> None:
        self._pool = pool
        self._emit = emit
        self._enabled = enabled
        self._lock = threading.Lock()
        self._pinners: dict[int, Pinner] = {}
        self._closed = False

    def use(self, rows: Sequence[Row]) -> None:
        """Checked rows are about to be copied from or to. Raises as :meth:`lmkv.transfer.Gpu.of`."""
        device = device_of(rows)
        if device is None or device in self._pinners or not self._enabled:
            return
        with self._lock:
            if device not in self._pinners and not self._closed:
                self._pinners[device] = Pinner(self._pool, Gpu.of(device), delay=_DELAY, emit=self._emit)

    def close(self) -> None:
        """Unpin everything, as :meth:`Pinner.close`."""
        with self._lock:
            self._closed = True
            for pinner in self._pinners.values():
                pinner.close()
