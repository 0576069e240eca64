"""What of a request's KV is to be stored behind a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from vllm.logger import init_logger

from ...chunks import TOKEN_BYTES
from ...handles import Reservation
from ...store import Store
from .plans import CopyOrder, SlotPart
from .requests import RequestState
from .settings import Settings

__all__ = ["store_orders"]

logger = init_logger("vllm.lmkv.scheduler")


class _MakeOrder(Protocol):
    def __call__(
        self, state: RequestState, parts: tuple[SlotPart, ...], blocks: Iterable[list[int]], *, load: bool, waits: bool = True
    ) -> CopyOrder: ...


def store_orders(
    store: Store, settings: Settings, state: RequestState, computed: int, make_order: _MakeOrder
) -> list[tuple[CopyOrder, Reservation]]:
    """Orders for the chunks that are complete once a request has ``computed`` tokens of KV.

    The short last chunk of its prompt counts as complete. Chunks that are held already, or that another request is filling, are
    left out.
    """
    request: Any = state.request
    prompt = int(request.num_prompt_tokens)
    # generated tokens count once they are known: behind them may be drafts that are rejected
    known = min(computed, request.num_tokens if settings.save_decode_cache else prompt)
    width = store.layout.chunk_tokens
    target = prompt if known == prompt and store.config.save_partial_chunk else known // width * width
    if target <= state.stored_to:
        return []
    start = state.stored_to // width * width
    state.stored_to = target
    reservation = store.reserve(state.tokens(target), start=start, namespace=state.namespace)
    if not reservation.chunks:
        reservation.abort()
        return []
    parts = []
    for chunk in reservation.chunks:
        stop = chunk.start + len(chunk.piece) // TOKEN_BYTES
        parts.append(SlotPart(chunk.slot, chunk.start, stop, chunk.start, stop))
    order = make_order(state, tuple(parts), state.blocks, load=False)
    if any(block < 0 for ids in order.blocks for block in ids):
        reservation.abort()  # a sliding window has passed it: the blocks are gone
        return []
    if settings.log_requests:
        logger.info(
            "LMKV: Storing KV cache for %d out of %d tokens (skip_leading_tokens=%d) for request %s",
            *(order.tokens, target, parts[0].start, state.id),
        )
    return [(order, reservation)]
