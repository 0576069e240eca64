"""Copies between slots and the tensors of whoever computes the KV.

A :class:`KVAccess` describes tensors; ``gather`` fills a chunk's payload from them, ``scatter`` fills them from a payload.
Bytes are moved, never converted: dtypes must agree. The compiled part copies, or numpy where it was not built; both release
the interpreter lock. torch is used only where the caller's tensors are torch's.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from .errors import ArgumentError, LayoutMismatchError, NativeError
from .layout import DTYPES, KVLayout, dtype_name

__all__ = ["DenseKV", "KVAccess", "PagedKV", "Part", "Segment", "as_access", "gather", "payload_arrays", "scatter"]

#: By name, since it stands in ``native/``, where type checkers of this package do not look.
try:
    _native: Any = importlib.import_module("lmkv._native")
except ModuleNotFoundError as error:
    raise ImportError(
        "expected an installed lmkv; this is its source tree, where native/ and adapters/ are not yet part of the package: "
        "run `pip install -e .` in it, or start Python elsewhere"
    ) from error

#: KV as unsigned integers of the elements' size: types that numpy lacks (bfloat16, float8) are bits like any other.
Bits = npt.NDArray[Any]
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of a text that lie together in the caller's tensors.

    Args:
        first, last: the text positions.
        block: index on the leading axis of the rows, 0 where they have none.
        index: index along the tokens' axis of ``first``.
    """

    first: int
    last: int
    block: int
    index: int


@runtime_checkable
class KVAccess(Protocol):
    """Tensors that hold the KV of a run of text positions.

    Attributes:
        rows: after :meth:`check`, one array of bits a layer and kind (K, V, K, V, …), views of the caller's memory of shape
            [blocks, heads, tokens, head_size].
    """

    rows: list[Bits]

    def check(self, layout: KVLayout, start: int, stop: int) -> None:
        """Prove that tokens ``start`` to ``stop`` of that layout are here.

        Raises:
            LayoutMismatchError: wrong number of layers, shape, dtype or device.
            ArgumentError: positions outside the tensors.
        """

    def segments(self, start: int, stop: int) -> list[Segment]:
        """Where checked tokens ``start`` to ``stop`` lie; the same for all rows."""


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


def _bits(tensor: Any, layout_dtype: str, where: str) -> Bits:
    """The tensor as an array of bits that shares its memory."""
    if hasattr(tensor, "detach"):
        if tensor.device.type != "cpu":
            raise LayoutMismatchError(
                f"{where}: expected a tensor in host memory; got device {tensor.device}: copy it with .cpu()"
            )
        _same_dtype(tensor.dtype, layout_dtype, where)
        import torch

        same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[DTYPES[layout_dtype]]
        array: Bits = tensor.detach().view(same_size).numpy()
        return array.view(_BITS[DTYPES[layout_dtype]])
    size = DTYPES[layout_dtype]
    as_bits = tensor.dtype.kind in "uV" and tensor.dtype.itemsize == size and layout_dtype not in ("uint8", "int8")
    if not as_bits:
        _same_dtype(tensor.dtype, layout_dtype, where)
    bits: Bits = tensor.view(_BITS[size])
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


def _layer_shapes(layout: KVLayout) -> list[tuple[int, int, int, str]]:
    """``(kv, heads, head_size, dtype)`` of every layer."""
    return [(g.kv, g.heads, g.head_size, g.dtype) for g in layout.groups for _ in range(g.layers)]


class _Layers:
    """Per-layer tensors, checked against a layout once and kept as bits."""

    def __init__(self, layers: Sequence[Any], order: str) -> None:
        if order not in ("HND", "NHD"):
            raise ArgumentError(f"expected order 'HND' (heads, tokens, size) or 'NHD' (tokens, heads, size); got {order!r}")
        if not hasattr(layers, "__len__"):
            raise LayoutMismatchError(f"expected layers, a sequence with one entry for each; got {type(layers).__name__}")
        self._given = layers
        self.order = order
        self._rows: list[Bits] = []
        self._layout: KVLayout | None = None

    def rows(self, layout: KVLayout, ndim: int) -> list[Bits]:
        """``[layer and kind]`` of [blocks, heads, tokens, head_size]; the tensors have ``ndim`` 4, or 3 without blocks.

        Raises:
            LayoutMismatchError: the tensors do not have that layout.
        """
        if self._layout == layout:
            return self._rows
        shapes = _layer_shapes(layout)
        if len(self._given) != len(shapes):
            raise LayoutMismatchError(f"expected {len(shapes)} layers; got {len(self._given)}")
        found: list[Bits] = []
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
                array = _bits(part, dtype, where)
                if self.order == "NHD":
                    array = array.swapaxes(-3, -2)
                if (array.shape[-3], array.shape[-1]) != (heads, size):
                    raise LayoutMismatchError(
                        f"{where}: expected {heads} heads of size {size} in order {self.order}; got shape {tuple(part.shape)}"
                    )
                found.append(array[None] if ndim == 3 else array)
        self._rows, self._layout = found, layout
        return found


