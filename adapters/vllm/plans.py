"""What the scheduler's half and the workers' halves tell each other: plain values that are pickled with every step.

The scheduler sends :class:`Orders` with each step: which slots to copy from and to, by block table. Workers answer with a
:class:`Report`: which copies are done. Nobody else names a slot, so a worker needs no index.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from ...layout import KVLayout, LayerGroup
from ...pool import PoolHandle

__all__ = ["CopyOrder", "Orders", "PoolInfo", "Report", "ShardInfo", "SlotParts", "copy_order", "parts_between"]


#: Of each part, in the order of the text: the slot of a chunk, whose payload holds the tokens from ``first`` to ``last``, and
#: the tokens ``start`` to ``stop`` that are copied; int64 [parts, 5].
SlotParts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class CopyOrder:
    """One copy between slots and a request's blocks.

    Args:
        id: of the copy; every worker reports it once.
        request: the request whose blocks they are.
        parts: what of which slots.
        blocks: block ids by KV cache group, those of the tokens from ``base`` on; -1 where a token has no block;
            int32.
        base: text position of the first block's first token, the same for all groups.
        load: slots to blocks; else blocks to slots.
        waits: of a load: the forward pass of this step needs it; else the request waits in the scheduler until it is done.
    """

    id: int
    request: str
    parts: SlotParts
    blocks: tuple[npt.NDArray[np.int32], ...]
    base: int
    load: bool
    waits: bool = True

    @property
    def tokens(self) -> int:
        """Tokens to copy."""
        return int((self.parts[:, 4] - self.parts[:, 3]).sum())


def parts_between(spans: npt.NDArray[np.int64], start: int, stop: int) -> SlotParts:
    """What of leased chunks (:attr:`lmkv.Lease.spans`) lies between two text positions."""
    first, last = spans[:, 1], spans[:, 1] + spans[:, 2]
    parts = np.stack((spans[:, 0], first, last, np.maximum(first, start), np.minimum(last, stop)), axis=1)
    return parts[parts[:, 3] < parts[:, 4]]


def copy_order(
    number: int,
    request: str,
    parts: SlotParts,
    blocks: Iterable[Sequence[int]],
    sizes: Sequence[int],
    *,
    load: bool,
    waits: bool,
) -> CopyOrder:
    """An order that names no block which it does not need.

    Args:
        blocks: of the whole request, by KV cache group; 0 stands for none.
        sizes: tokens a block, by KV cache group.
    """
    unit = math.lcm(*sizes)
    base = int(parts[:, 3].min()) // unit * unit
    stop = int(parts[:, 4].max())
    named = tuple(np.array(ids[base // size : -(-stop // size)], np.int32) for ids, size in zip(blocks, sizes, strict=True))
    for ids in named:
        ids[ids == 0] = -1
    return CopyOrder(number, request, parts, named, base, load, waits)


@dataclass(frozen=True)
class ShardInfo(KVConnectorHandshakeMetadata):
    """What a worker found its KV tensors to be, told once before the first request.

    Args:
        groups: its part of a chunk, in layout order.
        layers: names of the layers that these are.
        latent: all layers keep one latent a token, which every tensor-parallel rank holds whole.
        windows: by KV cache group, its sliding window in tokens, 0 for none.
        block_tokens: by KV cache group, tokens a block of the scheduler's.
        device: ``cpu`` or ``cuda``.
        numa_node: that the device hangs on, ``None`` if that is not known.
        refusal: why reuse is not possible; empty if it is.
    """

    groups: tuple[LayerGroup, ...] = ()
    layers: tuple[str, ...] = ()
    latent: bool = False
    windows: tuple[int, ...] = ()
    block_tokens: tuple[int, ...] = ()
    device: str = "cpu"
    numa_node: int | None = None
    refusal: str = ""


@dataclass(frozen=True)
class PoolInfo:
    """How a worker finds the slots and its part of them.

    Args:
        key: names the pool in its own process.
        handle: how another process maps it; ``None`` where there is none.
        layout: of a whole chunk, all ranks' parts.
        first_layer: by ``(pp_rank, tp_rank)``, number in the layout of the rank's first layer.
        stores: ranks that fill slots; the others hold copies of what these hold.
        pin: have slots pinned for a GPU.
    """

    key: str
    handle: PoolHandle | None
    layout: KVLayout
    first_layer: dict[tuple[int, int], int]
    stores: frozenset[tuple[int, int]]
    pin: bool = True


@dataclass
class Orders(KVConnectorMetadata):
    """What workers have to do in one step.

    Args:
        step: its number.
        pool: until every worker has said that it found the slots.
        loads, stores: copies to begin before and after the forward pass.
        held: finished requests whose blocks stay until their copies are done, new in this step.
        preempted: requests whose blocks are about to be taken.
        forward: whether the model runs in this step.
        early: loads may begin before vLLM has prepared the step's inputs; not where it still clears new blocks then.
        behind: loads begin behind what the device was given to do; not needed where none of that can touch the blocks.
        quick_pass: the forward pass takes less time than the loads.
        healed: the last step whose failed loads the scheduler knows of.
    """

    step: int = 0
    pool: PoolInfo | None = None
    loads: list[CopyOrder] = field(default_factory=list)
    stores: list[CopyOrder] = field(default_factory=list)
    held: frozenset[str] = frozenset()
    preempted: frozenset[str] = frozenset()
    forward: bool = True
    early: bool = True
    behind: bool = True
    quick_pass: bool = False
    healed: int = -1


@dataclass
class Report(KVConnectorWorkerMetadata):
    """What became of copies since the last step; sums over workers.

    Args:
        done: copy id to the number of workers that ended it, well or not.
        failed: copies that at least one worker could not make.
        seconds: copy id to the longest time a worker took.
        mapped: workers that found the slots.
        unreachable: why a worker can't; empty if none said so.
        failed_step: the last step in which a load failed, -1 for none.
        reasons: what went wrong, for people.
    """

    done: dict[int, int] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    seconds: dict[int, float] = field(default_factory=dict)
    mapped: int = 0
    unreachable: str = ""
    failed_step: int = -1
    reasons: list[str] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Report:
        """Both reports as one."""
        assert isinstance(other, Report)
        done = dict(self.done)
        for copy, count in other.done.items():
            done[copy] = done.get(copy, 0) + count
        seconds = dict(self.seconds)
        for copy, value in other.seconds.items():
            seconds[copy] = max(seconds.get(copy, 0.0), value)
        return Report(
            done,
            self.failed | other.failed,
            seconds,
            self.mapped + other.mapped,
            self.unreachable or other.unreachable,
            max(self.failed_step, other.failed_step),
            self.reasons + other.reasons,
        )

    def __bool__(self) -> bool:
        return bool(self.done or self.failed or self.mapped or self.unreachable or self.reasons)
