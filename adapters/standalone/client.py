"""A store behind HTTP: the verbs of :class:`lmkv.Store`, served by ``python -m lmkv.standalone``.

    with StoreClient("http://127.0.0.1:7711") as store:
        store.store(tokens, kv)
        match = store.lookup(tokens)
        loaded = store.retrieve(match, kv)

KV goes piece by piece between the caller's tensors and the socket; every piece is verified before it reaches a tensor.
"""

from __future__ import annotations

import http.client
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Any

from lmkv.chunks import TOKEN_BYTES, token_bytes
from lmkv.errors import ArgumentError, BackendError, LayoutMismatchError
from lmkv.layout import KVLayout
from lmkv.transfer import KVAccess, Part, as_access, gather, scatter

from . import frames
from .wire import Wire

__all__ = ["RemoteContentHit", "RemoteHit", "RemoteMatch", "StoreClient"]


@dataclass(frozen=True)
class RemoteHit:
    """A chunk of the prompt's prefix that the service holds; fields as :class:`lmkv.handles.ChunkHit`."""

    key: bytes
    start: int
    tokens: int
    stored_tokens: int
    tier: str


@dataclass(frozen=True)
class RemoteContentHit:
    """A chunk found behind another text; fields as :class:`lmkv.handles.ContentHit`."""

    key: bytes
    start: int
    tokens: int
    position: int
    tier: str


@dataclass(frozen=True)
class RemoteMatch:
    """What a lookup found; a value without hold on anything.

    Args:
        total_tokens: tokens of the prompt.
        hit_tokens: leading tokens that some tier holds.
        pending: a tier has not answered yet: look up again.
        hits: held chunks of the prefix, in order.
        elsewhere: chunks found behind it (``anywhere=True``).
        text: the prompt, little-endian uint32.
        scope: what the lookup changed of the service's namespace.
    """

    total_tokens: int
    hit_tokens: int
    pending: bool
    hits: tuple[RemoteHit, ...]
    elsewhere: tuple[RemoteContentHit, ...]
    text: bytes = field(repr=False)
    scope: Mapping[str, str] = field(default_factory=dict)

    def tokens_by_tier(self) -> dict[str, int]:
        """How many of the hit tokens come from which tier."""
        counts: dict[str, int] = {}
        for hit in self.hits:
            counts[hit.tier] = counts.get(hit.tier, 0) + hit.tokens
        return counts


