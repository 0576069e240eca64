"""What the bytes of one chunk are.

A chunk's payload holds its layer groups one after the other. One group is a dense C-order array

    [layers, kv, heads, tokens, head_size]      ``kv`` = 2 (K then V), or 1 for an MLA latent (then ``heads`` = 1)

where ``tokens`` is the chunk's own number of tokens (a short last chunk is stored compactly). Heads come before tokens so
that one head of one layer is one contiguous run, whatever the engine's own order is; ``docs/format.md`` says more.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .errors import LayoutMismatchError

__all__ = ["DTYPES", "KVLayout", "LayerGroup"]

#: Element types and their size in bytes. The core moves bytes: a type is a size and a name that enters every key.
DTYPES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint8": 1,
    "int8": 1,
}

_DTYPE_ALIASES = {
    "double": "float64",
    "float": "float32",
    "fp32": "float32",
    "half": "float16",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp8_e4m3fn": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}

_SPEC_GROUP = re.compile(r"\(\s*(\d+(?:\s*,\s*\d+)*)\s*\)\s*:\s*([A-Za-z0-9_.]+)\s*:\s*(\d+)")


def dtype_name(dtype: object) -> str:
    """The layout's name of a dtype given as a name, a torch dtype or a numpy dtype.

    Raises:
        LayoutMismatchError: the type is not one a KV cache is kept in.
    """
    name = str(dtype).removeprefix("torch.")
    name = _DTYPE_ALIASES.get(name, name)
    if name not in DTYPES:
        raise LayoutMismatchError(f"expected a dtype out of {', '.join(DTYPES)}; got {dtype!r}: name one of these")
    return name


@dataclass(frozen=True)
class LayerGroup:
    """Layers that share one shape.

    Args:
        layers: how many.
        kv: 2 for keys and values, 1 for one latent vector a token (MLA).
        heads: KV heads a layer on this shard; 1 for MLA.
        head_size: elements a head and token.
        dtype: a name out of :data:`DTYPES`.
    """

    layers: int
    kv: int
    heads: int
    head_size: int
    dtype: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        for name in ("layers", "heads", "head_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise LayoutMismatchError(f"expected {name} to be a whole number of at least 1; got {value!r}")
        if self.kv not in (1, 2):
            raise LayoutMismatchError(f"expected kv to be 2 (K and V) or 1 (MLA latent); got {self.kv!r}")
        if self.kv == 1 and self.heads != 1:
            raise LayoutMismatchError(f"expected heads = 1 where kv = 1 (MLA latent); got heads = {self.heads}")

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return DTYPES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers of the group."""
        return self.layers * self.kv * self.heads * self.head_size * self.itemsize


@dataclass(frozen=True)
class KVLayout:
    """The shape of a chunk: layer groups and the number of tokens in a full chunk.

    Two stores understand each other's records only if their layouts' fingerprints are equal.
    """

    groups: tuple[LayerGroup, ...]
    chunk_tokens: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        if not self.groups:
            raise LayoutMismatchError("expected at least one LayerGroup; got none")
        n = self.chunk_tokens
        if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= 65536:
            raise LayoutMismatchError(f"expected chunk_tokens between 1 and 65536; got {n!r}")

    @classmethod
    def dense(
        cls, *, layers: int, heads: int, head_size: int, dtype: object, chunk_tokens: int = 256, mla: bool = False
    ) -> KVLayout:
        """A layout of one group, as nearly all models have it. With ``mla``, ``head_size`` is the latent's size."""
        group = LayerGroup(layers, 1 if mla else 2, 1 if mla else heads, head_size, dtype_name(dtype))
        return cls((group,), chunk_tokens)

    @classmethod
    def parse(cls, spec: str) -> KVLayout:
        """Read ``(kv,layers,tokens,heads,head_size):dtype:layers`` groups joined by ``;``, as LMCache writes them.

        ``(layers,kv,…)`` is understood too where the layer count behind the dtype tells them apart. All groups name the
        same number of tokens, which becomes ``chunk_tokens``.

        Raises:
            LayoutMismatchError: the text is not of that form.
        """
        form = "'(kv,layers,tokens,heads,head_size):dtype:layers', for example '(2,2,256,4,16):float16:2'"
        groups: list[LayerGroup] = []
        tokens: set[int] = set()
        for part in spec.strip().strip(";").split(";"):
            found = _SPEC_GROUP.fullmatch(part.strip())
            if not found:
                raise LayoutMismatchError(f"expected groups of the form {form}; got {part!r}")
            dims = [int(d) for d in found[1].split(",")]
            count = int(found[3])
            if len(dims) != 5:
                raise LayoutMismatchError(f"expected five numbers, {form}; got {len(dims)} in {part!r}")
            if dims[0] in (1, 2) and dims[1] == count:
                kv = dims[0]
            elif dims[1] in (1, 2) and dims[0] == count:
                kv = dims[1]
            else:
                raise LayoutMismatchError(f"expected {form} whose layer counts agree; got {part!r}")
            groups.append(LayerGroup(count, kv, dims[3], dims[4], found[2]))
            tokens.add(dims[2])
        if len(tokens) != 1:
            raise LayoutMismatchError(f"expected one number of tokens in all groups; got {sorted(tokens)}")
        return cls(tuple(groups), tokens.pop())

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of KV a token, over all groups."""
        return sum(group.token_bytes for group in self.groups)

    @cached_property
    def chunk_bytes(self) -> int:
        """Bytes of the payload of a full chunk."""
        return self.token_bytes * self.chunk_tokens

    @cached_property
    def describe(self) -> str:
        """The text whose hash is the fingerprint; a person can read it in error messages."""
        groups = ";".join(f"{g.layers}x{g.kv}x{g.heads}x{g.head_size}:{g.dtype}" for g in self.groups)
        return f"lmkv-layout/1 tokens={self.chunk_tokens} groups={groups}"

    @cached_property
    def fingerprint(self) -> bytes:
        """16 bytes that two layouts share exactly when their chunks' bytes mean the same."""
        return hashlib.sha256(self.describe.encode()).digest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; :meth:`from_dict` reads it back."""
        names = ("layers", "kv", "heads", "head_size", "dtype")
        return {
            "chunk_tokens": self.chunk_tokens,
            "groups": [{name: getattr(group, name) for name in names} for group in self.groups],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KVLayout:
        """The layout that :meth:`to_dict` described.

        Raises:
            LayoutMismatchError: a field is missing, unknown or out of range.
        """
        try:
            return cls(tuple(LayerGroup(**group) for group in data["groups"]), data["chunk_tokens"])
        except (KeyError, TypeError) as error:
            raise LayoutMismatchError(f"expected the fields that KVLayout.to_dict() writes; got {data!r}") from error
