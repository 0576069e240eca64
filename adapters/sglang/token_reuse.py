"""What a prefix tree asks of LMKV by tokens: how many are held, bring them, keep them. All ranks answer alike."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from ...chunks import Namespace
from ...errors import LMKVError
from ...handles import Match
from .keeping import Keeper, Order
from .pages import PageStore, Text
from .passes import LayerWaits
from .telling import Telling

__all__ = ["TokenReuse", "unserved"]

#: Requests that are remembered between lookup and load; those that are aborted in the queue leave their entries behind.
_MOST_REQUESTS = 8192

#: Takes a number of tokens, returns the least that any rank named.
Agree = Callable[[int], int]


@dataclass
class _Found:
    """What was found for a request.

    Args:
        tokens, namespace: what was looked up.
        mark: of the request that it was looked up for; a name alone may be given to another text later.
        match: ``None`` if nothing is to be loaded.
        until: when to wait no longer for slow tiers.
        hit: tokens that all ranks have.
        coming: what brings slow tiers' chunks into RAM; the number of leading tokens that are there then.
        settled: nothing is waited for any more.
    """

    tokens: int
    namespace: Namespace
    mark: object
    match: Match | None
    until: float = 0.0
    hit: int = 0
    coming: Future[int] | None = None
    settled: bool = False


def unserved(request: Any) -> str:
    """Why the KV of a request can't be named by its tokens; ``""`` if it can."""
    for name in ("input_embeds", "positional_embed_overrides", "token_type_ids", "multimodal_inputs"):
        if getattr(request, name, None) is not None:
            return name
    return ""


def _mark(request: Any) -> object:
    """What tells a request from all others, whatever they are named: SGLang does not say of each one that it is gone."""
    return request.__dict__.setdefault("_lmkv_mark", object())


