"""Finding a prompt's chunks in all tiers: as a prefix, up to a token, and anywhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Container, Iterator, Sequence
from typing import Any

import numpy as np

from .chunks import TOKEN_BYTES, ChunkKey, Namespace
from .handles import ContentHit, Match, Tail
from .index import Node
from .index.content import root_seed, window_fingerprints
from .loading import Probes
from .tiers import RamTier, SlowTier

__all__ = ["Finder", "take_origins"]


class Finder:
    """Asks tiers in their order. Takes the store's lock for RAM only, never while a slow tier is asked.

    Args:
        lock: the store's.
        ram, slow: its tiers.
    """

    def __init__(self, lock: threading.RLock, ram: RamTier, slow: Sequence[SlowTier]) -> None:
        self._lock = lock
        self._ram = ram
        self._slow = slow
        self._width = ram.layout.chunk_tokens
        self._probes = Probes()

    def match(self, namespace: Namespace, keys: Sequence[ChunkKey], pieces: Sequence[bytes], wait: float = 0.0) -> Match:
        """What the tiers hold of a prompt's chunks; remote tiers are waited for at most ``wait`` seconds in all."""
        runs: list[tuple[str, int]] = []
        full, pending, total = 0, False, len(keys)
        until = time.monotonic() + wait
        with self._lock:
            count = len(self._ram.index.walk(keys, pieces))
        if count:
            runs.append((self._ram.name, count))
            full = count
        while full < total:
            step = 0
            for tier in self._slow:
                if tier.local is not None:
                    step = tier.match_prefix(keys[full:], pieces[full:])
                else:
                    answer = self._probes.ask(tier, keys[full:], max(0.0, until - time.monotonic()))
                    pending = pending or answer is None
                    step = answer or 0
                if step:
                    runs.append((tier.name, step))
                    full += step
                    break
            if not step:
                break
            with self._lock:
                count = len(self._ram.index.walk(keys, pieces, full))
            if count:
                runs.append((self._ram.name, count))
                full += count
        tail = self._tail(namespace, keys, pieces, full) if full < total else None
        return Match(
            namespace,
            self._width,
            keys,
            pieces,
            runs,
            tail,
            pending=pending,
            again=lambda timeout: self.match(namespace, keys, pieces, timeout),
        )

    def _tail(self, namespace: Namespace, keys: Sequence[ChunkKey], pieces: Sequence[bytes], full: int) -> Tail | None:
        """The chunk that carries the hit on behind the last full match, up to a token."""
        parent = keys[full - 1] if full else namespace.root
        rest = pieces[full]
        best: Tail | None = None
        with self._lock:
            found = self._ram.index.best_child(parent, rest)
            if found is not None:
                node, shared = found
                best = Tail(node.key, node.tokens, shared, self._ram.name)
        for tier in self._slow:
            child = tier.best_child(parent, rest)
            if child is not None and (best is None or child[2] > best.shared):
                best = Tail(*child, tier.name)
        return best

    def forget(self) -> None:
        """Believe no answer of before: the store is being cleared."""
        self._probes.forget()

    def behind(self, root: ChunkKey, keys: Sequence[ChunkKey], pieces: Sequence[bytes]) -> int:
        """Leading chunks that every slow tier holds; 0 if one of them can't tell at once."""
        known = len(keys)
        for tier in self._slow:
            held = tier.match_prefix(keys[:known], pieces[:known])
            if held == known - 1:  # a longer chunk may begin with the tokens of a short last one
                child = tier.best_child(keys[held - 1] if held else root, pieces[held])
                held += child is not None and child[2] * TOKEN_BYTES == len(pieces[held])
            known = held
        return known

    def held(self, match: Match) -> tuple[list[Node], int]:
        """The match's chunks that are in slots, and how many tokens of the prompt they serve; at most what was promised.
        Under the lock."""
        full, width = match.full, self._width
        nodes = self._ram.index.walk(match.keys[:full], match.pieces[:full])
        hit = min(len(nodes) * width, match.total_tokens)
        if len(nodes) < len(match.pieces) and hit < match.hit_tokens:
            parent = match.keys[len(nodes) - 1] if nodes else match.namespace.root
            found = self._ram.index.best_child(parent, match.pieces[len(nodes)])
            if found is not None:
                nodes.append(found[0])
                hit = min(hit + found[1], match.hit_tokens)
        return nodes, hit

    def missing(
        self, root: ChunkKey, keys: Sequence[ChunkKey], pieces: Sequence[bytes], first: int, reserving: Container[ChunkKey]
    ) -> list[int]:
        """Numbers of the chunks from ``first`` on that are neither in RAM nor being filled. Under the lock."""
        index = self._ram.index
        wanted = [i for i in range(first, len(keys)) if index.get(keys[i]) is None and keys[i] not in reserving]
        last = len(keys) - 1
        if wanted and wanted[-1] == last and len(pieces[last]) < self._width * TOKEN_BYTES:
            found = index.best_child(keys[last - 1] if last else root, pieces[last])
            if found is not None and found[1] * TOKEN_BYTES == len(pieces[last]):
                wanted.pop()  # a longer chunk begins with these very tokens
        return wanted

    # -- looking up anywhere ---------------------------------------------------------------------------------------------

    def elsewhere(self, match: Match) -> Iterator[ContentHit]:
        """Stored chunks behind the prefix, leftmost first, none overlapping another."""
        width = self._width
        data = b"".join(match.pieces)
        begin = match.hit_tokens
        windows = window_fingerprints(np.frombuffer(data, "<u4")[begin:], width, root_seed(match.namespace.root))
        found: list[ContentHit] = []
        with self._lock:
            for offset, slots in self._ram.content.matches(windows):
                at = begin + offset
                if found and at < found[-1].start + found[-1].tokens:
                    continue
                found.extend(self._ram_content(data, at, slots, match.namespace.root))
        for tier in self._slow:
            self._disk_content(tier, data, begin, windows, match.namespace.root, found)
        found.sort(key=lambda hit: hit.start)
        yield from found

    def _ram_content(self, data: bytes, at: int, slots: Sequence[int], root: ChunkKey) -> list[ContentHit]:
        """The chunk in one of ``slots`` whose tokens stand at ``at``, and what follows both there and in its own text."""
        width = self._width
        for slot in slots:
            node = self._ram.node_in(slot)
            piece = data[at * TOKEN_BYTES : (at + width) * TOKEN_BYTES]
            if node is None or node.tokens != piece or not self._ram.has_root(slot, root):
                continue
            position = self._ram.start_of(slot)
            hits = [ContentHit(node.key, at, width, position, self._ram.name)]
            while True:
                at += width
                child = self._ram.index.best_child(node.key, data[at * TOKEN_BYTES : (at + width) * TOKEN_BYTES])
                if child is None:
                    return hits
                node, shared = child
                position += width
                hits.append(ContentHit(node.key, at, shared, position, self._ram.name))
                if shared < width:
                    return hits
        return []

    def _disk_content(
        self, tier: SlowTier, data: bytes, begin: int, windows: Any, root: ChunkKey, found: list[ContentHit]
    ) -> None:
        """Add what only ``tier`` holds, in the gaps between what was found already."""
        mirrored = tier.mirror()
        if mirrored is None:
            return
        mirror, lock = mirrored
        width = self._width
        taken = np.zeros(len(data) // TOKEN_BYTES, dtype=bool)
        for hit in found:
            taken[hit.start : hit.start + hit.tokens] = True
        with lock:
            candidates = [(begin + o, [mirror.key_of(n) for n in numbers]) for o, numbers in mirror.content.matches(windows)]
        for at, entries in candidates:
            if taken[at : at + width].any():
                continue
            piece = data[at * TOKEN_BYTES : (at + width) * TOKEN_BYTES]
            for entry in entries:
                if entry is None or entry[1] != root or tier.tokens_of(entry[0]) != piece:
                    continue
                key, shared, position = entry[0], width, entry[2]
                while shared:
                    found.append(ContentHit(key, at, shared, position, tier.name))
                    taken[at : at + shared] = True
                    at, position = at + shared, position + shared
                    rest = data[at * TOKEN_BYTES : (at + width) * TOKEN_BYTES]
                    child = tier.best_child(key, rest) if shared == width and not taken[at : at + 1].any() else None
                    key, shared = (child[0], child[2]) if child is not None else (key, 0)
                break


def take_origins(nodes: Sequence[Node], hit: int, width: int, ram: str) -> dict[str, int]:
    """Tokens of a lease by the tier that its chunks were loaded from; of a chunk's next lease, ``ram``. Under the store's lock.

    Args:
        hit: tokens in all; ``width`` in a chunk.
    """
    counts = {ram: hit}
    for i, node in enumerate(nodes):
        if node.origin:
            tokens = max(0, min(width, hit - i * width))
            counts[node.origin] = counts.get(node.origin, 0) + tokens
            counts[ram] -= tokens
            node.origin = ""
    return counts
