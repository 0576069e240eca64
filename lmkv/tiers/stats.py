"""What a tier counts."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TierStats"]


@dataclass(frozen=True)
class TierStats:
    """Counts of one tier.

    Args:
        name: the tier's.
        capacity_bytes, used_bytes: its quota, and what counts towards it; 0 where it does not say.
        chunks: held now; -1 where it does not say.
        hit_tokens: tokens that leases took from it.
        read_chunks, written_chunks: records read from and written to it (0 for RAM).
        evictions: chunks that it gave up for room.
        waiting_writes: chunks on their way to it.
        enabled: not switched off by its breaker.
    """

    name: str
    capacity_bytes: int
    used_bytes: int
    chunks: int
    hit_tokens: int = 0
    read_chunks: int = 0
    written_chunks: int = 0
    evictions: int = 0
    waiting_writes: int = 0
    enabled: bool = True
