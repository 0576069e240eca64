"""What a store tells about itself while it runs.

A store hands every :class:`Event` to the one callable it was given (``on_event``); metrics and logs are built on that. The
callable runs on whichever thread the event happened on, possibly inside the store's lock, so it has to be quick and must
not call the store. An exception it raises is swallowed: telling must not break serving.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

__all__ = ["KINDS", "Event", "EventSink"]

#: Every kind of event and what its ``detail`` holds.
KINDS: Mapping[str, str] = {
    "stored": "chunks became visible in a tier; chunks, tokens, bytes",
    "loaded": "chunks came from a slow tier into slots; chunks, tokens, bytes, seconds, keys",
    "evicted": "a tier made room; chunks, and of the RAM tier their keys",
    "let_go": "chunks left RAM though no room was needed: nothing keeps them, or a longer one has their tokens; chunks, keys",
    "load_failed": "a chunk that was found could not be read: a miss; key, reason",
    "corrupt": "a record failed its checks and was deleted: a miss; key, reason",
    "write_dropped": "chunks were not written to a slow tier; chunks, reason",
    "tier_failed": "an operation on a tier failed or was too late; operation, reason",
    "tier_disabled": "a tier failed too often and is left out for a while; seconds, reason",
    "tier_enabled": "a tier that was left out answers again",
    "lease_expired": "a lease outlived its time limit and lost its hold; chunks",
    "unpinned": "slots could not be pinned: a GPU copies from and to them slowly; bytes, reason",
    "reservation_lost": "a reservation was dropped without commit or abort; chunks",
}


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Args:
        kind: a name out of :data:`KINDS`.
        tier: the tier it happened in (``"ram"``, ``"disk"``, a backend's name), or ``""`` for the store itself.
        detail: plain values, as :data:`KINDS` says.
    """

    kind: str
    tier: str = ""
    detail: Mapping[str, object] = field(default_factory=dict)


EventSink = Callable[[Event], None]


class Emitter:
    """Hands events to a sink that may be absent or faulty."""

    __slots__ = ("_sink",)

    def __init__(self, sink: EventSink | None) -> None:
        self._sink = sink

    def __call__(self, kind: str, tier: str = "", **detail: object) -> None:
        if self._sink is None:
            return
        with contextlib.suppress(Exception):  # the listener's fault must not become the cache's
            self._sink(Event(kind, tier, detail))
