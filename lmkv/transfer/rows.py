"""The caller's tensors as rows: one array of bits a layer and kind (K, V, K, V, …), with its geometry in bytes.

Rows in host memory are numpy arrays that share it; rows in a GPU's memory say of themselves what an array would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, LayoutMismatchError
from ..layout import DTYPES, KVLayout, dtype_name

__all__ = ["BITS", "Bits", "DeviceRow", "Layers", "Row", "device_of", "layer_shapes", "row_geometry", "row_table"]

#: KV as unsigned integers of the elements' size: types that numpy lacks (bfloat16, float8) are bits like any other.
Bits = npt.NDArray[Any]
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True, slots=True, eq=False)
class DeviceRow:
    """A row in a GPU's memory.

    Args:
        address: of its first element.
        shape: [blocks, heads, tokens, head_size].
        strides: in bytes.
        itemsize: bytes an element.
        device: ordinal of the CUDA device.
        owner: the tensor whose memory it is, kept alive.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    device: int
    owner: Any = field(repr=False)


Row = Bits | DeviceRow


def _is_tensor(given: Any) -> bool:
    return isinstance(given, np.ndarray) or (hasattr(given, "detach") and hasattr(given, "ndim"))


def _parts(given: Any, kv: int, where: str) -> list[Any]:
    """K and V of a layer, or its latent, handed over one by one or in one tensor of both."""
    if isinstance(given, (tuple, list)):
        parts = list(given)
    elif kv == 2 and _is_tensor(given) and given.ndim:
        parts = [given[j] for j in range(given.shape[0])]
    else:
        parts = [given]
    if len(parts) != kv:
        what = "K and V" if kv == 2 else "one latent tensor"
        raise LayoutMismatchError(f"{where}: expected {what}; got {len(parts)} tensors")
    return parts


def _row(tensor: Any, layout_dtype: str, where: str) -> Row:
    """The tensor, [blocks, heads, tokens, head_size], as a row that shares its memory."""
    if hasattr(tensor, "detach"):
        if tensor.device.type not in ("cpu", "cuda"):
            raise LayoutMismatchError(
                f"{where}: expected a tensor in host memory or on a CUDA device; got device {tensor.device}: "
                "copy it with .cpu()"
            )
        _same_dtype(tensor.dtype, layout_dtype, where)
        if tensor.device.type == "cuda":
            size = DTYPES[layout_dtype]
            strides = tuple(stride * size for stride in tensor.stride())
            return DeviceRow(tensor.data_ptr(), tuple(tensor.shape), strides, size, tensor.device.index or 0, tensor)
        import torch

        same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[DTYPES[layout_dtype]]
        array: Bits = tensor.detach().view(same_size).numpy()
        return array.view(BITS[DTYPES[layout_dtype]])
    size = DTYPES[layout_dtype]
    as_bits = tensor.dtype.kind in "uV" and tensor.dtype.itemsize == size and layout_dtype not in ("uint8", "int8")
    if not as_bits:
        _same_dtype(tensor.dtype, layout_dtype, where)
    bits: Bits = tensor.view(BITS[size])
    return bits


def _same_dtype(dtype: object, wanted: str, where: str) -> None:
    try:
        got = dtype_name(dtype)
    except LayoutMismatchError:
        got = str(dtype)
    if got != wanted:
        raise LayoutMismatchError(
            f"{where}: expected dtype {wanted}; got {got}: open the store with the layout of these tensors"
        )


def layer_shapes(layout: KVLayout) -> list[tuple[int, int, int, str]]:
    """``(kv, heads, head_size, dtype)`` of every layer."""
    return [(g.kv, g.heads, g.head_size, g.dtype) for g in layout.groups for _ in range(g.layers)]


