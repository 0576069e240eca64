"""Copies to and from a GPU's memory: submitted, not waited for. ``native/gpu_submit.c`` says how they are made."""

from __future__ import annotations

import bisect
import contextlib
import sys
import threading
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..errors import NativeError
from .kernels import built_in, compiled
from .plan import Plan, native

__all__ = ["Gpu", "GpuCopy", "GpuOptions", "count"]

_ROOM = 400  # characters of a message


@dataclass(frozen=True)
class GpuOptions:
    """How copies are made on a device.

    Args:
        entry_bytes, entries: of the staging ring in device memory, one a direction.
        thread_blocks, threads: of a kernel: blocks at most, and threads in each.
        beside_blocks: at most, of a kernel beside which the wire is in use.
        direct_bytes: copies of at most so many bytes are one kernel on pinned host memory, without staging.
    """

    entry_bytes: int = 40 << 20
    entries: int = 2
    thread_blocks: int = 132
    beside_blocks: int = 16
    threads: int = 512
    direct_bytes: int = 256 << 10


def _message() -> Any:
    return native.ffi.new("char[]", _ROOM)


def _text(why: Any) -> str:
    return str(native.ffi.string(why).decode(errors="replace"))


def count() -> int:
    """How many GPUs there are.

    Raises:
        NativeError: no usable driver, or the compiled part was not built; the message says which.
    """
    if native.lib is None:
        raise NativeError("expected the compiled part; it was not built: install a C compiler and reinstall lmkv")
    why = _message()
    found = int(native.lib.lmkv_gpu_count(why, _ROOM))
    if found < 0:
        raise NativeError(_text(why))
    return found


