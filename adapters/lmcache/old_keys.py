"""Names under which LMCache kept a text's chunks, computed from the text's tokens.

A chunk's number follows from its tokens and the number of the chunk before:

    h_i = H((h_{i-1}, tokens of chunk i, None))     0.3.4 to 0.3.15; (h_{i-1}, tokens) in 0.3.3; () for None from 0.4 on
    h_i = sha256(h_{i-1} in hex + tokens as uint32) 0.3.0 to 0.3.2

with H = ``pre_caching_hash_algorithm``: Python's ``hash``, or what vLLM has under that name. h_{-1} is 0 without vLLM (or with
an old one) and follows from ``PYTHONHASHSEED`` with it; a vLLM without a seed begins with random bytes, and such names can't be
computed. ``hash(None)`` is an address before Python 3.12, so neither can those of ``builtin`` under an older Python.
Source: ``lmcache/v1/token_database.py`` and ``lmcache/utils.py`` of these versions, ``vllm/utils/hashing.py`` and
``vllm/v1/core/kv_cache_utils.py``.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lmkv.errors import ConfigError

__all__ = ["ALGORITHMS", "HASH_OF_NONE", "Chain", "KeyForm", "chains"]

#: ``hash(None)`` from Python 3.12 on.
HASH_OF_NONE = 0xFCA86420
#: What vLLM seeds cryptographic hashes with where ``PYTHONHASHSEED`` is not set, as of 0.32; before it took
#: random bytes.
_SEED_OF_VLLM = "vllm-none-hash"
ALGORITHMS = ("builtin", "sha256", "sha256_cbor", "sha256_cbor_64bit", "xxhash", "xxhash_cbor")

Number = int | bytes | str


@dataclass(frozen=True)
class KeyForm:
    """How some versions of LMCache name chunks.

    Args:
        versions: which, for people.
        engine: whether a name begins with the engine (``vllm@…``).
        dtype: whether it ends with the element type (``…@half``).
        base: format of a number, ``x`` or ``d``.
        tail: what follows the tokens in the tuple that is hashed; ``None`` for a chain of plain sha256.
    """

    versions: str
    engine: bool
    dtype: bool
    base: str
    tail: tuple[object, ...] | None

    def name(self, engine: str, model: str, world_size: int, worker: int, number: Number, dtype: str) -> str:
        """A chunk's key, as Redis and the disk know it but for what they append."""
        shown = number if isinstance(number, str) else number.hex() if isinstance(number, bytes) else f"{number:{self.base}}"
        words = [engine] * self.engine + [model, str(world_size), str(worker), shown] + [dtype] * self.dtype
        return "@".join(words)


FORMS = (
    KeyForm("0.3.13 to 0.3.15", False, True, "x", (None,)),
    KeyForm("0.3.9 to 0.3.12", True, True, "x", (None,)),
    KeyForm("0.3.6 and 0.3.7", True, False, "x", (None,)),
    KeyForm("0.3.4 and 0.3.5", True, False, "d", (None,)),
    KeyForm("0.3.3", True, False, "d", ()),
    KeyForm("0.3.0 to 0.3.2", True, False, "x", None),
    KeyForm("0.4 and later", False, True, "x", ((),)),
)


@dataclass(frozen=True)
class Chain:
    """One way in which a text's chunks may have been numbered and named.

    Args:
        form: of the names.
        engine: at the beginning of a name, where there is one.
        step: from the tuple that is hashed to the number.
        first: the number before the first chunk's.
    """

    form: KeyForm
    engine: str
    step: Callable[[Any], Number]
    first: Number

    def numbers(self, pieces: Sequence[tuple[int, ...]]) -> Iterator[Number]:
        """The numbers of a text's chunks, given their tokens, from its beginning."""
        before = self.first
        for piece in pieces:
            if self.form.tail is None:
                before = hashlib.sha256(str(before).encode() + array("I", piece).tobytes()).hexdigest()
            else:
                before = self.step((before, piece, *self.form.tail))
            yield before


