"""Copies in host memory: compiled, or by numpy where there was no compiler. Both release the interpreter lock."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ..layout import KVLayout
from .access import Places
from .plan import Part, PartTable, Plan, native, payload_arrays, refused
from .rows import Bits

__all__ = ["copy_compiled", "copy_numpy", "needs_numpy"]

_ROOM = 300  # characters of a message


def needs_numpy(rows: Sequence[Bits]) -> bool:
    """Whether the compiled part is missing, or can't do it: it moves whole tokens of a head, not elements that lie apart."""
    return native.lib is None or any(row.strides[3] != row.itemsize and row.shape[3] > 1 for row in rows)


def copy_compiled(
    table: npt.NDArray[np.int64], parts: Sequence[Part], places: Sequence[Places], *, into_payloads: bool, threads: int = 1
) -> None:
    """Copy as a plan says.

    Args:
        table: the rows, from :func:`lmkv.transfer.rows.row_table`.
        places: of the parts' tokens, one array a block table.
        threads: how many share the parts.

    Raises:
        NativeError: an invalid plan; nothing was copied.
    """
    plan = Plan(table, PartTable.of(parts), places)
    why = native.ffi.new("char[]", _ROOM)
    if native.lib.lmkv_host_copy(plan.struct, into_payloads, threads, why, _ROOM) < 0:
        raise refused(why)


def copy_numpy(
    rows: Sequence[Bits],
    tables: Sequence[int],
    layout: KVLayout,
    first_row: int,
    parts: Sequence[Part],
    places: Sequence[Places],
    *,
    into_payloads: bool,
) -> None:
    """The same by numpy."""
    at = 0
    for part in parts:
        arrays = payload_arrays(part.payload, layout, part.last - part.first)
        mine = [array[layer, kv] for array in arrays for layer in range(array.shape[0]) for kv in range(array.shape[1])]
        tokens = part.stop - part.start
        for number, table in enumerate(places):
            for first, last, block, index in _runs(table[at : at + tokens]):
                here = slice(part.start - part.first + first, part.start - part.first + last)
                for row, theirs, own in zip(mine[first_row : first_row + len(rows)], rows, tables, strict=True):
                    if own == number:
                        there = theirs[block, :, index : index + last - first]
                        np.copyto(*((row[:, here], there) if into_payloads else (there, row[:, here])))
        at += tokens


def _runs(places: Places) -> Iterator[tuple[int, int, int, int]]:
    """``first, last, block, index`` of tokens that follow each other in one block; skipped ones are left out."""
    if not len(places):
        return
    breaks = np.flatnonzero((np.diff(places[:, 0]) != 0) | (np.diff(places[:, 1]) != 1)) + 1
    for first, last in zip([0, *breaks.tolist()], [*breaks.tolist(), len(places)], strict=True):
        block, index = places[first].tolist()
        if block >= 0:
            yield first, last, block, index
