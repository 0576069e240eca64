"""Tiers, fast to slow: where chunks are kept and how they move between places."""

from __future__ import annotations

from .opening import open_tier
from .ram import NewChunk, RamTier
from .slow import SlowTier, Write
from .stats import TierStats

__all__ = ["NewChunk", "RamTier", "SlowTier", "TierStats", "Write", "open_tier"]
