"""KV between sockets and slots: what the bodies of store and retrieve go through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from aiohttp import web

from lmkv.errors import ArgumentError, LMKVError
from lmkv.layout import KVLayout
from lmkv.store import Lease, Reservation, Slot, Store
from lmkv.transfer import payload_arrays

from . import frames
from .body import BodyReader, BodyWriter
from .queries import TextQuery
from .replies import RefusedError

if TYPE_CHECKING:
    from lmkv.chunks import Namespace

    from .service import Service

__all__ = ["give_out", "read_head", "take_in"]

#: Chunks are reserved and committed together up to this many bytes, or this part of a text if that is more: each turn
#: through the store hashes the text from its beginning, so a long text of small chunks must not take thousands.
WINDOW_BYTES = 4 * 1024**2
MOST_WINDOWS = 64


async def read_head(body: BodyReader, kind: int, layout: KVLayout) -> frames.Head:
    """The head of a frame of that kind, verified. A body of another length than it implies is refused before more is read.

    Raises:
        LMKVError: as :func:`frames.read_fixed` and :func:`frames.read_rest`.
        RefusedError: as :class:`BodyReader`.
    """
    fixed = frames.read_fixed(await body.read(frames.HEAD_BYTES), kind, layout)
    payload = frames.pieces_bytes(layout, fixed.start, fixed.stop) if kind == frames.STORE else 0
    body.check_length(frames.HEAD_BYTES + fixed.rest_bytes + payload)
    return frames.read_rest(fixed, await body.read(fixed.rest_bytes))


def _windows(layout: KVLayout, start: int, stop: int) -> Iterator[list[tuple[int, int]]]:
    """Pieces of ``[start, stop)``, those together that are committed together."""
    whole = list(frames.pieces(layout.chunk_tokens, start, stop))
    most = max(1, WINDOW_BYTES // layout.chunk_bytes, -(-len(whole) // MOST_WINDOWS))
    for i in range(0, len(whole), most):
        yield whole[i : i + most]


async def take_in(service: Service, body: BodyReader) -> dict[str, int]:
    """Read a store frame and commit each window of its chunks as soon as it is whole and verified.

    Returns:
        ``tokens`` of the text and ``stored_tokens``, those that were not there before.

    Raises:
        LMKVError, RefusedError, ConnectionError: what was committed before stays.
    """
    layout = service.store.layout
    head = await read_head(body, frames.STORE, layout)
    if head.start % layout.chunk_tokens or head.stop != head.total_tokens:
        raise ArgumentError(
            f"expected start at a multiple of {layout.chunk_tokens} and stop at the text's end, {head.total_tokens}; "
            f"got start {head.start}, stop {head.stop}"
        )
    stored = 0
    for window in _windows(layout, head.start, head.stop):
        stored += await _take_window(service, body, head, window)
    await body.expect_end()
    return {"tokens": head.total_tokens, "stored_tokens": stored}


async def _take_window(service: Service, body: BodyReader, head: frames.Head, window: list[tuple[int, int]]) -> int:
    """Fill and commit the chunks of one window; if the body breaks off, those that arrived whole."""
    store, layout = service.store, service.store.layout
    tokens = np.frombuffer(head.tokens, "<u4")
    namespace = service.namespace(head.scope)

    def begin() -> Reservation:
        return store.reserve(tokens[: window[-1][1]], start=window[0][0], namespace=namespace)

    reservation = await service.in_thread(begin, Reservation.abort)
    whole = 0
    try:
        slots = {slot.start: slot for slot in reservation.slots}
        for start, stop in window:
            slot = slots.get(start)  # none: it is there already, or there is no room for it
            hasher = frames.piece_hasher(start)
            size = (stop - start) * layout.token_bytes
            await body.read_into(None if slot is None else slot.payload, size, hasher)
            frames.check_sum(hasher, await body.read(frames.SUM_BYTES), start)
            whole = stop
        return await service.in_thread(reservation.commit)
    except (LMKVError, RefusedError, ConnectionError):
        if whole and reservation.open:
            await service.in_thread(lambda: _keep_whole(store, reservation, tokens[:whole], window[0][0], namespace))
        raise
    finally:
        await service.in_thread(reservation.abort)


def _keep_whole(store: Store, broken: Reservation, tokens: npt.NDArray[np.uint32], first: int, namespace: Namespace) -> None:
    """Commit the chunks of ``tokens`` that a broken reservation holds, and give the others back."""
    filled = {slot.key: bytes(slot.payload) for slot in broken.slots if slot.start + slot.tokens <= len(tokens)}
    broken.abort()
    with store.reserve(tokens, start=first, namespace=namespace) as again:
        if all(slot.key in filled for slot in again.slots):
            for slot in again.slots:
                slot.payload[:] = filled[slot.key]
            again.commit()


async def give_out(service: Service, request: web.Request, query: TextQuery) -> tuple[web.StreamResponse, int]:
    """Send what is there of a text's KV; returns the reply and its tokens.

    Raises:
        LMKVError: before anything was sent.
        ConnectionError: the client is gone or too slow, or the lease was lost on the way: the reply ends early.
    """
    store = service.store
    match = await service.find(query, query.wait_seconds or store.config.deadline_seconds)
    lease = await service.in_thread(lambda: store.lease(match), Lease.release)
    try:
        slots = lease.slots
        wanted = match.total_tokens if query.stop is None else query.stop
        stop = max(query.start, min(wanted, lease.hit_tokens))
        head = frames.Head(frames.REPLY, store.layout.fingerprint, match.total_tokens, query.start, stop).pack()
        response = web.StreamResponse(headers={"Content-Type": frames.CONTENT_TYPE})
        response.content_length = len(head) + frames.pieces_bytes(store.layout, query.start, stop)
        await response.prepare(request)
        writer = BodyWriter(request, response, patience=service.options.patience_seconds)
        await writer.write(head)
        await _send_pieces(service, writer, lease, slots, query.start, stop)
        await response.write_eof()
    finally:
        await service.in_thread(lease.release)
    return response, stop - query.start


async def _send_pieces(service: Service, writer: BodyWriter, lease: Lease, slots: list[Slot], start: int, stop: int) -> None:
    layout = service.store.layout
    for slot in slots:
        first, last = max(start, slot.start), min(stop, slot.start + slot.tokens)
        if first >= last:
            continue
        payload = slot.payload
        held = len(payload) // layout.token_bytes
        if last - first != held:
            whole, begin, end = payload, first - slot.start, last - slot.start
            payload = await service.in_thread(lambda: memoryview(_cut(layout, whole, held, begin, end)))  # noqa: B023  # awaited here
        hasher = frames.piece_hasher(first)
        await writer.write(payload, hasher, lease.renew)
        if not lease.held:  # what was hashed and sent may have been another chunk's bytes: withhold the checksum
            raise ConnectionResetError("the lease was lost")
        await writer.write(frames.pack_sum(hasher.intdigest()))


def _cut(layout: KVLayout, payload: memoryview, held: int, begin: int, end: int) -> bytearray:
    """Tokens ``begin`` to ``end`` of a payload of ``held`` tokens, as a payload of their own."""
    out = bytearray((end - begin) * layout.token_bytes)
    for mine, theirs in zip(
        payload_arrays(memoryview(out), layout, end - begin), payload_arrays(payload, layout, held), strict=True
    ):
        np.copyto(mine, theirs[..., begin:end, :])
    return out
