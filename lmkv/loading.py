"""Asking slow tiers beside the caller: probes of remote tiers, and loads from any slow tier into slots."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from .chunks import TOKEN_BYTES, ChunkKey
from .errors import StoreClosedError
from .events import Emitter
from .handles import Match
from .index import Node
from .tiers import NewChunk, RamTier, SlowTier

__all__ = ["Loader", "Probes", "Waits"]

#: How long a remote tier's answer to "how many of these keys" is believed.
_ANSWER_SECONDS = 1.0
_MOST_PROBES = 1024


class Waits:
    """Waits that end in time: who waits is woken late by what the machine takes for it, so it asks for that much less."""

    #: What a wait is cut short by, as parts of it: at least, since the first late one is not foreseen, and at most.
    LEAST, MOST = 0.02, 0.1
    #: Once and a half the latest of so many waits that ended without a result is expected.
    REMEMBERED, ALLOWANCE = 16, 1.5

    def __init__(self) -> None:
        self._late: deque[float] = deque(maxlen=self.REMEMBERED)

    def result(self, future: Future[int], seconds: float) -> int:
        """The future's result within ``seconds``.

        Raises:
            concurrent.futures.TimeoutError: it did not come.
        """
        if seconds <= 0:
            return future.result(0)
        begun = time.monotonic()
        expected = self.ALLOWANCE * max(list(self._late), default=0.0)
        asked = seconds - min(max(expected, self.LEAST * seconds), self.MOST * seconds)
        try:
            return future.result(asked)
        except FutureTimeoutError:
            self._late.append(time.monotonic() - begun - asked)
            raise


class Probes:
    """Questions to remote tiers that are under way or just answered."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: dict[tuple[str, ChunkKey, ChunkKey], tuple[Future[int], float]] = {}
        self._waits = Waits()

    def forget(self) -> None:
        """Ask anew."""
        with self._lock:
            self._asked.clear()

    def ask(self, tier: SlowTier, keys: Sequence[ChunkKey], wait: float) -> int | None:
        """How many leading keys ``tier`` holds; ``None`` if it has not answered within ``wait`` seconds."""
        now = time.monotonic()
        question = (tier.name, keys[0], keys[-1])
        with self._lock:
            future, asked = self._asked.get(question, (None, 0.0))
            if future is not None and future.done() and now - asked > _ANSWER_SECONDS:
                future = None
            if future is None:
                if tier.breaker.resting:
                    return 0
                future, asked = tier.probe(keys), now
                self._asked[question] = (future, asked)
                while len(self._asked) > _MOST_PROBES:
                    self._asked.pop(next(iter(self._asked)))
        try:
            return self._waits.result(future, wait)
        except CancelledError:  # the store is closing
            return 0
        except FutureTimeoutError:
            early = Waits.MOST * tier.deadline if wait > 0 else 0.0  # a wait may have been cut short
            if time.monotonic() - asked < tier.deadline - early:
                return None
        with self._lock:
            self._asked.pop(question, None)
        tier.breaker.failure("lookup", f"no answer within {tier.deadline} s")
        return 0


class _Trip:
    """One load from one tier, in several batches: how long it takes as whoever asked for it sees it."""

    def __init__(self, tier: SlowTier, epoch: int) -> None:
        self.tier = tier
        self.epoch = epoch
        self.begun = time.monotonic()
        self._left = self._asked = self._size = 0

    def expects(self, size: int) -> None:
        """So many bytes will be asked for in one more batch; before any is."""
        self._left += 1
        self._asked += size

    def arrived(self, size: int) -> None:
        """A batch ended, of which so many bytes came; under the store's lock."""
        self._size += size
        self._left -= 1
        if not self._left:
            seconds = time.monotonic() - self.begun
            late = seconds > 0.9 * self.tier.deadline  # what did not come in time would have taken longer still
            self.tier.speed.add(self._asked if late else self._size, seconds)


