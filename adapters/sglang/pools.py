"""SGLang's KV pools as paged memory: keys and values of every layer as [blocks, block tokens, heads, head_size] views.

A slot number of SGLang's names one token's place in every layer, so a device pool is paged memory of one token a block. What a
pool is follows from its class and its tensors, never from a version. Only pools are served whose entry of a token depends on
that token and those before it alone and is whole in these tensors; any other is refused by its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import LayoutMismatchError
from ...layout import KVLayout, LayerGroup, dtype_name

__all__ = ["KVPool", "device_pool"]

#: Classes of device pools that keep plain keys and values, or one latent, a token. Their subclasses are other pools.
_PLAIN = ("MHATokenToKVPool",)
_LATENT = ("MLATokenToKVPool",)
#: Tensors beside keys and values without which these can't be read.
_SCALES = ("k_scale_buffer", "v_scale_buffer", "native_k_scale_buffer", "kv_scale_buffer", "scale_buffer")


@dataclass(frozen=True)
class KVPool:
    """All layers of one rank's pool, device or host.

    Args:
        layers: one entry a layer: ``(K, V)``, or a latent (MLA) alone; each [blocks, block tokens, heads, head_size], a view of
            SGLang's memory of any strides.
    """

    layers: tuple[Any, ...]

    @property
    def latent(self) -> bool:
        """Whether a layer keeps one latent a token, which every tensor-parallel rank holds whole."""
        return not isinstance(self.layers[0], tuple)

    @property
    def first(self) -> Any:
        """The first tensor."""
        return self.layers[0] if self.latent else self.layers[0][0]

    @property
    def block_tokens(self) -> int:
        """Tokens a block."""
        return int(self.first.shape[1])

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The layers as a layout's groups: neighbours of one shape together.

        Raises:
            LayoutMismatchError: keys and values differ in shape, or the dtype is not one that KV is kept in.
        """
        found: list[LayerGroup] = []
        for i, layer in enumerate(self.layers):
            parts = layer if isinstance(layer, tuple) else (layer,)
            shapes = {(int(part.shape[2]), int(part.shape[3]), dtype_name(part.dtype)) for part in parts}
            if len(shapes) > 1:
                raise LayoutMismatchError(f"layer {i}: expected keys and values of one shape; got {sorted(shapes)}")
            heads, size, dtype = shapes.pop()
            last = found[-1] if found else None
            if last is not None and (last.kv, last.heads, last.head_size, last.dtype) == (len(parts), heads, size, dtype):
                found[-1] = LayerGroup(last.layers + 1, len(parts), heads, size, dtype)
            else:
                found.append(LayerGroup(1, len(parts), heads, size, dtype))
        return tuple(found)

    def layout(self, chunk_tokens: int) -> KVLayout:
        """The layout of chunks of this pool's KV."""
        return KVLayout(self.groups, chunk_tokens)

    def split(self, n: int) -> KVPool:
        """The same memory, each token as ``n`` tokens of an ``n``-th of the head size: views, nothing is moved.

        Raises:
            LayoutMismatchError: the pool is not one of one token a block, or ``n`` does not divide a head's size.
        """

        def parts_of(tensor: Any) -> Any:
            if tensor.shape[1] != 1 or tensor.shape[3] % n:
                raise LayoutMismatchError(
                    f"expected one token a block and heads of a size that {n} divides; got shape {tuple(tensor.shape)}"
                )
            return tensor.squeeze(1).unflatten(-1, (n, -1)).transpose(1, 2)

        return KVPool(
            tuple(tuple(map(parts_of, layer)) if isinstance(layer, tuple) else parts_of(layer) for layer in self.layers)
        )


def device_pool(pool: Any) -> KVPool:
    """The device pool of a model, as SGLang's ``token_to_kv_pool_allocator.get_kvcache()`` gives it.

    Raises:
        LayoutMismatchError: it is not understood; the message says what was found.
    """
    name = type(pool).__name__
    if name not in (*_PLAIN, *_LATENT):
        raise LayoutMismatchError(f"expected a KV pool of {' or '.join((*_PLAIN, *_LATENT))}; got {name}, which is not served")
    scaled = [scale for scale in _SCALES if getattr(pool, scale, None) is not None]
    if scaled:
        raise LayoutMismatchError(f"{name}: expected KV that is read without more; got scales beside it ({', '.join(scaled)})")
    arranged = getattr(pool, "kv_cache_layout", None) or "nhd"
    if arranged != "nhd":
        raise LayoutMismatchError(f"{name}: expected KV as [slots, heads, head_size]; got the arrangement {arranged}")
    if getattr(pool, "layer_shard_enabled", False) or getattr(pool, "use_dsa", False):
        raise LayoutMismatchError(f"{name}: expected whole layers and no sparse attention; got shards of layers or an indexer")
    latent = name in _LATENT
    if latent:
        layers: list[Any] = [_slots(tensor, pool.dtype, f"{name} layer {i}") for i, tensor in enumerate(pool.kv_buffer)]
    else:
        pairs = zip(pool.k_buffer, pool.v_buffer, strict=True)
        layers = [
            (_slots(k, pool.dtype, f"{name} layer {i} K"), _slots(v, pool.dtype, f"{name} layer {i} V"))
            for i, (k, v) in enumerate(pairs)
        ]
    if not layers or len(layers) != int(pool.layer_num):
        raise LayoutMismatchError(f"{name}: expected tensors of {pool.layer_num} layers; got {len(layers)}")
    return KVPool(tuple(layers))


def _slots(tensor: Any, dtype: Any, where: str) -> Any:
    """[slots, heads, head_size] as [slots, 1, heads, head_size] of the pool's own dtype (fp8 is stored as bytes)."""
    if tensor is None or tensor.ndim != 3:
        shape = None if tensor is None else tuple(tensor.shape)
        raise LayoutMismatchError(f"{where}: expected a tensor [slots, heads, head_size]; got shape {shape}")
    if tensor.dtype != dtype:
        if tensor.element_size() != dtype.itemsize:
            raise LayoutMismatchError(f"{where}: expected numbers of {dtype}; got {tensor.dtype}")
        tensor = tensor.view(dtype)
    return tensor.unsqueeze(1)
