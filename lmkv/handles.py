"""What the verbs of a store hand out: matches, leases, reservations, slots, statistics."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from .chunks import TOKEN_BYTES, ChunkKey, Namespace
from .index import Node
from .tiers import NewChunk, TierStats
from .transfer import Part

__all__ = ["ChunkHit", "ContentHit", "Lease", "Match", "Reservation", "Slot", "Stats", "TierStats", "slot_parts"]


@dataclass(frozen=True, slots=True)
class ChunkHit:
    """A chunk of the prompt's prefix that some tier holds.

    Args:
        key: its prefix key.
        start: position of its first token in the prompt.
        tokens: how many of its leading tokens the prompt shares.
        stored_tokens: how many it has.
        tier: name of the fastest tier that holds it.
    """

    key: ChunkKey
    start: int
    tokens: int
    stored_tokens: int
    tier: str


@dataclass(frozen=True, slots=True)
class ContentHit:
    """A stored chunk whose tokens stand somewhere in the prompt, behind another text than the one it was computed behind.

    Args:
        key: its prefix key.
        start: where its tokens begin in the prompt.
        tokens: how many of them stand there.
        position: where they began in the chunk's own text.
        tier: name of the tier that holds it.
    """

    key: ChunkKey
    start: int
    tokens: int
    position: int
    tier: str


@dataclass(frozen=True, slots=True)
class Tail:
    """The chunk behind the last full match that shares the most tokens."""

    key: ChunkKey
    piece: bytes
    shared: int
    tier: str


class Match:
    """What a lookup found; a value without hold on anything.

    Attributes:
        total_tokens: tokens of the prompt.
        hit_tokens: leading tokens that some tier holds.
        pending: a remote tier has not answered yet; look up again, or :meth:`wait`.
        elsewhere: chunks found behind the prefix (``anywhere=True``), by ``start``.
    """

    __slots__ = ("_again", "_chunk_tokens", "elsewhere", "hit_tokens", "keys", "namespace", "pending", "pieces", "runs", "tail")

    def __init__(
        self,
        namespace: Namespace,
        chunk_tokens: int,
        keys: Sequence[ChunkKey],
        pieces: Sequence[bytes],
        runs: Sequence[tuple[str, int]],
        tail: Tail | None,
        *,
        pending: bool,
        again: Callable[[float], Match],
    ) -> None:
        self.namespace = namespace
        self.keys = keys
        self.pieces = pieces
        self.runs = runs
        self.tail = tail
        self.pending = pending
        self.elsewhere: tuple[ContentHit, ...] = ()
        self._again = again
        self._chunk_tokens = chunk_tokens
        full = self.full
        whole = min(full * chunk_tokens, self.total_tokens)
        self.hit_tokens = whole + (tail.shared if tail else 0)

    @property
    def total_tokens(self) -> int:
        """Tokens of the prompt."""
        return (len(self.pieces) - 1) * self._chunk_tokens + len(self.pieces[-1]) // TOKEN_BYTES

    @property
    def full(self) -> int:
        """Leading chunks of the prompt that are held whole."""
        return sum(count for _, count in self.runs)

    @property
    def hits(self) -> tuple[ChunkHit, ...]:
        """The held chunks of the prefix, in order."""
        found: list[ChunkHit] = []
        for tier, count in self.runs:
            for _ in range(count):
                i = len(found)
                tokens = len(self.pieces[i]) // TOKEN_BYTES
                found.append(ChunkHit(self.keys[i], i * self._chunk_tokens, tokens, tokens, tier))
        if self.tail:
            tail, stored = self.tail, len(self.tail.piece) // TOKEN_BYTES
            found.append(ChunkHit(tail.key, len(found) * self._chunk_tokens, tail.shared, stored, tail.tier))
        return tuple(found)

    def tier_of(self, number: int) -> str:
        """Name of the tier that holds the prompt's chunk of that number; empty for none."""
        for tier, count in self.runs:
            if number < count:
                return tier
            number -= count
        return self.tail.tier if self.tail and not number else ""

    def tokens_by_tier(self) -> dict[str, int]:
        """How many of the hit tokens come from which tier."""
        if len(self.runs) == 1 and not self.tail:
            return {self.runs[0][0]: self.hit_tokens}
        counts: dict[str, int] = {}
        for hit in self.hits:
            counts[hit.tier] = counts.get(hit.tier, 0) + hit.tokens
        return counts

    def first(self, runs: int) -> Match:
        """The match without what stands behind the first ``runs`` of its runs, as whose last one its tail counts."""
        tail = self.tail if runs > len(self.runs) else None
        return Match(
            self.namespace,
            self._chunk_tokens,
            self.keys,
            self.pieces,
            self.runs[:runs],
            tail,
            pending=self.pending,
            again=self._again,
        )

    def wait(self, timeout: float) -> Match:
        """The match once remote tiers have answered or ``timeout`` seconds have passed."""
        return self._again(timeout) if self.pending else self

    def __repr__(self) -> str:
        state = ", pending" if self.pending else ""
        return f"Match(hit_tokens={self.hit_tokens}, total_tokens={self.total_tokens}, tiers={self.tokens_by_tier()}{state})"


