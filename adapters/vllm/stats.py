"""What the connector counts, and the KV events it publishes; vLLM takes both after each step."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ...chunks import TOKEN_BYTES, ChunkKey
from ...events import Event
from ...handles import Reservation

if TYPE_CHECKING:
    from ...store import Store

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
    """KV events of what is in RAM, one block a chunk, as vLLM publishes its own (``kv_events_config``).

    What came is looked up in RAM when vLLM takes the events: the store tells of it from several threads, so that word of a
    chunk's end may come before word of its beginning, which nobody would take back any more.
    """

    #: Namespaces of LoRA adapters whose names are remembered.
    MOST_NAMES = 4096

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[tuple[str, Sequence[ChunkKey]]] = []
        self._names: dict[ChunkKey, str] = {}

    def named(self, root: ChunkKey, lora: str) -> None:
        """Chunks of the namespace of that root are of that LoRA adapter."""
        self._names[root] = lora
        while len(self._names) > self.MOST_NAMES:
            del self._names[next(iter(self._names))]

    def stored(self, reservation: Reservation) -> None:
        """Chunks became visible."""
        self._add("came", [chunk.key for chunk in reservation.chunks])

    def event(self, event: Event) -> None:
        """Listen to the store: chunks that came into RAM from slow tiers, and that left it."""
        keys = event.detail.get("keys")
        if isinstance(keys, tuple) and (event.kind == "loaded" or event.tier == "ram"):
            self._add("came" if event.kind == "loaded" else "gone", keys)

    def cleared(self) -> None:
        """Everything was forgotten."""
        self._add("cleared", ())

    def _add(self, what: str, keys: Sequence[ChunkKey]) -> None:
        with self._lock:
            self._waiting.append((what, keys))

    def take(self, store: Store | None) -> list[Any]:
        """The events since the last call."""
        from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved

        with self._lock:
            waiting, self._waiting = self._waiting, []
        events: list[Any] = []
        for what, keys in waiting:
            if what == "cleared":
                events.append(AllBlocksCleared())
            elif what == "gone":
                events.append(BlockRemoved(block_hashes=list(keys), medium="CPU"))
            elif store is not None:
                events.extend(self._in_ram(store, keys))
        return events

    def _in_ram(self, store: Store, keys: Sequence[ChunkKey]) -> Iterator[Any]:
        from vllm.distributed.kv_events import BlockStored

        ram = store._ram
        with store._lock:
            nodes = [node for node in map(ram.index.get, keys) if node is not None]
            places = [(node, ram.start_of(node.slot), ram.root_of(node.slot), node.parent) for node in nodes]
        for node, start, root, parent in places:
            yield BlockStored(
                block_hashes=[node.key],
                parent_block_hash=parent.key if start and parent is not None else None,
                token_ids=memoryview(node.tokens).cast("I").tolist(),
                block_size=len(node.tokens) // TOKEN_BYTES,
                lora_id=None,
                medium="CPU",
                lora_name=None if root is None else self._names.get(root),
            )


def rate(size: int, seconds: float) -> tuple[float, float, float]:
    """GB, milliseconds, GB/s."""
    return size / 1e9, seconds * 1e3, size / 1e9 / seconds if seconds else 0.0
