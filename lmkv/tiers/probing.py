"""How many leading chunks of a prompt a remote tier holds, in few round trips."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..chunks import ChunkKey

__all__ = ["BATCH", "count_leading"]

#: Keys that one question asks for.
BATCH = 512
#: Keys of a long prompt that the first question samples.
_SAMPLES = 64


def count_leading(contains_many: Callable[[Sequence[ChunkKey]], list[bool]], keys: Sequence[ChunkKey]) -> int:
    """How many leading ``keys`` are there, without a gap.

    Up to :data:`BATCH` keys are one question. Of more, some spread over the whole are asked first: what stands behind an absent
    one need not be asked. Every key that counts was itself found there, since any of them may have been evicted.

    Args:
        contains_many: as of :class:`lmkv.backends.base.Backend`.
    """
    end = len(keys)
    if end > BATCH:
        places = [i * end // _SAMPLES for i in range(_SAMPLES)]
        there = contains_many([keys[place] for place in places])
        end = next((place for place, held in zip(places, there, strict=True) if not held), end)
    for begin in range(0, end, BATCH):
        there = contains_many(keys[begin : min(begin + BATCH, end)])
        if not all(there):
            return begin + there.index(False)
    return end
