"""What the scheduler's half remembers of a request."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ...chunks import Namespace
from ...handles import Lease, Reservation
from .plans import CopyOrder
from .texts import Wishes, text_of

__all__ = ["CopyRecord", "Filling", "RequestState"]


@dataclass
class Filling:
    """Slots that are being filled, by one copy or by several.

    Args:
        reservation: what becomes visible once all is there.
        stop, reached: text positions: where it ends, and up to where copies were ordered.
        copies: under way.
        failed: one of them could not be made, or the rest will not come.
    """

    reservation: Reservation
    stop: int
    reached: int = -1
    copies: int = 0
    failed: bool = False

    def __post_init__(self) -> None:
        if self.reached < 0:
            self.reached = self.stop

    def drop(self) -> None:
        """The rest will not come; slots are given back once no copy fills them."""
        self.failed = True
        if not self.copies:
            self.reservation.abort()


@dataclass
class RequestState:
    """One request between its arrival and the end of its copies.

    Args:
        request: vLLM's.
        namespace: of its keys; ``None`` where reuse is not possible.
        wishes: what its sender asked for.
        blocks: its block ids by KV cache group, as they were given out; a window's may have been taken back since.
        since: the step in which it was given them first, or anew.
        computed: tokens that vLLM's own cache held when it last asked.
        lease: holds what was found until it is loaded.
        between_steps: it is loaded while others run, not before the next step.
        looked_at: ``(tokens, generation of the store)`` of the last lookup that found nothing, so as not to repeat it.
        prefetch, give_up: slow tiers being read, and until when they are waited for.
        computing: tokens that are computed before its first answer, and since when.
        prefetches: how often they were read; what is missing still is a miss.
        no_load: a load failed; what is left is computed.
        stored_to: tokens whose chunks were taken care of.
        filling: the chunk that is being stored piece by piece.
        copies: ids of copies under way.
        hit_tokens: tokens found for it, for its log lines.
        ended: it is finished and only its copies are waited for.
    """

    request: Any
    namespace: Namespace | None
    wishes: Wishes
    blocks: list[list[int]] = field(default_factory=list)
    since: int = -1
    computed: int = 0
    lease: Lease | None = None
    between_steps: bool = False
    looked_at: tuple[int, int] = (-1, -1)
    prefetch: Future[int] | None = None
    give_up: float = 0.0
    computing: tuple[int, float] | None = None
    prefetches: int = 0
    no_load: bool = False
    stored_to: int = 0
    filling: Filling | None = None
    copies: set[int] = field(default_factory=set)
    hit_tokens: int = 0
    ended: bool = False
    _text: npt.NDArray[np.uint32] | None = None

    @property
    def id(self) -> str:
        """vLLM's id of the request."""
        return str(self.request.request_id)

    def tokens(self, stop: int) -> npt.NDArray[np.uint32]:
        """The first ``stop`` tokens of its text."""
        if self._text is None or len(self._text) < stop:
            self._text = text_of(self.request)
        return self._text[:stop]

    def drop_filling(self) -> None:
        """Give up the chunk that is being stored piece by piece."""
        if self.filling is not None:
            self.stored_to = min(self.stored_to, self.filling.reservation.chunks[0].start)
            self.filling.drop()
            self.filling = None

    def begin_anew(self, namespace: Namespace | None) -> None:
        """Forget what was found of it and what is kept; from now on its keys are in another namespace, or it has none."""
        self.drop_lease()
        self.namespace, self.looked_at = namespace, (-1, -1)
        self.prefetch, self.prefetches, self.stored_to = None, 0, 0

    def drop_lease(self) -> None:
        """Give up what was found and not loaded."""
        if self.lease is not None:
            self.lease.release()
            self.lease = None


@dataclass
class CopyRecord:
    """A copy that workers were told to make.

    Args:
        order: what they were told.
        state: of its request.
        hold: what it copies out of, or fills.
        reports: workers that have ended it.
        failed: one of them could not make it.
        seconds: the longest time that one of them took.
        begun: when it was ordered.
    """

    order: CopyOrder
    state: RequestState
    hold: Lease | Filling
    reports: int = 0
    failed: bool = False
    seconds: float = 0.0
    begun: float = field(default_factory=time.monotonic)