class Loader:
    """Loads chunks from slow tiers into slots; a chunk that is being loaded is not loaded twice.

    Args:
        lock: the store's.
        allocate: up to n slots, sparing the given keys; called under the lock.
        held: which chunks of a match are in slots, and how many of its tokens they serve; called under the lock.
    """

    def __init__(
        self,
        lock: threading.RLock,
        ram: RamTier,
        tiers: Sequence[SlowTier],
        allocate: Callable[[int, Sequence[ChunkKey]], list[int]],
        held: Callable[[Match], tuple[list[Node], int]],
        emit: Emitter,
    ) -> None:
        self._lock = lock
        self._ram = ram
        self._tiers = {tier.name: tier for tier in tiers}
        self._allocate = allocate
        self._held = held
        self._emit = emit
        self._under_way: dict[ChunkKey, Future[None]] = {}
        self._epoch = 0
        self._waits = Waits()

    def forget(self) -> None:
        """Count what is under way for nothing: the store is being cleared. Under the lock."""
        self._epoch += 1

    @property
    def loading(self) -> int:
        """Chunks whose slots are being filled now."""
        return len(self._under_way)

    def load(self, match: Match) -> Future[int]:
        """See :meth:`lmkv.Store.prefetch`."""
        result: Future[int] = Future()
        with self._lock:
            wanted = self._wanted(match)
            others = {self._under_way[chunk.key] for _, chunk in wanted if chunk.key in self._under_way}
            mine = [(tier, chunk) for tier, chunk in wanted if chunk.key not in self._under_way]
            slots = self._allocate(len(mine), match.keys)
            batches = self._batches(mine, slots)
            waits = list(others)
            for _, batch in batches:
                done: Future[None] = Future()
                waits.append(done)
                for chunk in batch:
                    self._under_way[chunk.key] = done
            trips = {tier: _Trip(self._tiers[tier], self._epoch) for tier, _ in batches}
        for tier, batch in batches:
            trips[tier].expects(self._bytes(batch))
        for (tier, batch), done in zip(batches, waits[len(others) :], strict=True):
            self._start(trips[tier], batch, done)
        self._when_all(waits, lambda: result.set_result(self._count(match)))
        return result

    def load_and_wait(self, match: Match) -> None:
        """Load, waiting for at most the tiers' deadline."""
        names = [tier for tier, _ in match.runs] + ([match.tail.tier] if match.tail else [])
        tiers = [self._tiers[name] for name in set(names) if name in self._tiers]
        until = time.monotonic() + max((tier.deadline for tier in tiers), default=0.0)
        loading = self.load(match)
        try:
            self._waits.result(loading, max(0.0, until - time.monotonic()))
        except FutureTimeoutError:
            for tier in tiers:
                tier.breaker.failure("read", f"no answer within {tier.deadline} s")

    def _count(self, match: Match) -> int:
        with self._lock:
            return self._held(match)[1]

    def _wanted(self, match: Match) -> list[tuple[str, NewChunk]]:
        """The match's chunks that are not in RAM, with the tier that has them; no slots yet."""
        root, width = match.namespace.root, self._ram.layout.chunk_tokens
        found: list[tuple[str, NewChunk]] = []
        i = 0
        for tier, count in match.runs:
            for _ in range(count):
                key = match.keys[i]
                if tier in self._tiers and self._ram.index.get(key) is None:
                    parent = match.keys[i - 1] if i else root
                    found.append((tier, NewChunk(key, parent, root, match.pieces[i], i * width, -1)))
                i += 1
        tail = match.tail
        if tail and tail.tier in self._tiers and self._ram.index.get(tail.key) is None:
            parent = match.keys[i - 1] if i else root
            found.append((tail.tier, NewChunk(tail.key, parent, root, tail.piece, i * width, -1)))
        return found

    def _batches(self, wanted: Sequence[tuple[str, NewChunk]], slots: Sequence[int]) -> list[tuple[str, list[NewChunk]]]:
        """Chunks with slots, split so that all reading threads of a tier have work."""
        by_tier: dict[str, list[NewChunk]] = {}
        for (tier, chunk), slot in zip(wanted, slots, strict=False):
            chunk.slot = slot
            by_tier.setdefault(tier, []).append(chunk)
        batches: list[tuple[str, list[NewChunk]]] = []
        for tier, chunks in by_tier.items():
            size = self._tiers[tier].batch_size(len(chunks))
            batches.extend((tier, chunks[i : i + size]) for i in range(0, len(chunks), size))
        return batches

    def _start(self, trip: _Trip, batch: list[NewChunk], done: Future[None]) -> None:
        try:
            reading = trip.tier.read(batch)
        except StoreClosedError:  # the tier's threads are gone: the store is closing
            self._finish(trip, batch, [False] * len(batch), done)
            return

        def finish(read: Future[list[bool]]) -> None:
            there = [False] * len(batch) if read.cancelled() else read.result()
            self._finish(trip, batch, there, done)

        reading.add_done_callback(finish)

    def _finish(self, trip: _Trip, batch: list[NewChunk], there: list[bool], done: Future[None]) -> None:
        with self._lock:
            if trip.epoch != self._epoch:  # what was read may be from before the store was cleared
                there = [False] * len(batch)
            good = [chunk for chunk, ok in zip(batch, there, strict=True) if ok]
            for chunk in batch:
                del self._under_way[chunk.key]
            self._ram.pool.release([chunk.slot for chunk, ok in zip(batch, there, strict=True) if not ok])
            came = [node for node, _ in self._ram.commit(good)]
            for node in came:
                node.origin = trip.tier.name
            size = self._bytes(good)
            trip.arrived(size)
        if good:
            tokens = size // self._ram.layout.token_bytes
            seconds = time.monotonic() - trip.begun
            keys = tuple(node.key for node in came)
            self._emit("loaded", trip.tier.name, chunks=len(good), tokens=tokens, bytes=size, seconds=seconds, keys=keys)
        done.set_result(None)

    def _bytes(self, chunks: Sequence[NewChunk]) -> int:
        return sum(len(chunk.piece) for chunk in chunks) // TOKEN_BYTES * self._ram.layout.token_bytes

    @staticmethod
    def _when_all(waits: Sequence[Future[None]], then: Callable[[], None]) -> None:
        """Call ``then`` once, when all of ``waits`` are done; at once if there are none."""
        left = len(waits)
        lock = threading.Lock()

        def one_done(_: Future[None]) -> None:
            nonlocal left
            with lock:
                left -= 1
                last = left == 0
            if last:
                then()

        if not waits:
            then()
        for wait in waits:
            wait.add_done_callback(one_done)
