"""Copies between slots and the tensors of whoever computes the KV.

A :class:`KVAccess` describes a text's tensors: ``gather`` fills payloads from them, ``scatter`` fills them from payloads. A
:class:`CopyEngine` does both for an engine's paged memory, again and again, without blocking where that is on a GPU.
"""

from .access import DenseKV, KVAccess, PagedKV, as_access
from .engine import Copy, CopyEngine, CopyMade, gather, scatter
from .gpu import Gpu, GpuOptions
from .pinning import Pinner, Pins
from .plan import Part, PartTable, payload_arrays
from .rows import device_of

__all__ = [
    "Copy",
    "CopyEngine",
    "CopyMade",
    "DenseKV",
    "Gpu",
    "GpuOptions",
    "KVAccess",
    "PagedKV",
    "Part",
    "PartTable",
    "Pinner",
    "Pins",
    "as_access",
    "device_of",
    "gather",
    "payload_arrays",
    "scatter",
]
