"""Loads that begin while vLLM still schedules: each as soon as its request has blocks, where the worker is in this process.

To schedule a request with a known prompt of 10,000 tokens takes about a millisecond, and all loads of a step used to begin once
the last of its requests was scheduled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from .plans import CopyOrder
from .pools import local_worker
from .requests import RequestState

__all__ = ["EarlyLoads", "LoadsAhead", "quick"]

#: A token to compute takes at least as long as so many to load: a forward pass of few tokens is over before their KV is there.
_LOADED_A_COMPUTED = 16


def quick(computed: int, loaded: int) -> bool:
    """Whether a forward pass over ``computed`` tokens takes less time than ``loaded`` tokens to load."""
    return _LOADED_A_COMPUTED * computed <= loaded


class LoadsAhead(Protocol):
    """A worker, as far as it matters here."""

    def begin_ahead(self, order: CopyOrder, *, behind: bool, quick_pass: bool, by_layers: bool) -> None:
        """Begin a load that the orders of this step will name."""


class EarlyLoads:
    """What of a step's loads has begun before the step.

    In a quick pass only the last load comes by layers (see :meth:`.worker.WorkerHalf.start_loads`), so each one waits for the
    next, as long as another request may follow.

    Args:
        key: of the pool.
        layerwise: whether loads come by layers at all.
    """

    def __init__(self, key: str, *, layerwise: bool) -> None:
        self._key = key
        self._layerwise = layerwise
        self._kept: CopyOrder | None = None

    def allocated(self, order: CopyOrder, computed: int, requests: Iterable[RequestState], *, behind: bool) -> None:
        """A request has blocks for what it loads.

        Args:
            computed: tokens of it that are not loaded.
            requests: all.
            behind: see :class:`.plans.Orders`.
        """
        worker = local_worker(self._key)
        if worker is None or not order.waits or any(one.preempted for one in requests):
            return  # what is still copied from blocks that came free is waited for in the step
        quick_pass = quick(computed, order.tokens)
        last = not any(not (one.blocks or one.copies or one.ended) for one in requests)  # nobody else waits for blocks
        kept, self._kept = self._kept, None
        if kept is not None:
            worker.begin_ahead(kept, behind=behind, quick_pass=True, by_layers=False)
        if self._layerwise and quick_pass and not last:
            self._kept = order
        else:
            worker.begin_ahead(order, behind=behind, quick_pass=quick_pass, by_layers=True)

    def end_step(self) -> None:
        """Loads to come belong to the next step."""
        self._kept = None
