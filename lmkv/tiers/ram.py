"""The RAM tier: slots, what is in them, and who goes when room is needed. Not thread-safe: the store's lock guards it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from array import array
from collections.abc import Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..chunks import TOKEN_BYTES, ChunkKey
from ..config import StoreConfig
from ..errors import CapacityError
from ..events import Emitter
from ..eviction import make_policy
from ..eviction.base import EvictionPolicy
from ..eviction.priority import ByPriority
from ..index import ContentIndex, Node, PrefixIndex
from ..index.content import chunk_fingerprints, root_seed
from ..layout import KVLayout
from ..pool import HostPool
from ..record import payload_offset
from .stats import TierStats

__all__ = ["NewChunk", "RamTier"]


#: Extents that are made ready at once, and seconds by which more of them are put off.
_MANY, _HEAD_START = 4, 0.1


@dataclass(slots=True)
class NewChunk:
    """A chunk on its way into the RAM tier: its slot is taken, nobody sees it yet.

    Args:
        key, parent, root: of the chunk, of what it extends, of its namespace.
        piece: its tokens, little-endian uint32.
        start: position of its first token.
        slot: where its KV goes.
        priority: lower ones are evicted first.
    """

    key: ChunkKey
    parent: ChunkKey
    root: ChunkKey
    piece: bytes
    start: int
    slot: int
    priority: int = 0


class _Unavailable:
    """Keys that must not be evicted now: pinned ones, and those of the text that room is made for."""

    __slots__ = ("_index", "_protected")

    def __init__(self, index: PrefixIndex, protected: Container[ChunkKey]) -> None:
        self._index = index
        self._protected = protected

    def __contains__(self, key: object) -> bool:
        node = self._index.get(key)  # type: ignore[arg-type]  # policies ask with the keys they were given
        return node is None or node.pins > 0 or key in self._protected


class RamTier:
    """Chunks in slots of host memory.

    Raises:
        CapacityError: the capacity is below one chunk.
    """

    name = "ram"

    def __init__(self, config: StoreConfig, layout: KVLayout, emit: Emitter) -> None:
        self.layout = layout
        self._full_bytes = layout.chunk_tokens * TOKEN_BYTES
        self.payload_offset = payload_offset(layout.chunk_tokens)
        slot_bytes = self.payload_offset + layout.chunk_bytes
        slot_bytes = -(-slot_bytes // 4096) * 4096
        slots = config.ram_capacity // slot_bytes
        if slots < 1:
            raise CapacityError(
                f"ram_capacity: expected at least one chunk of {slot_bytes} bytes ({layout.chunk_tokens} tokens); "
                f"got {config.ram_capacity}: raise it or use smaller chunks"
            )
        self.pool = HostPool(
            slot_bytes,
            slots,
            extent_bytes=config.ram_extent,
            shared=config.ram_shared,
            huge_pages=config.ram_huge_pages,
            numa_node=None if config.ram_numa_node in (None, "auto") else int(config.ram_numa_node),
        )
        self.index = PrefixIndex()
        self.content = ContentIndex()
        links = self.index if config.chain_aware else None
        self.policy: EvictionPolicy = ByPriority(lambda: make_policy(config.ram_policy, slots), self._priority_of, links)
        self.evictions = 0
        #: Whether chunks stay here once nobody holds them.
        self.keeps = config.ram_cache
        self._ahead = min(config.ram_ahead, slots * self.pool.slot_bytes)
        self._preparing = False
        self._nodes: list[Node | None] = []  # by slot
        self._fingerprints = array("Q")  # by slot; of full chunks
        self._starts = array("I")  # by slot: position of the chunk's first token in its text
        self._roots = array("I")  # by slot: number of the root of the chunk's namespace
        self._root_numbers: dict[ChunkKey, int] = {}
        self._detached: dict[int, int] = {}  # by id of a pinned node that is found no more: its slot
        self._emit = emit

    def _priority_of(self, key: ChunkKey) -> int:
        node = self.index.get(key)
        return 0 if node is None else node.priority

    @property
    def detached(self) -> int:
        """Slots of pinned chunks that were cleared."""
        return len(self._detached)

    def payload(self, slot: int, tokens: int) -> memoryview:
        """The payload of a chunk of ``tokens`` tokens in a slot."""
        begin = self.payload_offset
        return self.pool.view(slot)[begin : begin + tokens * self.layout.token_bytes]

    def prepare(self) -> None:
        """Have free slots made ready on a thread of their own, if there are few."""
        if self._preparing or self.pool.free_bytes >= self._ahead:
            return
        with contextlib.suppress(CapacityError):  # no memory to spare: whoever needs the slots will hear of it
            grown = self.pool.grow_ahead(self._ahead)
            if grown:
                self._preparing = True
                threading.Thread(target=self._touch, args=(grown,), name="lmkv-prepare", daemon=True).start()

    def _touch(self, extents: range) -> None:
        if len(extents) > _MANY:  # whoever needs slots right now should not have to share the memory with all this
            time.sleep(_HEAD_START)
        threads = max(1, min(8, (os.cpu_count() or 2) // 2, len(extents)))  # fresh pages come at about 1 GB/s a thread
        with (
            contextlib.suppress(RuntimeError),  # no threads any more: the interpreter is going down
            ThreadPoolExecutor(threads, thread_name_prefix="lmkv-prepare") as pool,
        ):
            list(pool.map(self.pool.touch, extents))
        self._preparing = False

    def make_room(self, n: int, protected: Container[ChunkKey]) -> int:
        """Evict until ``n`` slots can be allocated, or as many as can be; returns how many that is."""
        missing = n - self.pool.available
        unavailable = _Unavailable(self.index, protected)
        ask = missing
        while missing > 0 and ask > 0:
            victims = self.policy.victims(ask, unavailable)
            if victims is None:
                ask //= 2
                continue
            for key in victims:
                node = self.index.get(key)
                assert node is not None, "a policy named a key that is not held"
                self.drop(node)
            self.evictions += len(victims)
            self._emit("evicted", self.name, chunks=len(victims), keys=tuple(victims))
            missing -= len(victims)
            ask = min(ask, missing)
        return n - max(0, missing)

    def let_go(self, nodes: Sequence[Node]) -> None:
        """Take one pin off each chunk. One without pins goes at once where RAM keeps nothing, or was cleared meanwhile."""
        gone: list[ChunkKey] = []
        for node in nodes:
            node.pins -= 1
            if node.pins:
                continue
            if node.slot < 0:
                self.pool.release((self._detached.pop(id(node)),))
            elif not self.keeps:
                self.drop(node)
                gone.append(node.key)
        self._tell_gone(gone)

    def _tell_gone(self, keys: Sequence[ChunkKey]) -> None:
        if keys:
            self._emit("let_go", self.name, chunks=len(keys), keys=tuple(keys))

    def drop(self, node: Node) -> None:
        """Hold a chunk no longer and free its slot. Its pins must be gone."""
        slot = node.slot
        self._forget(node)
        self.pool.release((slot,))

    def _forget(self, node: Node) -> None:
        slot = node.slot
        if len(node.tokens) == self._full_bytes:
            self.content.discard(self._fingerprints[slot], slot)
        self.policy.remove(node.key)
        self.index.remove(node)
        self._nodes[slot] = None

    def commit(self, chunks: Sequence[NewChunk]) -> list[tuple[Node, NewChunk]]:
        """Make filled slots visible. A chunk that came in by another way meanwhile gives its slot back and is left out."""
        done: list[tuple[Node, NewChunk]] = []
        index = self.index
        for chunk in chunks:
            if index.get(chunk.key) is not None:
                self.pool.release((chunk.slot,))
                continue
            done.append((index.insert(chunk.key, chunk.parent, chunk.piece, chunk.slot), chunk))
        self._grow_tables()
        self._forget_roots()
        nodes, numbers = self._nodes, self._root_numbers
        for node, chunk in done:
            nodes[chunk.slot] = node
            node.priority = chunk.priority
            self._starts[chunk.slot] = chunk.start
            self._roots[chunk.slot] = numbers.setdefault(chunk.root, len(numbers))
        insert = self.policy.insert
        for node, _ in done if self.policy.newest_first else reversed(done):
            insert(node.key)
        self._index_content([chunk for _, chunk in done])
        gone: list[ChunkKey] = []
        for node, chunk in done:
            if node.parent is None or isinstance(node.parent.children, Node):
                continue  # an only child makes nobody redundant
            for sibling in index.covered_siblings(chunk.parent, chunk.piece):
                if sibling.pins == 0 and sibling.children is None:
                    self.drop(sibling)
                    gone.append(sibling.key)
        self._tell_gone(gone)
        return done

    def touch(self, nodes: Sequence[Node]) -> None:
        """Count one use of a text's chunks, given first to last."""
        touch = self.policy.touch
        for node in nodes if self.policy.newest_first else reversed(nodes):
            touch(node.key)

    def node_in(self, slot: int) -> Node | None:
        """The chunk in a slot."""
        return self._nodes[slot] if slot < len(self._nodes) else None

    def chunk_in(self, node: Node, root: ChunkKey) -> NewChunk:
        """A held chunk of the namespace of that root, as it came in."""
        assert node.parent is not None
        return NewChunk(node.key, node.parent.key, root, node.tokens, self._starts[node.slot], node.slot, node.priority)

    def start_of(self, slot: int) -> int:
        """Where the chunk in a slot begins in its text."""
        return self._starts[slot]

    def root_of(self, slot: int) -> ChunkKey | None:
        """The root of the namespace that the chunk in a slot belongs to."""
        return next((root for root, number in self._root_numbers.items() if number == self._roots[slot]), None)

    def has_root(self, slot: int, root: ChunkKey) -> bool:
        """Whether the chunk in a slot belongs to the namespace of that root."""
        return self._roots[slot] == self._root_numbers.get(root, -1)

    def stats(self, hit_tokens: int) -> TierStats:
        """Counts since the tier was opened, ``hit_tokens`` as the store counted them."""
        pool = self.pool
        return TierStats(
            self.name,
            pool.slots * pool.slot_bytes,
            pool.used * pool.slot_bytes,
            len(self.index),
            hit_tokens=hit_tokens,
            evictions=self.evictions,
        )

    def clear(self) -> int:
        """Drop every chunk, extensions first; returns how many are pinned: their slots are freed when their pins are gone."""
        left = list(self.index)
        while left:
            node = left.pop()
            if node.slot < 0:  # it went as an extension of another
                continue
            if node.children is not None:
                left.append(node)
                left.extend(node.iter_children())
            elif node.pins:
                self._detached[id(node)] = node.slot
                self._forget(node)
            else:
                self.drop(node)
        return len(self._detached)

    def _grow_tables(self) -> None:
        missing = len(self.pool._used) - len(self._nodes)
        if missing > 0:
            self._nodes.extend([None] * missing)
            self._fingerprints.extend([0] * missing)
            self._starts.extend([0] * missing)
            self._roots.extend([0] * missing)

    def _forget_roots(self) -> None:
        """Number the namespaces anew once most numbers belong to chunks that are gone."""
        if len(self._root_numbers) <= 2 * len(self.index) + 1024:
            return
        names = {number: root for root, number in self._root_numbers.items()}
        self._root_numbers = {}
        for slot, node in enumerate(self._nodes):
            if node is not None:
                root = names[self._roots[slot]]
                self._roots[slot] = self._root_numbers.setdefault(root, len(self._root_numbers))

    def _index_content(self, chunks: Iterable[NewChunk]) -> None:
        by_root: dict[ChunkKey, list[NewChunk]] = {}
        for chunk in chunks:
            if len(chunk.piece) == self._full_bytes:
                by_root.setdefault(chunk.root, []).append(chunk)
        for root, full in by_root.items():
            tokens = np.frombuffer(b"".join(chunk.piece for chunk in full), "<u4")
            prints = chunk_fingerprints(tokens, self.layout.chunk_tokens, root_seed(root))
            for chunk, fingerprint in zip(full, prints.tolist(), strict=True):
                self._fingerprints[chunk.slot] = fingerprint
            self.content.add(prints, [chunk.slot for chunk in full])

    def _check(self) -> None:
        self.pool._check()
        self.index._check()
        self.content._check()
        self.policy._check()
        held = {node.slot: node for node in self.index}
        assert len(held) == len(self.index) == len(self.policy)
        assert all(node.key in self.policy for node in self.index)
        assert {slot: node for slot, node in enumerate(self._nodes) if node is not None} == held
        assert all(self.pool._used[slot] for slot in (*held, *self._detached.values()))
        assert not held.keys() & self._detached.values()
        assert len(self.content) == sum(1 for node in self.index if len(node.tokens) == self._full_bytes)
