"""How many leading chunks of a prompt a remote tier holds, in few round trips."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..chunks import ChunkKey

__all__ = ["BATCH", "count_leading"]

#: Keys that one question asks for.
BATCH = 512
#: Keys of a long prompt that the first question samples.
_SAMPLES = 64


def count_leading(
    contains_many: Callable[[Sequence[ChunkKey]], list[bool]], keys: Sequence[ChunkKey], at_once: int | None = None
) -> int:
    """How many leading ``keys`` are there, without a gap.

    Up to :data:`BATCH` keys are one question. Of more, some spread over the whole are asked first: what stands behind an absent
    one need not be asked. Every key that counts was itself found there, since any of them may have been evicted.

    Args:
        contains_many: as of :class:`lmkv.backends.base.Backend`.
        at_once: where every key costs a request: as many are asked at first, then twice as many each time.
    """
    end = len(keys)
    if at_once is None and end > BATCH:
        places = [i * end // _SAMPLES for i in range(_SAMPLES)]
        there = contains_many([keys[place] for place in places])
        end = next((place for place, held in zip(places, there, strict=True) if not held), end)
    begin, step = 0, at_once or BATCH
    while begin < end:
        there = contains_many(keys[begin : min(begin + step, end)])
        if not all(there):
            return begin + there.index(False)
        begin += step
        step = min(2 * step, BATCH)
    return end
