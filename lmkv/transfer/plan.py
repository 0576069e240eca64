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


class PartTable:
    """Many parts as one table, for those who know where payloads are and how often that is asked for.

    Args:
        addresses: where payloads begin, int64 [parts].
        spans: of each what a :class:`Part` says, int64 [parts, 4]: first, last, start, stop.
        holds: whatever keeps the payloads' memory; kept as long as the table.
    """

    def __init__(self, addresses: npt.NDArray[np.int64], spans: npt.NDArray[np.int64], holds: Any = None) -> None:
        first, last, start, stop = spans.T
        tokens, upto = stop - start, np.cumsum(stop - start)
        self.rows = np.empty((len(spans), 5), np.int64)
        for column, values in enumerate((addresses, last - first, start - first, tokens, upto - tokens)):
            self.rows[:, column] = values
        self.tokens = int(upto[-1]) if len(upto) else 0
        self._holds = holds
        self._ends = (start, stop)

    @classmethod
    def of(cls, parts: Sequence[Part]) -> PartTable:
        """The table of parts."""
        ffi = native.ffi
        addresses = [int(ffi.cast("uintptr_t", ffi.from_buffer(part.payload))) for part in parts]
        spans = np.array([(part.first, part.last, part.start, part.stop) for part in parts], np.int64).reshape(-1, 4)
        return cls(np.array(addresses, np.int64), spans, [part.payload for part in parts])

    def runs(self) -> list[tuple[int, int]]:
        """The parts' positions, where one follows another as one run."""
        start, stop = self._ends
        if not len(start):
            return []
        if (start[1:] == stop[:-1]).all():
            return [(int(start[0]), int(stop[-1]))]
        breaks = np.flatnonzero(start[1:] != stop[:-1])
        return list(zip(start[np.append(0, breaks + 1)].tolist(), stop[np.append(breaks, -1)].tolist(), strict=True))


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
        parts: what to copy, in the columns of ``lmkv_part``.
        places: of all parts' tokens in the parts' order, one array a block table.

    Raises:
        NativeError: the compiled part was not built.
    """

    def __init__(self, rows: npt.NDArray[np.int64], parts: PartTable, places: Sequence[Places]) -> None:
        if native.lib is None:
            raise NativeError("expected the compiled part; it was not built: install a C compiler and reinstall lmkv")
        self._rows = np.ascontiguousarray(rows)
        together = np.stack(places) if len(places) > 1 else places[0][None]
        self._places = np.ascontiguousarray(together, dtype=np.int32)
        self._parts = parts
        table = parts.rows
        self.struct = native.ffi.new(
            "lmkv_plan *",
            {
                "rows": native.ffi.cast("lmkv_row *", _address(self._rows)),
                "n_rows": len(self._rows),
                "parts": native.ffi.cast("lmkv_part *", _address(table)),
                "n_parts": len(table),
                "places": native.ffi.cast("lmkv_place *", _address(self._places)),
                "n_places": self._places.shape[1],
                "tables": len(self._places),
            },
        )


def _address(array: npt.NDArray[Any]) -> int:
    """Where an array's bytes begin: ``array.ctypes`` takes several times as long, and somebody waits."""
    return int(array.__array_interface__["data"][0])


def refused(why: Any) -> NativeError:
    """The error that ``native/plan.c`` wrote into a buffer of characters."""
    return NativeError(f"expected a plan of valid copies; {native.ffi.string(why).decode(errors='replace')}")
