"""Which chunks are held, as chains: key to chunk, chunk to what it extends and what extends it.

Siblings (chunks that extend the same one) are kept sorted by their tokens. The sibling that shares the longest prefix with any
given tokens is then a neighbour of where those tokens would stand, so that a hit can end at a token inside a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any

from sortedcontainers import SortedKeyList

from ..chunks import TOKEN_BYTES, ChunkKey, shared_tokens
from ..errors import ArgumentError

__all__ = ["Node", "PrefixIndex"]

_tokens_of = attrgetter("tokens")


class Node:
    """One chunk of a chain. A chunk that is not held but extended by held ones stays as a place-holder, ``slot`` = -1.

    Attributes:
        key: its prefix key.
        parent: the node it extends; ``None`` for a root and for a place-holder.
        tokens: its tokens, little-endian uint32; empty for a place-holder.
        slot: where its KV is.
        pins: how many leases, loads and pending writes need it to stay.
        priority: of what is held; lower ones are evicted first.
        origin: the slow tier that it was loaded from, until its first lease; else empty.
        children: ``None``, the only child, or a sorted list of children; held ones only.
    """

    __slots__ = ("children", "key", "origin", "parent", "pins", "priority", "slot", "tokens")

    def __init__(self, key: ChunkKey) -> None:
        self.key = key
        self.parent: Node | None = None
        self.tokens = b""
        self.slot = -1
        self.pins = 0
        self.priority = 0
        self.origin = ""
        self.children: Any = None

    def iter_children(self) -> Iterator[Node]:
        """The held nodes that extend this one, in the order of their tokens."""
        if self.children is None:
            return iter(())
        return iter((self.children,) if isinstance(self.children, Node) else self.children)


class PrefixIndex:
    """Held chunks by key, with their chains. Not thread-safe by itself: the store's lock guards it."""

    __slots__ = ("_held", "_nodes")

    def __init__(self) -> None:
        self._nodes: dict[ChunkKey, Node] = {}
        self._held = 0

    def __len__(self) -> int:
        """Held chunks."""
        return self._held

    def __iter__(self) -> Iterator[Node]:
        """Held chunks, in no promised order."""
        return (node for node in self._nodes.values() if node.slot >= 0)

    def get(self, key: ChunkKey) -> Node | None:
        """The held chunk of that key."""
        node = self._nodes.get(key)
        return node if node is not None and node.slot >= 0 else None

    def walk(self, keys: Sequence[ChunkKey], pieces: Sequence[bytes], begin: int = 0) -> list[Node]:
        """The held chunks from ``begin`` on up to the first that is missing; a hit is proved by its tokens.

        Args:
            keys, pieces: prefix keys and token bytes of a text's chunks.
        """
        nodes = self._nodes
        found: list[Node] = []
        if begin:
            keys, pieces = keys[begin:], pieces[begin:]
        for key, piece in zip(keys, pieces):  # noqa: B905  equal lengths by construction; strict costs a tenth of the loop
            node = nodes.get(key)
            if node is None or node.tokens != piece:
                break
            found.append(node)
        return found

    def best_child(self, parent: ChunkKey, tokens: bytes) -> tuple[Node, int] | None:
        """The held chunk behind ``parent`` that shares the most leading tokens with ``tokens``, and how many (at least 1)."""
        node = self._nodes.get(parent)
        if node is None or node.children is None or not tokens:
            return None
        if isinstance(node.children, Node):
            near = (node.children,)
        else:
            at = node.children.bisect_key_left(tokens)
            near = tuple(node.children[max(0, at - 1) : at + 1])
        best = max(near, key=lambda child: shared_tokens(child.tokens, tokens))
        shared = shared_tokens(best.tokens, tokens)
        return (best, shared) if shared else None

    def covered_siblings(self, parent: ChunkKey, tokens: bytes) -> list[Node]:
        """Held chunks behind ``parent`` whose tokens begin ``tokens`` and are shorter: a longer chunk makes them redundant."""
        node = self._nodes.get(parent)
        if node is None or node.children is None:
            return []
        if isinstance(node.children, Node):
            near = [node.children]
        else:
            at = node.children.bisect_key_left(tokens)
            near = []
            while at > 0:
                child = node.children[at - 1]
                shared = shared_tokens(child.tokens, tokens) * TOKEN_BYTES
                if shared == len(child.tokens):
                    at -= 1
                    near.append(child)
                else:  # it parts from the tokens: what is left is at most as long as what they share
                    at = node.children.bisect_key_right(tokens[:shared])
        return [child for child in near if len(child.tokens) < len(tokens) and tokens.startswith(child.tokens)]

    def insert(self, key: ChunkKey, parent: ChunkKey, tokens: bytes, slot: int) -> Node:
        """Hold a chunk.

        Raises:
            ArgumentError: it is held already, or has no tokens or slot.
        """
        nodes = self._nodes
        if not tokens or slot < 0:
            raise ArgumentError(f"expected tokens and a slot; got {len(tokens)} bytes and slot {slot}")
        node = nodes.get(key)
        if node is None:
            node = nodes[key] = Node(key)
        elif node.slot >= 0:
            raise ArgumentError(f"expected a chunk that is not held; {key.hex()} is")
        above = nodes.get(parent)
        if above is None:
            above = nodes[parent] = Node(parent)
        node.parent = above
        node.tokens = tokens
        node.slot = slot
        children = above.children
        if children is None:
            above.children = node
        elif isinstance(children, Node):
            above.children = SortedKeyList((children, node), key=_tokens_of)
        else:
            children.add(node)
        self._held += 1
        return node

    def remove(self, node: Node) -> None:
        """Hold a chunk no longer. What extends it stays findable once it is held again."""
        above = node.parent
        if above is None or node.slot < 0:
            raise ArgumentError(f"expected a held chunk; {node.key.hex()} is not")
        if above.children is node:
            above.children = None
        else:
            above.children.remove(node)
            if len(above.children) == 1:
                above.children = above.children[0]
        node.parent = None
        node.tokens = b""
        node.slot = -1
        node.priority = 0
        node.origin = ""
        self._held -= 1
        for place in (node, above):
            if place.children is None and place.slot < 0:
                self._nodes.pop(place.key, None)

    def chain(self, node: Node) -> list[Node]:
        """The held chunks from the first one down to ``node``, as far as they hang together."""
        found = [node]
        while found[-1].parent is not None and found[-1].parent.slot >= 0:
            found.append(found[-1].parent)
        found.reverse()
        return found

    def parent_of(self, key: ChunkKey) -> ChunkKey | None:
        """See :class:`lmkv.eviction.base.ChainLinks`."""
        node = self._nodes.get(key)
        if node is None or node.parent is None or node.parent.slot < 0:
            return None
        return node.parent.key

    def children_count(self, key: ChunkKey) -> int:
        """See :class:`lmkv.eviction.base.ChainLinks`."""
        node = self._nodes.get(key)
        if node is None or node.children is None:
            return 0
        return 1 if isinstance(node.children, Node) else len(node.children)

    def _check(self) -> None:
        held = 0
        for key, node in self._nodes.items():
            assert node.key == key
            children = list(node.iter_children())
            assert all(child.parent is node and child.slot >= 0 for child in children)
            assert [c.tokens for c in children] == sorted({c.tokens for c in children})
            if not isinstance(node.children, Node) and node.children is not None:
                assert len(node.children) > 1
            if node.slot >= 0:
                held += 1
                assert node.tokens
                assert node.parent is not None
                assert self._nodes[node.parent.key] is node.parent
            else:
                assert not node.tokens
                assert node.parent is None
                assert node.pins == 0
                assert children, "a place-holder without children should be gone"
        assert held == self._held
