"""The connector's counts as vLLM's statistics: its log lines and its Prometheus metrics, ``lmkv:…``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import REGISTRY
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

__all__ = ["LMKVPromMetrics", "LMKVStats"]

#: Counters: name of the count, what it counts.
COUNTERS: Mapping[str, str] = {
    "lookup_tokens": "Tokens that requests asked for.",
    "hit_tokens": "Tokens found and ordered to be loaded.",
    "loaded_tokens": "Tokens loaded instead of computed.",
    "loaded_bytes": "Bytes loaded into the engine's KV memory.",
    "loads": "Loads that ended well.",
    "load_failures": "Loads that failed and were computed.",
    "stored_tokens": "Tokens newly kept.",
    "stored_bytes": "Bytes copied out of the engine's KV memory.",
    "stores": "Stores that ended well.",
    "store_failures": "Stores that failed: misses later.",
    "late_prefetches": "Requests for which a slow tier was too late.",
    "computed_instead_tokens": "Tokens that slow tiers had and that were quicker to compute.",
    "bypassed_requests": "Requests served without reuse.",
    "evicted_chunks": "Chunks that tiers gave up for room.",
    "tier_failures": "Operations on tiers that failed or were too late, and damaged records.",
}
#: Gauges: the state of the RAM tier.
GAUGES: Mapping[str, str] = {
    "ram_used_bytes": "Bytes of slots in use.",
    "ram_capacity_bytes": "Bytes of slots there may be.",
    "ram_chunks": "Chunks in the RAM tier.",
}
#: Histograms, in seconds, with a list of observations in the data.
HISTOGRAMS: Mapping[str, str] = {
    "load_seconds": "Time of a load's copies.",
    "store_seconds": "Time of a store's copies.",
}
_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class LMKVStats(KVConnectorStats):
    """Counts of an interval; plain numbers and lists, so that they can be sent between processes."""

    def reset(self) -> None:
        """Begin anew."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> LMKVStats:
        """Both intervals as one: counts and lists add up, the later state stays."""
        data = dict(self.data)
        for name, value in other.data.items():
            data[name] = value if name in GAUGES or name not in data else data[name] + value
        return LMKVStats(data=data)

    def reduce(self) -> dict[str, int | float]:
        """What a log line says of the interval."""
        data = self.data
        asked = data.get("lookup_tokens", 0)
        found: dict[str, int | float] = {
            "LMKV hit rate (%)": round(100 * data.get("hit_tokens", 0) / asked, 1) if asked else 0.0,
            "loaded tokens": data.get("loaded_tokens", 0),
            "stored tokens": data.get("stored_tokens", 0),
        }
        for way in ("load", "store"):
            seconds, size = (
                sum(data.get(f"{way}_seconds", ())),
                data.get("loaded_bytes" if way == "load" else "stored_bytes", 0),
            )
            if seconds:
                found[f"{way} GB/s"] = round(size / seconds / 1e9, 2)
        for name in ("load_failures", "store_failures", "late_prefetches", "tier_failures"):
            if data.get(name):
                found[name.replace("_", " ")] = data[name]
        return found

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not any(name in self.data for name in (*COUNTERS, *HISTOGRAMS))


def _forget_earlier() -> None:
    """Drop the metrics of an engine that this process had before, as vLLM does with its own: names may be registered once."""
    for collector in list(REGISTRY._collector_to_names):
        if str(getattr(collector, "_name", "")).startswith("lmkv:"):
            REGISTRY.unregister(collector)


class LMKVPromMetrics(KVConnectorPromMetrics):
    """Prometheus metrics of the connector, one of each for every engine of the process."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        _forget_earlier()
        counters = {name: self._counter_cls(f"lmkv:{name}", text, labelnames) for name, text in COUNTERS.items()}
        gauges = {name: self._gauge_cls(f"lmkv:{name}", text, labelnames) for name, text in GAUGES.items()}
        histograms = {
            name: self._histogram_cls(f"lmkv:{name}", text, labelnames, buckets=_BUCKETS) for name, text in HISTOGRAMS.items()
        }
        self._by_engine = {
            engine: {name: metric.labels(*values) for name, metric in (counters | gauges | histograms).items()}
            for engine, values in per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add an interval's counts."""
        metrics = self._by_engine[engine_idx]
        for name, value in transfer_stats_data.items():
            if name in COUNTERS:
                metrics[name].inc(value)
            elif name in GAUGES:
                metrics[name].set(value)
            elif name in HISTOGRAMS:
                for seconds in value:
                    metrics[name].observe(seconds)
