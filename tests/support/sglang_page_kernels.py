"""Test infrastructure: what SGLang's allocator of pages larger than one token needs of a GPU, done by torch on the CPU.

SGLang runs it as a plug-in of its own. Stand-ins for two kernels that give tokens their slots and no more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class _Kernel:
    """Started as a Triton kernel is: ``kernel[grid](...)``."""

    def __init__(self, run: Callable[..., None]) -> None:
        self._run = run

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._run


def register() -> None:
    """The plug-in's function."""
    from sglang.srt.mem_cache.allocator import paged

    paged.alloc_extend_kernel = _Kernel(_extend)
    paged.alloc_decode_kernel = _Kernel(_decode)


def _extend(before: Any, after: Any, last: Any, free: Any, out: Any, _: int, page: int) -> None:
    """Slots for tokens ``before[i]`` to ``after[i]`` of each request: the rest of its last page, then free pages in turn."""
    taken = at = 0
    for begin, end, behind in zip(before.tolist(), after.tolist(), last.tolist(), strict=True):
        for position in range(begin, end):
            if position % page == 0:
                behind = int(free[taken]) * page - 1 if taken < len(free) else -1  # which SGLang finds out afterwards
                taken += 1
            behind += 1
            out[at] = behind
            at += 1


def _decode(after: Any, last: Any, free: Any, out: Any, pages: int, page: int) -> None:
    _extend(after - 1, after, last, free, out, pages, page)