class Gpu:
    """A device, in the process's own context there. One object a device; safe to use from several threads.

    Args:
        device: CUDA ordinal.
        image: kernels, instead of the built-in or compiled ones.
        cache: as for :func:`lmkv.transfer.kernels.compiled`.

    Raises:
        NativeError: no driver, no such device, or no kernels for it.
    """

    _open: ClassVar[dict[int, Gpu]] = {}
    _lock = threading.Lock()

    def __init__(self, device: int, *, image: bytes | None = None, cache: Path | None = None) -> None:
        devices = count()
        if not 0 <= device < devices:
            raise NativeError(f"expected a device from 0 to {devices - 1}; got {device}")
        self.device = device
        self.options = GpuOptions()
        image = built_in() if image is None else image
        why = _message()
        self._handle: Any = native.ffi.NULL
        if image is not None:
            self._handle = native.lib.lmkv_gpu_open(device, native.ffi.from_buffer(image), why, _ROOM)
        if self._handle == native.ffi.NULL:  # no kernels, or none for this device
            for anew in (False, True):
                fresh = compiled(self._architecture(device), cache=cache, anew=anew)
                self._handle = native.lib.lmkv_gpu_open(device, native.ffi.from_buffer(fresh), why, _ROOM)
                if self._handle != native.ffi.NULL:
                    return
            raise NativeError(f"device {device}: {_text(why)}")

    @classmethod
    def of(cls, device: int) -> Gpu:
        """The process's object for a device; opened at the first call."""
        with cls._lock:
            if device not in cls._open:
                cls._open[device] = cls(device)
            return cls._open[device]

    @staticmethod
    def _architecture(device: int) -> str:
        text, why = native.ffi.new("char[]", 16), _message()
        if native.lib.lmkv_gpu_architecture(device, text, 16, why, _ROOM):
            raise NativeError(f"device {device}: {_text(why)}")
        return _text(text)

    def fact(self, name: str) -> str:
        """``name``, or ``pci`` (its address on the bus)."""
        text = native.ffi.new("char[]", 256)
        if native.lib.lmkv_gpu_fact(self._handle, name.encode(), text, 256):
            raise NativeError(f"expected to learn the device's {name!r}; the driver does not tell")
        return _text(text)

    def numa_node(self) -> int | None:
        """The NUMA node that the device hangs on (sysfs), ``None`` where the machine has one node only or does not tell."""
        try:
            node = int(Path(f"/sys/bus/pci/devices/{self.fact('pci').lower()}/numa_node").read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None
        return node if node >= 0 else None

    def tune(self, options: GpuOptions) -> None:
        """Change how copies are made from now on.

        Raises:
            NativeError: a value is out of range.
        """
        why = _message()
        values = astuple(options)
        if native.lib.lmkv_gpu_tune(self._handle, native.ffi.new("lmkv_gpu_options *", values), why, _ROOM):
            raise NativeError(_text(why))
        self.options = options

    def pin(self, address: int, size: int) -> None:
        """Pin mapped memory, so that the device copies at full speed. Takes 0.1 to 0.3 s a GiB; releases the interpreter lock.

        Raises:
            NativeError: the driver refuses, for example since the memory was pinned before.
        """
        why = _message()
        if native.lib.lmkv_gpu_pin(self._handle, address, size, why, _ROOM):
            raise NativeError(_text(why))

    def unpin(self, address: int) -> None:
        """Undo :meth:`pin`. No copy may be under way there.

        Raises:
            NativeError: nothing was pinned at that address.
        """
        why = _message()
        if native.lib.lmkv_gpu_unpin(self._handle, address, why, _ROOM):
            raise NativeError(_text(why))

    def pinned(self, address: int, size: int) -> bool:
        """Whether that memory lies in one pinned range."""
        return bool(native.lib.lmkv_gpu_pinned(self._handle, address, size))

    def start(
        self,
        plan: Plan,
        ends: npt.NDArray[np.int64],
        layer_rows: Sequence[int],
        size: int,
        *,
        into_payloads: bool,
        stream: int | None,
    ) -> GpuCopy:
        """Submit a copy.

        Args:
            ends: last row + 1 of each group of rows, in the order in which a scatter brings them.
            layer_rows: last row + 1 of each layer.
            size: bytes, for the copy to tell.
            stream: it touches rows only after what is in this stream now; ``None`` is torch's current one.

        Raises:
            NativeError: an invalid plan, or the driver refuses; then nothing is under way.
        """
        why = _message()
        order = np.ascontiguousarray(ends, dtype=np.int64)
        handle = native.lib.lmkv_gpu_start(
            self._handle,
            plan.struct,
            into_payloads,
            native.ffi.cast("int64_t *", order.ctypes.data),
            len(order),
            self.stream(stream),
            why,
            _ROOM,
        )
        if handle == native.ffi.NULL:
            raise NativeError(_text(why))
        return GpuCopy(self, handle, plan, order, layer_rows, size)

    def stream(self, stream: int | None) -> int:
        """The handle of a stream; torch's current one for ``None``, the default one where torch is not loaded."""
        if stream is not None:
            return stream
        torch = sys.modules.get("torch")
        return 0 if torch is None else int(torch.cuda.current_stream(self.device).cuda_stream)


class GpuCopy:
    """A submitted copy; see :class:`lmkv.transfer.Copy`. Dropping it waits until it is done.

    Attributes:
        bytes: how many it moves.
    """

    def __init__(
        self, gpu: Gpu, handle: Any, plan: Plan, ends: npt.NDArray[np.int64], layer_rows: Sequence[int], size: int
    ) -> None:
        self._gpu = gpu
        self._handle = handle
        self._plan: Plan | None = plan  # its payloads and rows must stay
        self._ends = ends
        self._layer_rows = layer_rows
        self.bytes = size

    def done(self) -> bool:
        """See :meth:`lmkv.transfer.Copy.done`."""
        if self._handle is None:
            return True
        why = _message()
        state = native.lib.lmkv_gpu_done(self._handle, why, _ROOM)
        if state < 0:
            raise NativeError(_text(why))
        if state:
            self._forget()
        return bool(state)

    def wait(self) -> None:
        """See :meth:`lmkv.transfer.Copy.wait`."""
        if self._handle is None:
            return
        why = _message()
        if native.lib.lmkv_gpu_wait(self._handle, why, _ROOM):
            raise NativeError(_text(why))
        self._forget()

    def wait_layer(self, layer: int, stream: int | None = None) -> int:
        """See :meth:`lmkv.transfer.Copy.wait_layer`."""
        if self._handle is None:
            return len(self._layer_rows)
        why = _message()
        row = self._layer_rows[layer] - 1
        if native.lib.lmkv_gpu_order(self._handle, row, self._gpu.stream(stream), why, _ROOM):
            raise NativeError(_text(why))
        end = self._ends[np.searchsorted(self._ends, row, side="right")]
        return bisect.bisect_right(self._layer_rows, end)

    def _forget(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            native.lib.lmkv_gpu_forget(handle)
        self._plan = None

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, TypeError):  # an interpreter that is going down
            self._forget()
