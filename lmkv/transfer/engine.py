"""Copies between slots and the tensors of whoever computes the KV. Bytes are moved, never converted: dtypes must agree."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, LayoutMismatchError
from ..layout import KVLayout
from .access import KVAccess, Places, block_numbers, paged_places
from .calibration import tuned
from .host import copy_compiled, copy_numpy, needs_numpy
from .plan import Part, PartTable, Plan
from .rows import Bits, Layers, Row, device_of, layer_shapes, row_table

__all__ = ["Copy", "CopyEngine", "CopyMade", "gather", "scatter"]


class Copy(Protocol):
    """A copy under way. The payloads and blocks it names must stay as they are until it is done."""

    bytes: int

    def done(self) -> bool:
        """Whether every byte has arrived. Does not block.

        Raises:
            NativeError: the device reported a failure; what was copied is undefined.
        """

    def wait(self) -> None:
        """Block until every byte has arrived. Raises as :meth:`done`."""

    def wait_layer(self, layer: int, stream: int | None = None) -> int:
        """Have a stream wait, on the device, until a layer has arrived.

        Args:
            layer: number of a layer of the engine's.
            stream: handle of a CUDA stream; 0 is the default stream, ``None`` torch's current one.

        Returns:
            How many layers, counted from the first, are there once the wait is over: at least ``layer + 1``. For these the
            stream need not wait again.
        """


class CopyMade:
    """A :class:`Copy` that was made before the call returned, as all copies in host memory are."""

    def __init__(self, size: int) -> None:
        self.bytes = size

    def done(self) -> bool:
        """It is."""
        return True

    def wait(self) -> None:
        """Nothing to wait for."""

    def wait_layer(self, layer: int, stream: int | None = None) -> int:
        """Nothing to wait for."""
        return layer + 1


class CopyEngine:
    """Copies between payloads and the paged KV memory of one engine, checked once.

    Safe to use from several threads.

    Args:
        layers: as for :class:`lmkv.transfer.PagedKV`, in host memory or on one CUDA device.
        layout: of the slots.
        order: ``HND`` or ``NHD``.
        first_layer: number in the layout of the first of ``layers``: a rank that holds a part of a chunk names its own.
        tables: number of the block table that each layer's blocks are named by; one for all by default.

    Raises:
        LayoutMismatchError: wrong number of layers, shape, dtype or device.
    """

    def __init__(
        self, layers: Any, layout: KVLayout, *, order: str = "NHD", first_layer: int = 0, tables: Sequence[int] | None = None
    ) -> None:
        self.layout = layout
        shapes = layer_shapes(layout)
        if not 0 <= first_layer <= len(shapes) - len(layers):
            raise LayoutMismatchError(
                f"expected layers within the layout's {len(shapes)}; got {len(layers)} from {first_layer}"
            )
        self._rows = Layers(layers, order).rows(layout, 4, first_layer, len(layers))
        self.device = device_of(self._rows)
        kinds = [kv for kv, *_ in shapes[first_layer : first_layer + len(layers)]]
        given = [0] * len(layers) if tables is None else list(tables)
        if len(given) != len(layers) or set(given) != set(range(max(given, default=0) + 1)):
            raise ArgumentError(f"expected a block table for each of {len(layers)} layers, numbered from 0; got {given}")
        self._tables = [table for table, kv in zip(given, kinds, strict=True) for _ in range(kv)]
        self._first_row = sum(kv for kv, *_ in shapes[:first_layer])
        self._layer_rows = np.cumsum(kinds, dtype=np.int64)
        self._gpu = None if self.device is None else tuned(self.device)
        self._table = row_table(self._rows, layout, first_row=self._first_row, tables=self._tables)
        self._token_bytes = int((self._table[:, 6] * self._table[:, 7]).sum())
        self._block_tokens = self._sizes()

    def _sizes(self) -> list[int]:
        """Tokens a block, by table."""
        sizes: dict[int, set[int]] = {}
        for row, table in zip(self._rows, self._tables, strict=True):
            sizes.setdefault(table, set()).add(row.shape[2])
        for table, found in sizes.items():
            if len(found) > 1:
                raise LayoutMismatchError(
                    f"block table {table}: expected blocks of one size in all layers; got {sorted(found)}"
                )
        return [sizes[table].pop() for table in sorted(sizes)]

    @property
    def block_tokens(self) -> list[int]:
        """Tokens a block, by block table."""
        return list(self._block_tokens)

    def gather(self, parts: Sequence[Part] | PartTable, blocks: Sequence[Any], *, stream: int | None = None) -> Copy:
        """Engine memory to payloads.

        Args:
            parts: what to copy; a table of parts for an engine on a GPU only.
            blocks: the text's block ids by block table, each a sequence or int32 array; -1 leaves a block's tokens out.
            stream: the copy begins once what is in this stream has run; see :meth:`Copy.wait_layer`.

        Raises:
            ArgumentError: too few blocks.
            NativeError: a block id out of range; nothing was copied.
        """
        return self._copy(parts, blocks, stream, self._layer_rows[-1:], into_payloads=True)

    def scatter(
        self,
        parts: Sequence[Part] | PartTable,
        blocks: Sequence[Any],
        *,
        stream: int | None = None,
        layerwise: bool = False,
        quick_pass: bool = False,
    ) -> Copy:
        """Payloads to engine memory; as :meth:`gather`.

        Args:
            layerwise: bring the first layers first, so that :meth:`Copy.wait_layer` lets a forward pass begin before the end.
            quick_pass: computing a layer takes less time than bringing it, so that only what follows the last layers counts:
                bring few groups of layers, the last one small. Else the first layers come as early as can be.
        """
        ends = self._layer_rows[-1:]
        if layerwise:
            layers = len(self._layer_rows)
            ends = self._layer_rows[(_late_groups(layers) if quick_pass else _early_groups(layers)) - 1]
        return self._copy(parts, blocks, stream, ends, into_payloads=False)

    def _copy(
        self,
        parts: Sequence[Part] | PartTable,
        blocks: Sequence[Any],
        stream: int | None,
        ends: npt.NDArray[np.int64],
        *,
        into_payloads: bool,
    ) -> Copy:
        if self._gpu is not None:
            table = parts if isinstance(parts, PartTable) else PartTable.of(parts)
            plan = Plan(self._table, table, self._places(table.runs(), blocks))
            size = table.tokens * self._token_bytes
            return self._gpu.start(plan, ends, self._layer_rows.tolist(), size, into_payloads=into_payloads, stream=stream)
        if isinstance(parts, PartTable):
            raise ArgumentError("expected a sequence of parts, since this engine's tensors are in host memory; got a table")
        places = self._places(_runs(parts), blocks)
        _copy_host(
            typing.cast(Sequence[Bits], self._rows),
            self._table,
            self._tables,
            self.layout,
            self._first_row,
            parts,
            places,
            into_payloads=into_payloads,
        )
        return CopyMade(sum(part.stop - part.start for part in parts) * self._token_bytes)

    def _places(self, runs: Sequence[tuple[int, int]], blocks: Sequence[Any]) -> list[Places]:
        if len(blocks) != len(self._block_tokens):
            raise ArgumentError(f"expected {len(self._block_tokens)} block tables; got {len(blocks)}")
        found: list[Places] = []
        for given, size in zip(blocks, self._block_tokens, strict=True):
            ids = block_numbers(given)
            for start, stop in runs:
                if start < 0 or stop > len(ids) * size:
                    raise ArgumentError(f"expected blocks for tokens {start} to {stop}; got {len(ids)} of {size} tokens")
            spans = [paged_places(ids, size, start, stop) for start, stop in runs]
            found.append(spans[0] if len(spans) == 1 else np.concatenate(spans) if spans else np.empty((0, 2), np.int32))
        return found


def _runs(parts: Sequence[Part]) -> list[tuple[int, int]]:
    """The parts' positions, where one follows another as one run."""
    runs: list[tuple[int, int]] = []
    for part in parts:
        if runs and runs[-1][1] == part.start:
            runs[-1] = (runs[-1][0], part.stop)
        else:
            runs.append((part.start, part.stop))
    return runs


