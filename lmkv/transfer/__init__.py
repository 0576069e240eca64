"""Copies between slots and the tensors of whoever computes the KV.

A :class:`KVAccess` describes a text's tensors: ``gather`` fills payloads from them, ``scatter`` fills them from payloads. A
:class:`CopyEngine` does both for an engine's paged memory, again and again, without blocking where that is on a GPU.
"""

from .access import DenseKV, KVAccess, PagedKV, as_access
from .engine import Copy, CopyEngine, gather, scatter
from .plan import Part, payload_arrays

__all__ = ["Copy", "CopyEngine", "DenseKV", "KVAccess", "PagedKV", "Part", "as_access", "gather", "payload_arrays", "scatter"]
