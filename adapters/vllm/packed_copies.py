"""Copies where a CPU kernel packs blocks in its own way: whole blocks are brought into the order of slots and back by torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from ...errors import ArgumentError
from ...layout import KVLayout
from ...transfer import CopyMade, Part, payload_arrays
from .geometry import LayerKV

__all__ = ["PackedEngine"]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NUMPY = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}


class PackedEngine:
    """What :class:`lmkv.transfer.CopyEngine` is for plain tensors.

    Args:
        layers: all of a worker's, packed ones only.
        layout: of the slots.
        first_layer: number in the layout of the first of ``layers``.
    """

    def __init__(self, layers: Sequence[LayerKV], layout: KVLayout, first_layer: int) -> None:
        self._layers = layers
        self._layout = layout
        self._first_layer = first_layer
        self._views = [[part.view(_BITS[part.element_size()]) for part in layer.parts] for layer in layers]

    def gather(self, parts: Sequence[Part], blocks: Sequence[npt.NDArray[np.int32]], *, stream: int | None = None) -> CopyMade:
        """Engine memory to payloads."""
        return self._copy(parts, blocks, into_payloads=True)

    def scatter(
        self,
        parts: Sequence[Part],
        blocks: Sequence[npt.NDArray[np.int32]],
        *,
        stream: int | None = None,
        layerwise: bool = False,
        quick_pass: bool = False,
    ) -> CopyMade:
        """Payloads to engine memory."""
        return self._copy(parts, blocks, into_payloads=False)

    def _copy(self, parts: Sequence[Part], blocks: Sequence[npt.NDArray[np.int32]], *, into_payloads: bool) -> CopyMade:
        size = 0
        for part in parts:
            arrays = payload_arrays(part.payload, self._layout, part.last - part.first)
            rows = [array[layer] for array in arrays for layer in range(array.shape[0])]
            here = slice(part.start - part.first, part.stop - part.first)
            for layer, views, row in zip(self._layers, self._views, rows[self._first_layer :], strict=False):
                for first, last, ids, index in _runs(blocks[layer.group], layer.block_tokens, part.start, part.stop):
                    for view, payload in zip(views, row, strict=True):
                        mine = torch.from_numpy(payload.view(_NUMPY[payload.itemsize]))[:, here][:, first:last]
                        _move(view, ids, index, mine, into_payloads=into_payloads)
                        size += mine.numel() * mine.element_size()
        return CopyMade(size)


def _runs(blocks: npt.NDArray[np.int32], width: int, start: int, stop: int) -> Iterator[tuple[int, int, torch.Tensor, int]]:
    """``first, last`` from ``start``, blocks and index in the first of them, of tokens whose blocks are named, run by run."""
    if start < 0 or stop > len(blocks) * width:
        raise ArgumentError(f"expected blocks for tokens {start} to {stop}; got {len(blocks)} of {width} tokens")
    begin, end = start // width, -(-stop // width)
    named = blocks[begin:end] >= 0
    edges = np.flatnonzero(np.diff(np.concatenate([[False], named, [False]])))
    for low, high in zip(edges[::2], edges[1::2], strict=True):
        first, last = max(start, (begin + low) * width), min(stop, (begin + high) * width)
        ids = torch.from_numpy(blocks[begin + low : begin + high].astype(np.int64))
        yield first - start, last - start, ids, first - (begin + int(low)) * width


def _move(view: torch.Tensor, ids: torch.Tensor, index: int, mine: torch.Tensor, *, into_payloads: bool) -> None:
    """Copy between tokens from ``index`` of consecutive blocks and ``mine``, [heads, tokens, head_size]."""
    if len(ids) and (int(ids.max()) >= view.shape[0]):
        raise ArgumentError(f"expected block ids from 0 to {view.shape[0] - 1}; got {int(ids.max())}")
    heads, tokens, size = mine.shape
    count, width = len(ids), view.shape[2] * view.shape[3]
    if into_payloads:
        plain = view[ids].permute(1, 0, 2, 3, 4, 5).reshape(heads, count * width, size)
        mine.copy_(plain[:, index : index + tokens])
        return
    if tokens < count * width:  # what else is in the blocks stays
        plain = view[ids].permute(1, 0, 2, 3, 4, 5).reshape(heads, count * width, size)
        plain[:, index : index + tokens] = mine
        mine = plain
    view[ids] = mine.reshape(heads, count, *view.shape[2:]).permute(1, 0, 2, 3, 4, 5)
