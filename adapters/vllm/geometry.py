"""What vLLM's KV tensors are: keys and values of every layer as [blocks, heads, tokens, head_size], whatever lies beneath.

Geometry is derived from a tensor's shape and the layer's spec, never from a version. Seen so far:

- ``[blocks, heads, tokens, 2 * head_size]``, K and V of a head side by side (0.32; the CPU backend before);
- ``[blocks, 2, tokens, heads, head_size]``, ``[2, blocks, tokens, heads, head_size]`` (GPU backends to 0.25);
- ``[blocks, tokens, size]`` or ``[blocks, 1, tokens, size]``, one latent a token (MLA).

Strides are free. A tensor may cut a block of the scheduler's into several. CPU kernels arrange numbers within a block in their
own ways, which :mod:`.packing` finds out. Anything else is refused with a reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...errors import LayoutMismatchError
from ...layout import LayerGroup, dtype_name
from .packing import check_latents, packed_views, probe_packing

__all__ = ["LayerKV", "ShardGeometry", "layer_kv", "shard_geometry"]

#: Specs whose layers keep one entry a token that depends on that token and those before it alone. Others (Mamba states, chunked
#: local attention, cross attention, compressed or quantized by token) have other rules; a new kind is refused by its name.
_UNDERSTOOD = ("FullAttentionSpec", "MLAAttentionSpec", "SlidingWindowSpec")
#: Names of quantization modes whose cache holds all that reading it takes: per-tensor scales belong to the weights.
_UNDERSTOOD_QUANTIZATION = ("NONE", "FP8_PER_TENSOR")


@dataclass(frozen=True)
class LayerKV:
    """One layer's tensors.

    Args:
        name: vLLM's.
        group: number of the KV cache group whose block table names its blocks.
        parts: K and V, or one latent, each [blocks, heads, tokens, head_size], views of vLLM's memory; where a CPU kernel packs
            them [blocks, heads, t1, t0, d1, d0], tokens and elements by their digits.
        pieces: tensor blocks a block of the scheduler's.
    """

    name: str
    group: int
    parts: tuple[Any, ...]
    pieces: int

    @property
    def shape(self) -> tuple[int, int, int, str]:
        """``(kv, heads, head_size, dtype)``."""
        first = self.parts[0]
        size = int(first.shape[4] * first.shape[5]) if self.packed else int(first.shape[3])
        return len(self.parts), int(first.shape[1]), size, dtype_name(first.dtype)

    @property
    def packed(self) -> bool:
        """Whether a CPU kernel has its own arrangement within a block."""
        return bool(self.parts[0].ndim == 6)

    @property
    def block_tokens(self) -> int:
        """Tokens a tensor block."""
        shape = self.parts[0].shape
        return int(shape[2] * shape[3]) if self.packed else int(shape[2])


@dataclass(frozen=True)
class ShardGeometry:
    """All layers of one worker, in the order of their names, whatever KV cache groups vLLM has put them in.

    Args:
        layers: each once; layers that share another's KV are left out.
        windows: by KV cache group, its sliding window in tokens, 0 for none.
        block_tokens: by KV cache group, tokens a block of the scheduler's.
    """

    layers: tuple[LayerKV, ...]
    windows: tuple[int, ...]
    block_tokens: tuple[int, ...]

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The layers as a layout's groups: neighbours of one shape together."""
        found: list[LayerGroup] = []
        for layer in self.layers:
            kv, heads, size, dtype = layer.shape
            last = found[-1] if found else None
            if last is not None and (last.kv, last.heads, last.head_size, last.dtype) == (kv, heads, size, dtype):
                found[-1] = LayerGroup(last.layers + 1, kv, heads, size, dtype)
            else:
                found.append(LayerGroup(1, kv, heads, size, dtype))
        return tuple(found)

    @property
    def latent(self) -> bool:
        """Whether every layer keeps one latent a token."""
        return all(len(layer.parts) == 1 for layer in self.layers)

    @property
    def device(self) -> str:
        """Where the tensors are."""
        return str(self.layers[0].parts[0].device.type)


def shard_geometry(kv_caches: Mapping[str, Any], kv_cache_config: Any, modules: Mapping[str, Any]) -> ShardGeometry:
    """The geometry of a worker's tensors.

    Args:
        kv_caches: layer name to tensor, as vLLM registers them.
        kv_cache_config: vLLM's ``KVCacheConfig``.
        modules: layer name to vLLM's attention layer, whose kernels are asked how they pack blocks on a CPU.

    Raises:
        LayoutMismatchError: something is not understood; the message names the layer and what was found.
    """
    layers: list[LayerKV] = []
    windows: list[int] = []
    block_tokens: list[int] = []
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        spec = group.kv_cache_spec
        by_layer = getattr(spec, "kv_cache_specs", None)
        seen: set[tuple[Any, ...]] = set()
        found = 0
        group_windows: set[int] = set()
        for name in sorted(group.layer_names, key=_place):
            if name not in kv_caches:
                continue
            tensor = kv_caches[name]
            of_layer = by_layer[name] if by_layer else spec
            _check_spec(name, of_layer)
            identity = (
                (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())) if hasattr(tensor, "data_ptr") else (name,)
            )
            if identity in seen:
                continue  # a layer that reads another's KV
            seen.add(identity)
            layers.append(layer_kv(name, number, tensor, of_layer, int(kv_cache_config.num_blocks), modules.get(name)))
            found += 1
            is_window = type(of_layer).__name__ == "SlidingWindowSpec"
            group_windows.add(int(of_layer.sliding_window) if is_window else 0)
        if not found:
            raise LayoutMismatchError(f"KV cache group {number}: expected KV tensors of its layers; none was registered")
        if len(group_windows) > 1:
            raise LayoutMismatchError(f"KV cache group {number}: expected one sliding window; got {sorted(group_windows)}")
        windows.append(group_windows.pop())
        block_tokens.append(int(spec.block_size))
    if not layers:
        raise LayoutMismatchError("expected a model with KV tensors; none was registered")
    devices = {str(part.device) for layer in layers for part in layer.parts}
    if len(devices) > 1:
        raise LayoutMismatchError(f"expected all KV tensors on one device; got {sorted(devices)}")
    return ShardGeometry(tuple(sorted(layers, key=lambda layer: _place(layer.name))), tuple(windows), tuple(block_tokens))


