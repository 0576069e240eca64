"""A cache with room: KV is loaded into it without a copy, and what is computed is appended in place.

transformers' ``DynamicLayer`` grows by ``torch.cat``, which copies the whole KV for each token. A :class:`RoomyLayer` is one
whose ``keys`` and ``values`` are the filled part of larger buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ...errors import LayoutMismatchError

__all__ = ["RoomyLayer", "cache_over", "empty_buffers"]

Buffers = list[tuple[torch.Tensor, torch.Tensor]]  # (K, V) per layer, each [batch, heads, capacity, head_size]


class RoomyLayer(DynamicLayer):  # type: ignore[misc]  # mypy does not read transformers
    """A full-attention layer over given buffers ``[batch, heads, capacity, head_size]``, ``length`` tokens of them filled.

    Beyond the capacity it moves into larger buffers of its own. Whoever replaces ``keys`` or ``values`` (reordering, cropping)
    takes the layer out of the buffers; it then copies what it was given on the next update.
    """

    # `args` and `kwargs` stand in the base class's signatures; later versions of transformers add to them.
    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dtype, self.device = keys.dtype, keys.device
        self._use(keys, values, length)
        self.is_initialized = True

    def _use(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        self._buffers = (keys, values)
        self.keys = keys[:, :, :length]
        self.values = values[:, :, :length]
        self._views = (self.keys, self.values)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[batch, heads, tokens, head_size]``; returns all keys and values.

        Raises:
            LayoutMismatchError: the states have another dtype than the buffers (autocast around the call).
        """
        if key_states.requires_grad or value_states.requires_grad:  # autograd would not survive writing in place
            super().update(key_states, value_states, *args, **kwargs)
            return self.keys, self.values
        if not self.is_initialized:  # after reset()
            self.lazy_initialization(key_states, value_states)
        if not key_states.dtype == value_states.dtype == self.dtype:
            raise LayoutMismatchError(
                f"expected K and V of {self.dtype}, as the store's layout says; the model computed {key_states.dtype} and "
                f"{value_states.dtype}: leave autocast, or load the model in the dtype to compute in"
            )
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        batch, _, capacity, _ = self._buffers[0].shape
        replaced = self._views[0] is not self.keys or self._views[1] is not self.values
        if replaced or stop > capacity or batch != key_states.shape[0]:  # an empty cache takes any batch
            self._move(key_states, start, stop + max(256, stop // 8))
        keys, values = self._buffers
        keys[:, :, start:stop] = key_states
        values[:, :, start:stop] = value_states
        self._use(keys, values, stop)
        return self.keys, self.values

    def _move(self, like: torch.Tensor, length: int, capacity: int) -> None:
        batch, heads, _, size = like.shape
        keys, values = (like.new_empty((batch, heads, capacity, size)) for _ in range(2))
        if length:
            keys[:, :, :length] = self.keys
            values[:, :, :length] = self.values
        self._use(keys, values, length)


def empty_buffers(like: Sequence[tuple[torch.device, torch.dtype]], shape: tuple[int, int, int, int]) -> Buffers:
    """Uninitialised K and V of ``shape`` = ``[batch, heads, capacity, head_size]`` for each layer's device and dtype."""

    def empty(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return [(empty(*place), empty(*place)) for place in like]


def cache_over(buffers: Buffers, length: int) -> DynamicCache:
    """A cache over ``buffers`` of which ``length`` tokens are filled."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = None
    cache.layers = [RoomyLayer(keys, values, length) for keys, values in buffers]
    return cache
