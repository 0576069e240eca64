"""The HTTP face of one store. Blocking calls of the store run on threads; the event loop only moves bytes."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import re
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from aiohttp import web

from lmkv.errors import ArgumentError, LMKVError
from lmkv.events import Event
from lmkv.tiers.readers import Readers

from ..access import is_loopback
from . import frames, transfers
from .body import BodyReader
from .options import Options
from .queries import TextQuery, read_json
from .replies import RefusedError, error_body, status_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from lmkv.chunks import Namespace
    from lmkv.store import Match, Store

__all__ = ["Service"]

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
T = TypeVar("T")

#: JSON bodies hold tokens, not KV.
MAX_JSON_BYTES = 16 * 1024**2
#: How long a request may wait for its turn, and a flush for the disk.
QUEUE_SECONDS = 30.0
MAX_FLUSH_SECONDS = 600.0
_PORT = re.compile(r":\d*$")
_BROWSER = "expected a client that is no browser page; got an Origin header: pages must not reach this service"


class Service:
    """Handlers, and what they share.

    Args:
        store: open; closed by whoever opened it.
        options: of the service.

    Attributes:
        fresh: connections that have brought no request yet.
    """

    def __init__(self, store: Store, options: Options) -> None:
        self.store = store
        self.options = options
        self.stopping = False
        self.fresh: set[object] = set()
        self.executor = ThreadPoolExecutor(options.max_requests + 2, thread_name_prefix="lmkv-standalone")
        self._flushes = Readers("lmkv-standalone-flush", options.max_requests)  # a stopping service does not wait for these
        self._turns = asyncio.Semaphore(options.max_requests)
        self._running: set[asyncio.Task[Any]] = set()
        self._counts: Counter[str] = Counter()  # of the event loop
        self._events: Counter[str] = Counter()  # of the store's threads
        self._count_lock = threading.Lock()
        self._open_host = not is_loopback(options.host)

    def app(self) -> web.Application:
        """The application that aiohttp serves."""
        app = web.Application(middlewares=[self._errors, self._admit], client_max_size=0)
        app.add_routes(
            [
                web.get("/v1/health", self.health),
                web.get("/v1/stats", self.stats),
                web.get("/v1/layout", self.layout),
                web.post("/v1/lookup", self.lookup),
                web.post("/v1/store", self.store_kv),
                web.post("/v1/retrieve", self.retrieve),
                web.post("/v1/clear", self.clear),
                web.post("/v1/flush", self.flush),
            ]
        )
        return app

    def count_event(self, event: Event) -> None:
        """Keep count of a store's events by kind; quick, and safe on any thread."""
        with self._count_lock:
            self._events[event.kind] += 1

    async def drain(self, grace_seconds: float, cut: asyncio.Event) -> None:
        """Take no more requests, let running ones end, and cut off those that last longer than the grace time.

        ``cut`` ends the grace time early.
        """
        self.stopping = True
        hurry = asyncio.ensure_future(cut.wait())
        deadline = asyncio.get_running_loop().time() + grace_seconds
        while self._running and not hurry.done():
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                break
            await asyncio.wait({hurry, *self._running}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        for task in list(self._running):
            task.cancel()
        if self._running:
            await asyncio.wait(list(self._running), timeout=5.0)

    # -- threads ---------------------------------------------------------------------------------------------------

    async def in_thread(self, call: Callable[[], T], undo: Callable[[T], object] | None = None) -> T:
        """The result of a blocking call.

        A thread can't be cancelled: a cancelled caller waits until the call is done, so that no two calls about one
        reservation ever overlap. ``undo`` takes back a result that nobody waits for any more.
        """
        future = asyncio.get_running_loop().run_in_executor(self.executor, call)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            while not future.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({future})
            if undo is not None and future.exception() is None:
                undo(future.result())
            raise

    # -- before and after every request -----------------------------------------------------------------------------

    @web.middleware
    async def _errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        self.fresh.discard(request.protocol)
        self._counts["requests"] += 1
        try:
            return await handler(request)
        except LMKVError as error:
            return self._refuse(*status_of(error), str(error))
        except RefusedError as error:
            return self._refuse(error.status, error.kind, str(error))
        except ConnectionError:  # the client is gone, or must not get the rest of a reply
            self._counts["broken_off"] += 1
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=400)  # nobody gets it: aiohttp sees that the connection is closed
        except web.HTTPNotFound:
            return self._refuse(404, "NotFound", f"expected a path of docs/standalone.md; got {request.path}")
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted(error.allowed_methods))
            return self._refuse(405, "MethodNotAllowed", f"expected {allowed} for {request.path}; got {request.method}")
        finally:
            self._running.discard(task)

    def _refuse(self, status: int, kind: str, message: str) -> web.Response:
        self._counts[f"status_{status}"] += 1
        response = web.Response(status=status, body=error_body(kind, message), content_type="application/json")
        if status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        if status == 503:
            response.headers["Retry-After"] = "1"
        response.force_close()  # part of the body may be unread
        return response

    @web.middleware
    async def _admit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        options = self.options
        if self.stopping:
            raise RefusedError(503, "Stopping", "expected a running service; this one is stopping")
        if "Origin" in request.headers:
            raise RefusedError(403, "Forbidden", _BROWSER)
        host = _PORT.sub("", request.headers.get("Host", "localhost"))
        if options.token is None and not self._open_host and not is_loopback(host):
            raise RefusedError(403, "Forbidden", f"expected a loopback address as Host; got {host!r}")
        if options.token is not None and request.path != "/v1/health":
            scheme, _, token = request.headers.get("Authorization", "").partition(" ")
            given, wanted = token.strip().encode("utf-8", "replace"), options.token.encode()
            if scheme.lower() != "bearer" or not hmac.compare_digest(given, wanted):
                raise RefusedError(401, "Unauthorized", "expected 'Authorization: Bearer TOKEN' with this service's token")
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise RefusedError(415, "UnsupportedMediaType", "expected a body without Content-Encoding")
        if (request.content_length or 0) > options.max_body:
            text = f"expected a body of at most {options.max_body} bytes; got {request.content_length}: raise --max-body"
            raise RefusedError(413, "BodyTooLarge", text)
        return await handler(request)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """One of the ``max_requests`` places beside the store."""
        try:
            if self._turns.locked():
                await asyncio.wait_for(self._turns.acquire(), QUEUE_SECONDS)
            else:
                await self._turns.acquire()
        except asyncio.TimeoutError:
            text = f"expected a free place within {QUEUE_SECONDS:.0f} seconds; {self.options.max_requests} requests are running"
            raise RefusedError(503, "Busy", text) from None
        try:
            yield
        finally:
            self._turns.release()

    def body(self, request: web.Request) -> BodyReader:
        """The body of a request under this service's limits."""
        options = self.options
        return BodyReader(
            request.content, limit=options.max_body, patience=options.patience_seconds, length=request.content_length
        )

    def namespace(self, scope: Mapping[str, str]) -> Namespace:
        """The store's namespace with a request's changes."""
        namespace = self.store.namespace
        return namespace.replace(**scope) if scope else namespace

    # -- verbs -----------------------------------------------------------------------------------------------------

    async def health(self, request: web.Request) -> web.StreamResponse:
        """Whether the service runs; needs no token and says nothing else."""
        return web.json_response({"status": "ok"})

    async def stats(self, request: web.Request) -> web.StreamResponse:
        """Statistics of store and service."""
        store = await self.in_thread(lambda: self.store.stats().as_dict())
        service = {"running": len(self._running), "max_requests": self.options.max_requests, **self._counts}
        with self._count_lock:
            events = dict(self._events)
        return web.json_response({"store": store, "service": service, "events": events})

    async def layout(self, request: web.Request) -> web.StreamResponse:
        """What the payloads are, and which namespace they belong to. The salt is a secret and stays here."""
        layout, namespace = self.store.layout, self.store.namespace
        shown = {name: getattr(namespace, name) for name in ("model", "revision", "rope", "lora", "shard")}
        return web.json_response(
            {
                "layout": layout.to_dict(),
                "fingerprint": layout.fingerprint.hex(),
                "token_bytes": layout.token_bytes,
                "chunk_bytes": layout.chunk_bytes,
                "namespace": shown,
                "frame_version": frames.VERSION,
                "max_body": self.options.max_body,
            }
        )

    async def lookup(self, request: web.Request) -> web.StreamResponse:
        """Which tokens are there."""
        async with self._turn():
            query = await self._query(request)
            match = await self.find(query, query.wait_seconds)
            text = await self.in_thread(lambda: json.dumps(match_dict(match)))
        return web.Response(text=text, content_type="application/json")

    async def store_kv(self, request: web.Request) -> web.StreamResponse:
        """Take a text's KV in, chunk by chunk."""
        if request.content_type != frames.CONTENT_TYPE:
            raise RefusedError(415, "UnsupportedMediaType", f"expected {frames.CONTENT_TYPE}; got {request.content_type}")
        async with self._turn():
            taken = await transfers.take_in(self, self.body(request))
        self._counts["stored_tokens"] += taken["stored_tokens"]
        return web.json_response(taken)

    async def retrieve(self, request: web.Request) -> web.StreamResponse:
        """Give a text's KV out, chunk by chunk."""
        async with self._turn():
            query = await self._query(request)
            response, tokens = await transfers.give_out(self, request, query)
        self._counts["retrieved_tokens"] += tokens
        return response

    async def clear(self, request: web.Request) -> web.StreamResponse:
        """Forget everything, in all tiers."""
        await self._empty_json(request)
        async with self._turn():
            return web.json_response({"cleared": await self.in_thread(self.store.clear)})

    async def flush(self, request: web.Request) -> web.StreamResponse:
        """Wait until everything committed is in the slow tiers."""
        data = read_json(await self.body(request).read_all(MAX_JSON_BYTES), ("timeout_seconds",))
        seconds = data.get("timeout_seconds")
        seconds = MAX_FLUSH_SECONDS if seconds is None else seconds
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds <= MAX_FLUSH_SECONDS:
            raise ArgumentError(f"expected timeout_seconds from 0 to {MAX_FLUSH_SECONDS:.0f}, or null; got {seconds!r}")
        async with self._turn():
            waiting = self._flushes.submit(lambda: self.store.flush(float(seconds)))
            return web.json_response({"flushed": await asyncio.wrap_future(waiting)})

    async def find(self, query: TextQuery, wait_seconds: float) -> Match:
        """The match of a query; tiers that answer late are waited for."""

        def call() -> Match:
            match = self.store.lookup(query.tokens, anywhere=query.anywhere, namespace=self.namespace(query.scope))
            return match.wait(wait_seconds) if match.pending and wait_seconds > 0 else match

        return await self.in_thread(call)

    async def _query(self, request: web.Request) -> TextQuery:
        body = self.body(request)
        if request.content_type == frames.CONTENT_TYPE:
            head = await transfers.read_head(body, frames.RETRIEVE, self.store.layout)
            await body.expect_end()
            return TextQuery.of_head(head)
        data = await body.read_all(MAX_JSON_BYTES)
        if len(data) < 64 * 1024:
            return TextQuery.of_json(data)
        return await self.in_thread(lambda: TextQuery.of_json(data))

    async def _empty_json(self, request: web.Request) -> None:
        read_json(await self.body(request).read_all(MAX_JSON_BYTES), ())


def match_dict(match: Match) -> dict[str, object]:
    """A match as plain data."""
    return {
        "total_tokens": match.total_tokens,
        "hit_tokens": match.hit_tokens,
        "pending": match.pending,
        "tokens_by_tier": dict(match.tokens_by_tier()),
        "hits": [
            {"key": h.key.hex(), "start": h.start, "tokens": h.tokens, "stored_tokens": h.stored_tokens, "tier": h.tier}
            for h in match.hits
        ],
        "elsewhere": [
            {"key": h.key.hex(), "start": h.start, "tokens": h.tokens, "position": h.position, "tier": h.tier}
            for h in match.elsewhere
        ],
    }
