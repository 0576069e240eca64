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
        read_bytes, written_bytes: of the records read and written, as they are kept there.
        read_seconds, written_seconds: that its backend took for them, on all threads together.
        failures: calls that failed or came too late.
        dropped_writes: chunks that were not written: the queue was full, their slots were needed, or the tier failed.
        held_back: chunks that were not written since they had been seen once only (``admission: second``).
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
    read_bytes: int = 0
    written_bytes: int = 0
    read_seconds: float = 0.0
    written_seconds: float = 0.0
    failures: int = 0
    dropped_writes: int = 0
    held_back: int = 0