@dataclass(frozen=True, slots=True)
class Slot:
    """One chunk in host memory.

    Args:
        id: the slot's number in the pool, the same for every process that maps it.
        key: the chunk's prefix key.
        start: position of its first token in the text.
        tokens: how many tokens its payload holds.
        payload: the bytes, ``layout.token_bytes * tokens``; read-only in a lease, writable in a reservation.
    """

    id: int
    key: ChunkKey
    start: int
    tokens: int
    payload: memoryview


def slot_parts(slots: Sequence[Slot], start: int, stop: int) -> list[Part]:
    """What a copy of tokens ``start`` to ``stop`` of a text moves out of or into its slots."""
    return [
        Part(slot.payload, slot.start, slot.start + slot.tokens, max(start, slot.start), min(stop, slot.start + slot.tokens))
        for slot in slots
        if start < slot.start + slot.tokens and slot.start < stop
    ]


class Lease:
    """Keeps found chunks where they are while somebody copies out of them. A context manager with a time limit.

    Attributes:
        hit_tokens: leading tokens of the prompt that are held; at most what the match promised.
    """

    def __init__(
        self,
        nodes: list[Node],
        hit_tokens: int,
        chunk_tokens: int,
        seconds: float,
        payload: Callable[[int, int], memoryview],
        release: Callable[[Lease], None],
    ) -> None:
        self.nodes = nodes
        self.hit_tokens = hit_tokens
        # taken now: a lease that loses its hold must still be readable as what it was, to find that out afterwards
        self._slot_ids = [node.slot for node in nodes]
        self._last_tokens = len(nodes[-1].tokens) // TOKEN_BYTES if nodes else 0
        self.seconds = seconds
        self.until = time.monotonic() + seconds
        self.held = True
        self._chunk_tokens = chunk_tokens
        self._payload = payload
        self._release = release

    @cached_property
    def slots(self) -> list[Slot]:
        """The held chunks, in order. Their payloads are valid as long as the lease is :attr:`held`."""
        return [
            Slot(slot, node.key, start, tokens, self._payload(slot, tokens).toreadonly())
            for node, (slot, start, tokens) in zip(self.nodes, self.spans.tolist(), strict=True)
        ]

    @property
    def spans(self) -> npt.NDArray[np.int64]:
        """Of each held chunk its slot, the position of its first token, and its tokens, [chunks, 3]: for those who know where
        slots are."""
        count = len(self._slot_ids)
        table = np.empty((count, 3), np.int64)
        table[:, 0] = self._slot_ids
        table[:, 1] = np.arange(0, count * self._chunk_tokens, self._chunk_tokens)
        table[:, 2] = self._chunk_tokens
        table[-1:, 2] = self._last_tokens
        return table

    def renew(self) -> bool:
        """Start the time limit anew; ``False`` if the lease was lost already."""
        if self.held:
            self.until = time.monotonic() + self.seconds
        return self.held

    def release(self) -> None:
        """Give the hold up. A second call does nothing."""
        self._release(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


class Reservation:
    """Slots that are being filled: invisible until :meth:`commit`, gone without it. A context manager that aborts on exit.

    Attributes:
        chunks: what was missing, in the order of the text.
    """

    def __init__(
        self,
        chunks: list[NewChunk],
        payload: Callable[[int, int], memoryview],
        commit: Callable[[Reservation], int],
        abort: Callable[[Reservation], None],
        lost: Callable[[Reservation], None],
        epoch: int = 0,
    ) -> None:
        self.chunks = chunks
        self.epoch = epoch  # of the store: how often it was cleared
        self._lost = lost
        self.open = True
        self._payload = payload
        self._commit = commit
        self._abort = abort

    @cached_property
    def slots(self) -> list[Slot]:
        """The chunks to fill: only those that are missing. Fill every payload before the commit."""
        found: list[Slot] = []
        for chunk in self.chunks:
            tokens = len(chunk.piece) // TOKEN_BYTES
            found.append(Slot(chunk.slot, chunk.key, chunk.start, tokens, self._payload(chunk.slot, tokens)))
        return found

    @property
    def tokens(self) -> int:
        """Tokens of the chunks to fill."""
        return sum(len(chunk.piece) for chunk in self.chunks) // TOKEN_BYTES

    def commit(self) -> int:
        """Make the chunks visible; returns how many tokens are newly stored: none if the store was cleared meanwhile.

        Raises:
            ArgumentError: the reservation was committed or aborted before.
            StoreClosedError: the store was closed meanwhile.
        """
        return self._commit(self)

    def abort(self) -> None:
        """Give the slots back. After a commit or a first abort it does nothing."""
        self._abort(self)

    def __del__(self) -> None:
        if self.open:  # its owner forgot it: nobody can fill or commit it any more
            self._lost(self)

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.abort()


@dataclass(frozen=True)
class Stats:
    """Counts of a store since it was opened.

    Args:
        lookups, lookup_tokens: leases taken for prompts with or without hits count once here, with the prompts' tokens.
        hit_tokens: tokens that leases held.
        stored_tokens: tokens newly stored.
        leases, reservations: open now.
        tiers: in order, RAM first.
    """

    lookups: int
    lookup_tokens: int
    hit_tokens: int
    stored_tokens: int
    leases: int
    reservations: int
    tiers: tuple[TierStats, ...] = field(default_factory=tuple)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        data = dataclasses.asdict(self)
        data["tiers"] = list(data["tiers"])
        return data