def _cbor(value: object) -> bytes:
    """Canonical CBOR (RFC 8949) of what is hashed: tuples, numbers from 0 to 2^64-1, bytes, text and None."""
    if value is None:
        return b"\xf6"
    if isinstance(value, (int, tuple)):
        kind, size = (0, value) if isinstance(value, int) else (4, len(value))
    else:
        kind, size = (2, len(value)) if isinstance(value, bytes) else (3, len(str(value).encode()))
    if size < 24:
        head = bytes([kind << 5 | size])
    else:
        bits = next(bits for bits in (8, 16, 32, 64) if size < 1 << bits)
        head = bytes([kind << 5 | 23 + bits.bit_length() - 3]) + size.to_bytes(bits // 8, "big")
    if isinstance(value, tuple):
        return head + b"".join(map(_cbor, value))
    return head if isinstance(value, int) else head + (value if isinstance(value, bytes) else str(value).encode())


def _pickled(value: object) -> bytes:
    return pickle.dumps(value, protocol=5)


def _xxh3(data: bytes) -> bytes:
    import xxhash

    return xxhash.xxh3_128_digest(data)


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


#: What vLLM and LMCache, by version, made of a digest: bytes; a number of all of it, of its end, of its beginning.
_MADE_OF_DIGESTS: dict[str, Callable[[bytes], Number]] = {
    "bytes": bytes,
    "all": lambda digest: int.from_bytes(digest, "big"),
    "low": lambda digest: int.from_bytes(digest[-8:], "big"),
    "high": lambda digest: int.from_bytes(digest[:8], "big"),
}


def _steps(algorithm: str, hash_of_none: int) -> list[tuple[str, Callable[[Any], Number]]]:
    """What ``H`` may have been, with the kind of number that it makes."""
    if algorithm == "builtin":

        def builtin(parts: Any) -> Number:
            # a number that is its own hash stands for None, so that any Python computes what 3.12 and later do
            return hash(tuple(hash_of_none if part is None else part for part in parts))

        return [("hash", builtin)]
    write = _cbor if "cbor" in algorithm else _pickled
    digest = _xxh3 if algorithm.startswith("xxhash") else _sha256
    kinds = ("bytes", "low", "high") if "cbor" in algorithm else ("bytes", "all", "high")

    def step_of(kind: str) -> Callable[[Any], Number]:
        return lambda parts: _MADE_OF_DIGESTS[kind](digest(write(parts)))

    return [(kind, step_of(kind)) for kind in kinds]


def _hash_of_text(seed: str) -> int:
    """``hash(seed)`` in a Python of 3.11 or later that was started with ``PYTHONHASHSEED=seed``."""
    code = f"import sys; print(sys.hash_info.algorithm, hash({seed!r}))"
    env = {**os.environ, "PYTHONHASHSEED": seed}
    out = subprocess.run([sys.executable, "-S", "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    algorithm, number = out.split()
    if algorithm != "siphash13":
        raise ConfigError(
            f"expected a Python that hashes text with siphash13, as LMCache's did; this one has {algorithm}: use 3.11 or later"
        )
    return int(number)


def _firsts(algorithm: str, kind: str, step: Callable[[Any], Number], seed: str) -> list[Number]:
    """What may stand before the first chunk."""
    found: list[Number] = [0]
    if not seed:
        return [*found, step(_SEED_OF_VLLM)] if algorithm.startswith("sha256") else found
    found.append(_hash_of_text(seed) if algorithm == "builtin" else step(seed))
    if kind != "bytes":  # vLLM 0.9 had one number for all algorithms
        found.append(_MADE_OF_DIGESTS["all"](_sha256(_pickled(seed))))
    return list(dict.fromkeys(found))


def chains(algorithm: str, seed: str, engines: Sequence[str], hash_of_none: int = HASH_OF_NONE) -> list[Chain]:
    """All ways in which LMCache may have numbered and named chunks, by what is known of its settings.

    Args:
        algorithm: its ``pre_caching_hash_algorithm``.
        seed: the ``PYTHONHASHSEED`` of its process; empty for none.
        engines: at the beginning of names, where there is one: ``vllm``, ``sgl``.
        hash_of_none: ``hash(None)`` of its process.

    Raises:
        ConfigError: an unknown algorithm, or a seed that Python would not take.
    """
    if algorithm not in ALGORITHMS:
        raise ConfigError(f"hash algorithm: expected one of {', '.join(ALGORITHMS)}; got {algorithm!r}")
    if seed and (not re.fullmatch(r"[0-9]{1,10}", seed) or int(seed) > 2**32 - 1):
        raise ConfigError(f"hash seed: expected PYTHONHASHSEED as LMCache's process had it, 0 to 4294967295; got {seed!r}")
    # LMCache took Python's hash where it did not find the one that was asked for, for example without vLLM
    ways = [
        (step, first)
        for name in dict.fromkeys((algorithm, "builtin"))
        for kind, step in _steps(name, hash_of_none)
        for first in _firsts(name, kind, step, seed)
    ]
    found: list[Chain] = []
    for form in FORMS:
        for engine in engines if form.engine else ("",):
            plain = form.tail is None
            found += [Chain(form, engine, step, "" if plain else first) for step, first in (ways[:1] if plain else ways)]
    return found
