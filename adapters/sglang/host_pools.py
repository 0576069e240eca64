"""SGLang's host pools (HiCache's memory) as paged memory, in any of the orders that ``--hicache-mem-layout`` names.

    layer_first         [2, layers, tokens, heads, size]              MLA: [layers, tokens, 1, size]
    page_first          [2, tokens, layers, heads, size]                   [tokens, layers, 1, size]
    page_first_direct   [2, pages, layers, page, heads, size]              [pages, layers, page, 1, size]
    page_head           [2, pages, heads, page, layers, size]

What is stored has one order whatever the pool's is, so servers of different orders share it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...errors import LayoutMismatchError
from .pools import KVPool

__all__ = ["host_pool", "page_bytes"]

_PLAIN = "MHATokenToKVPoolHost"
_LATENT = "MLATokenToKVPoolHost"

#: By order: the view [blocks, block tokens, heads, size] of a layer's keys (or values, or latents).
_VIEWS: dict[str, Callable[[Any, int], Any]] = {
    "layer_first": lambda part, layer: part[layer].unsqueeze(1),
    "page_first": lambda part, layer: part[:, layer].unsqueeze(1),
    "page_first_direct": lambda part, layer: part[:, layer],
    "page_head": lambda part, layer: part[:, :, :, layer].transpose(1, 2),
}
_DIMENSIONS = {"layer_first": 4, "page_first": 4, "page_first_direct": 5, "page_head": 5}


def host_pool(pool: Any) -> KVPool:
    """A host pool of HiCache's.

    Raises:
        LayoutMismatchError: its class, order or tensors are not understood; the message says what was found.
    """
    kind, order = type(pool).__name__, getattr(pool, "layout", None)
    if kind not in (_PLAIN, _LATENT):
        raise LayoutMismatchError(f"expected a host pool of {_PLAIN} or {_LATENT}; got {kind}")
    if order not in _VIEWS or (kind == _LATENT and order == "page_head"):
        raise LayoutMismatchError(f"{kind}: expected one of the orders {', '.join(_VIEWS)}; got {order}")
    mixed = kind == _LATENT and int(pool.kv_cache_dim) != int(pool.kv_lora_rank) + int(pool.qk_rope_head_dim)
    if getattr(pool, "dcp_size", 1) > 1 or mixed:
        raise LayoutMismatchError(f"{kind}: expected whole entries of plain numbers; got parts, or scales among the numbers")
    buffer, layers = pool.kv_buffer, int(pool.layer_num)
    dtype = getattr(getattr(pool, "device_pool", None), "dtype", buffer.dtype)
    if buffer.dtype != dtype and buffer.element_size() == dtype.itemsize:
        buffer = buffer.view(dtype)  # fp8 is stored as bytes
    parts = (buffer,) if kind == _LATENT else (buffer[0], buffer[1])
    if any(part.ndim != _DIMENSIONS[order] for part in parts) or (kind == _PLAIN and buffer.shape[0] != 2):
        raise LayoutMismatchError(f"{kind}: expected the order {order}; got shape {tuple(buffer.shape)}")
    view = _VIEWS[order]
    found = [tuple(view(part, layer) for part in parts) for layer in range(layers)]
    paged = KVPool(tuple(each[0] for each in found) if kind == _LATENT else tuple(found))
    if paged.block_tokens not in (1, int(pool.page_size)):
        raise LayoutMismatchError(f"{kind}: expected pages of {pool.page_size} tokens; got shape {tuple(buffer.shape)}")
    return paged


def page_bytes(pool: Any) -> int:
    """Bytes of one page of any host pool."""
    return int(pool.get_size_per_token()) * int(pool.page_size)
