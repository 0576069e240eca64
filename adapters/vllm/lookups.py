"""What is known of a request's text: looked up, read from slow tiers while that pays, and leased."""

from __future__ import annotations

import time

from ...handles import Lease, Match
from ...store import Store
from ...worth import PrefillSpeed
from .requests import RequestState
from .stats import Counts

__all__ = ["Lookups"]

#: How often slow tiers are read for a request where RAM keeps nothing: another one may have let go of what both waited for.
_MOST_READS = 4


class Lookups:
    """Lookups of one engine.

    Args:
        counts: told of slow tiers that were too late or not worth reading.

    Attributes:
        filling: keys of chunks that workers are copying into slots.
        generation: of what the store holds: a lookup that found nothing need not be repeated within one.
        computed: told by others how quick computing is.
    """

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self.filling: set[bytes] = set()
        self.generation = 0
        self.computed = PrefillSpeed()

    def lease(self, store: Store, state: RequestState, most: int) -> bool:
        """Give a request a lease of what is known of its first ``most`` tokens; ``False``: ask again in the next step."""
        if self._still_good(state, most):
            return True
        lease = self._find(store, state, most)
        if lease is None:
            return False
        state.drop_lease()
        if state.looked_at[0] != most:
            self._counts.add(lookup_tokens=most)
        state.lease, state.looked_at = lease, (most, self.generation)
        return True

    def _still_good(self, state: RequestState, most: int) -> bool:
        """Whether what was found before is all there is: vLLM asks again each step that a request can't be scheduled in."""
        lease = state.lease
        if lease is None or not lease.held or state.prefetch is not None:
            return False
        return lease.hit_tokens >= most or state.looked_at == (most, self.generation)

    def _find(self, store: Store, state: RequestState, most: int) -> Lease | None:
        """A lease of what is known of the first ``most`` tokens and the next one; ``None`` while slow tiers are asked or read.

        With that one a text that comes again has the very keys under which it was stored, its short last chunk included, which
        remote tiers find by its key only.
        """
        tokens, namespace = state.tokens(most + 1), state.namespace
        if state.prefetch is not None and not self._read(state):
            return None
        match = store.lookup(tokens, namespace=namespace)
        if match.pending or (match.hit_tokens < most and match.keys[match.full] in self.filling):
            return None  # what another request computed is on its way into the slots
        slow = _slow_tokens(match)
        if slow and state.prefetches < (1 if store.config.ram_cache else _MOST_READS):
            state.prefetches += 1
            pays = self._worthwhile(store, match)
            slow = _slow_tokens(pays)
            if slow:
                deadlines = {tier.name: tier.deadline_seconds for tier in store.config.slow_tiers("")}
                now = time.monotonic()
                state.give_up = now + max(deadlines[name] for name in slow)
                state.prefetch = store.prefetch(pays)
                if not self._read(state):
                    return None
            match = store.lookup(tokens, namespace=namespace)
            slow = _slow_tokens(match)
        if slow:  # what is not in slots by now is computed
            leading = match.runs[0][1] * store.layout.chunk_tokens if match.runs and match.runs[0][0] == "ram" else 0
            match = store.lookup(tokens[: max(1, min(leading, len(tokens)))], namespace=namespace)
            if not leading:
                match.runs, match.tail, match.hit_tokens = [], None, 0
        return store.lease(match)

    def _worthwhile(self, store: Store, match: Match) -> Match:
        """As much of the match as is read quicker than it is computed."""
        speed = self.computed.tokens_per_second
        if speed is None:
            return match
        pays = store.worthwhile(match, speed)
        self._counts.add(computed_instead_tokens=sum(_slow_tokens(match).values()) - sum(_slow_tokens(pays).values()))
        return pays

    def _read(self, state: RequestState) -> bool:
        """Whether the slow tiers that are read for a request have answered, or are given up."""
        prefetch = state.prefetch
        assert prefetch is not None
        now = time.monotonic()
        if not prefetch.done() and now < state.give_up:
            return False
        if not prefetch.done():
            self._counts.add(late_prefetches=1)
        state.prefetch = None
        return True


def _slow_tokens(match: Match) -> dict[str, int]:
    """Tokens of a match by slow tier."""
    return {tier: count for tier, count in match.tokens_by_tier().items() if tier != "ram"}
