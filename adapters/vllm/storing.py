"""What of a request's KV is to be stored behind a step.

Where all layers attend to the whole text, a chunk is stored once it is complete. Where some attend to a sliding window, vLLM
takes blocks back that the window has passed, so the chunk that a step ends in is stored piece by piece, each behind the step
that computed it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from vllm.logger import init_logger

from ...chunks import TOKEN_BYTES
from ...store import Store
from .plans import CopyOrder, SlotParts
from .requests import Filling, RequestState
from .settings import Settings

__all__ = ["store_orders"]

logger = init_logger("vllm.lmkv.scheduler")

Ordered = list[tuple[CopyOrder, Filling]]


class _MakeOrder(Protocol):
    def __call__(
        self, state: RequestState, parts: SlotParts, blocks: Iterable[list[int]], *, load: bool, waits: bool = True
    ) -> CopyOrder: ...


def store_orders(
    store: Store,
    settings: Settings,
    state: RequestState,
    steps: tuple[int, int],
    windows: Sequence[int],
    make_order: _MakeOrder,
) -> Ordered:
    """Orders for what can be stored once a step has taken a request from one number of computed tokens to another.

    The short last chunk of its prompt counts as complete. Chunks that are held already, or that another request is filling, are
    left out.

    Args:
        steps: tokens with KV before and behind the step.
        windows: by KV cache group, 0 for none.
    """
    window = min((window for window in windows if window), default=0)
    request: Any = state.request
    prompt = int(request.num_prompt_tokens)
    # generated tokens count once they are known: behind them may be drafts that are rejected
    known = min(steps[1], request.num_tokens if settings.save_decode_cache and not window else prompt)
    width = store.layout.chunk_tokens
    partial = store.config.save_partial_chunk
    found: Ordered = []
    if window:
        found += _continued(state, known, make_order)
    target = prompt if known == prompt and partial else known // width * width
    start = state.stored_to // width * width
    if window:  # what the window had passed before the step is gone
        start = max(start, -(-max(0, steps[0] - window + 1) // width) * width)
    if target > max(state.stored_to, start - 1) and target > start:
        found += _whole(store, state, start, target, make_order)
        state.stored_to = target
    if window and known < prompt and state.filling is None:
        start = max(start, known // width * width)
        stop = min(start + width, prompt)
        if start < known and (stop - start == width or partial):
            found += _begun(store, state, start, known, stop, make_order)
    if settings.log_requests:
        for order, _ in found:
            logger.info(
                "LMKV: Storing KV cache for %d out of %d tokens (skip_leading_tokens=%d) for request %s",
                *(order.tokens, order.parts[-1, 4], order.parts[0, 3], state.id),
            )
    return found


def _whole(store: Store, state: RequestState, start: int, target: int, make_order: _MakeOrder) -> Ordered:
    """All chunks between two positions, whose KV is there."""
    reservation = store.reserve(state.tokens(target), start=start, namespace=state.namespace, priority=state.wishes.priority)
    parts = []
    for chunk in reservation.chunks:
        stop = chunk.start + len(chunk.piece) // TOKEN_BYTES
        parts.append((chunk.slot, chunk.start, stop, chunk.start, stop))
    return _ordered(state, Filling(reservation, parts[-1][4] if parts else target), parts, make_order)


def _begun(store: Store, state: RequestState, start: int, known: int, stop: int, make_order: _MakeOrder) -> Ordered:
    """The first piece of a chunk that later steps complete."""
    reservation = store.reserve(state.tokens(stop), start=start, namespace=state.namespace, priority=state.wishes.priority)
    if not reservation.chunks:
        reservation.abort()
        return []
    chunk = reservation.chunks[0]
    filling = Filling(reservation, stop, known)
    found = _ordered(state, filling, [(chunk.slot, start, stop, start, known)], make_order)
    if found:
        state.filling = filling
    return found


def _continued(state: RequestState, known: int, make_order: _MakeOrder) -> Ordered:
    """The next piece of the chunk that an earlier step has begun."""
    filling = state.filling
    if filling is None or known <= filling.reached:
        return []
    chunk = filling.reservation.chunks[0]
    stop = min(known, filling.stop)
    found = _ordered(state, filling, [(chunk.slot, chunk.start, filling.stop, filling.reached, stop)], make_order)
    filling.reached = stop
    if not found or stop == filling.stop:
        state.filling = None
        state.stored_to = max(state.stored_to, filling.stop)
    return found


def _ordered(
    state: RequestState, filling: Filling, parts: list[tuple[int, int, int, int, int]], make_order: _MakeOrder
) -> Ordered:
    if not parts:
        filling.reservation.abort()
        return []
    order = make_order(state, np.array(parts, np.int64), state.blocks, load=False)
    if any((ids < 0).any() for ids in order.blocks):  # a window has passed it after all
        filling.drop()
        return []
    filling.copies += 1
    return [(order, filling)]
