"""Paged KV memory as engines keep it, and what copies to and from it must make of every byte, worked out by indexing alone.

A layout is a function from one flat array to views of it. Applied to the memory it gives the tensors that a copy is handed;
applied to 0, 1, 2, … it tells where each element of them lies, which is all that the slow reference here knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lmkv.layout import KVLayout, LayerGroup
from lmkv.transfer import Part

Array = npt.NDArray[Any]
#: One list of K and V, or of the latent, a layer.
Views = list[list[Any]]

BITS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32}
DTYPES = {1: "float8_e4m3fn", 2: "bfloat16", 4: "float32"}
#: Elements before and after the memory that nobody may write to.
GUARD = 64


@dataclass(frozen=True)
class Shape:
    """Sizes of the KV of some layers: ``size`` is the head size, in elements; ``itemsize`` bytes each."""

    layers: int
    blocks: int
    block_tokens: int
    heads: int
    size: int
    itemsize: int


@dataclass(frozen=True)
class Kind:
    """How an engine lays it out.

    Args:
        elements: how many there are in all, of a shape.
        views: one flat array, numpy's or torch's, as tensors of the layers.
        order: of those.
        kv: 2, or 1 for MLA.
        adapt: what the kind makes of a shape that others could have.
    """

    elements: Callable[[Shape], int]
    views: Callable[[Any, Shape], Views]
    order: str
    kv: int = 2
    adapt: Callable[[Shape], Shape] = lambda shape: shape


def permute(array: Any, axes: Sequence[int]) -> Any:
    return array.transpose(axes) if isinstance(array, np.ndarray) else array.permute(*axes)


def _plain(s: Shape) -> int:
    return s.layers * 2 * s.blocks * s.block_tokens * s.heads * s.size


def _latent(s: Shape) -> int:
    return _plain(s) // 2


def _blocks_of_both(flat: Any, s: Shape) -> Views:
    whole = flat.reshape(s.layers, s.blocks, 2, s.block_tokens, s.heads, s.size)
    return [[layer[:, 0], layer[:, 1]] for layer in whole]


def _both_of_blocks(flat: Any, s: Shape) -> Views:
    whole = flat.reshape(s.layers, 2, s.blocks, s.block_tokens, s.heads, s.size)
    return [[layer[0], layer[1]] for layer in whole]


def _heads_first(flat: Any, s: Shape) -> Views:
    whole = flat.reshape(s.layers, s.blocks, 2, s.heads, s.block_tokens, s.size)
    return [[layer[:, 0], layer[:, 1]] for layer in whole]


def _packed(flat: Any, s: Shape) -> Views:
    whole = flat.reshape(s.layers, s.blocks, s.heads, s.block_tokens, 2 * s.size)
    return [[layer[..., : s.size], layer[..., s.size :]] for layer in whole]


def _logical(axes: str) -> Callable[[Any, Shape], Views]:
    """Logical [layers, blocks, heads, block tokens, K and V] in memory of another order."""

    def views(flat: Any, s: Shape) -> Views:
        sizes = {"L": s.layers, "B": s.blocks, "H": s.heads, "N": s.block_tokens, "C": 2 * s.size}
        whole = permute(flat.reshape(*(sizes[axis] for axis in axes)), [axes.index(axis) for axis in "LBHNC"])
        return [[layer[..., : s.size], layer[..., s.size :]] for layer in whole]

    return views


def _latents(flat: Any, s: Shape) -> Views:
    return [[layer] for layer in flat.reshape(s.layers, s.blocks, s.block_tokens, s.size)]


def _padded(flat: Any, s: Shape) -> Views:
    whole = flat.reshape(s.layers, 2, s.blocks + 1, s.block_tokens + 1, s.heads + 1, s.size + 3)
    return [[kv[1:, 1:, 1:, 3:] for kv in layer] for layer in whole]


def _padded_elements(s: Shape) -> int:
    return s.layers * 2 * (s.blocks + 1) * (s.block_tokens + 1) * (s.heads + 1) * (s.size + 3)


def _slots(s: Shape) -> Shape:
    return replace(s, blocks=s.blocks * s.block_tokens, block_tokens=1)


KINDS = {
    "[blocks,2,N,H,D]": Kind(_plain, _blocks_of_both, "NHD"),
    "[2,blocks,N,H,D]": Kind(_plain, _both_of_blocks, "NHD"),
    "[blocks,2,H,N,D]": Kind(_plain, _heads_first, "HND"),
    "[blocks,H,N,2D]": Kind(_plain, _packed, "HND"),
    **{axes: Kind(_plain, _logical(axes), "HND") for axes in ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")},
    "slots": Kind(_plain, _both_of_blocks, "NHD", adapt=_slots),
    "MLA": Kind(_latent, _latents, "NHD", kv=1, adapt=lambda s: replace(s, heads=1)),
    "MLA slots": Kind(_latent, _latents, "NHD", kv=1, adapt=lambda s: replace(_slots(s), heads=1)),
    "dense": Kind(_plain, _heads_first, "HND", adapt=lambda s: replace(s, blocks=1, block_tokens=s.blocks * s.block_tokens)),
    "padded": Kind(_padded_elements, _padded, "NHD"),
}


class Memory:
    """An engine's memory between guards, random or poisoned, on the host or a CUDA device.

    Attributes:
        layers: for a :class:`lmkv.transfer.CopyEngine`.
        wanted: what the memory must hold; the reference's to change.
        where: of each layer, K and V or latent: indices [blocks, heads, block tokens, head size] into ``wanted``.
    """

    def __init__(self, kind: Kind, shape: Shape, device: str, rng: np.random.Generator) -> None:
        self.kind = kind
        self.shape = kind.adapt(shape)
        n = kind.elements(self.shape)
        bits = BITS[shape.itemsize]
        self.wanted: Array = rng.integers(0, np.iinfo(bits).max, n + 2 * GUARD, dtype=bits, endpoint=True)
        self._held: Any = self.wanted.copy()
        if device == "cuda":
            import torch

            signed: Any = {1: np.uint8, 2: np.int16, 4: np.int32}[shape.itemsize]
            self._held = torch.from_numpy(self._held.view(signed)).to(device).view(getattr(torch, DTYPES[shape.itemsize]))
        self.layers = kind.views(self._held[GUARD : GUARD + n], self.shape)
        places = kind.views(np.arange(GUARD, GUARD + n), self.shape)
        self.where = [[self._in_order(part) for part in layer] for layer in places]

    def _in_order(self, part: Array) -> Array:
        if part.ndim == 3:
            return part[:, None]
        return part if self.kind.order == "HND" else part.swapaxes(1, 2)

    def group(self) -> LayerGroup:
        s = self.shape
        return LayerGroup(s.layers, self.kind.kv, s.heads, s.size, DTYPES[s.itemsize])

    def read(self) -> Array:
        """What is there now."""
        if isinstance(self._held, np.ndarray):
            return self._held
        import torch

        signed = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[self.shape.itemsize]
        found: Array = self._held.view(signed).cpu().numpy().view(self.wanted.dtype)
        return found


def expect(
    memories: Sequence[tuple[Memory, Sequence[int]]],
    parts: Sequence[Part],
    layout: KVLayout,
    payloads: Sequence[Array],
    *,
    into_payloads: bool,
    first_layer: int = 0,
) -> None:
    """Change ``payloads`` (copies of the parts', as bytes), or what the memories ``wanted``, as a copy must.

    Args:
        memories: of consecutive layers from ``first_layer`` on, each with its block ids.
    """
    for part, payload in zip(parts, payloads, strict=True):
        held, begin, layer = part.last - part.first, 0, -first_layer
        rows = {
            number + i: (memory, memory.where[i], blocks)
            for number, memory, blocks in _numbered(memories)
            for i in range(memory.shape.layers)
        }
        for group in layout.groups:
            size = group.heads * held * group.head_size * group.itemsize
            for _ in range(group.layers):
                for kv in range(group.kv):
                    if layer in rows:
                        bits = payload[begin : begin + size].view(BITS[group.itemsize])
                        memory, where, blocks = rows[layer]
                        _expect_row(bits.reshape(group.heads, held, -1), memory, where[kv], blocks, part, into_payloads)
                    begin += size
                layer += 1


def _numbered(memories: Sequence[tuple[Memory, Sequence[int]]]) -> list[tuple[int, Memory, Sequence[int]]]:
    first, found = 0, []
    for memory, blocks in memories:
        found.append((first, memory, blocks))
        first += memory.shape.layers
    return found


def _expect_row(row: Array, memory: Memory, where: Array, blocks: Sequence[int], part: Part, into_payloads: bool) -> None:
    for token in range(part.start, part.stop):
        block, index = blocks[token // memory.shape.block_tokens], token % memory.shape.block_tokens
        if block < 0:
            continue
        if into_payloads:
            row[:, token - part.first] = memory.wanted[where[block, :, index]]
        else:
            memory.wanted[where[block, :, index]] = row[:, token - part.first]