class DenseKV:
    """KV of consecutive positions in one tensor a layer and kind.

    Args:
        layers: a sequence with one (K, V) pair a layer, or one latent tensor a layer (MLA); numpy arrays or CPU torch tensors,
            [heads, tokens, head_size] for order ``HND``, [tokens, heads, head_size] for ``NHD``; any strides. One array
            [layers, 2, heads, tokens, head_size] (or [layers, 1, …]) does too.
        order: ``HND`` or ``NHD``.
        first_token: the text position at index 0.
    """

    def __init__(self, layers: Any, *, order: str = "HND", first_token: int = 0) -> None:
        if first_token < 0:
            raise ArgumentError(f"expected first_token of at least 0; got {first_token}")
        if hasattr(layers, "ndim"):
            if layers.ndim != 5:
                raise LayoutMismatchError(
                    f"expected one array [layers, kv, heads, tokens, head_size]; got shape {tuple(layers.shape)}"
                )
            layers = [[layers[i, j] for j in range(layers.shape[1])] for i in range(layers.shape[0])]
        self._layers = _Layers(layers, order)
        self._first = first_token
        self.rows: list[Bits] = []

    def check(self, layout: KVLayout, start: int, stop: int) -> None:
        """See :class:`KVAccess`."""
        self.rows = self._layers.rows(layout, 3)
        for i, row in enumerate(self.rows):
            held = (self._first, self._first + row.shape[2])
            if start < held[0] or stop > held[1]:
                raise ArgumentError(f"tensor {i}: expected tokens {start} to {stop}; it holds {held[0]} to {held[1]}")

    def segments(self, start: int, stop: int) -> list[Segment]:
        """See :class:`KVAccess`."""
        return [Segment(start, stop, 0, start - self._first)]


