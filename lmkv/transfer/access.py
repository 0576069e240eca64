"""What holds a text's KV at the caller's: which tensors, and where in them each token lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, LayoutMismatchError
from ..layout import KVLayout
from .rows import Layers, Row

__all__ = ["DenseKV", "KVAccess", "PagedKV", "Places", "as_access", "paged_places"]

#: [tokens, 2] int32: block and index in it of every token; a negative block marks a token that is left out.
Places = npt.NDArray[np.int32]


@runtime_checkable
class KVAccess(Protocol):
    """Tensors that hold the KV of a run of text positions.

    Attributes:
        rows: after :meth:`check`, one a layer and kind (K, V, K, V, …), views of the caller's memory of shape
            [blocks, heads, tokens, head_size].
    """

    rows: list[Row]

    def check(self, layout: KVLayout, start: int, stop: int) -> None:
        """Prove that tokens ``start`` to ``stop`` of that layout are here.

        Raises:
            LayoutMismatchError: wrong number of layers, shape, dtype or device.
            ArgumentError: positions outside the tensors.
        """

    def places(self, start: int, stop: int) -> Places:
        """Where checked tokens ``start`` to ``stop`` lie; the same for all rows."""


def paged_places(block_ids: npt.NDArray[np.int32], block_tokens: int, start: int, stop: int) -> Places:
    """Places of text positions ``start`` to ``stop`` in the blocks of a text.

    Args:
        block_ids: the text's blocks in order, int32.
        block_tokens: tokens in one.
    """
    first, skip = divmod(start, block_tokens)
    last = -(-stop // block_tokens)
    whole = np.empty((last - first, block_tokens, 2), dtype=np.int32)
    whole[:, :, 0] = block_ids[first:last, None]
    whole[:, :, 1] = np.arange(block_tokens, dtype=np.int32)
    return whole.reshape(-1, 2)[skip : skip + stop - start]


def block_numbers(given: Any) -> npt.NDArray[np.int32]:
    """Block ids as int32.

    Raises:
        ArgumentError: they are no row of whole numbers, or some do not fit: cut off, they would name other blocks.
    """
    ids = np.asarray(given)
    if not ids.size:
        return np.empty(0, np.int32)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ArgumentError(f"expected a row of whole numbers as block ids; got shape {ids.shape} of {ids.dtype}")
    if ids.dtype != np.int32 and (ids.min() < -(2**31) or ids.max() >= 2**31):
        raise ArgumentError(f"expected block ids below {2**31}; got {ids.min()} to {ids.max()}")
    return ids.astype(np.int32, copy=False)


class DenseKV:
    """KV of consecutive positions in one tensor a layer and kind.

    Args:
        layers: a sequence with one (K, V) pair a layer, or one latent tensor a layer (MLA); numpy arrays or torch tensors,
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
        self._layers = Layers(layers, order)
        self._first = first_token
        self.rows: list[Row] = []

    def check(self, layout: KVLayout, start: int, stop: int) -> None:
        """See :class:`KVAccess`."""
        self.rows = self._layers.rows(layout, 3)
        for i, row in enumerate(self.rows):
            held = (self._first, self._first + row.shape[2])
            if start < held[0] or stop > held[1]:
                raise ArgumentError(f"tensor {i}: expected tokens {start} to {stop}; it holds {held[0]} to {held[1]}")

    def places(self, start: int, stop: int) -> Places:
        """See :class:`KVAccess`."""
        places = np.zeros((stop - start, 2), dtype=np.int32)
        places[:, 1] = np.arange(start - self._first, stop - self._first)
        return places


class PagedKV:
    """KV in an engine's pages.

    Args:
        layers: as for :class:`DenseKV`, each tensor with a leading axis of blocks: [blocks, heads, block tokens, head_size] for
            ``HND``, [blocks, block tokens, heads, head_size] for ``NHD``.
        block_ids: the text's blocks, in order; -1 marks a block whose tokens must not be asked for.
        order: ``HND`` or ``NHD``.
    """

    def __init__(self, layers: Any, block_ids: Sequence[int], *, order: str = "NHD") -> None:
        self._layers = Layers(layers, order)
        self._blocks = block_numbers(list(block_ids))
        self.rows: list[Row] = []

    def check(self, layout: KVLayout, start: int, stop: int) -> None:
        """See :class:`KVAccess`."""
        self.rows = self._layers.rows(layout, 4)
        shapes = {(row.shape[0], row.shape[2]) for row in self.rows}
        if len(shapes) != 1:
            raise LayoutMismatchError(f"expected as many blocks of as many tokens in all layers; got {sorted(shapes)}")
        blocks, size = shapes.pop()
        if start < 0 or stop > len(self._blocks) * size:
            raise ArgumentError(f"expected blocks for tokens {start} to {stop}; got {len(self._blocks)} of {size} tokens")
        used = self._blocks[start // size : -(-stop // size)]
        wrong = used[(used < 0) | (used >= blocks)]
        if len(wrong):
            raise ArgumentError(f"expected block ids from 0 to {blocks - 1}; got {wrong[0]}")

    def places(self, start: int, stop: int) -> Places:
        """See :class:`KVAccess`."""
        return paged_places(self._blocks, self.rows[0].shape[2], start, stop)


def as_access(kv: Any) -> KVAccess:
    """``kv`` itself if it is a :class:`KVAccess`, else a :class:`DenseKV` of it."""
    return kv if isinstance(kv, KVAccess) else DenseKV(kv)