class Layers:
    """Per-layer tensors, checked against a layout once and kept as bits."""

    def __init__(self, layers: Sequence[Any], order: str) -> None:
        if order not in ("HND", "NHD"):
            raise ArgumentError(f"expected order 'HND' (heads, tokens, size) or 'NHD' (tokens, heads, size); got {order!r}")
        if not hasattr(layers, "__len__"):
            raise LayoutMismatchError(f"expected layers, a sequence with one entry for each; got {type(layers).__name__}")
        self._given = layers
        self.order = order
        self._rows: list[Row] = []
        self._layout: KVLayout | None = None

    def rows(self, layout: KVLayout, ndim: int, first_layer: int = 0, count: int | None = None) -> list[Row]:
        """``[layer and kind]`` of [blocks, heads, tokens, head_size]; the tensors have ``ndim`` 4, or 3 without blocks.

        Args:
            first_layer, count: the layout's layers that these are; all by default.

        Raises:
            LayoutMismatchError: the tensors do not have that layout.
        """
        if self._layout == layout:
            return self._rows
        shapes = layer_shapes(layout)[first_layer : None if count is None else first_layer + count]
        if len(self._given) != len(shapes):
            raise LayoutMismatchError(f"expected {len(shapes)} layers; got {len(self._given)}")
        found: list[Row] = []
        for i, (given, (kv, heads, size, dtype)) in enumerate(zip(self._given, shapes, strict=True)):
            for part, name in zip(_parts(given, kv, f"layer {i}"), "KV", strict=False):
                where = f"layer {i} {name}" if kv == 2 else f"layer {i}"
                if not _is_tensor(part):
                    raise LayoutMismatchError(f"{where}: expected a numpy array or torch tensor; got {type(part).__name__}")
                if kv == 1 and part.ndim == ndim - 1:  # a latent without a heads axis
                    part = part[..., None, :, :] if self.order == "HND" else part[..., None, :]
                if part.ndim != ndim:
                    raise LayoutMismatchError(
                        f"{where}: expected {ndim} dimensions ({self.order}); got shape {tuple(part.shape)}"
                    )
                view = part.swapaxes(-3, -2) if self.order == "NHD" else part
                if (view.shape[-3], view.shape[-1]) != (heads, size):
                    raise LayoutMismatchError(
                        f"{where}: expected {heads} heads of size {size} in order {self.order}; got shape {tuple(part.shape)}"
                    )
                found.append(_row(view[None] if ndim == 3 else view, dtype, where))
        device_of(found)
        self._rows, self._layout = found, layout
        return found


def device_of(rows: Sequence[Row], where: str = "layers") -> int | None:
    """The CUDA device that all rows are on; ``None`` for host memory.

    Raises:
        LayoutMismatchError: they are not all in one place, or a GPU's elements of a head lie apart.
    """
    places = {row.device if isinstance(row, DeviceRow) else None for row in rows}
    if len(places) > 1:
        raise LayoutMismatchError(f"{where}: expected all tensors on one device; got {sorted(map(str, places))}")
    for i, row in enumerate(rows):
        if isinstance(row, DeviceRow) and row.shape[3] > 1 and row.strides[3] != row.itemsize:
            raise LayoutMismatchError(
                f"{where}: tensor {i}: expected the elements of a head side by side; got a stride of {row.strides[3]} bytes "
                f"for elements of {row.itemsize}: make the last axis contiguous"
            )
    return places.pop() if places else None


@lru_cache(maxsize=64)
def row_geometry(layout: KVLayout) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of every row of a layout: heads, bytes of a head's token, bytes of all rows before it for one token."""
    heads = np.array([g.heads for g in layout.groups for _ in range(g.layers * g.kv)], dtype=np.int64)
    run = np.array([g.head_size * g.itemsize for g in layout.groups for _ in range(g.layers * g.kv)], dtype=np.int64)
    return heads, run, np.cumsum(heads * run) - heads * run


#: Columns of ``lmkv_row`` in ``native/lmkv.h``.
_COLUMNS = ("base", "block_stride", "token_stride", "head_stride", "blocks", "block_tokens", "heads", "run", "offset", "table")


def row_table(
    rows: Sequence[Row], layout: KVLayout, *, first_row: int = 0, tables: Sequence[int] | None = None
) -> npt.NDArray[np.int64]:
    """Rows as the array of ``lmkv_row`` that a plan points to.

    Args:
        rows: checked rows, [blocks, heads, tokens, head_size] each.
        first_row: number in the layout of the first one.
        tables: the block table of each row; all use the first one by default.
    """
    heads, run, before = row_geometry(layout)
    table = np.empty((len(rows), len(_COLUMNS)), dtype=np.int64)
    for i, row in enumerate(rows):
        address = row.address if isinstance(row, DeviceRow) else row.__array_interface__["data"][0]
        block, head, token = row.strides[:3]
        table[i, :6] = address, block, token, head, row.shape[0], row.shape[2]
    mine = slice(first_row, first_row + len(rows))
    table[:, 6], table[:, 7], table[:, 8] = heads[mine], run[mine], before[mine]
    table[:, 9] = 0 if tables is None else tables
    return table
