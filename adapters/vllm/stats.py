"""What the connector counts, and the KV events it publishes; vLLM takes both after each step."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

from ...chunks import TOKEN_BYTES
from ...events import Event
from ...handles import Reservation

__all__ = ["Counts", "Published", "rate"]

_FAILURES = ("tier_failed", "load_failed", "corrupt", "write_dropped")


class Counts:
    """Counts since they were last taken. The store tells its events from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._interval: Counter[str] = Counter()
        self._seconds: dict[str, list[float]] = {}
        #: Requests served without reuse, by reason, since the start.
        self.bypasses: Counter[str] = Counter()

    def add(self, **counts: int) -> None:
        """Count."""
        with self._lock:
            self._interval.update(counts)

    def event(self, event: Event) -> None:
        """Listen to the store."""
        if event.kind == "evicted":
            self.add(evicted_chunks=int(str(event.detail["chunks"])))
        elif event.kind in _FAILURES:
            self.add(tier_failures=1)

    def loaded(self, tokens: int, size: int, seconds: float) -> None:
        """A load that ended well."""
        self.add(loads=1, loaded_tokens=tokens, loaded_bytes=size)
        self._seconds.setdefault("load_seconds", []).append(seconds)

    def stored(self, tokens: int, size: int, seconds: float) -> None:
        """A store that ended well."""
        self.add(stores=1, stored_tokens=tokens, stored_bytes=size)
        self._seconds.setdefault("store_seconds", []).append(seconds)

    def bypassed(self, why: str) -> None:
        """A request served without reuse."""
        self.add(bypassed_requests=1)
        self.bypasses[why] += 1

    def peek(self) -> dict[str, int]:
        """The counts of this interval so far."""
        with self._lock:
            return dict(self._interval)

    def take(self) -> dict[str, Any]:
        """The counts, and begin anew."""
        with self._lock:
            taken: dict[str, Any] = dict(self._interval)
            self._interval = Counter()
        taken |= self._seconds
        self._seconds = {}
        return taken


class Published:
    """KV events of the RAM tier, one block a chunk, as vLLM publishes its own (``kv_events_config``)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[Any] = []

    def stored(self, reservation: Reservation, lora: str | None) -> None:
        """Chunks became visible."""
        from vllm.distributed.kv_events import BlockStored

        found = []
        for chunk in reservation.chunks:
            tokens = memoryview(chunk.piece).cast("I").tolist()
            found.append(
                BlockStored(
                    block_hashes=[chunk.key],
                    parent_block_hash=chunk.parent if chunk.start else None,
                    token_ids=tokens,
                    block_size=len(chunk.piece) // TOKEN_BYTES,
                    lora_id=None,
                    medium="CPU",
                    lora_name=lora,
                )
            )
        with self._lock:
            self._waiting.extend(found)

    def event(self, event: Event) -> None:
        """Listen to the store: chunks that left the RAM tier."""
        if event.kind != "evicted" or event.tier != "ram":
            return
        from vllm.distributed.kv_events import BlockRemoved

        keys = event.detail.get("keys")
        if isinstance(keys, tuple):
            with self._lock:
                self._waiting.append(BlockRemoved(block_hashes=list(keys), medium="CPU"))

    def cleared(self) -> None:
        """Everything was forgotten."""
        from vllm.distributed.kv_events import AllBlocksCleared

        with self._lock:
            self._waiting.append(AllBlocksCleared())

    def take(self) -> list[Any]:
        """The events since the last call."""
        with self._lock:
            taken, self._waiting = self._waiting, []
        return taken


def rate(size: int, seconds: float) -> tuple[float, float, float]:
    """GB, milliseconds, GB/s."""
    return size / 1e9, seconds * 1e3, size / 1e9 / seconds if seconds else 0.0
