"""What a prefix tree asks of LMKV by tokens: how many are held, bring them, keep them. All ranks answer alike."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...chunks import Namespace
from ...errors import LMKVError
from ...handles import Match
from .pages import PageStore, Text
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
        match: ``None`` if nothing is to be loaded.
        hit: tokens that all ranks have.
    """

    tokens: int
    namespace: Namespace
    match: Match | None
    hit: int


def unserved(request: Any) -> str:
    """Why the KV of a request can't be named by its tokens; ``""`` if it can."""
    for name in ("input_embeds", "positional_embed_overrides", "token_type_ids", "multimodal_inputs"):
        if getattr(request, name, None) is not None:
            return name
    return ""


class TokenReuse:
    """One rank's store, asked by a prefix tree. Called on the scheduler's thread, which is where its copies are made.

    The ranks of a model ask the same in the same order, and every answer is agreed upon. So nothing that one rank alone
    knows (its tiers, the time) may decide whether they come to agree, only what they agree upon.

    Args:
        pages: this rank's store, of texts named by tokens.
        agree: the least of all ranks' numbers.
        told: counts, and tells of trouble.
        wait_seconds: how long a lookup waits for remote tiers, once a request.
    """

    def __init__(self, pages: PageStore, agree: Agree, told: Telling, *, wait_seconds: float = 0.2) -> None:
        self.pages = pages
        self._agree = agree
        self._told = told
        self._wait = wait_seconds
        self._found: OrderedDict[str, _Found] = OrderedDict()
        self._begun: OrderedDict[str, Namespace] = OrderedDict()

    def begin(self, request: Any) -> None:
        """A request is matched, perhaps again: from now on its KV may be computed."""
        if request.rid not in self._begun:
            self._begun[request.rid] = self._text(request, (0,)).namespace
            while len(self._begun) > _MOST_REQUESTS:
                self._begun.popitem(last=False)

    def find(self, request: Any, tokens: Any) -> int:
        """How many leading tokens of a request are held, by every rank; what slow tiers hold begins to come.

        Args:
            tokens: a sequence of token ids. A request that asks again with as many gets the same answer until it loads.
        """
        if unserved(request):
            return 0
        match: Match | None = None
        namespace = self._text(request, (0,)).namespace
        known = self._found.get(request.rid)
        if known is not None and (known.tokens, known.namespace) == (len(tokens), namespace):
            return known.hit
        try:
            match = self.pages.find(self._text(request, tokens))
            if match.pending:
                match = match.wait(self._wait)
            if match.tokens_by_tier().keys() - {"ram"}:
                self.pages.store.prefetch(match)
        except LMKVError as error:
            self._told.trouble("a lookup failed", str(error))
        hit = self._agree(self.pages.tokens(match) if match is not None else 0)
        self._told.add(lookup_tokens=len(tokens))
        self._remember(request, _Found(len(tokens), namespace, match, hit))
        return hit

    def load(self, request: Any, slots: Any, start: int) -> int:
        """Bring tokens that :meth:`find` promised.

        Args:
            slots: slot numbers for the tokens from ``start`` on.

        Returns:
            How many of them every rank has now, from ``start`` on; what lies in the other slots is undefined.
        """
        found = self._found.get(request.rid)
        done = self._agree(self._load(request, found, slots, start))
        self._told.add(hit_tokens=len(slots), loaded_tokens=done, loads=int(done > 0), load_failures=int(done < len(slots)))
        if found is not None:
            # what did not come is not promised to this request once more, or it would be asked for in each round
            self._remember(request, _Found(found.tokens, found.namespace, None, start + done))
        return done

    def _load(self, request: Any, found: _Found | None, slots: Any, start: int) -> int:
        if found is None or found.match is None or found.namespace != self._text(request, (0,)).namespace:
            return 0
        try:
            lease = self.pages.lease(found.match)
            count = min(start + len(slots), found.hit, self.pages.tokens(lease)) - start
            if count <= 0:
                lease.release()
                return 0
            load = self.pages.load(lease, slots[:count], first=start)
            if load.finish():
                return count
            self._told.trouble("a load failed", load.error)
        except LMKVError as error:
            self._told.trouble("a load failed", str(error))
        return 0

    def keep(self, request: Any, tokens: Any, slots: Any) -> int:
        """Store a text's KV; what is there already is skipped.

        Args:
            slots: slot numbers of all ``tokens``.

        Returns:
            Tokens newly stored.
        """
        if unserved(request) or not len(tokens):
            return 0
        try:
            text = self._text(request, tokens)
            if self._begun.get(request.rid, text.namespace) != text.namespace:
                return 0  # the weights changed under it
            save = self.pages.save(text, slots)
        except LMKVError as error:
            self._failed_to_keep(str(error))
            return 0
        if save.finish():
            self._told.add(stores=1, stored_tokens=save.tokens)
        else:
            self._failed_to_keep(save.error)
        return save.tokens

    def _failed_to_keep(self, why: str) -> None:
        self._told.add(store_failures=1)
        self._told.trouble("a text was not kept", why)

    def forget(self, request: Any) -> None:
        """The request is over."""
        self._found.pop(request.rid, None)
        self._begun.pop(request.rid, None)

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