class StoreClient:
    """A store in another process. Safe to use from several threads; each request in flight takes a connection.

    ``salt``, ``lora`` and ``extra`` of the verbs change the service's namespace for that call, as
    ``store.namespace.replace(...)`` does for a store in this process.

    Args:
        url: of the service, ``http://127.0.0.1:7711``.
        token: its bearer token, if it wants one.
        layout: the layout that is expected there; the service's is taken, after checking, if it is left out.
        timeout_seconds: how long one step (connecting, sending or receiving a piece, waiting for an answer) may take.

    Every verb raises, besides what it says itself:
        BackendUnavailableError: nobody answers at the URL, or not in time.
        StoreClosedError: this client was closed, or the service is stopping.
        ConfigError: the token is wrong, or the URL leads to something else.
        LayoutMismatchError: the service has another layout.
    """

    def __init__(
        self, url: str, token: str | None = None, *, layout: KVLayout | None = None, timeout_seconds: float = 30.0
    ) -> None:
        self._wire = Wire(url, token, timeout_seconds)
        self._expected = layout

    @property
    def url(self) -> str:
        """Where the service is."""
        return self._wire.url

    @cached_property
    def layout(self) -> KVLayout:
        """The service's layout, proved against its fingerprint; asked once."""
        answer = self._wire.ask("GET", "/v1/layout")
        try:
            layout = KVLayout.from_dict(answer["layout"])
            fingerprint, version = str(answer["fingerprint"]), answer["frame_version"]
        except KeyError as error:
            raise BackendError(f"{self.url}: expected a layout with {error}; got {answer!r}") from None
        if version != frames.VERSION:
            raise BackendError(f"{self.url}: expected frame version {frames.VERSION}; the service speaks {version}")
        if layout.fingerprint.hex() != fingerprint:
            raise LayoutMismatchError(
                f"{self.url}: expected fingerprint {layout.fingerprint.hex()} of {layout.describe}; got {fingerprint}"
            )
        if self._expected is not None and self._expected.fingerprint != layout.fingerprint:
            raise LayoutMismatchError(f"{self.url}: expected {self._expected.describe}; the service has {layout.describe}")
        return layout

    # -- verbs -----------------------------------------------------------------------------------------------------

    def health(self) -> bool:
        """Whether the service runs and takes requests."""
        return bool(self._wire.ask("GET", "/v1/health").get("status") == "ok")

    def stats(self) -> dict[str, Any]:
        """``{"store": as Store.stats().as_dict(), "service": counts of requests, "events": counts by kind}``."""
        return self._wire.ask("GET", "/v1/stats")

    def lookup(
        self,
        tokens: object,
        *,
        anywhere: bool = False,
        wait_seconds: float = 0.0,
        salt: str | None = None,
        lora: str | None = None,
        extra: str | None = None,
    ) -> RemoteMatch:
        """What the service holds of a prompt. No side effects.

        Args:
            tokens: the prompt; see :func:`lmkv.chunks.token_bytes`.
            anywhere: also find its chunks where they stood in other texts.
            wait_seconds: how long to wait for slow tiers that answer late.

        Raises:
            ArgumentError: wrong tokens.
        """
        return self._lookup(token_bytes(tokens), _scope(salt, lora, extra), anywhere, wait_seconds)

    def _lookup(self, text: bytes, scope: Mapping[str, str], anywhere: bool, wait_seconds: float) -> RemoteMatch:
        if anywhere or wait_seconds:
            ids = array("I", text).tolist()
            question = {"tokens": ids, "anywhere": anywhere, "wait_seconds": wait_seconds, **scope}
            answer = self._wire.ask("POST", "/v1/lookup", question)
        else:  # the same question without digits: a long prompt is asked in a tenth of the time
            answer = self._ask_text("/v1/lookup", text, scope)
        hits = tuple(
            RemoteHit(bytes.fromhex(h["key"]), h["start"], h["tokens"], h["stored_tokens"], h["tier"]) for h in answer["hits"]
        )
        elsewhere = tuple(
            RemoteContentHit(bytes.fromhex(h["key"]), h["start"], h["tokens"], h["position"], h["tier"])
            for h in answer["elsewhere"]
        )
        return RemoteMatch(answer["total_tokens"], answer["hit_tokens"], answer["pending"], hits, elsewhere, text, scope)

    def _ask_text(self, path: str, text: bytes, scope: Mapping[str, str]) -> dict[str, Any]:
        total = len(text) // TOKEN_BYTES
        head = frames.Head(frames.RETRIEVE, self.layout.fingerprint, total, 0, total, scope, text).pack()
        with self._wire.exchange("POST", path, len(head), frames.CONTENT_TYPE, lambda c: c.send(head)) as response:
            return self._wire.json_of(response)

    def store(
        self,
        tokens: object,
        source: Any,
        *,
        start: int = 0,
        salt: str | None = None,
        lora: str | None = None,
        extra: str | None = None,
    ) -> int:
        """Keep a text's KV. The service is asked first what it has: only what is missing is sent.

        Args:
            tokens: the whole text from its beginning.
            source: what :meth:`lmkv.Store.store` takes, with the KV from ``start`` on.
            start: the first token whose KV the caller has; chunks that begin before it are left out.

        Returns:
            Tokens newly stored.

        Raises:
            ArgumentError, LayoutMismatchError: wrong tokens or tensors; nothing was stored.
            CapacityError: the body is larger than the service takes.
        """
        layout, text, scope = self.layout, token_bytes(tokens), _scope(salt, lora, extra)
        total, width = len(text) // TOKEN_BYTES, layout.chunk_tokens
        if not isinstance(start, int) or not 0 <= start <= total:
            raise ArgumentError(f"expected start from 0 to {total} tokens; got {start!r}")
        held = self._lookup(text, scope, False, 0.0).hit_tokens
        first = max(-(-start // width), held // width) * width
        if held >= total or first >= total:
            return 0
        access = as_access(source)
        access.check(layout, first, total)
        head = frames.Head(frames.STORE, layout.fingerprint, total, first, total, scope, text).pack()

        def send(connection: http.client.HTTPConnection) -> None:
            connection.send(head)
            buffer = bytearray(layout.chunk_bytes + frames.SUM_BYTES)
            for begin, end in frames.pieces(width, first, total):
                connection.send(_packed(access, memoryview(buffer), layout, begin, end))

        length = len(head) + frames.pieces_bytes(layout, first, total)
        with self._wire.exchange("POST", "/v1/store", length, frames.CONTENT_TYPE, send) as response:
            return int(self._wire.json_of(response)["stored_tokens"])

    def retrieve(
        self,
        what: RemoteMatch | object,
        sink: Any,
        *,
        start: int = 0,
        stop: int | None = None,
        salt: str | None = None,
        lora: str | None = None,
        extra: str | None = None,
    ) -> int:
        """Copy what the service holds of a prompt's KV into the caller's tensors.

        Args:
            what: a match of :meth:`lookup` (with its scope), or the prompt's tokens.
            sink: what :meth:`lmkv.Store.retrieve` takes.
            start, stop: text positions; ``stop`` is the end of what is held by default, and at most that.

        Returns:
            Tokens copied, from ``start`` on. When an error is raised, the tensors hold verified pieces up to where it
            happened and are as they were behind it.

        Raises:
            ArgumentError, LayoutMismatchError: wrong positions or tensors.
            CorruptRecordError: a piece was damaged on its way.
        """
        layout = self.layout
        if isinstance(what, RemoteMatch):
            if (salt, lora, extra) != (None, None, None):
                raise ArgumentError("expected salt, lora and extra with tokens only: a match has its own")
            text, scope = what.text, what.scope
            stop = what.hit_tokens if stop is None else min(stop, what.hit_tokens)
        else:
            text, scope = token_bytes(what), _scope(salt, lora, extra)
        total = len(text) // TOKEN_BYTES
        stop = total if stop is None else min(stop, total)
        if not 0 <= start <= total:
            raise ArgumentError(f"expected start from 0 to {total} tokens; got {start}")
        if stop <= start:
            return 0
        access = as_access(sink)
        head = frames.Head(frames.RETRIEVE, layout.fingerprint, total, start, stop, scope, text).pack()
        with self._wire.exchange("POST", "/v1/retrieve", len(head), frames.CONTENT_TYPE, lambda c: c.send(head)) as response:
            fixed = frames.read_fixed(self._wire.read(response, frames.HEAD_BYTES), frames.REPLY, layout)
            reply = frames.read_rest(fixed, self._wire.read(response, fixed.rest_bytes))
            if reply.start != start or reply.stop > stop or reply.total_tokens != total:
                raise BackendError(
                    f"{self.url}: expected tokens {start} to {stop}; the service sent {reply.start} to {reply.stop}"
                )
            if reply.stop > start:
                access.check(layout, start, reply.stop)
            buffer = memoryview(bytearray(layout.chunk_bytes + frames.SUM_BYTES))
            for begin, end in frames.pieces(layout.chunk_tokens, start, reply.stop):
                payload = self._receive(response, buffer, begin, end)
                scatter(access, [Part(payload, begin, end, begin, end)], layout)
            return reply.stop - start

    def _receive(self, response: http.client.HTTPResponse, buffer: memoryview, begin: int, end: int) -> memoryview:
        """The verified payload of tokens ``begin`` to ``end``, in ``buffer``."""
        size = (end - begin) * self.layout.token_bytes
        self._wire.read_into(response, buffer[: size + frames.SUM_BYTES])
        hasher = frames.piece_hasher(begin)
        hasher.update(buffer[:size])
        frames.check_sum(hasher, buffer[size : size + frames.SUM_BYTES], begin)
        return buffer[:size]

    def clear(self) -> bool:
        """Drop every chunk of every tier of the service, whatever its namespace; ``False`` as for :meth:`lmkv.Store.clear`."""
        return bool(self._wire.ask("POST", "/v1/clear", {})["cleared"])

    def flush(self, timeout_seconds: float | None = None) -> bool:
        """Wait until everything committed is in the service's slow tiers; ``False`` as for :meth:`lmkv.Store.flush`."""
        longest = 600.0 if timeout_seconds is None else timeout_seconds
        return bool(self._wire.ask("POST", "/v1/flush", {"timeout_seconds": longest}, patience=longest)["flushed"])

    def close(self) -> None:
        """Close the connections. The service goes on."""
        self._wire.close()

    def __enter__(self) -> StoreClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _scope(salt: str | None, lora: str | None, extra: str | None) -> dict[str, str]:
    given = {"salt": salt, "lora": lora, "extra": extra}
    return frames.check_scope({name: value for name, value in given.items() if value is not None})


def _packed(access: KVAccess, buffer: memoryview, layout: KVLayout, begin: int, end: int) -> memoryview:
    """One piece as it is sent: payload and checksum, in ``buffer``."""
    size = (end - begin) * layout.token_bytes
    gather(access, [Part(buffer[:size], begin, end, begin, end)], layout)
    hasher = frames.piece_hasher(begin)
    hasher.update(buffer[:size])
    buffer[size : size + frames.SUM_BYTES] = frames.pack_sum(hasher.intdigest())
    return buffer[: size + frames.SUM_BYTES]
