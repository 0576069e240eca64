"""Stores whose hits all come from a remote tier, for tests of what goes wrong there."""

from __future__ import annotations

import time
from typing import Any

import known_kv
import servers

import lmkv
from lmkv.chunks import TokenChunker

__all__ = ["DEADLINE", "LAYOUT", "SLACK", "TEXT", "Client", "other_text", "until_served"]

#: Chunks of 64 KiB: with parts of 64 KiB a record is in two.
LAYOUT = lmkv.KVLayout.dense(layers=2, heads=8, head_size=64, dtype="float16", chunk_tokens=16)
TEXT = list(range(1000, 1100))  # 100 tokens: six full chunks and one of four
DEADLINE = 1.0
#: What the deadline is kept by, on a machine that is busy with other tests.
SLACK = 1.0


class Client:
    """A store whose RAM is emptied before each request, so that every hit comes from the remote tier."""

    def __init__(self, url: str, **settings: Any) -> None:
        self.events: list[lmkv.Event] = []
        options = settings.pop("options", {"part_bytes": 65536})
        self.deadline: float = settings.pop("deadline", DEADLINE)
        of_tier = {name: settings.pop(name) for name in ("backend", "codec", "encryption") if name in settings}
        tier = lmkv.TierConfig(url=url, name="remote", deadline_seconds=self.deadline, options=options, **of_tier)
        config = lmkv.StoreConfig(
            model="m", ram_capacity=8 << 20, disk_capacity=0, tiers=(tier,), breaker_failures=3, **settings
        )
        self.store = lmkv.Store(config, LAYOUT, on_event=self.events.append)
        self.slowest = 0.0

    def put(self, text: list[int] = TEXT) -> bool:
        """Store a text; whether it got to the server."""
        self.events.clear()
        self.store._ram.clear()
        self.store.store(text, known_kv.source(LAYOUT, text))
        assert self.store._slow[0].flush(60)
        return not any(event.kind in ("write_dropped", "tier_failed") for event in self.events)

    def get(self, text: list[int] = TEXT) -> int:
        """Tokens that came from the server, every byte of them proved."""
        self.store._ram.clear()
        begun = time.monotonic()
        match = self.store.lookup(text).wait(self.deadline)
        asked = time.monotonic()
        loaded = known_kv.fetch(self.store, text, match)
        self.slowest = max(self.slowest, asked - begun, time.monotonic() - asked)
        return loaded

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def keys(self, text: list[int] = TEXT) -> list[str]:
        return [key.hex() for key in TokenChunker(self.store.namespace, LAYOUT.chunk_tokens).prefix_keys(text)]


def other_text(number: int) -> list[int]:
    """A text that shares nothing with others, so that no answer is believed from before."""
    return [number + 5000, *TEXT]


def until_served(each: Client, seconds: float, text: list[int] = TEXT) -> float:
    """Store and load until it works again; returns how long it took."""
    begun = time.monotonic()
    servers.until(lambda: each.put(text) and each.get(text) == len(text), seconds)
    return time.monotonic() - begun
