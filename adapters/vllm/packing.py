"""How vLLM's CPU kernels arrange the numbers of a block: found out by having them write known ones, as processors differ.

With AVX-512 the keys of a block are stored as [head_size, tokens]; with AMX keys and values are interleaved by pairs. What all
have in common: the place of token ``t``, element ``d`` of a head is a sum of strides times digits of ``t`` and ``d``. A packing
holds these strides; a kernel whose writes are not of that form is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...errors import LayoutMismatchError

__all__ = ["Packing", "check_latents", "packed_views", "probe_packing"]

Table = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """Where a head's numbers of one block are: ``start + t1*s[0] + t0*s[1] + d1*s[2] + d0*s[3]`` elements from its begin.

    Args:
        start: of token 0, element 0.
        sizes: how many values the digits t1, t0, d1, d0 take; ``t = t1 * sizes[1] + t0``, ``d = d1 * sizes[3] + d0``.
        strides: of the digits, in elements.
    """

    start: int
    sizes: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]


def _digits(places: Table) -> tuple[int, int, int, int]:
    """``(size1, size0, stride1, stride0)`` of a run of places, as far as its first steps tell."""
    steps = np.diff(places)
    if not len(steps):
        return 1, 1, 0, 0
    inner = int(steps[0])
    other = np.flatnonzero(steps != inner)
    size = int(other[0]) + 1 if len(other) else len(places)
    if len(places) % size:
        raise LayoutMismatchError(f"expected groups of {size} in {len(places)}")
    return len(places) // size, size, int(places[size] - places[0]) if size < len(places) else 0, inner


def packing_of(table: Table) -> Packing:
    """The packing whose places are ``table[token, element]``.

    Raises:
        LayoutMismatchError: they are not of that form.
    """
    t1, t0, t1_stride, t0_stride = _digits(table[:, 0])
    d1, d0, d1_stride, d0_stride = _digits(table[0])
    found = Packing(int(table[0, 0]), (t1, t0, d1, d0), (t1_stride, t0_stride, d1_stride, d0_stride))
    t, d = np.arange(len(table))[:, None], np.arange(table.shape[1])[None]
    meant = found.start + t // t0 * t1_stride + t % t0 * t0_stride + d // d0 * d1_stride + d % d0 * d0_stride
    if not np.array_equal(meant, table):
        raise LayoutMismatchError("expected places that are sums of strides; this kernel's are not")
    return found


def probe_packing(name: str, layer: Any, tensor: torch.Tensor, heads: int, size: int) -> tuple[Packing, Packing]:
    """How a layer's kernel writes keys and values into a block of ``tensor``, [blocks, heads, tokens, 2 * head_size].

    Every number of a key (and then of a value) is told by its bits: one write into a scratch block for each bit of the numbers'
    indices shows which places it reached.

    Raises:
        LayoutMismatchError: the kernel can't be called, or its writes are not understood.
    """
    update = getattr(getattr(layer, "impl", None), "do_kv_cache_update", None)
    if update is None:
        raise LayoutMismatchError(
            f"layer {name}: expected a CPU kernel that can be asked to write a block; got {type(layer).__name__}"
        )
    tokens = int(tensor.shape[2])
    count = tokens * size
    found = []
    for kind in range(2):
        places = np.zeros(2 * count, np.int64)
        numbers = torch.arange(1, count + 1).reshape(tokens, 1, size).expand(tokens, heads, size)
        for bit in range(count.bit_length()):
            written = _write(update, layer, tensor, numbers, bit, kind)
            places |= written.astype(np.int64) << bit
        reached = np.flatnonzero(places)
        if not np.array_equal(np.sort(places[reached]), np.arange(1, count + 1)):
            raise LayoutMismatchError(
                f"layer {name}: expected each number in one place of a block; the kernel wrote {len(reached)}"
            )
        table = np.empty(count, np.int64)
        table[places[reached] - 1] = reached
        try:
            found.append(packing_of(table.reshape(tokens, size)))
        except LayoutMismatchError as error:
            raise LayoutMismatchError(f"layer {name}: {error}") from None
    return found[0], found[1]


def check_latents(name: str, layer: Any, tensor: torch.Tensor) -> None:
    """See that a layer's kernel (MLA) writes latents as they stand: [blocks, tokens, rank + rotary size], token by token.

    Args:
        tensor: [blocks, ..., tokens, rank + rotary size].

    Raises:
        LayoutMismatchError: the kernel can't be called, or arranges them in another way.
    """
    impl = getattr(layer, "impl", None)
    update, rank = getattr(impl, "do_kv_cache_update", None), getattr(impl, "kv_lora_rank", None)
    if update is None or rank is None:
        raise LayoutMismatchError(
            f"layer {name}: expected a CPU kernel that can be asked to write latents; got {type(layer).__name__}"
        )
    tokens, size = int(tensor.shape[-2]), int(tensor.shape[-1])
    given = torch.rand(tokens, size, generator=torch.Generator().manual_seed(0)).to(tensor.dtype)
    scratch = torch.zeros(2, tokens, size, dtype=tensor.dtype)
    parts = given[:, :rank].contiguous(), given[:, None, rank:].contiguous()
    with torch.inference_mode():
        update(*parts, scratch, torch.arange(tokens) + tokens, getattr(impl, "kv_cache_dtype", "auto"), torch.ones(()))
    if not torch.equal(scratch[1], given) or bool(scratch[0].any()):
        raise LayoutMismatchError(f"layer {name}: expected latents as they were given; the kernel wrote something else")


def _write(update: Any, layer: Any, tensor: torch.Tensor, numbers: torch.Tensor, bit: int, kind: int) -> npt.NDArray[np.bool_]:
    """Which places of a scratch block's last head are not zero after a write of one bit of ``numbers``."""
    scratch = torch.zeros((1, *tensor.shape[1:]), dtype=tensor.dtype)
    ones = (numbers >> bit & 1).to(_model_dtype(layer, tensor)).contiguous()
    given = [torch.zeros_like(ones), torch.zeros_like(ones)]
    given[kind] = ones
    with torch.inference_mode():
        update(layer, *given, scratch, torch.arange(len(numbers)))
    raw = scratch[0, -1].contiguous().view(torch.uint8).numpy().reshape(-1, tensor.element_size())
    nonzero: npt.NDArray[np.bool_] = raw.any(axis=1)
    return nonzero


def _model_dtype(layer: Any, tensor: torch.Tensor) -> torch.dtype:
    """The type that the model computes keys and values in; the cache's own unless that is an 8-bit one."""
    if tensor.element_size() > 1:
        return tensor.dtype
    return torch.bfloat16


def packed_views(tensor: torch.Tensor, packings: tuple[Packing, Packing]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a layer as views [blocks, heads, t1, t0, d1, d0] of its tensor."""
    keys, values = (
        tensor.as_strided(
            (tensor.shape[0], tensor.shape[1], *packing.sizes),
            (tensor.stride(0), tensor.stride(1), *packing.strides),
            tensor.storage_offset() + packing.start,
        )
        for packing in packings
    )
    return keys, values
