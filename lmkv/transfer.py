"""Copies between slots and the tensors of whoever computes the KV.

A :class:`KVAccess` describes tensors; ``gather`` fills a chunk's payload from them, ``scatter`` fills them from a payload.
Bytes are moved, never converted: dtypes must agree. numpy does the copying, which releases the interpreter lock.
torch is used only where the caller's tensors are torch's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from .errors import ArgumentError, LayoutMismatchError
from .layout import DTYPES, KVLayout, dtype_name

__all__ = ["DenseKV", "KVAccess", "PagedKV", "as_access", "gather", "payload_arrays", "scatter"]

#: KV as unsigned integers of the elements' size: types that numpy lacks (bfloat16, float8) are bits like any other.
Bits = npt.NDArray[Any]
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@runtime_checkable
class KVAccess(Protocol):
    """Tensors that hold the KV of a run of text positions."""

    def check(self, layout: KVLayout, start: int, stop: int) -> None:
        """Prove that tokens ``start`` to ``stop`` of that layout are here.

        Raises:
            LayoutMismatchError: wrong number of layers, shape, dtype or device.
            ArgumentError: positions outside the tensors.
        """

    def runs(self, layer: int, start: int, stop: int) -> Iterator[tuple[int, int, list[Bits]]]:
        """``(first, last, [K, V])`` for pieces of tokens ``start`` to ``stop`` of one layer.

        The arrays (one for an MLA latent) are views [heads, last - first, head_size] of the caller's memory.
        """


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
    if not isinstance(tensor, np.ndarray):
        raise LayoutMismatchError(f"{where}: expected a numpy array or torch tensor; got {type(tensor).__name__}")
    size = DTYPES[layout_dtype]
    as_bits = tensor.dtype.kind in "uV" and tensor.dtype.itemsize == size and layout_dtype not in ("uint8", "int8")
    if not as_bits:
        _same_dtype(tensor.dtype, layout_dtype, where)
    return tensor.view(_BITS[size])


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
        self._given = layers
        self.order = order
        self._bits: list[list[Bits]] = []
        self._layout: KVLayout | None = None

    def tensors(self, layout: KVLayout, ndim: int) -> list[list[Bits]]:
        """``[layer][kv]`` with heads before tokens; ``ndim`` 3, or 4 with a leading block axis."""
        if self._layout == layout:
            return self._bits
        shapes = _layer_shapes(layout)
        if len(self._given) != len(shapes):
            raise LayoutMismatchError(f"expected {len(shapes)} layers; got {len(self._given)}")
        found: list[list[Bits]] = []
        for i, (given, (kv, heads, size, dtype)) in enumerate(zip(self._given, shapes, strict=True)):
            parts = list(given) if isinstance(given, (tuple, list)) else [given[j] for j in range(kv)] if kv == 2 else [given]
            if len(parts) != kv:
                what = "K and V" if kv == 2 else "one latent tensor"
                raise LayoutMismatchError(f"layer {i}: expected {what}; got {len(parts)} tensors")
            arrays = []
            for part, name in zip(parts, "KV", strict=False):
                where = f"layer {i} {name}" if kv == 2 else f"layer {i}"
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
                arrays.append(array)
            found.append(arrays)
        self._bits, self._layout = found, layout
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
        self._ready: list[list[Bits]] = []

    def check(self, layout: KVLayout, start: int, stop: int) -> None:
        """See :class:`KVAccess`."""
        self._ready = self._layers.tensors(layout, 3)
        for i, arrays in enumerate(self._ready):
            for array in arrays:
                held = (self._first, self._first + array.shape[1])
                if start < held[0] or stop > held[1]:
                    raise ArgumentError(
                        f"layer {i}: expected tokens {start} to {stop}; the tensor holds {held[0]} to {held[1]}"
                    )

    def runs(self, layer: int, start: int, stop: int) -> Iterator[tuple[int, int, list[Bits]]]:
        """See :class:`KVAccess`."""
        begin, end = start - self._first, stop - self._first
        yield start, stop, [array[:, begin:end] for array in self._ready[layer]]


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
        self._ready: list[list[Bits]] = []

    def check(self, layout: KVLayout, start: int, stop: int) -> None:
        """See :class:`KVAccess`."""
        self._ready = self._layers.tensors(layout, 4)
        for i, arrays in enumerate(self._ready):
            for array in arrays:
                blocks, size = array.shape[0], array.shape[2]
                if stop > len(self._blocks) * size:
                    raise ArgumentError(
                        f"layer {i}: expected blocks for {stop} tokens; got {len(self._blocks)} of {size} tokens"
                    )
                for block in self._blocks[start // size : -(-stop // size)]:
                    if not 0 <= block < blocks:
                        raise ArgumentError(f"layer {i}: expected block ids from 0 to {blocks - 1}; got {block}")

    def runs(self, layer: int, start: int, stop: int) -> Iterator[tuple[int, int, list[Bits]]]:
        """See :class:`KVAccess`."""
        arrays = self._ready[layer]
        size = arrays[0].shape[2]
        while start < stop:
            block, offset = divmod(start, size)
            end = min(stop, start - offset + size)
            yield start, end, [array[self._blocks[block], :, offset : offset + end - start] for array in arrays]
            start = end


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


def _pairs(
    payload: memoryview, layout: KVLayout, held: tuple[int, int], access: KVAccess, start: int, stop: int
) -> Iterator[tuple[Bits, Bits]]:
    """Matching views of payload and tensors for tokens ``start`` to ``stop``; the payload holds those of ``held``."""
    layer = 0
    for array in payload_arrays(payload, layout, held[1] - held[0]):
        for chunk_layer in array:
            for first, last, parts in access.runs(layer, start, stop):
                for kv, part in enumerate(parts):
                    yield chunk_layer[kv, :, first - held[0] : last - held[0]], part
            layer += 1


def gather(access: KVAccess, payload: memoryview, layout: KVLayout, start: int, stop: int) -> None:
    """Fill a payload with tokens ``start`` to ``stop`` of checked tensors."""
    for mine, theirs in _pairs(payload, layout, (start, stop), access, start, stop):
        np.copyto(mine, theirs)


def scatter(payload: memoryview, layout: KVLayout, held: tuple[int, int], access: KVAccess, start: int, stop: int) -> None:
    """Fill tokens ``start`` to ``stop`` of checked tensors from a payload that holds tokens ``held[0]`` to ``held[1]``."""
    for mine, theirs in _pairs(payload, layout, held, access, start, stop):
        np.copyto(theirs, mine)
