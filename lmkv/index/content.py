"""Chunks by their own tokens: stored chunks are found wherever they stand in a prompt, without separators.

Every window of W tokens of the prompt (W = tokens of a full chunk) gets a rolling fingerprint

    f(t_0 … t_{W-1}) = ((sum of m(t_j) * B^(W-1-j)) mod 2^64 >> 4)  xor  seed,        m(t) = (t + 1) * A mod 2^64

(Karp and Rabin 1987, with multiplicative mixing of the tokens): all windows at once, one step each by ``native/scan.c``, or by
prefix sums over B^-j where there was no compiler. A counting filter screens them, a table finds the chunk, and the tokens
themselves prove the hit, so that a fingerprint can only cost time.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ContentIndex", "chunk_fingerprints", "root_seed", "window_fingerprints"]

_native: Any = None
with contextlib.suppress(ModuleNotFoundError):  # a source tree that was not installed: lmkv.transfer says so
    _native = importlib.import_module("lmkv._native")

#: Bits of a fingerprint; with four fewer than 64, and without the weakest, Python keeps one in 32 bytes.
_BITS = 60
_DROPPED = np.uint64(64 - _BITS)
_A = 0x9E3779B97F4A7C15  # 2^64 / golden ratio (Knuth's multiplicative hashing), odd
_B = 0xD1342543DE82EF95  # a multiplier of full period (Steele and Vigna 2021), odd and so invertible mod 2^64
_B_INVERSE = pow(_B, -1, 1 << 64)

U64 = npt.NDArray[np.uint64]


def root_seed(root: bytes) -> int:
    """The seed of a namespace, so that one namespace's chunks do not answer for another's."""
    return int.from_bytes(root[:8], "little") >> int(_DROPPED)


def _powers(base: int, n: int) -> U64:
    out: U64 = np.full(n, base, dtype=np.uint64)
    out[:1] = 1
    return np.multiply.accumulate(out, out=out) if n else out


def _mixed(tokens: npt.NDArray[np.uint32]) -> U64:
    mixed: U64 = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(_A)
    return mixed


def window_fingerprints(tokens: npt.NDArray[np.uint32], width: int, seed: int) -> U64:
    """Fingerprints of all ``len(tokens) - width + 1`` windows; empty if the text is shorter than one."""
    n = len(tokens)
    if n < width:
        return np.empty(0, dtype=np.uint64)
    if _native is None or _native.lib is None or not tokens.dtype.isnative:
        return _by_prefix_sums(tokens, width, seed)
    ffi, tokens, prints = _native.ffi, np.ascontiguousarray(tokens), np.empty(n - width + 1, dtype=np.uint64)
    source, target = ffi.cast("uint32_t *", tokens.ctypes.data), ffi.cast("uint64_t *", prints.ctypes.data)
    _native.lib.lmkv_windows(source, n, width, seed, target)
    return prints


def _by_prefix_sums(tokens: npt.NDArray[np.uint32], width: int, seed: int) -> U64:
    n = len(tokens)
    sums = np.zeros(n + 1, dtype=np.uint64)
    np.cumsum(_mixed(tokens) * _powers(_B_INVERSE, n), out=sums[1:])
    windows = sums[width:] - sums[:-width]
    shift = np.uint64(pow(_B, width - 1, 1 << 64))
    prints: U64 = ((windows * _powers(_B, n - width + 1) * shift) >> _DROPPED) ^ np.uint64(seed)
    return prints


@lru_cache(maxsize=16)
def _chunk_weights(width: int) -> tuple[U64, np.uint64]:
    """``f`` of one chunk as a weighted sum of its tokens plus a constant: m(t) is linear."""
    weights: U64 = _powers(_B, width)[::-1] * np.uint64(_A)
    return np.ascontiguousarray(weights), np.uint64(int(weights.sum(dtype=np.uint64)))


def chunk_fingerprints(tokens: npt.NDArray[np.uint32], width: int, seed: int) -> U64:
    """Fingerprints of consecutive full chunks; ``len(tokens)`` is a multiple of ``width``."""
    weights, constant = _chunk_weights(width)
    prints: U64 = ((tokens.astype(np.uint64).reshape(-1, width) @ weights + constant) >> _DROPPED) ^ np.uint64(seed)
    return prints


class ContentIndex:
    """Fingerprints of held full chunks. Not thread-safe by itself.

    Values are small whole numbers of the owner's choice, each in at most once (the RAM tier uses slot ids).
    """

    __slots__ = ("_bits", "_count", "_filter", "_table")

    def __init__(self) -> None:
        self._table: dict[int, int | set[int]] = {}
        self._count = 0
        self._bits = 12
        self._filter = np.zeros(1 << self._bits, dtype=np.uint8)

    def __len__(self) -> int:
        return self._count

    def _cells(self, prints: U64) -> npt.NDArray[np.int64]:
        cells: npt.NDArray[np.int64] = (prints >> np.uint64(_BITS - self._bits)).astype(np.int64)
        return cells

    def add(self, prints: U64, values: list[int]) -> None:
        """Hold ``values`` under their fingerprints."""
        table = self._table
        for fingerprint, value in zip(prints.tolist(), values, strict=True):
            held = table.get(fingerprint)
            if held is None:
                table[fingerprint] = value
            elif isinstance(held, set):
                held.add(value)
            else:
                table[fingerprint] = {held, value}
        self._count += len(values)
        if self._count * 4 > len(self._filter):
            self._resize()
        else:
            self._raise(prints)

    def discard(self, fingerprint: int, value: int) -> None:
        """Hold ``value`` no longer."""
        held = self._table.get(fingerprint)
        if isinstance(held, set) and value in held:
            held.remove(value)
            if len(held) == 1:
                self._table[fingerprint] = held.pop()
        elif held == value:
            del self._table[fingerprint]
        else:
            return
        self._count -= 1
        cell = fingerprint >> (_BITS - self._bits)
        if self._filter[cell] < 255:  # a full counter has forgotten how many it counts, so it stays
            self._filter[cell] -= 1

    def matches(self, windows: U64) -> Iterator[tuple[int, tuple[int, ...]]]:
        """``(offset, values)`` of every window whose fingerprint is held, in order of offset."""
        for offset in np.flatnonzero(self._filter[self._cells(windows)]).tolist():
            held = self._table.get(int(windows[offset]))
            if held is not None:
                yield offset, tuple(held) if isinstance(held, set) else (held,)

    def _raise(self, prints: U64) -> None:
        cells, counts = np.unique(self._cells(prints), return_counts=True)
        self._filter[cells] = np.minimum(self._filter[cells].astype(np.int64) + counts, 255).astype(np.uint8)

    def _resize(self) -> None:
        while self._count * 4 > (1 << self._bits):
            self._bits += 1
        self._filter = np.zeros(1 << self._bits, dtype=np.uint8)
        self._raise(self._prints())

    def _prints(self) -> U64:
        every = (f for f, held in self._table.items() for _ in (held if isinstance(held, set) else (held,)))
        return np.fromiter(every, dtype=np.uint64, count=self._count)

    def _check(self) -> None:
        prints = self._prints()
        cells, counts = np.unique(self._cells(prints), return_counts=True)
        assert np.all(self._filter[cells] >= np.minimum(counts, 255))
        assert all(len(held) > 1 for held in self._table.values() if isinstance(held, set))
