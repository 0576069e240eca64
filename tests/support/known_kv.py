"""KV that can be checked: every element follows from the tokens up to its own, as in a real model.

So whatever a store gives back for a text can be told right from wrong without remembering what was stored, in any process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import lmkv
from lmkv.layout import DTYPES

BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
#: Layout dtypes that numpy has; the others are handled as bits.
NUMPY_DTYPES = {"float64", "float32", "float16", "uint8", "int8"}

_A, _B, _C = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _states(tokens: Sequence[int]) -> npt.NDArray[np.uint64]:
    """One number a token that depends on it, its place and all tokens before."""
    ids = np.asarray(tokens, dtype=np.uint64)
    places = np.arange(len(ids), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    sums = np.cumsum((ids + np.uint64(1)) * _A * places, dtype=np.uint64)
    return (sums ^ (sums >> np.uint64(31))) * _B


def group_bits(layout: lmkv.KVLayout, tokens: Sequence[int]) -> list[npt.NDArray[Any]]:
    """The KV of a text as bits, one array [layers, kv, heads, tokens, head_size] a layer group."""
    states = _states(tokens)
    found = []
    for number, g in enumerate(layout.groups):
        shape = (g.layers, g.kv, g.heads, 1, g.head_size)
        places = np.arange(np.prod(shape), dtype=np.uint64).reshape(shape) + np.uint64(number << 40)
        mixed = (states[:, None] + places * _C) * _B
        found.append((mixed >> np.uint64(64 - 8 * g.itemsize)).astype(BITS[g.itemsize]))
    return found


def payload(layout: lmkv.KVLayout, tokens: Sequence[int], start: int, stop: int) -> bytes:
    """The payload of a chunk of a text: tokens ``start`` to ``stop``."""
    return b"".join(np.ascontiguousarray(bits[:, :, :, start:stop]).tobytes() for bits in group_bits(layout, tokens))


def layer_arrays(layout: lmkv.KVLayout, tokens: Sequence[int]) -> list[list[npt.NDArray[Any]]]:
    """One list [K, V] (or [latent]) of arrays [heads, tokens, head_size] a layer, of the layout's dtype where numpy has it."""
    layers = []
    for g, bits in zip(layout.groups, group_bits(layout, tokens), strict=True):
        typed = bits.view(g.dtype) if g.dtype in NUMPY_DTYPES else bits
        layers += [[np.ascontiguousarray(typed[i, kv]) for kv in range(g.kv)] for i in range(g.layers)]
    return layers


def empty_layers(layout: lmkv.KVLayout, tokens: int) -> list[list[npt.NDArray[Any]]]:
    """Arrays to be filled, zero everywhere."""
    return [
        [
            np.zeros((g.heads, tokens, g.head_size), g.dtype if g.dtype in NUMPY_DTYPES else BITS[DTYPES[g.dtype]])
            for _ in range(g.kv)
        ]
        for g in layout.groups
        for _ in range(g.layers)
    ]


def same_bits(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    """Whether two arrays hold the same bytes, NaN or not."""
    return a.shape == b.shape and np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


def source(layout: lmkv.KVLayout, tokens: Sequence[int]) -> lmkv.DenseKV:
    """What a model would have computed for a text."""
    return lmkv.DenseKV(layer_arrays(layout, tokens))


def fetch(store: lmkv.Store, tokens: Sequence[int], match: lmkv.Match | None = None) -> int:
    """Load a text's longest known prefix and prove every byte of it; returns its tokens."""
    with store.lease(store.lookup(tokens) if match is None else match) as lease:
        arrays = empty_layers(store.layout, len(tokens))
        loaded = store.retrieve(lease, lmkv.DenseKV(arrays))
        assert loaded == lease.hit_tokens
    for layer, (got, wanted) in enumerate(zip(arrays, layer_arrays(store.layout, tokens), strict=True)):
        for kv, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
            assert same_bits(mine[:, :loaded], theirs[:, :loaded]), f"layer {layer}, part {kv}: other bytes than were stored"
            assert not mine[:, loaded:].view(np.uint8).any(), f"layer {layer}, part {kv}: written behind the hit"
    return loaded
