"""The store: the whole public verb list of LMKV.

Control is guarded by one lock and touches no KV; copies run outside it. Slow tiers are asked outside it too.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from .chunks import TOKEN_BYTES, ChunkKey, Namespace, TokenChunker, token_bytes
from .config import StoreConfig
from .errors import ArgumentError, ConfigError, StoreClosedError
from .events import Emitter, EventSink
from .eviction.priority import PRIORITIES
from .finding import Finder, take_origins
from .handles import Lease, Match, Reservation, Slot, Stats, slot_parts
from .index import Node
from .layout import KVLayout
from .loading import Loader
from .peers import PeerServer
from .processes import watch
from .tiers import NewChunk, RamTier, SlowTier, Write, open_tier
from .transfer import Pins, as_access, gather, scatter
from .worth import worthwhile

__all__ = ["Lease", "Match", "Reservation", "Slot", "Store"]


class Store:
    """KV by text: RAM first, slow tiers behind it.

    Safe to use from several threads. A context manager that closes on exit.

    Args:
        config: settings; see :class:`StoreConfig`.
        layout: what chunks' bytes are.
        on_event: called with every :class:`lmkv.Event`.

    Raises:
        ConfigError: settings that contradict each other or the layout, or a disk path that can't be used.
        LayoutMismatchError: the disk path holds chunks of another layout.
        CapacityError: a tier is smaller than one chunk.
    """

    def __init__(self, config: StoreConfig, layout: KVLayout, *, on_event: EventSink | None = None) -> None:
        if config.chunk_size is not None and config.chunk_size != layout.chunk_tokens:
            raise ConfigError(
                f"chunk_size: expected the layout's {layout.chunk_tokens} tokens; got {config.chunk_size}: "
                "leave it out or change one"
            )
        self.config = config
        self.layout = layout
        names = ("model", "revision", "rope", "lora", "shard", "salt", "key_hash")
        self.namespace = Namespace.of(layout, **{name: getattr(config, name) for name in names})
        self._emit = Emitter(on_event)
        self._lock = threading.RLock()
        self._closed = self._forked = False
        self._ram = RamTier(config, layout, self._emit)
        self._pins = Pins(self._ram.pool, self._emit, config.ram_pin)
        self._slow: list[SlowTier] = []
        try:
            view, emit = self._ram.pool.view, self._emit
            for settings in config.slow_tiers(layout.fingerprint.hex()):
                self._slow.append(open_tier(settings, config, layout, slot_view=view, release=self._unpin, emit=emit))
        except BaseException:
            for tier in self._slow:
                tier.close(None)
            self._ram.pool.close()
            raise
        self._reserving: set[ChunkKey] = set()
        self._reservations = self._epoch = 0
        self._leases: dict[int, Lease] = {}
        self._counts = {"lookups": 0, "lookup_tokens": 0, "hit_tokens": 0, "stored_tokens": 0}
        self._hits_by_tier: dict[str, int] = {}
        self._finder = Finder(self._lock, self._ram, self._slow)
        watch(self)
        self._loader = Loader(self._lock, self._ram, self._slow, self._allocate, self._finder.held, self._emit)
        self._peers: PeerServer | None = None
        if config.peer_listen:
            self._peers = PeerServer(config, layout, self._lock, self._ram, self._unpin)
        if any(tier.holds_something() for tier in self._slow):
            with self._lock:
                self._ram.prepare()

    # -- looking up ------------------------------------------------------------------------------------------------------

    def lookup(self, tokens: object, *, anywhere: bool = False, namespace: Namespace | None = None) -> Match:
        """What the tiers hold of a prompt. No side effects, and it never blocks: a remote tier is asked beside.

        Args:
            tokens: the prompt; see :func:`lmkv.chunks.token_bytes`.
            anywhere: also find stored chunks behind the prefix, at any token offset (``match.elsewhere``).
            namespace: instead of the store's own, for example with another ``salt`` or ``lora``.

        Raises:
            ArgumentError: wrong tokens, or a namespace of another layout.
            StoreClosedError: the store was closed.
        """
        self._open()
        chunker = self._chunker(namespace)
        pieces = chunker.pieces(token_bytes(tokens))
        match = self._finder.match(chunker.namespace, chunker.chain(pieces), pieces)
        if anywhere:
            match.elsewhere = tuple(self._finder.elsewhere(match))
        return match

    def _chunker(self, namespace: Namespace | None) -> TokenChunker:
        space = self.namespace if namespace is None else namespace
        if space.layout != self.layout.fingerprint:
            raise ArgumentError(
                f"expected a namespace of this store's layout {self.layout.fingerprint.hex()}; got {space.layout.hex()}: "
                "derive it with store.namespace.replace(...)"
            )
        return TokenChunker(space, self.layout.chunk_tokens)

    # -- loading and leasing ---------------------------------------------------------------------------------------------

    def prefetch(self, match: Match) -> Future[int]:
        """Bring the prefix's chunks from slow tiers into slots, beside the caller.

        Returns:
            A future of the number of leading tokens that are then in slots. It never raises: what does not come is a miss.

        Raises:
            StoreClosedError: the store was closed.
        """
        self._open()
        return self._loader.load(match)

    def worthwhile(self, match: Match, tokens_per_second: float) -> Match:
        """As much of a match as is loaded quicker than the caller computes it, by what its tiers took before.

        Args:
            tokens_per_second: how quick a prompt is computed; :class:`lmkv.PrefillSpeed` measures it.

        Raises:
            ArgumentError: no speed.
        """
        if not tokens_per_second > 0:
            raise ArgumentError(f"expected tokens_per_second above 0; got {tokens_per_second!r}")
        return worthwhile(match, {tier.name: tier.speed for tier in self._slow}, self.layout.token_bytes, tokens_per_second)

    def lease(self, match: Match) -> Lease:
        """Hold the prefix's chunks in their slots while they are copied out.

        May block: what is only in slow tiers is loaded first, for at most their deadline. The lease may hold fewer tokens than
        the match promised, never other ones; ``lease.hit_tokens`` says how many.

        Raises:
            StoreClosedError: the store was closed.
        """
        self._open()
        nodes, hit = self._pinned(match)
        if hit < match.hit_tokens and not self._ram.keeps and match.tier_of(len(nodes)) == self._ram.name:
            # it went from RAM since the lookup, so slow tiers have it by now
            self._unpin(nodes)
            nodes, hit = self._pinned(self._finder.match(match.namespace, match.keys, match.pieces))
            hit = min(hit, match.hit_tokens)
        with self._lock:
            self._open()
            if any(node.slot < 0 for node in nodes):  # the store was cleared meanwhile
                self._ram.let_go(nodes)
                nodes, hit = [], 0
            self._ram.touch(nodes)
            lease = Lease(nodes, hit, self.layout.chunk_tokens, self.config.lease_seconds, self._ram.payload, self._release)
            self._leases[id(lease)] = lease
            self._counts["lookups"] += 1
            self._counts["lookup_tokens"] += match.total_tokens
            self._counts["hit_tokens"] += hit
            for tier_name, tokens in take_origins(nodes, hit, self.layout.chunk_tokens, self._ram.name).items():
                self._hits_by_tier[tier_name] = self._hits_by_tier.get(tier_name, 0) + tokens
            self._offer_again(nodes, match.namespace.root)
        if nodes and self._slow:
            keys = [node.key for node in nodes]
            for tier in self._slow:
                tier.touch(keys)
        return lease

    def _offer_again(self, nodes: Sequence[Node], root: ChunkKey) -> None:
        """Have tiers write what they held back until its second use; under the lock."""
        for tier in self._slow:
            wanted = tier.held_back(nodes)
            for node in wanted:
                node.pins += 1
            if wanted:
                tier.offer_again([Write(node, self._ram.chunk_in(node, root)) for node in wanted])

    def _pinned(self, match: Match) -> tuple[list[Node], int]:
        """As :meth:`Finder.held`, once what slow tiers hold of the match was loaded; the nodes are pinned."""
        if any(tier != self._ram.name for tier, _ in match.runs) or (match.tail and match.tail.tier != self._ram.name):
            self._loader.load_and_wait(match)
        with self._lock:
            self._open()
            nodes, hit = self._finder.held(match)
            for node in nodes:
                node.pins += 1
            return nodes, hit

    def retrieve(self, lease: Lease, sink: Any, *, start: int = 0, stop: int | None = None) -> int:
        """Copy leased tokens into the caller's tensors.

        Args:
            lease: from :meth:`lease`.
            sink: a :class:`lmkv.transfer.KVAccess`, or what :class:`DenseKV` takes.
            start, stop: text positions; ``stop`` is the lease's ``hit_tokens`` by default, and at most that.

        Returns:
            Tokens copied; 0 if the lease was lost meanwhile: then the tensors' contents are undefined.

        Raises:
            LayoutMismatchError: the tensors do not have the layout; nothing was copied.
            ArgumentError: positions outside the tensors or the lease, or another store's lease; nothing was copied.
            StoreClosedError: the store was closed.
        """
        self._open()
        stop = lease.hit_tokens if stop is None else min(stop, lease.hit_tokens)
        if not 0 <= start <= lease.hit_tokens:
            raise ArgumentError(f"expected start from 0 to the lease's {lease.hit_tokens} tokens; got {start}")
        access = as_access(sink)
        if stop <= start:
            return 0
        access.check(self.layout, start, stop)
        with self._lock:
            if not lease.held:
                return 0
            if self._leases.get(id(lease)) is not lease:
                raise ArgumentError("expected a lease of this store; got another store's")
        self._pins.use(access.rows)
        scatter(access, slot_parts(lease.slots, start, stop), self.layout)
        with self._lock:  # a lease that lost its hold may have been overwritten under the copy
            return stop - start if lease.held else 0

    # -- storing ---------------------------------------------------------------------------------------------------------

    def reserve(self, tokens: object, *, start: int = 0, namespace: Namespace | None = None, priority: int = 0) -> Reservation:
        """Slots for those chunks of a text that are not in RAM and that nobody else is filling.

        Where RAM keeps nothing (``ram_cache: false``), leading chunks that all slow tiers hold are left out as well, as far as
        these can tell at once: a remote tier can't.

        Never blocks. When there is not room for all, the leading ones are served.

        Args:
            tokens: the whole text from its beginning, since keys name what comes before.
            start: the first token whose KV the caller has; chunks that begin before it are left out.
            namespace: as for :meth:`lookup`.
            priority: from 0 to 255; every tier evicts lower ones first. A chunk keeps the one that it was first stored with.

        Raises:
            ArgumentError: wrong tokens, ``start`` or ``priority``.
            StoreClosedError: the store was closed.
        """
        self._open()
        if not isinstance(priority, int) or priority not in PRIORITIES:
            raise ArgumentError(f"expected a priority from 0 to {PRIORITIES[-1]}; got {priority!r}")
        chunker = self._chunker(namespace)
        data = token_bytes(tokens)
        if not isinstance(start, int) or not 0 <= start <= len(data) // TOKEN_BYTES:
            raise ArgumentError(f"expected start from 0 to {len(data) // TOKEN_BYTES} tokens; got {start!r}")
        pieces = chunker.pieces(data)
        if not self.config.save_partial_chunk and len(pieces[-1]) < self.layout.chunk_tokens * TOKEN_BYTES:
            pieces.pop()
        keys = chunker.chain(pieces)
        root = chunker.namespace.root
        first = -(-start // self.layout.chunk_tokens)
        if not self._ram.keeps:
            first = max(first, self._finder.behind(root, keys, pieces))
        with self._lock:
            self._open()
            wanted = self._finder.missing(root, keys, pieces, first, self._reserving)
            slots = self._allocate(len(wanted), keys)
            width = self.layout.chunk_tokens
            chunks = [
                NewChunk(keys[i], keys[i - 1] if i else root, root, pieces[i], i * width, slot, priority)
                for i, slot in zip(wanted, slots, strict=False)
            ]
            self._reserving.update([chunk.key for chunk in chunks])
            self._reservations += 1
            return Reservation(chunks, self._ram.payload, self._commit, self._abort, self._lost, self._epoch)

    def _allocate(self, n: int, protected: Sequence[ChunkKey]) -> list[int]:
        """Up to ``n`` slots, making room; under the lock."""
        if not n:
            return []
        pool = self._ram.pool
        if pool.available < n:
            keep = set(protected)
            self._expire_leases()
            got = self._ram.make_room(n, keep)
            # what waits to be written holds its slots; a chunk goes only after those that extend it, so one round may not do
            while got < n and sum(tier.writer.drop_oldest(n - got, "their slots were needed") for tier in self._slow) > 0:
                got = self._ram.make_room(n, keep)
            n = got
        slots = pool.allocate(n) or []
        self._ram.prepare()
        return slots

    def _commit(self, reservation: Reservation) -> int:
        with self._lock:
            self._open()
            if not reservation.open:  # a commit or an abort on another thread came first
                raise ArgumentError("expected an open reservation; it was committed or aborted before")
            if reservation.epoch != self._epoch:  # the store was cleared meanwhile
                self._abort(reservation)
                return 0
            reservation.open = False
            self._reservations -= 1
            self._reserving.difference_update([chunk.key for chunk in reservation.chunks])
            done = self._ram.commit(reservation.chunks)
            tokens = sum(len(chunk.piece) for _, chunk in done) // TOKEN_BYTES
            self._counts["stored_tokens"] += tokens
            if self._slow:
                for node, _ in done:
                    node.pins += len(self._slow)
                writes = [Write(node, chunk) for node, chunk in done]
                for tier in self._slow:
                    tier.offer(writes)
        if done:
            self._emit("stored", self._ram.name, chunks=len(done), tokens=tokens, bytes=tokens * self.layout.token_bytes)
        return tokens

    def _abort(self, reservation: Reservation) -> None:
        with self._lock:
            if not reservation.open:
                return
            reservation.open = False
            if self._closed:
                return
            self._reservations -= 1
            self._reserving.difference_update([chunk.key for chunk in reservation.chunks])
            self._ram.pool.release([chunk.slot for chunk in reservation.chunks])

    def _lost(self, reservation: Reservation) -> None:
        self._abort(reservation)
        self._emit("reservation_lost", chunks=len(reservation.chunks))

    def store(
        self, tokens: object, source: Any, *, start: int = 0, namespace: Namespace | None = None, priority: int = 0
    ) -> int:
        """Keep a text's KV: reserve, copy out of the caller's tensors, commit.

        Args:
            tokens: the whole text from its beginning.
            source: a :class:`lmkv.transfer.KVAccess`, or what :class:`DenseKV` takes, with the KV from ``start`` on.
            start, namespace, priority: as for :meth:`reserve`.

        Returns:
            Tokens newly stored; chunks that are there already are skipped.

        Raises:
            LayoutMismatchError: the tensors do not have the layout; nothing was stored.
            ArgumentError: wrong tokens, or the tensors do not hold all of them; nothing was stored.
            StoreClosedError: the store was closed.
        """
        access = as_access(source)
        with self.reserve(tokens, start=start, namespace=namespace, priority=priority) as reservation:
            if not reservation.chunks:
                return 0
            slots = reservation.slots
            parts = slot_parts(slots, slots[0].start, slots[-1].start + slots[-1].tokens)
            access.check(self.layout, parts[0].start, parts[-1].stop)
            self._pins.use(access.rows)
            gather(access, parts, self.layout)
            return reservation.commit()

    # -- holds -----------------------------------------------------------------------------------------------------------

    def _unpin(self, nodes: Sequence[Node]) -> None:
        with self._lock:
            self._ram.let_go(nodes)

    def _release(self, lease: Lease) -> None:
        with self._lock:
            if self._leases.pop(id(lease), None) is None:
                return
            lease.held = False
            self._ram.let_go(lease.nodes)

    def _expire_leases(self) -> None:
        now = time.monotonic()
        for lease in [lease for lease in self._leases.values() if lease.until < now]:
            self._release(lease)
            self._emit("lease_expired", chunks=len(lease.nodes))

    # -- the rest --------------------------------------------------------------------------------------------------------

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until every committed chunk is in all slow tiers that take it, and durable where these can make it so.

        Returns:
            ``False`` if ``timeout`` seconds were not enough, a tier can't make it durable now, or chunks were given up
            (``write_dropped``) since a flush that was in time last told of that.

        Raises:
            StoreClosedError: the store was closed.
        """
        self._open()
        deadline = None if timeout is None else time.monotonic() + timeout
        done, told = True, [tier.given_up.told for tier in self._slow]
        for tier in self._slow:
            done = tier.flush(None if deadline is None else max(0.0, deadline - time.monotonic())) and done
        return done and False not in [tier.given_up.none_since(known) for tier, known in zip(self._slow, told, strict=True)]

    def clear(self) -> bool:
        """Drop every chunk of every tier; other processes on the same disk directory lose theirs too, peers do not.

        What is leased stays in place until its lease ends, but is found no more; reservations of before commit nothing. Returns
        ``False``, with an event, if a tier was not cleared: it gives nothing until it was, unless its storage has no way to
        drop everything (``lm://``, ``infinistore://``): what that holds is found again. Raises :class:`StoreClosedError`.
        """
        self._open()
        done = True
        for cleared in (False, True):  # again afterwards: what came from the tiers meanwhile
            with self._lock:
                self._open()
                self._loader.forget()
                self._finder.forget()
                self._epoch += not cleared
                for tier in () if cleared else self._slow:
                    tier.forget_waiting()
                self._ram.clear()
            for tier in () if cleared else self._slow:
                done = tier.clear() and done
        return done

    def stats(self) -> Stats:
        """Counts since the store was opened. Raises :class:`StoreClosedError`."""
        self._open()
        with self._lock:
            hits = dict(self._hits_by_tier)
            ram = self._ram.stats(hits.get(self._ram.name, 0))
            counts = dict(self._counts)
            leases, reservations = len(self._leases), self._reservations
        tiers = (ram, *(tier.stats(hits.get(tier.name, 0)) for tier in self._slow))
        return Stats(**counts, leases=leases, reservations=reservations, tiers=tiers)

    def pool_handle(self) -> Any:
        """How :class:`lmkv.pool.MappedPool` maps the slots. Raises :class:`ConfigError` without ``ram_shared``."""
        self._open()
        return self._ram.pool.handle()

    def close(self, timeout: float | None = 60.0) -> None:
        """Write what waits to the slow tiers, for at most ``timeout`` seconds, and release everything.

        Leases and reservations that are still open lose their hold. A second call does nothing.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._peers is not None:
            self._peers.close()
        for tier in self._slow:
            tier.close(timeout)
        with self._lock:
            for lease in list(self._leases.values()):
                self._release(lease)
        self._pins.close()
        self._ram.pool.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # a store whose opening failed
            if not self._closed and self._slow:
                self.close(5.0)

    def _left_behind(self) -> None:
        """In a forked process there are neither the store's threads nor its locks, but its slots, if they are shared."""
        self._closed = self._forked = True
        self._lock = threading.RLock()  # the other one may be held by a thread that is not here

    def _open(self) -> None:
        if self._forked:
            raise StoreClosedError("expected the process that opened the store; this one was forked from it: open another here")
        if self._closed:
            raise StoreClosedError("expected an open store; it was closed: open a new one")

    def _check(self) -> None:
        """Assert the invariants of all parts; for tests, while nothing is in flight elsewhere."""
        with self._lock:
            self._ram._check()
            held = len(self._ram.index) + self._ram.detached
            assert self._ram.pool.used == held + len(self._reserving) + self._loader.loading
            assert all(node.pins >= 0 for node in self._ram.index)
            held_nodes = (node for lease in self._leases.values() for node in lease.nodes if node.slot >= 0)
            assert all(self._ram.index.get(node.key) is node for node in held_nodes)
        for tier in self._slow:
            tier._check()
