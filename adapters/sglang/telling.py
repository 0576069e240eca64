"""What the adapter tells: one line at the start, a line for each load, warnings about trouble, and Prometheus metrics."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ...config import StoreConfig
from ...events import Event

__all__ = ["COUNTERS", "Telling", "active", "inactive", "tier_names"]

#: Speaks whatever SGLang's log level is: there is one line of it, and who looks for it must find it.
status = logging.getLogger("lmkv.sglang")
status.setLevel(logging.INFO)
#: Speaks as the rest of SGLang does.
logger = logging.getLogger("sglang.lmkv")

#: Counters, ``lmkv:<name>`` in Prometheus, the same as under vLLM.
COUNTERS: Mapping[str, str] = {
    "lookup_tokens": "Tokens that requests asked for.",
    "hit_tokens": "Tokens found beyond the engine's own cache and ordered to be loaded.",
    "loaded_tokens": "Tokens loaded instead of computed.",
    "loads": "Loads that ended well.",
    "load_failures": "Loads that failed.",
    "stored_tokens": "Tokens newly kept.",
    "stores": "Stores that ended well.",
    "store_failures": "Stores that failed: misses later.",
    "evicted_chunks": "Chunks that tiers gave up for room.",
    "tier_failures": "Operations on tiers that failed or were too late, and damaged records.",
}
_TROUBLE = ("tier_failed", "load_failed", "corrupt", "write_dropped", "tier_disabled", "tier_enabled", "unpinned")
_FAILURES = ("tier_failed", "load_failed", "corrupt", "write_dropped")
_PAUSE = 10.0  # seconds between two warnings of one kind
_prometheus: dict[str, Any] = {}


def active(door: str, where: str, config: StoreConfig, served: str) -> None:
    """The one line at the start, where LMKV serves."""
    status.info("LMKV: active (%s, %s): %s; tiers: %s", door, where, served, tier_names(config))


def inactive(door: str, why: str) -> None:
    """The one line at the start, where it does not."""
    status.error("LMKV: not active (%s): %s. SGLang runs without it: nothing is kept and nothing is loaded.", door, why)


def tier_names(config: StoreConfig) -> str:
    """The tiers and their sizes, for people."""
    tiers = [f"ram {_size(config.ram_capacity)}"]
    if config.disk_capacity:
        tiers.append(f"disk {_size(config.disk_capacity)} at {config.disk_path or 'the user cache directory'}")
    tiers += [tier.name + (f" {_size(tier.capacity)}" if tier.capacity else "") for tier in config.tiers]
    return ", ".join(tiers)


def _size(n: int) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 1 << 30 else f"{n / 2**20:.0f} MiB"


class Telling:
    """Counts and lines of one page store.

    Args:
        prometheus: also count in this process's Prometheus registry, as SGLang's metrics do.
    """

    def __init__(self, *, prometheus: bool = False) -> None:
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._last: dict[str, float] = {}
        self._prometheus = _prometheus_counters() if prometheus else {}

    def add(self, **counts: int) -> None:
        """Count."""
        with self._lock:
            self.counts.update(counts)
        for name, n in counts.items():
            if name in self._prometheus and n:
                self._prometheus[name].inc(n)

    def event(self, event: Event) -> None:
        """Listen to the store; called from any thread."""
        if event.kind == "evicted":
            self.add(evicted_chunks=int(str(event.detail["chunks"])))
        elif event.kind in _FAILURES:
            self.add(tier_failures=1)
        if event.kind in _TROUBLE and self._may_speak(f"{event.kind} {event.tier}"):
            detail = {name: value for name, value in event.detail.items() if name != "keys"}
            logger.warning("LMKV: %s in %s: %s", event.kind, event.tier or "the store", detail)

    def trouble(self, what: str, why: str) -> None:
        """Something that was to be kept or loaded was not."""
        if self._may_speak(what):
            logger.warning("LMKV: %s: %s", what, why)

    def _may_speak(self, what: str) -> bool:
        now = time.monotonic()
        with self._lock:
            if now - self._last.get(what, -_PAUSE) < _PAUSE:
                return False
            self._last[what] = now
        return True


def _prometheus_counters() -> dict[str, Any]:
    if not _prometheus:
        from prometheus_client import Counter as PrometheusCounter

        for name, what in COUNTERS.items():
            _prometheus[name] = PrometheusCounter(f"lmkv:{name}", what)
    return _prometheus
