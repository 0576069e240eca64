"""What the connector counts: for vLLM's own statistics lines and for Prometheus."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ...events import Event

__all__ = ["Counts"]


class Counts:
    """Counts since they were last taken."""

    def __init__(self) -> None:
        self.interval: Counter[str] = Counter()
        self.bypasses: Counter[str] = Counter()

    def event(self, event: Event) -> None:
        """Listen to the store."""
        self.interval[f"event:{event.tier}:{event.kind}"] += 1

    def hit(self, tokens: int) -> None:
        """Tokens found and to be loaded."""
        self.interval["hit_tokens"] += tokens

    def loaded(self, tokens: int, size: int, seconds: float) -> None:
        """A load that ended well."""
        self.interval.update(loads=1, loaded_tokens=tokens, loaded_bytes=size)
        self.interval["load_us"] += round(seconds * 1e6)

    def load_failed(self, tokens: int) -> None:
        """A load that failed."""
        self.interval.update(load_failures=1, load_failed_tokens=tokens)

    def stored(self, tokens: int, size: int, seconds: float) -> None:
        """A store that ended well."""
        self.interval.update(stores=1, stored_tokens=tokens, stored_bytes=size)
        self.interval["store_us"] += round(seconds * 1e6)

    def store_failed(self, tokens: int) -> None:
        """A store that failed."""
        self.interval.update(store_failures=1, store_failed_tokens=tokens)

    def late(self) -> None:
        """Slow tiers that were given up for a request."""
        self.interval["late_prefetches"] += 1

    def bypassed(self, why: str) -> None:
        """A request served without reuse."""
        self.interval["bypassed_requests"] += 1
        self.bypasses[why] += 1

    def take(self) -> dict[str, Any]:
        """The counts, and begin anew."""
        taken, self.interval = dict(self.interval), Counter()
        return taken
