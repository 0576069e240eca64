"""Whether the pages of an LMDB file hang together, before LMDB follows them.

LMDB trusts its pages: a flipped bit in one ends the process, at an assertion or a bad address. So at opening all pages that a
transaction can reach are checked here, many at a time: each is what it says it is, its nodes lie within it, its children are
pages of the file, and no page has two uses, in the trees or in the list of free ones. The layout of pages is that of LMDB 0.9
(``MDB_page``, ``MDB_node``, ``MDB_db``, ``MDB_meta`` in its ``mdb.c``) on little-endian machines of 64 bits.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["PagesDamagedError", "check_pages"]

_PAGE = 4096
_HEADER = 16
_NODE = 8
_BRANCH, _LEAF, _OVERFLOW, _FIXED = 0x01, 0x02, 0x04, 0x20
_KINDS = _BRANCH | _LEAF | _OVERFLOW | 0x08 | _FIXED | 0x40
_BIG, _TREE, _DUPLICATES = 0x01, 0x02, 0x04
_NO_PAGE = 2**64 - 1
_MAGIC = 0xBEEFC0DE
#: size of fixed items, flags, depth, pages of three kinds, entries, root
_DB = struct.Struct("<IHHQQQQQ")
_META = struct.Struct("<II8xQ48s48sQQ")
_DEEPEST = 32

Numbers = npt.NDArray[np.int64]


class PagesDamagedError(ValueError):
    """The file can't be trusted; the message says which page."""


@dataclass
class _Nodes:
    """Nodes of several leaf or branch pages: their page, where they lie in the file, and their fields."""

    at: Numbers
    low: Numbers
    flags: Numbers
    key_size: Numbers


