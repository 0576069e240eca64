"""Names of chunks: tokens in, 16-byte keys out.

    root  = sha256("lmkv-namespace/1" + every setting, each with its length)[:16]
    key_0 = H(root  + tokens of chunk 0)[:16]
    key_i = H(key_{i-1} + tokens of chunk i)[:16]          prefix keys: key i names everything up to chunk i
    ckey  = H(content_root + tokens)[:16]                  content keys: the chunk's own tokens only

with tokens as little-endian uint32 and H = sha256, or xxh3-128 by config. ``docs/format.md`` holds test vectors. A key names
everything that changes the bytes of the KV, so equal keys mean equal bytes in every process and on every machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NewType

from .errors import ArgumentError
from .layout import KVLayout

__all__ = ["ChunkKey", "Namespace", "TokenChunker", "shared_tokens", "token_bytes"]

ChunkKey = NewType("ChunkKey", bytes)

#: Bytes of a key.
KEY_BYTES = 16
#: Bytes of a token id: little-endian uint32.
TOKEN_BYTES = 4
MAX_TOKEN = 2**32 - 1

_NAMESPACE_VERSION = b"lmkv-namespace/1"


def _range_error(low: int, high: int) -> ArgumentError:
    bad = low if low < 0 else high
    return ArgumentError(f"expected token ids from 0 to {MAX_TOKEN}; got {bad}")


def token_bytes(tokens: object) -> bytes:
    """Token ids as little-endian uint32, four bytes each.

    Args:
        tokens: a one-dimensional numpy array, torch tensor or ``array``, or any sequence of whole numbers. Arrays of uint32
            are the fastest (no conversion).

    Raises:
        ArgumentError: no tokens, more than one dimension, not whole numbers, or an id outside 0 … 2^32-1.
    """
    if isinstance(tokens, (str, bytes, bytearray)):
        raise ArgumentError(f"expected token ids; got {type(tokens).__name__}: run the tokenizer first")
    if isinstance(tokens, (list, tuple)):
        data = _sequence_bytes(tokens)
    elif hasattr(tokens, "__array__") or isinstance(tokens, (array, memoryview)):
        data = _array_bytes(tokens)
    elif isinstance(tokens, Sequence):
        data = _sequence_bytes(list(tokens))
    else:
        raise ArgumentError(f"expected a sequence or array of token ids; got {type(tokens).__name__}")
    if not data:
        raise ArgumentError("expected at least one token; got an empty text")
    return data


def _sequence_bytes(tokens: Sequence[Any]) -> bytes:
    try:
        packed = array("I", tokens)
    except (OverflowError, TypeError):
        for token in tokens:
            if isinstance(token, bool) or not hasattr(token, "__index__"):
                raise ArgumentError(f"expected whole numbers as token ids; got {token!r}") from None
        raise _range_error(min(map(int, tokens)), max(map(int, tokens))) from None
    if packed.itemsize != TOKEN_BYTES:  # no platform that CPython runs on today
        packed = array("L", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _array_bytes(tokens: Any) -> bytes:
    import numpy as np

    if hasattr(tokens, "detach"):  # a torch tensor, perhaps on a device
        tokens = tokens.detach().cpu().numpy()
    ids = np.asarray(tokens)
    if ids.ndim != 1:
        raise ArgumentError(f"expected one dimension of token ids; got shape {ids.shape}")
    if ids.dtype.kind not in "iu":
        raise ArgumentError(f"expected whole numbers as token ids; got an array of {ids.dtype}")
    if ids.size and ids.dtype != np.uint32:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high > MAX_TOKEN:
            raise _range_error(low, high)
    return ids.astype("<u4", copy=False).tobytes()


def shared_tokens(a: bytes, b: bytes) -> int:
    """How many leading tokens two token byte strings share."""
    n = min(len(a), len(b))
    a, b = a[:n], b[:n]
    if a == b:
        return n // TOKEN_BYTES
    differing = int.from_bytes(a, "little") ^ int.from_bytes(b, "little")
    lowest_bit = (differing & -differing).bit_length() - 1
    return lowest_bit // (8 * TOKEN_BYTES)


@dataclass(frozen=True)
class Namespace:
    """Everything besides the tokens that the bytes of a chunk depend on. Any difference changes every key.

    Args:
        layout: fingerprint of the layout, 16 bytes; it covers shape, dtype and chunk size.
        model, revision, rope, lora, shard, salt: as in :class:`lmkv.StoreConfig`.
        extra: anything else that changes the KV, for example hashes of a prompt's images.
        key_hash: ``sha256`` or ``xxh3``.
    """

    layout: bytes
    model: str = ""
    revision: str = ""
    rope: str = ""
    lora: str = ""
    shard: str = ""
    salt: str = ""
    extra: str = ""
    key_hash: str = "sha256"

    def __post_init__(self) -> None:
        if self.key_hash not in ("sha256", "xxh3"):
            raise ArgumentError(f"expected key_hash sha256 or xxh3; got {self.key_hash!r}")
        for field in dataclasses.fields(self):
            wanted = bytes if field.name == "layout" else str
            value = getattr(self, field.name)
            if not isinstance(value, wanted):
                raise ArgumentError(f"expected namespace {field.name} as {wanted.__name__}; got {value!r}")
            try:
                value if isinstance(value, bytes) else value.encode()
            except UnicodeEncodeError:
                raise ArgumentError(f"expected namespace {field.name} as a text that has a UTF-8 form; got {value!r}") from None

    @classmethod
    def of(cls, layout: KVLayout, **settings: str) -> Namespace:
        """The namespace of a layout and settings."""
        return cls(layout.fingerprint, **settings)

    def replace(self, **changes: str) -> Namespace:
        """The same but for ``changes``, for example ``namespace.replace(salt="tenant-7")``."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def _root(self, purpose: bytes) -> bytes:
        h = hashlib.sha256(_NAMESPACE_VERSION + b"\0" + purpose)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            data = value if isinstance(value, bytes) else value.encode()
            name = field.name.encode()
            h.update(len(name).to_bytes(4, "little") + name + len(data).to_bytes(4, "little") + data)
        return h.digest()[:KEY_BYTES]

    @cached_property
    def root(self) -> ChunkKey:
        """The parent of every first chunk."""
        return ChunkKey(self._root(b"prefix"))

    @cached_property
    def content_root(self) -> bytes:
        """What content keys start from."""
        return self._root(b"content")

    @cached_property
    def hasher(self) -> Callable[[bytes], bytes]:
        """``H``: bytes to at least 16 bytes."""
        if self.key_hash == "sha256":
            sha256 = hashlib.sha256
            return lambda data: sha256(data).digest()
        import xxhash

        return xxhash.xxh3_128_digest