def _place(name: str) -> list[tuple[int, str]]:
    """A layer's name such that ``layers.10`` comes behind ``layers.9``."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _check_spec(name: str, spec: Any) -> None:
    kind = type(spec).__name__
    if kind not in _UNDERSTOOD:
        raise LayoutMismatchError(f"layer {name}: expected one of {', '.join(_UNDERSTOOD)}; got {kind}, which is not served")
    mode = getattr(getattr(spec, "kv_quant_mode", None), "name", "NONE")
    if mode not in _UNDERSTOOD_QUANTIZATION:
        raise LayoutMismatchError(f"layer {name}: expected a KV cache of plain or fp8 numbers; got {mode}, which is not served")
    if getattr(spec, "non_causal", False):
        raise LayoutMismatchError(f"layer {name}: expected causal attention; got a layer that sees what comes after")
    ratio = getattr(spec, "tokens_per_state", getattr(spec, "compress_ratio", 1))
    if ratio != 1:
        raise LayoutMismatchError(f"layer {name}: expected an entry for each token; got one for {ratio} tokens")


def _check_bytes(name: str, tensor: Any, spec: Any) -> None:
    """Latents of bytes are served where a token's lie together; an indexer (DeepSeek V3.2) has scales behind a whole block."""
    kind, version = getattr(spec, "cache_dtype_str", None), getattr(spec, "model_version", None)
    if version is not None or (tensor.element_size() == 1 and not str(kind).startswith("fp8")):
        raise LayoutMismatchError(
            f"layer {name}: expected latents of numbers or of fp8; got {tensor.dtype} of kind {kind}, version {version}, "
            "whose order within a block is not known"
        )


def layer_kv(name: str, group: int, tensor: Any, spec: Any, num_blocks: int, module: Any = None) -> LayerKV:
    """K and V (or the latent) of one layer as views of vLLM's tensor.

    Raises:
        LayoutMismatchError: the tensor's shape does not follow from the spec in a way that is understood.
    """
    if not hasattr(tensor, "ndim") or not hasattr(tensor, "stride"):
        raise LayoutMismatchError(f"layer {name}: expected one KV tensor; got {type(tensor).__name__}")
    shape, heads, size = tuple(tensor.shape), int(spec.num_kv_heads), int(spec.head_size)
    latent = type(spec).__name__ == "MLAAttentionSpec"
    value_size = size if latent else int(getattr(spec, "head_size_v", None) or size)
    parts: tuple[Any, ...] = ()
    if latent:
        _check_bytes(name, tensor, spec)
        if tensor.device.type == "cpu" and module is not None:
            check_latents(name, module, tensor)
        if tensor.ndim == 3:
            parts = (tensor.unsqueeze(1),)
        elif tensor.ndim == 4 and shape[1] == 1:
            parts = (tensor,)
    elif value_size != size:
        raise LayoutMismatchError(f"layer {name}: expected keys and values of one size; got {size} and {value_size}")
    elif tensor.ndim == 4 and shape[1] == heads and shape[3] == 2 * size:
        if tensor.device.type == "cpu":
            parts = packed_views(tensor, probe_packing(name, module, tensor, heads, size))
        else:
            parts = (tensor[..., :size], tensor[..., size:])
    elif tensor.ndim == 5 and shape[3:] == (heads, size) and (shape[0] == 2) != (shape[1] == 2):
        parts = tuple(part.transpose(1, 2) for part in tensor.unbind(0 if shape[0] == 2 else 1))
    if not parts:
        raise LayoutMismatchError(
            f"layer {name}: expected a KV tensor of {heads} heads of size {size} in a known arrangement; got shape {shape}"
        )
    found = LayerKV(name, group, parts, 1)
    blocks, tokens = int(parts[0].shape[0]), found.block_tokens
    pieces = int(spec.block_size) // tokens
    if pieces * tokens != spec.block_size or blocks != num_blocks * pieces:
        raise LayoutMismatchError(
            f"layer {name}: expected {num_blocks} blocks of {spec.block_size} tokens; "
            f"got shape {shape}, that is {blocks} of {tokens}"
        )
    return replace(found, pieces=pieces)
