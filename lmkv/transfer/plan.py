"""What a copy moves: parts of chunks, rows of the caller's tensors, and the places of the tokens in them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import NativeError
from ..layout import KVLayout
from .access import Places
from .rows import BITS, Bits

__all__ = ["Part", "Plan", "native", "payload_arrays"]

#: By name, since it stands in ``native/``, where type checkers of this package do not look.
try:
    native: Any = importlib.import_module("lmkv._native")
except ModuleNotFoundError as error:
    raise ImportError(
        "expected an installed lmkv; this is its source tree, where native/ and adapters/ are not yet part of the package: "
        "run `pip install -e .` in it, or start Python elsewhere"
    ) from error


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens ``start`` to ``stop`` of a chunk whose payload holds those from ``first`` to ``last``."""

    payload: memoryview
    first: int
    last: int
    start: int
    stop: int


def payload_arrays(payload: memoryview, layout: KVLayout, tokens: int) -> list[Bits]:
    """A payload of ``tokens`` tokens as one array of bits a layer group, [layers, kv, heads, tokens, head_size]."""
    arrays: list[Bits] = []
    begin = 0
    for g in layout.groups:
        size = g.token_bytes * tokens
        array = np.frombuffer(payload[begin : begin + size], BITS[g.itemsize])
        arrays.append(array.reshape(g.layers, g.kv, g.heads, tokens, g.head_size))
        begin += size
    return arrays


class Plan:
    """An ``lmkv_plan`` (``native/lmkv.h``) and the arrays it points into.

    Args:
        rows: from :func:`lmkv.transfer.rows.row_table`.
        parts: what to copy.
        places: of all parts' tokens in the parts' order, one array a block table.

    Raises:
        NativeError: the compiled part was not built.
    """

    def __init__(self, rows: npt.NDArray[np.int64], parts: Sequence[Part], places: Sequence[Places]) -> None:
        if native.lib is None:
            raise NativeError("expected the compiled part; it was not built: install a C compiler and reinstall lmkv")
        self._rows = np.ascontiguousarray(rows)
        self._places = np.ascontiguousarray(np.stack(places), dtype=np.int32)
        ffi = native.ffi
        lines: list[tuple[int, ...]] = []  # the columns of lmkv_part
        at = 0
        for part in parts:
            address = int(ffi.cast("uintptr_t", ffi.from_buffer(part.payload)))
            lines.append((address, part.last - part.first, part.start - part.first, part.stop - part.start, at))
            at += part.stop - part.start
        table = np.array(lines, dtype=np.int64).reshape(-1, 5)
        self._parts = table
        self._held = [part.payload for part in parts]
        self.struct = native.ffi.new(
            "lmkv_plan *",
            {
                "rows": native.ffi.cast("lmkv_row *", self._rows.ctypes.data),
                "n_rows": len(self._rows),
                "parts": native.ffi.cast("lmkv_part *", table.ctypes.data),
                "n_parts": len(table),
                "places": native.ffi.cast("lmkv_place *", self._places.ctypes.data),
                "n_places": self._places.shape[1],
                "tables": len(self._places),
            },
        )


def refused(why: Any) -> NativeError:
    """The error that ``native/plan.c`` wrote into a buffer of characters."""
    return NativeError(f"expected a plan of valid copies; {native.ffi.string(why).decode(errors='replace')}")