def _early_groups(layers: int) -> npt.NDArray[np.int64]:
    """Last layer + 1 of groups that are brought in turn: few first, so that a forward pass can begin, then more at a time.

    A group is waited for as a whole, and each one costs a transfer a chunk to submit: hence neither many nor large ones.
    """
    ends = [1]
    while ends[-1] < layers:
        ends.append(min(layers, ends[-1] + min(ends[-1], max(4, layers // 6))))
    return np.array(ends)


def _late_groups(layers: int) -> npt.NDArray[np.int64]:
    """The same for a pass that is quicker than the copy: one layer last, before it four, …

    So a group is computed while the next one, a quarter as large, is brought: in a pass over few tokens a layer takes less than
    a quarter of its KV's time.
    """
    ends, left, size = [], layers, 1
    while left:
        ends.append(left)
        left = 0 if left <= size + size // 4 else left - size
        size *= 4
    return np.array(ends[::-1])


def _copy_host(
    rows: Sequence[Bits],
    table: npt.NDArray[np.int64],
    tables: Sequence[int],
    layout: KVLayout,
    first_row: int,
    parts: Sequence[Part],
    places: Sequence[Places],
    *,
    into_payloads: bool,
) -> None:
    if not into_payloads and not all(row.flags.writeable for row in rows):
        raise ArgumentError("expected tensors that can be written; one is read-only: pass a writable copy")
    if needs_numpy(rows):
        copy_numpy(rows, tables, layout, first_row, parts, places, into_payloads=into_payloads)
    else:
        copy_compiled(table, parts, places, into_payloads=into_payloads)


def gather(access: KVAccess, parts: Sequence[Part], layout: KVLayout) -> None:
    """Fill payloads from checked tensors."""
    _move(access, parts, layout, into_payloads=True)


def scatter(access: KVAccess, parts: Sequence[Part], layout: KVLayout) -> None:
    """Fill checked tensors from payloads.

    Raises:
        ArgumentError: one of the tensors is read-only; nothing was copied.
    """
    _move(access, parts, layout, into_payloads=False)


def _move(access: KVAccess, parts: Sequence[Part], layout: KVLayout, *, into_payloads: bool) -> None:
    rows: Sequence[Row] = access.rows
    spans = [access.places(start, stop) for start, stop in _runs(parts)]
    places = [np.concatenate(spans)] if spans else [np.empty((0, 2), np.int32)]
    device = device_of(rows)
    if device is not None:
        plan = Plan(row_table(rows, layout), PartTable.of(parts), places)
        everything = np.array([len(rows)])
        tuned(device).start(plan, everything, everything.tolist(), 0, into_payloads=into_payloads, stream=None).wait()
        return
    host = typing.cast(Sequence[Bits], rows)
    table = row_table(rows, layout)
    _copy_host(host, table, [0] * len(rows), layout, 0, parts, places, into_payloads=into_payloads)