class TokenChunker:
    """Cuts texts into chunks and names them.

    Args:
        namespace: what the keys are valid for.
        chunk_tokens: tokens a full chunk.
    """

    __slots__ = ("_step", "chunk_tokens", "namespace")

    def __init__(self, namespace: Namespace, chunk_tokens: int) -> None:
        if chunk_tokens < 1:
            raise ArgumentError(f"expected chunk_tokens of at least 1; got {chunk_tokens}")
        self.namespace = namespace
        self.chunk_tokens = chunk_tokens
        self._step = chunk_tokens * TOKEN_BYTES

    def prefix_keys(self, tokens: object) -> list[ChunkKey]:
        """Keys of a text's chunks, the last of which may be short; key i names everything up to and with chunk i.

        Raises:
            ArgumentError: as :func:`token_bytes`.
        """
        return self.chain(self.pieces(token_bytes(tokens)))

    def content_keys(self, tokens: object) -> list[ChunkKey]:
        """Keys of the same chunks by their own tokens alone, wherever they stand.

        Raises:
            ArgumentError: as :func:`token_bytes`.
        """
        root, hasher = self.namespace.content_root, self.namespace.hasher
        return [ChunkKey(hasher(root + piece)[:KEY_BYTES]) for piece in self.pieces(token_bytes(tokens))]

    def pieces(self, data: bytes) -> list[bytes]:
        """Token bytes cut at chunk borders."""
        step = self._step
        return [data[i : i + step] for i in range(0, len(data), step)]

    def chain(self, pieces: Sequence[bytes], parent: ChunkKey | None = None) -> list[ChunkKey]:
        """Prefix keys of consecutive pieces behind ``parent`` (the namespace's root by default)."""
        key: bytes = self.namespace.root if parent is None else parent
        keys: list[Any] = []
        if self.namespace.key_hash == "sha256":  # spelled out: one call less a chunk, 512 chunks a long prompt
            sha256 = hashlib.sha256
            for piece in pieces:
                key = sha256(key + piece).digest()[:16]
                keys.append(key)
            return keys
        hasher = self.namespace.hasher
        for piece in pieces:
            key = hasher(key + piece)[:16]
            keys.append(key)
        return keys