class _Pages:
    """The file's bytes, and what each page is used for.

    Args:
        data: a read-only map of the file.
        last: the last page in use.
    """

    def __init__(self, data: Any, last: int) -> None:
        self._bytes = np.frombuffer(data, np.uint8, (last + 1) * _PAGE)
        self._halves = self._bytes.view("<u2")
        self._used = np.zeros(last + 1, bool)
        self._used[:2] = True

    def close(self) -> None:
        """Let go of the map."""
        del self._bytes, self._halves

    def bytes_at(self, at: int, size: int) -> bytes:
        """Some bytes of the file."""
        if at + size > len(self._bytes):
            raise PagesDamagedError(f"expected {size} bytes at {at}; the file ends before")
        return self._bytes[at : at + size].tobytes()

    def half(self, at: Numbers) -> Numbers:
        """16-bit numbers at even places."""
        return self._halves[at // 2].astype(np.int64)

    def use(self, pages: Numbers) -> None:
        """Note a use of each page."""
        if len(pages) and (pages.min() < 2 or pages.max() >= len(self._used)):
            raise PagesDamagedError(f"expected pages from 2 to {len(self._used) - 1}; got {pages.min()} and {pages.max()}")
        if len(np.unique(pages)) < len(pages) or self._used[pages].any():
            raise PagesDamagedError("a page has two uses")
        self._used[pages] = True

    def kinds(self, pages: Numbers) -> Numbers:
        """Flags of pages that say that they are these very ones."""
        at = pages * _PAGE
        own = self.half(at) | self.half(at + 2) << 16 | self.half(at + 4) << 32 | self.half(at + 6) << 48
        if (own != pages).any():
            raise PagesDamagedError(f"page {pages[own != pages][0]} says that it is another")
        return self.half(at + 10) & _KINDS

    def nodes(self, pages: Numbers) -> _Nodes:
        """All nodes of these pages, each within its page."""
        at = pages * _PAGE
        lower, upper = self.half(at + 12), self.half(at + 14)
        bad = (lower < _HEADER + 2) | (lower % 2 == 1) | (upper < lower) | (upper > _PAGE)
        if bad.any():
            raise PagesDamagedError(f"page {pages[bad][0]} has impossible bounds")
        counts = (lower - _HEADER) // 2
        page = np.repeat(np.arange(len(pages)), counts)
        number = np.arange(len(page)) - np.repeat(np.cumsum(counts) - counts, counts)
        place = self.half(at[page] + _HEADER + 2 * number)
        bad = (place < upper[page]) | (place > _PAGE - _NODE) | (place % 2 == 1)
        if bad.any():
            raise PagesDamagedError(f"page {pages[page[bad]][0]} has a node outside of it")
        where = at[page] + place
        low = self.half(where) | self.half(where + 2) << 16
        nodes = _Nodes(where, low, self.half(where + 4), self.half(where + 6))
        bad = place + _NODE + nodes.key_size > _PAGE
        if bad.any():
            raise PagesDamagedError(f"page {pages[page[bad]][0]} has a key that reaches out of it")
        return nodes


def _check_tree(pages: _Pages, tree: tuple[int, ...], *, names: bool = False, free: bool = False, nested: bool = False) -> None:
    """One tree, level by level from its root; with ``names`` its values are trees, with ``free`` lists of pages."""
    _, _, depth, _, _, _, entries, root = tree
    if root == _NO_PAGE:
        if entries or depth:
            raise PagesDamagedError("a tree without root has entries")
        return
    if not 1 <= depth <= _DEEPEST:
        raise PagesDamagedError(f"a tree says that it is {depth} levels deep")
    level = np.array([root if root < 2**62 else -1], np.int64)
    for height in range(depth, 0, -1):
        pages.use(level)
        kinds = pages.kinds(level)
        if height > 1:
            if (kinds != _BRANCH).any():
                raise PagesDamagedError(f"page {level[kinds != _BRANCH][0]} is no branch page where one belongs")
            nodes = pages.nodes(level)
            level = nodes.low | nodes.flags << 32
            continue
        if nested and (kinds == _LEAF | _FIXED).all():
            return  # keys of equal size without nodes
        if (kinds != _LEAF).any():
            raise PagesDamagedError(f"page {level[kinds != _LEAF][0]} is no leaf page where one belongs")
        _check_leaves(pages, pages.nodes(level), names=names, free=free)


def _check_leaves(pages: _Pages, nodes: _Nodes, *, names: bool, free: bool) -> None:
    """Values lie within their pages, or on pages of their own."""
    value = nodes.at + _NODE + nodes.key_size
    inside = np.where(nodes.flags & _BIG, 8, nodes.low)
    if ((value % _PAGE == 0) & (inside > 0) | (value % _PAGE + inside > _PAGE)).any():
        raise PagesDamagedError("a value reaches out of its page")
    big = np.flatnonzero(nodes.flags & _BIG)
    for i in big:
        (first,) = struct.unpack("<Q", pages.bytes_at(int(value[i]), 8))
        count = -(-(int(nodes.low[i]) + _HEADER) // _PAGE)
        pages.use(np.arange(min(first, 2**60), min(first, 2**60) + count, dtype=np.int64))
        if pages.kinds(np.array([first], np.int64))[0] != _OVERFLOW:
            raise PagesDamagedError(f"page {first} holds no large value where one belongs")
        if free:
            _use_free(pages, pages.bytes_at(first * _PAGE + _HEADER, int(nodes.low[i])))
    if free:
        for i in np.flatnonzero(nodes.flags == 0):
            _use_free(pages, pages.bytes_at(int(value[i]), int(nodes.low[i])))
    for i in np.flatnonzero(nodes.flags & _TREE):
        if nodes.low[i] != _DB.size or not (names or nodes.flags[i] & _DUPLICATES):
            raise PagesDamagedError("a value claims to be a tree")
        _check_tree(pages, _DB.unpack(pages.bytes_at(int(value[i]), _DB.size)), nested=not names)
    for i in np.flatnonzero(nodes.flags == _DUPLICATES):  # a small page within the value
        flags, lower, upper = struct.unpack("<10xHHH", pages.bytes_at(int(value[i]), _HEADER))
        if not flags & 0x40 or not _HEADER <= lower <= upper <= nodes.low[i]:
            raise PagesDamagedError("a page within a page has impossible bounds")


def _use_free(pages: _Pages, listed: bytes) -> None:
    """The pages that an entry of the free list names."""
    numbers = np.frombuffer(listed[: len(listed) // 8 * 8], "<u8")
    if not len(numbers) or numbers[0] > len(numbers) - 1:
        raise PagesDamagedError("an entry of the free list says that it is longer than it is")
    pages.use(np.minimum(numbers[1 : int(numbers[0]) + 1], 2**60).astype(np.int64))


def check_pages(path: str, txnid: int) -> None:
    """Check what the transaction ``txnid``, which the caller holds, can reach. On machines of another kind nothing is checked.

    Raises:
        PagesDamagedError: something does not hang together.
    """
    if struct.calcsize("P") != 8 or struct.pack("=H", 1) != b"\x01\x00":
        return
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size // _PAGE * _PAGE
        data = mmap.mmap(fd, size, access=mmap.ACCESS_READ)
    finally:
        os.close(fd)
    try:
        for number in range(2):
            magic, version, _, free, names, last, current = _META.unpack_from(data, number * _PAGE + _HEADER)
            if magic != _MAGIC or version != 1 or current != txnid:
                continue
            if last * _PAGE >= size:
                raise PagesDamagedError(f"expected {last + 1} pages; the file has {size // _PAGE}")
            pages = _Pages(data, last)
            try:
                _check_tree(pages, _DB.unpack(names), names=True)
                _check_tree(pages, _DB.unpack(free), free=True)
            finally:
                pages.close()
    finally:
        data.close()