class PagedKV:
    """KV in an engine's pages.

    Args:
        layers: as for :class:`DenseKV`, each tensor with a leading axis of blocks: [blocks, heads, block tokens, head_size] for
            ``HND``, [blocks, block tokens, heads, head_size] for ``NHD``.
        block_ids: the text's blocks, in order; -1 marks a block whose tokens must not be asked for.
        order: ``HND`` or ``NHD``.
    """

    def __init__(self, layers: Any, block_ids: Sequence[int], *, order: str = "NHD") -> None:
        self._layers = _Layers(layers, order)
        self._blocks = [int(block) for block in block_ids]
        self.rows: list[Bits] = []

    def check(self, layout: KVLayout, start: int, stop: int) -> None:
        """See :class:`KVAccess`."""
        self.rows = self._layers.rows(layout, 4)
        shapes = {(row.shape[0], row.shape[2]) for row in self.rows}
        if len(shapes) != 1:
            raise LayoutMismatchError(f"expected as many blocks of as many tokens in all layers; got {sorted(shapes)}")
        blocks, size = shapes.pop()
        if start < 0 or stop > len(self._blocks) * size:
            raise ArgumentError(f"expected blocks for tokens {start} to {stop}; got {len(self._blocks)} of {size} tokens")
        for block in self._blocks[start // size : -(-stop // size)]:
            if not 0 <= block < blocks:
                raise ArgumentError(f"expected block ids from 0 to {blocks - 1}; got {block}")

    def segments(self, start: int, stop: int) -> list[Segment]:
        """See :class:`KVAccess`."""
        size = self.rows[0].shape[2]
        found: list[Segment] = []
        while start < stop:
            number, index = divmod(start, size)
            end = min(stop, start - index + size)
            found.append(Segment(start, end, self._blocks[number], index))
            start = end
        return found


def as_access(kv: Any) -> KVAccess:
    """``kv`` itself if it is a :class:`KVAccess`, else a :class:`DenseKV` of it."""
    return kv if isinstance(kv, KVAccess) else DenseKV(kv)


def payload_arrays(payload: memoryview, layout: KVLayout, tokens: int) -> list[Bits]:
    """A payload of ``tokens`` tokens as one array of bits a layer group, [layers, kv, heads, tokens, head_size]."""
    arrays: list[Bits] = []
    begin = 0
    for g in layout.groups:
        size = g.token_bytes * tokens
        array = np.frombuffer(payload[begin : begin + size], _BITS[g.itemsize])
        arrays.append(array.reshape(g.layers, g.kv, g.heads, tokens, g.head_size))
        begin += size
    return arrays


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens ``start`` to ``stop`` of a chunk whose payload holds those from ``first`` to ``last``."""

    payload: memoryview
    first: int
    last: int
    start: int
    stop: int


def gather(access: KVAccess, parts: Sequence[Part], layout: KVLayout) -> None:
    """Fill payloads from checked tensors."""
    _move(access, parts, layout, into_payload=True)


def scatter(access: KVAccess, parts: Sequence[Part], layout: KVLayout) -> None:
    """Fill checked tensors from payloads.

    Raises:
        ArgumentError: one of the tensors is read-only; nothing was copied.
    """
    if not all(row.flags.writeable for row in access.rows):
        raise ArgumentError("expected tensors that can be written; one is read-only: pass a writable copy")
    _move(access, parts, layout, into_payload=False)


def _move(access: KVAccess, parts: Sequence[Part], layout: KVLayout, *, into_payload: bool) -> None:
    lib = _native.lib
    # the compiled part moves whole tokens of a head; elements that lie apart are numpy's
    if lib is None or any(row.strides[3] != row.itemsize for row in access.rows):
        for part in parts:
            for mine, theirs in _views(access, part, layout):
                np.copyto(*((mine, theirs) if into_payload else (theirs, mine)))
        return
    boxes = _boxes(access, parts, layout, into_payload)
    done = lib.lmkv_copy(_native.ffi.cast("lmkv_box *", boxes.ctypes.data), len(boxes))
    if done < 0:
        raise NativeError(f"expected a plan of valid copies; lmkv_copy refused number {-1 - done}: {boxes[-1 - done].tolist()}")


def _views(access: KVAccess, part: Part, layout: KVLayout) -> Iterator[tuple[Bits, Bits]]:
    """Matching views of payload and tensors."""
    arrays = payload_arrays(part.payload, layout, part.last - part.first)
    mine = [array[layer, kv] for array in arrays for layer in range(array.shape[0]) for kv in range(array.shape[1])]
    for s in access.segments(part.start, part.stop):
        for row, theirs in zip(mine, access.rows, strict=True):
            there = theirs[s.block, :, s.index : s.index + s.last - s.first]
            yield row[:, s.first - part.first : s.last - part.first], there


#: Columns of ``lmkv_box`` in ``native/lmkv.h``.
_SRC, _DST, _HEADS, _TOKENS, _RUN, _SRC_HEAD, _SRC_TOKEN, _DST_HEAD, _DST_TOKEN = range(9)


@lru_cache(maxsize=64)
def _row_geometry(layout: KVLayout) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of every row (layer and kind): heads, bytes of a head's token, bytes of all rows before it for one token."""
    heads = np.array([g.heads for g in layout.groups for _ in range(g.layers * g.kv)], dtype=np.int64)
    run = np.array([g.head_size * g.itemsize for g in layout.groups for _ in range(g.layers * g.kv)], dtype=np.int64)
    return heads, run, np.cumsum(heads * run) - heads * run


def _boxes(access: KVAccess, parts: Sequence[Part], layout: KVLayout, into_payload: bool) -> npt.NDArray[np.int64]:
    """The plan for :c:func:`lmkv_copy`: one box a row and segment."""
    heads, run, before = _row_geometry(layout)
    table = np.array([(row.__array_interface__["data"][0], *row.strides[:3]) for row in access.rows], dtype=np.int64)
    address, block_stride, head_stride, token_stride = table.T
    mine, theirs = ((_DST, _DST_HEAD, _DST_TOKEN), (_SRC, _SRC_HEAD, _SRC_TOKEN))
    if not into_payload:
        mine, theirs = theirs, mine
    segments = [(part, segment) for part in parts for segment in access.segments(part.start, part.stop)]
    plan = np.empty((len(segments), len(heads), 9), dtype=np.int64)
    plan[:, :, _HEADS] = heads
    plan[:, :, _RUN] = run
    plan[:, :, theirs[1]] = head_stride
    plan[:, :, theirs[2]] = token_stride
    plan[:, :, mine[2]] = run
    for boxes, (part, s) in zip(plan, segments, strict=True):
        held = part.last - part.first
        payload = np.frombuffer(part.payload, np.uint8).__array_interface__["data"][0]
        boxes[:, _TOKENS] = s.last - s.first
        boxes[:, mine[0]] = payload + before * held + (s.first - part.first) * run
        boxes[:, mine[1]] = held * run
        boxes[:, theirs[0]] = address + s.block * block_stride + s.index * token_stride
    return plan.reshape(-1, 9)
