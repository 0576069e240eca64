"""Whether to read KV from slow tiers or to compute it, by what both took before."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

__all__ = ["Worth"]

#: Shorter runs say more of the engine's steps than of its speed.
_LEAST_TOKENS = 128
_ENOUGH = 3
#: Of so many decisions against a tier one is not followed: it may have become faster.
_TRY_AGAIN = 16


class Worth:
    """Speeds in tokens a second, the last few of each kind; the median counts."""

    def __init__(self) -> None:
        self._computed: deque[float] = deque(maxlen=9)
        self._read: dict[str, deque[float]] = {}
        self._refused: dict[str, int] = {}

    def computed(self, tokens: int, seconds: float) -> None:
        """A prompt was computed."""
        if tokens >= _LEAST_TOKENS and seconds > 0:
            self._computed.append(tokens / seconds)

    def read(self, tier: str, tokens: int, seconds: float) -> None:
        """A prompt's KV came from a slow tier, or did not come within ``seconds``."""
        if tokens >= _LEAST_TOKENS and seconds > 0:
            self._read.setdefault(tier, deque(maxlen=9)).append(tokens / seconds)

    def of(self, tokens_by_tier: Mapping[str, int]) -> bool:
        """Whether reading so many tokens from these tiers beats computing them; yes while too little is known."""
        if len(self._computed) < _ENOUGH:
            return True
        known = {tier: speeds for tier, speeds in self._read.items() if len(speeds) >= _ENOUGH and tier in tokens_by_tier}
        reading = sum(tokens_by_tier[tier] / _median(speeds) for tier, speeds in known.items())
        if reading <= sum(tokens_by_tier.values()) / _median(self._computed):
            return True
        slowest = min(known, key=lambda tier: _median(known[tier]))
        self._refused[slowest] = self._refused.get(slowest, 0) + 1
        return self._refused[slowest] % _TRY_AGAIN == 0


def _median(values: deque[float]) -> float:
    return sorted(values)[len(values) // 2]
