"""The service's life: open the store, listen, serve until a signal, lose nothing that was committed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aiohttp import http, web

from lmkv.errors import ConfigError, LayoutMismatchError, LMKVError
from lmkv.events import Event
from lmkv.store import Store

from .options import Options, parse_options
from .service import Service

__all__ = ["run", "serve"]

#: How long the disk may take at the end for what is committed but not yet written.
FLUSH_SECONDS = 120.0
#: Events that a person should see, one line each, and how often a line of one kind may come.
_TOLD = ("corrupt", "load_failed", "tier_disabled", "tier_enabled", "tier_failed", "write_dropped")
_TELL_SECONDS = 10.0


def _say(line: str) -> None:
    print(f"lmkv.standalone: {line}", file=sys.stderr, flush=True)


class _Teller:
    """Says on standard error what a person should know of a store's events, without flooding and without making it wait."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], float] = {}
        self._lines: queue.Queue[str] = queue.Queue(100)
        self.count: Callable[[Event], None] = lambda event: None
        threading.Thread(target=self._write, name="lmkv-standalone-events", daemon=True).start()

    def __call__(self, event: Event) -> None:
        self.count(event)
        if event.kind in _TOLD:
            detail = ", ".join(f"{key} {value}" for key, value in event.detail.items())
            self.tell(event.kind, event.tier, f"{event.kind} in tier {event.tier or 'store'}: {detail}")

    def tell(self, kind: str, tier: str, line: str) -> None:
        """A line, unless there was one of that kind and tier a moment ago."""
        now = time.monotonic()
        if now - self._last.get((kind, tier), -_TELL_SECONDS) >= _TELL_SECONDS:
            self._last[kind, tier] = now
            with contextlib.suppress(queue.Full):
                self._lines.put_nowait(line)

    def _write(self) -> None:
        while True:
            _say(self._lines.get())


def _logger(teller: _Teller) -> logging.Logger:
    """Where aiohttp reports errors: what is no HTTP is a client's fault and worth a line, not a traceback."""

    def told(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, http.HttpProcessingError):
            return True
        why = " ".join(str(error.message).split())[:200]
        teller.tell("refused", "", f"refused a request: expected HTTP; got {why}")
        return False

    logger = logging.Logger("lmkv.standalone.http")  # of this server alone, and not among all loggers
    logger.parent = logging.getLogger()
    logger.addFilter(told)
    return logger


def _size(count: int) -> str:
    for unit, size in (("TiB", 1024**4), ("GiB", 1024**3), ("MiB", 1024**2)):
        if count >= size:
            return f"{count / size:g} {unit}" if count % size == 0 else f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _banner(options: Options, address: tuple[Any, ...]) -> str:
    host, port = address[0], address[1]
    shown = f"[{host}]" if ":" in host else host
    config = options.config
    disk = _size(config.disk_capacity) if config.disk_capacity else "off"
    return (
        f"LMKV standalone listening on http://{shown}:{port} "
        f"(layout {options.layout.describe.removeprefix('lmkv-layout/1 ')}, ram {_size(config.ram_capacity)}, disk {disk})"
    )


async def _listen(runner: web.AppRunner, service: Service) -> asyncio.Server:
    """Accept connections; one that brings no request within the clients' patience is cut off."""
    loop, options = asyncio.get_running_loop(), service.options
    make = runner.server
    assert make is not None

    def accept() -> asyncio.Protocol:
        protocol = make()
        service.fresh.add(protocol)
        loop.call_later(options.patience_seconds, give_up, protocol)
        return protocol

    def give_up(protocol: web.RequestHandler) -> None:
        if protocol in service.fresh:
            service.fresh.discard(protocol)
            if protocol.transport is not None:
                protocol.transport.abort()

    host = "127.0.0.1" if options.host.lower() == "localhost" else options.host.strip("[]")
    return await loop.create_server(accept, host, options.port, backlog=128)


async def serve(options: Options, store: Store, teller: _Teller) -> None:
    """Serve until SIGTERM or SIGINT; a second one cuts running requests off at once. Leaves the store open.

    Raises:
        OSError: the address can't be listened on.
    """
    loop = asyncio.get_running_loop()
    stop, cut = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (cut if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    service = Service(store, options)
    teller.count = service.count_event
    runner = web.AppRunner(
        service.app(),
        access_log=None,
        logger=_logger(teller),
        handle_signals=False,
        keepalive_timeout=options.patience_seconds,
        lingering_time=2.0,
        auto_decompress=False,
        read_bufsize=1024**2,
        shutdown_timeout=1.0,
    )
    await runner.setup()
    try:
        listening = await _listen(runner, service)
        print(_banner(options, listening.sockets[0].getsockname()), flush=True)
        await stop.wait()
        listening.close()
        await service.drain(options.grace_seconds, cut)
    finally:
        await runner.cleanup()
        service.executor.shutdown(wait=True)


def _close(store: Store) -> int:
    """Bring everything committed to the disk and close; the exit status."""
    try:
        if store.flush(FLUSH_SECONDS) or store.flush(0.0):  # what was given up was told when it was
            return 0
        _say(f"stopped, but not all chunks reached the disk within {FLUSH_SECONDS:.0f} seconds: they will be missing")
        return 1
    finally:
        store.close()


def run(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> int:
    """The service from its command line; returns the exit status (0 done, 1 failed, 2 wrong arguments)."""
    try:
        options = parse_options(argv, os.environ if environ is None else environ)
    except (ConfigError, LayoutMismatchError) as error:
        print(f"lmkv.standalone: {error}", file=sys.stderr)
        return 2
    for warning in options.warnings:
        _say(f"warning: {warning}")
    teller = _Teller()
    try:
        store = Store(options.config, options.layout, on_event=teller)
    except LMKVError as error:
        _say(str(error))
        return 2 if isinstance(error, (ConfigError, LayoutMismatchError)) else 1
    status = 1
    try:
        with contextlib.suppress(KeyboardInterrupt):  # before the loop took over the signals
            asyncio.run(serve(options, store, teller))
            status = 0
    except OSError as error:
        _say(f"expected to listen on {options.host} port {options.port}; the system says: {error}")
    finally:
        status = _close(store) or status
    return status
