"""Whether to load what slow tiers hold, or to compute it: by what tiers took before and by how quick the caller computes."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping

from .chunks import TOKEN_BYTES
from .handles import Match
from .tiers.speed import ReadSpeed

__all__ = ["PrefillSpeed", "worthwhile"]

#: Shorter runs say more of an engine's steps than of its speed.
_LEAST_TOKENS = 128
_ENOUGH = 3


class PrefillSpeed:
    """How quick a caller computes prompts: the median of the last few."""

    def __init__(self) -> None:
        self._speeds: deque[float] = deque(maxlen=9)

    def add(self, tokens: int, seconds: float) -> None:
        """So many tokens of a prompt were computed within so many seconds."""
        if tokens >= _LEAST_TOKENS and seconds > 0:
            self._speeds.append(tokens / seconds)

    @property
    def tokens_per_second(self) -> float | None:
        """``None`` while too little is known."""
        return statistics.median(self._speeds) if len(self._speeds) >= _ENOUGH else None


def worthwhile(match: Match, speeds: Mapping[str, ReadSpeed], token_bytes: int, tokens_per_second: float) -> Match:
    """The match up to where loading saves the most time; the whole match while too little is known of its tiers.

    Tiers are read side by side, so that the slowest counts. Of a tier that is passed over one load in 16 is done all the same.

    Args:
        speeds: of the slow tiers, by name. What lies in other tiers costs nothing.
        token_bytes: KV bytes of a token.
        tokens_per_second: how quick the caller computes.
    """
    parts = [*_runs(match)]
    if match.tail:
        parts.append((match.tail.tier, match.tail.shared, len(match.tail.piece) // TOKEN_BYTES))
    sizes: dict[str, int] = {}
    best = 0.0
    keep = tokens = 0
    for number, (tier, served, read) in enumerate(parts, 1):
        tokens += served
        if tier in speeds:
            sizes[tier] = sizes.get(tier, 0) + read * token_bytes
        loading = max((speeds[name].seconds(size) or 0.0 for name, size in sizes.items()), default=0.0)
        saved = tokens / tokens_per_second - loading
        if saved >= best:
            best, keep = saved, number
    if keep == len(parts) or speeds[parts[keep][0]].refused():
        return match
    return match.first(keep)


def _runs(match: Match) -> list[tuple[str, int, int]]:
    """Tier, tokens that serve the prompt and tokens that are read, of each run."""
    found, at = [], 0
    for tier, count in match.runs:
        tokens = sum(len(piece) for piece in match.pieces[at : at + count]) // TOKEN_BYTES
        found.append((tier, tokens, tokens))
        at += count
    return found
