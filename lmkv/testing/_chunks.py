"""Chunks and whole records to feed a backend with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..chunks import TOKEN_BYTES, ChunkKey, Namespace, TokenChunker, shared_tokens, token_bytes
from ..layout import KVLayout
from ..record import payload_offset, seal

__all__ = ["Chunk", "best_shared", "covered", "siblings_of", "text_chunks"]


@dataclass(frozen=True)
class Chunk:
    """One chunk of a text.

    Args:
        key, parent, root: its names.
        tokens: little-endian uint32.
        start: position of the first token.
    """

    key: ChunkKey
    parent: ChunkKey
    root: ChunkKey
    tokens: bytes
    start: int

    def record(self, layout: KVLayout, version: int = 0) -> memoryview:
        """A whole record with a payload that only depends on key and version; read-only."""
        size = len(self.tokens) // TOKEN_BYTES * layout.token_bytes
        offset = payload_offset(layout.chunk_tokens)
        record = memoryview(bytearray(offset + size))
        seed = int.from_bytes(self.key[:8], "little")
        record[offset:] = np.random.default_rng([seed, version]).bytes(size)
        seal(
            record,
            key=self.key,
            parent=self.parent,
            root=self.root,
            layout=layout.fingerprint,
            start=self.start,
            tokens=self.tokens,
            offset=offset,
            payload_bytes=size,
        )
        return record.toreadonly()


def text_chunks(layout: KVLayout, tokens: object, salt: str = "") -> list[Chunk]:
    """The chunks of a text, in order."""
    namespace = Namespace.of(layout, model="suite", salt=salt)
    chunker = TokenChunker(namespace, layout.chunk_tokens)
    pieces = chunker.pieces(token_bytes(tokens))
    keys = chunker.chain(pieces)
    parents = [namespace.root, *keys]
    return [
        Chunk(key, parent, namespace.root, piece, i * layout.chunk_tokens)
        for i, (key, parent, piece) in enumerate(zip(keys, parents, pieces, strict=False))
    ]


def siblings_of(layout: KVLayout, pieces: Sequence[Sequence[int]], salt: str) -> list[Chunk]:
    """First chunks of texts of one namespace, each with other tokens."""
    found = {chunk.key: chunk for piece in pieces for chunk in text_chunks(layout, piece, salt)[:1]}
    return list(found.values())


def best_shared(held: Sequence[Chunk], parent: ChunkKey, tokens: bytes) -> int:
    """The slow answer to how many leading tokens the best child shares; 0 for none."""
    return max((shared_tokens(chunk.tokens, tokens) for chunk in held if chunk.parent == parent), default=0)


def covered(held: Sequence[Chunk], parent: ChunkKey, tokens: bytes) -> set[ChunkKey]:
    """The slow answer to which held chunks are a true beginning of ``tokens``."""
    return {
        chunk.key
        for chunk in held
        if chunk.parent == parent and len(chunk.tokens) < len(tokens) and tokens.startswith(chunk.tokens)
    }
