"""A slow tier: records in a backend, read into slots and written from them, behind a breaker.

What goes wrong in the backend ends here, as an event and a miss.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from ..backends.base import AsksEach, Backend, Bounded, Clearable, Creating, LocalIndex, ReadOnly, Syncing
from ..chunks import TOKEN_BYTES, ChunkKey
from ..config import StoreConfig, TierConfig
from ..errors import BackendError, CapacityError, ConfigError, CorruptRecordError
from ..events import Emitter
from ..eviction import make_policy
from ..index import Node
from ..layout import KVLayout
from .admission import SeenOnce, seen_size
from .breaker import Breaker
from .envelope import Envelope
from .mirror import Mirror
from .packing import Packer
from .probing import count_leading
from .ram import NewChunk
from .readers import Readers
from .speed import ReadSpeed
from .stats import TierStats
from .writer import Budget, GivenUp, WriteBehind

__all__ = ["SlowTier", "Write"]

Result = TypeVar("Result")

#: Records that are written together: enough bytes to share their syncs, few enough that RAM is not held up for long.
_WRITE_BATCH = (8, 32)
_WRITE_BYTES = 64 * 1024**2
#: Leases whose use is noted together.
_TOUCH_BATCH = 256


@dataclass(slots=True)
class Write:
    """A committed chunk on its way to slow tiers; its node is pinned until then. ``chunk`` = None asks to note uses."""

    node: Node | None
    chunk: NewChunk | None


class SlowTier:
    """One backend as a tier.

    Args:
        settings: the tier's part of the configuration.
        config: for what all slow tiers share.
        backend: opened already; the tier closes it.
        slot_view: slot id -> its whole memory.
        release: told of nodes that the tier needs no longer; takes the store's lock.
        envelope: what records are encrypted with; ``None`` for records in the clear.

    Raises:
        ConfigError: an unknown policy or codec.
        CapacityError: the capacity is below one chunk.
    """

    def __init__(
        self,
        settings: TierConfig,
        config: StoreConfig,
        layout: KVLayout,
        backend: Backend,
        *,
        slot_view: Callable[[int], memoryview],
        release: Callable[[Sequence[Node]], None],
        emit: Emitter,
        envelope: Envelope | None = None,
    ) -> None:
        self.name = settings.name
        self.deadline = settings.deadline_seconds
        self._capacity = settings.capacity
        self.layout = layout
        self.backend = backend
        self._create = backend.create_many if isinstance(backend, Creating) else backend.write_many
        self.local = backend if isinstance(backend, LocalIndex) else None
        self.evictions = self.read_chunks = self.written_chunks = 0
        self._moved = {"read": [0, 0.0], "write": [0, 0.0]}  # bytes, seconds
        self._failures = 0
        self.given_up = GivenUp()
        self._uncleared = False
        self._counting = threading.Lock()
        self._release = release
        self._emit = emit
        self._packer = Packer(layout, settings.codec, slot_view, envelope)
        self._bounded = backend if isinstance(backend, Bounded) else None
        self._mirror_lock = threading.Lock()
        self._mirror: Mirror | None = None
        if self._bounded is not None:
            smallest = self._bounded.cost(self._packer.offset + layout.chunk_bytes)
            if self._bounded.capacity < smallest:
                raise CapacityError(
                    f"tier {self.name}: expected a capacity that leaves room for a chunk of {smallest} bytes; "
                    f"got {settings.capacity} ({self._bounded.capacity} usable): raise it or use smaller chunks"
                )
            policy, limit = settings.policy, max(1, self._bounded.capacity // smallest)
            make_policy(policy, limit)  # an unknown name is the caller's error now, not the tier's later
            self._mirror = Mirror(self._bounded, lambda: make_policy(policy, limit), config.chain_aware)
        self.breaker = Breaker(
            self.name, config.breaker_failures, config.breaker_seconds, emit, first_seconds=config.breaker_seconds / 32
        )
        #: How long loads took, as whoever asked for them saw it.
        self.speed = ReadSpeed()
        self._threads = config.io_threads
        self._held_back = 0
        chunks = (self._bounded.capacity if self._bounded else settings.capacity) // (self._packer.offset + layout.chunk_bytes)
        self._seen = SeenOnce(seen_size(chunks)) if settings.admission == "second" else None
        self._readers = Readers(f"lmkv-{self.name}-read", config.io_threads)
        self._touches: list[list[ChunkKey]] = []
        batch = max(_WRITE_BATCH[0], min(_WRITE_BATCH[1], _WRITE_BYTES // layout.chunk_bytes))
        self._budget = Budget(settings.write_budget) if settings.write_budget else None
        pace = None if self._budget is None else self._budget.pause
        self.writer: WriteBehind[Write] = WriteBehind(
            f"lmkv-{self.name}-write", config.write_queue, batch, self._write, self._give_up, pace
        )

    def _guarded(self, operation: str, call: Callable[[], Result], otherwise: Result) -> Result:
        """``call()``, or ``otherwise`` and an event. Here failures of foreign code become misses."""
        if not self.breaker.allows():
            return otherwise
        begun = time.monotonic()
        try:
            result = call()
        except Exception as error:  # the tier boundary
            self._failures += 1
            self.breaker.failure(operation, f"{type(error).__name__}: {error}")
            return otherwise
        seconds = time.monotonic() - begun
        if operation in self._moved:
            with self._counting:
                self._moved[operation][1] += seconds
        if seconds > self.deadline and operation in ("lookup", "read"):  # too late for whoever asked
            self._failures += 1
            self.breaker.failure(operation, f"answered after {seconds:.3g} s; the deadline is {self.deadline} s")
        else:
            self.breaker.success()
        return result

    def holds_something(self) -> bool:
        """Whether loads are to be expected: a bounded tier that is not empty."""
        bounded = self._bounded
        return bounded is not None and self._guarded("stats", bounded.count, 0) > 0

    # -- looking up ------------------------------------------------------------------------------------------------------

    def match_prefix(self, keys: Sequence[ChunkKey], pieces: Sequence[bytes]) -> int:
        """Leading chunks that a local index holds; 0 for a tier without one."""
        local = self.local
        if local is None or not keys or not self._cleared():
            return 0
        return self._guarded("lookup", lambda: local.match_prefix(keys, pieces), 0)

    def best_child(self, parent: ChunkKey, tokens: bytes) -> tuple[ChunkKey, bytes, int] | None:
        """As :meth:`lmkv.backends.base.LocalIndex.best_child`."""
        local = self.local
        if local is None or not tokens or not self._cleared():
            return None
        return self._guarded("lookup", lambda: local.best_child(parent, tokens), None)

    def probe(self, keys: Sequence[ChunkKey]) -> Future[int]:
        """How many leading keys a tier without a local index holds, asked on a thread of the tier's."""

        def count() -> int:
            backend = self.backend
            at_once = backend.probe_concurrency if isinstance(backend, AsksEach) else None
            return count_leading(self.backend.contains_many, keys, at_once) if self._cleared() else 0

        return self._readers.submit(lambda: self._guarded("lookup", count, 0))

    def mirror(self) -> tuple[Mirror, threading.Lock] | None:
        """The mirror, caught up, with the lock to hold while using it; ``None`` where the backend lists nothing."""
        mirror = self._mirror
        if mirror is None or not self._cleared():
            return None

        def sync() -> bool:
            with self._mirror_lock:
                mirror.sync()
            return True

        return (mirror, self._mirror_lock) if self._guarded("lookup", sync, False) else None

    def tokens_of(self, key: ChunkKey) -> bytes | None:
        """The tokens of a record that a bounded tier holds."""
        bounded = self._bounded
        return self._guarded("lookup", lambda: bounded.tokens_of(key), None) if bounded else None

    # -- reading ---------------------------------------------------------------------------------------------------------

    def batch_size(self, chunks: int) -> int:
        """How many of ``chunks`` records one reading thread should take."""
        return max(1, min(8, -(-chunks // self._threads)))

    def read(self, chunks: Sequence[NewChunk]) -> Future[list[bool]]:
        """Fill the chunks' slots from their records, on a thread of the tier's; tells which are there and proved whole."""
        return self._readers.submit(lambda: self._guarded("read", lambda: self._read(chunks), [False] * len(chunks)))

    def _read(self, chunks: Sequence[NewChunk]) -> list[bool]:
        if not self._cleared():
            return [False] * len(chunks)
        buffers = [self._packer.room(chunk) for chunk in chunks]
        sizes = self.backend.read_many([chunk.key for chunk in chunks], buffers)
        done: list[bool] = []
        for chunk, buffer, size_read in zip(chunks, buffers, sizes, strict=True):
            if size_read is None:
                self._emit("load_failed", self.name, key=chunk.key.hex(), reason="it is not there any more")
                done.append(False)
                continue
            try:
                self._packer.unpack(chunk, buffer[:size_read])
                done.append(True)
            except (CorruptRecordError, ConfigError) as error:
                self._emit("corrupt", self.name, key=chunk.key.hex(), reason=str(error))
                self.delete([chunk.key])
                done.append(False)
        with self._counting:
            self.read_chunks += sum(done)
            self._moved["read"][0] += sum(size for size, good in zip(sizes, done, strict=True) if size and good)
        lost = {chunk.key: buffer for chunk, buffer, size_read in zip(chunks, buffers, sizes, strict=True) if size_read is None}
        if lost and not isinstance(self.backend, ReadOnly):
            self._drop_unreadable(lost)
        return done

    def _drop_unreadable(self, lost: dict[ChunkKey, memoryview]) -> None:
        """Remove what stands there though it can't be read, such as an encrypted record, larger than one in the clear: so
        that it is written anew. What was being replaced, or has come since, is there when it is read again, and stays."""
        with contextlib.suppress(BackendError):
            keys = [key for key, held in zip(lost, self.backend.contains_many(list(lost)), strict=True) if held]
            sizes = self.backend.read_many(keys, [lost[key] for key in keys]) if keys else []
            unreadable = [key for key, size_read in zip(keys, sizes, strict=True) if size_read is None]
            if unreadable:
                self.delete(unreadable)

    # -- writing ---------------------------------------------------------------------------------------------------------

    def offer(self, writes: Sequence[Write]) -> None:
        """Queue a text's chunks that were just committed, as far as they are admitted; never waits. Under the store's lock."""
        if isinstance(self.backend, ReadOnly):
            self._release([write.node for write in writes if write.node is not None])
            return
        if self._seen is not None:
            count = self._seen.admit([write.node.key for write in writes if write.node is not None])
            self._release([write.node for write in writes[count:] if write.node is not None])
            self._held_back += len(writes) - count
            writes = writes[:count]
        if writes:
            self.writer.put(writes)

    def held_back(self, nodes: Sequence[Node]) -> Sequence[Node]:
        """Those of a text's chunks, in use again, that were not written because they had been seen once only."""
        return () if self._seen is None else [node for node in nodes if node.key in self._seen]

    def offer_again(self, writes: Sequence[Write]) -> None:
        """Queue chunks that :meth:`held_back` named. Under the store's lock."""
        for write in writes:
            if self._seen is not None and write.node is not None:
                self._seen.discard(write.node.key)
        self.writer.put(writes)

    def touch(self, keys: list[ChunkKey]) -> None:
        """Note a use of a text's chunks, first to last; what a bounded tier keeps should not look unused there."""
        if self._bounded is None or not keys:
            return
        self._touches.append(keys)
        if len(self._touches) >= _TOUCH_BATCH:
            self.writer.put([Write(None, None)])

    def _give_up(self, writes: Sequence[Write], reason: str) -> None:
        chunks = [write.node for write in writes if write.node is not None]
        if chunks:
            self._release(chunks)
            self.given_up.add(len(chunks))
            self._emit("write_dropped", self.name, chunks=len(chunks), reason=reason)

    def _write(self, writes: list[Write]) -> None:
        chunks = [write.chunk for write in writes if write.chunk is not None]
        nodes = [write.node for write in writes if write.node is not None]
        try:
            kept = not self._uncleared or self._clear_now()
            self._note_touches()
            if chunks and not (kept and self._guarded("write", lambda: self._store(chunks), False)):
                self.given_up.add(len(chunks))
                self._emit("write_dropped", self.name, chunks=len(chunks), reason="the tier failed or has no room")
        finally:
            self._release(nodes)

    def _note_touches(self) -> None:
        bounded, touches = self._bounded, self._touches
        if bounded is None or not touches or self._mirror is None:
            return
        self._touches = []
        newest_first = self._mirror.policy.newest_first
        keys = [key for text in touches for key in (text if newest_first else reversed(text))]
        self._guarded("touch", lambda: bounded.touch_many(keys), None)

    def _store(self, chunks: list[NewChunk]) -> bool:
        there = self.backend.contains_many([chunk.key for chunk in chunks])
        missing = [chunk for chunk, held in zip(chunks, there, strict=True) if not held]
        if not missing:
            return True
        records = [self._packer.pack(chunk) for chunk in missing]
        newest_first = self._mirror is not None and self._mirror.policy.newest_first
        order = range(len(missing)) if newest_first else range(len(missing) - 1, -1, -1)
        stored = self._put([missing[i] for i in order], [records[i] for i in order])
        if stored:
            size = sum(map(len, records))
            if self._budget is not None:
                self._budget.spend(size)
            with self._counting:
                self.written_chunks += len(missing)
                self._moved["write"][0] += size
            tokens = sum(len(chunk.piece) for chunk in missing) // TOKEN_BYTES
            self._emit("stored", self.name, chunks=len(missing), tokens=tokens, bytes=size)
            self._drop_covered(missing)
        return stored

    def _put(self, chunks: list[NewChunk], records: list[memoryview], attempts: int = 16) -> bool:
        """Write, making room where the backend says there is none."""
        keys = [chunk.key for chunk in chunks]
        for attempt in range(attempts):
            try:
                self._create(keys, records)
                return True
            except CapacityError:
                if attempt > 1:  # room that was made may stay taken for as long as somebody reads there
                    time.sleep(min(0.002 * attempt, 0.02))
                if not self._evict_for(chunks, records):
                    break
        if len(chunks) == 1:
            return False
        half = len(chunks) // 2
        first = self._put(chunks[:half], records[:half], 4)
        return self._put(chunks[half:], records[half:], 4) and first

    def _evict_for(self, chunks: Sequence[NewChunk], records: Sequence[memoryview]) -> bool:
        """Delete what the policy names until the records should fit; ``False`` if there is no point in trying again."""
        bounded, mirror = self._bounded, self._mirror
        if bounded is None or mirror is None:
            return False
        incoming = sum(bounded.cost(len(record)) for record in records)
        if bounded.used_bytes() + incoming < bounded.capacity // 4:
            return False  # what it has free is not to be had, perhaps because somebody hangs in a read: keep the rest
        # a backend that is full before its quota is reached has its free space in pieces: free as much as comes
        excess = max(bounded.used_bytes() + incoming - bounded.capacity, min(incoming, bounded.used_bytes()))
        protected = {key for chunk in chunks for key in (chunk.key, chunk.parent)}
        target = bounded.used_bytes() - excess
        evicted, blocked = 0, False
        with self._mirror_lock:
            mirror.sync()
            while bounded.used_bytes() > target:
                victims = mirror.victims(len(records), protected)
                if not victims:
                    break
                try:
                    self.backend.delete_many(victims)
                except CapacityError:  # so full that it can't even note a deletion: no longer than somebody reads there
                    blocked = True
                    break
                for key in victims:
                    mirror.remove(key)
                evicted += len(victims)
        if evicted:
            self.evictions += evicted
            self._emit("evicted", self.name, chunks=evicted)
        return evicted > 0 or blocked or bounded.used_bytes() <= target  # another process may have made the room

    def _drop_covered(self, chunks: Sequence[NewChunk]) -> None:
        """Delete short chunks that longer ones just written make redundant."""
        if self.local is None:
            return
        covered = [key for chunk in chunks for key in self.local.covered_siblings(chunk.parent, chunk.piece)]
        if covered:
            self.delete(covered)

    def delete(self, keys: Sequence[ChunkKey]) -> None:
        """Remove records."""
        self.backend.delete_many(keys)
        if self._mirror is not None:
            with self._mirror_lock:
                for key in keys:
                    self._mirror.remove(key)

    # -- the rest --------------------------------------------------------------------------------------------------------

    def flush(self, timeout: float | None) -> bool:
        """Wait until nothing waits to be written, and make durable what is in the backend; whether both was done in time."""
        if self._touches:
            self.writer.put([Write(None, None)])
        done = self.writer.flush(timeout)
        backend = self.backend
        if not isinstance(backend, Syncing):
            return done

        def sync() -> bool:
            backend.sync()
            return True

        return self._guarded("sync", sync, False) and done

    def forget_waiting(self) -> None:
        """Give up what waits to be written, for a clear: no flush has to tell of that."""
        self.writer.drop_oldest(len(self.writer), "the store was cleared")
        self.given_up.forgive()

    def clear(self) -> bool:
        """Drop everything, within the deadline; until that is done nothing is found here. Whether it was done."""
        if isinstance(self.backend, Clearable):
            self._uncleared = True
            self.writer.put([Write(None, None)])  # done where writes are done, so that none under way comes later
        elif not isinstance(self.backend, ReadOnly):
            reason = "the storage has no way to drop everything: what it holds is found again"
            self._emit("tier_failed", self.name, operation="clear", reason=reason)
            return False
        self.writer.flush(self.deadline)
        return not self._uncleared

    def _cleared(self) -> bool:
        """Whether nothing is here any more from before it was to be cleared; sees to that, beside the caller, if not."""
        if self._uncleared and not len(self.writer):
            self.writer.put([Write(None, None)])
        return not self._uncleared

    def _clear_now(self) -> bool:
        backend = self.backend
        assert isinstance(backend, Clearable)

        def clear() -> bool:
            backend.clear()
            if self._mirror is not None:
                with self._mirror_lock:
                    self._mirror.reset()
            return True

        done = self._guarded("clear", clear, False)
        self._uncleared = not done
        return done

    def close(self, timeout: float | None) -> bool:
        """Write what waits, for at most ``timeout`` seconds, and close the backend."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self.flush(timeout)  # what can't be made durable is lost; the backend is closed all the same
        done = self.writer.close(None if deadline is None else max(0.0, deadline - time.monotonic()))
        ended = self._readers.close(None if deadline is None else max(0.0, deadline - time.monotonic()))
        if done and ended:  # a backend that somebody still hangs in can't be closed safely
            try:
                self.backend.close()
            except Exception as error:  # the tier boundary
                self._emit("tier_failed", self.name, operation="close", reason=f"{type(error).__name__}: {error}")
        return done and ended

    def stats(self, hit_tokens: int) -> TierStats:
        """Counts since the tier was opened, ``hit_tokens`` as the store counted them."""
        bounded = self._bounded
        used, chunks = self._guarded("stats", lambda: (bounded.used_bytes(), bounded.count()), (0, -1)) if bounded else (0, -1)
        return TierStats(
            self.name,
            bounded.capacity if bounded else self._capacity,
            used,
            chunks,
            hit_tokens=hit_tokens,
            read_chunks=self.read_chunks,
            written_chunks=self.written_chunks,
            evictions=self.evictions,
            waiting_writes=len(self.writer),
            enabled=not self.breaker.open,
            read_bytes=int(self._moved["read"][0]),
            written_bytes=int(self._moved["write"][0]),
            read_seconds=self._moved["read"][1],
            written_seconds=self._moved["write"][1],
            failures=self._failures,
            dropped_writes=self.given_up.count,
            held_back=self._held_back,
        )

    def _check(self) -> None:
        if self._seen is not None:
            self._seen._check()
        if self._mirror is not None:
            with self._mirror_lock:
                self._mirror.sync()
                self._mirror._check()