class TokenReuse:
    """One rank's store, asked by a prefix tree, on the scheduler's thread. Stores are not done when they return.

    The ranks of a model ask the same in the same order, and every answer is agreed upon. So nothing that one rank alone
    knows (its tiers, the time) may decide whether they come to agree, only what they agree upon.

    Args:
        pages: this rank's store, of texts named by tokens.
        agree: the least of all ranks' numbers.
        told: counts, and tells of trouble.
        queued: SGLang asks :meth:`ready` before a request's turn, so that slow tiers keep nobody else waiting.
        wait_seconds: if not, how long a lookup waits for remote tiers, once a request.
        order: of copies on the device.
        waits: what forward passes wait on; without it loads are done when they return.
    """

    def __init__(
        self,
        pages: PageStore,
        agree: Agree,
        told: Telling,
        *,
        queued: bool = False,
        wait_seconds: float = 0.2,
        order: Order | None = None,
        waits: LayerWaits | None = None,
    ) -> None:
        self.pages = pages
        self._agree = agree
        self._told = told
        self.queued = queued
        self._wait = wait_seconds
        self._order = order or Order()
        self._waits = waits
        self._keeper = Keeper(pages, self._order, told)
        self._found: OrderedDict[str, _Found] = OrderedDict()
        self._begun: OrderedDict[str, tuple[object, Namespace]] = OrderedDict()

    def begin(self, request: Any) -> None:
        """A request is matched, perhaps again: from now on its KV may be computed."""
        mark = _mark(request)
        if self._begun.get(request.rid, (None,))[0] is not mark:
            self._begun[request.rid] = (mark, self._text(request, (0,)).namespace)
            while len(self._begun) > _MOST_REQUESTS:
                self._begun.popitem(last=False)

    def find(self, request: Any, tokens: Any) -> int:
        """How many leading tokens of a request are held, by every rank; what slow tiers hold begins to come.

        Args:
            tokens: a sequence of token ids. A request that asks again with as many gets the same answer until it loads.
        """
        if unserved(request):
            return 0
        namespace = self._text(request, (0,)).namespace
        known = self._found.get(request.rid)
        mark = _mark(request)
        if known is not None and known.mark is mark and (known.tokens, known.namespace) == (len(tokens), namespace):
            return known.hit
        found = _Found(len(tokens), namespace, mark, None, time.monotonic() + self.pages.store.config.deadline_seconds)
        try:
            found.match = self.pages.find(self._text(request, tokens))
            if not self.queued:
                found.match = found.match.wait(self._wait)
            self._bring(found)
        except LMKVError as error:
            self._told.trouble("a lookup failed", str(error))
        found.hit = self._agree(self._has(found))
        self._told.add(lookup_tokens=len(tokens))
        self._remember(request, found)
        return found.hit

    def ready(self, rid: str) -> bool:
        """Whether a request may have its turn: what was found for it is in RAM, or was waited for long enough. Never blocks."""
        found = self._found.get(rid)
        if found is None or found.settled:
            return True
        try:
            arrived = self._arrived(found)
        except LMKVError:
            found.match, arrived = None, True
        if not self._agree(int(arrived)):
            return False
        found.settled = True
        found.hit = self._agree(self._has(found))
        return True

    def _arrived(self, found: _Found) -> bool:
        late = time.monotonic() > found.until
        if found.match is not None and found.match.pending:
            found.match = found.match.wait(0.0)
            if found.match.pending and not late:
                return False
            self._bring(found)
        if found.coming is None or found.coming.done():
            return True
        if late:
            found.match = found.coming = None
        return late

    def _bring(self, found: _Found) -> None:
        """Have slow tiers' chunks come into RAM, once it is known which."""
        match = found.match
        if match is not None and not match.pending and match.tokens_by_tier().keys() - {"ram"}:
            found.coming = self.pages.store.prefetch(match)

    def _has(self, found: _Found) -> int:
        """Tokens that this rank found, and, once nothing is waited for any more, that are there."""
        if found.match is None:
            return 0
        tokens = self.pages.tokens(found.match)
        return min(tokens, found.coming.result()) if found.settled and found.coming is not None else tokens

    def load(self, request: Any, slots: Any, start: int, *, quick_pass: bool = False) -> int:
        """Bring tokens that :meth:`find` promised.

        Args:
            slots: slot numbers for the tokens from ``start`` on. Nobody may write them before :meth:`settle` has returned,
                but forward passes, once they have read them.
            quick_pass: little is to be computed behind them.

        Returns:
            How many of them every rank has for the next forward pass, from ``start`` on; what lies in the other slots is
            undefined.
        """
        found = self._found.get(request.rid)
        done = self._agree(self._load(request, found, slots, start, quick_pass))
        self._told.add(hit_tokens=len(slots), loaded_tokens=done, loads=int(done > 0), load_failures=int(done < len(slots)))
        if found is not None and found.mark is _mark(request):
            # what did not come is not promised to this request once more, or it would be asked for in each round
            self._remember(request, _Found(found.tokens, found.namespace, found.mark, None, hit=start + done, settled=True))
        return done

    def settle(self, *, all_: bool = True) -> None:
        """Wait for the loads that are under way, or let those go that have arrived."""
        if self._waits is not None:
            self._waits.let_go(all_=all_)

    def _load(self, request: Any, found: _Found | None, slots: Any, start: int, quick_pass: bool) -> int:
        if found is None or found.match is None or found.mark is not _mark(request):
            return 0
        if found.namespace != self._text(request, (0,)).namespace:
            return 0
        try:
            lease = self.pages.lease(found.match)
            count = min(start + len(slots), found.hit, self.pages.tokens(lease)) - start
            if count <= 0:
                lease.release()
                return 0
            stream = self._order.behind_everything()  # its pages were somebody's whose last step may still run
            handle = None if stream is None else int(stream.cuda_stream)
            by_layers = self._waits is not None
            load = self.pages.load(lease, slots[:count], first=start, stream=handle, layerwise=by_layers, quick_pass=quick_pass)
            if self._waits is not None and not load.error:
                self._waits.add(load)
                return count
            if load.finish():
                return count
            self._told.trouble("a load failed", load.error)
        except LMKVError as error:
            self._told.trouble("a load failed", str(error))
        return 0

    def keep(self, request: Any, tokens: Any, slots: Any) -> Future[int] | None:
        """Begin to store a text's KV; what is there already is skipped.

        Args:
            slots: slot numbers of all ``tokens``, as a tensor. They must keep their KV until the result is there.

        Returns:
            Tokens newly stored, once they are; ``None`` if nothing was begun.
        """
        if unserved(request) or not len(tokens):
            return None
        try:
            text = self._text(request, tokens)
        except LMKVError as error:
            self._told.add(store_failures=1)
            self._told.trouble("a text was not kept", str(error))
            return None
        mark, namespace = self._begun.get(request.rid, (None, text.namespace))
        if mark is _mark(request) and namespace != text.namespace:
            return None  # the weights changed under it
        return self._keeper.keep(text, slots)

    def close(self) -> None:
        """Wait for what is being kept, write what waits for the slow tiers, and release everything."""
        self.settle()
        self._keeper.close()
        self.pages.close()

    def forget(self, rid: str) -> None:
        """A request is over."""
        self._found.pop(rid, None)
        self._begun.pop(rid, None)

    def forget_all(self) -> None:
        """All requests are over."""
        self._found.clear()
        self._begun.clear()

    def _text(self, request: Any, tokens: Any) -> Text:
        return self.pages.text(tokens, extra_key=request.extra_key)

    def _remember(self, request: Any, found: _Found) -> None:
        self._found[request.rid] = found
        while len(self._found) > _MOST_REQUESTS:
            self._found.popitem(last=False)
