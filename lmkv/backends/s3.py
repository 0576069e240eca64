"""Values as objects of an S3 bucket, through the package ``obstore``: its signing, retries, multipart uploads and ranges.

One object a value, ``<prefix>/<two hex digits>/<chunk key in hex>``, put whole or not at all. Every key costs a request, so
calls keep several under way at once, on one event loop beside the callers; what has not come when the deadline passes is a
miss and is cancelled.
"""

from __future__ import annotations

import asyncio
import datetime
import difflib
import re
import threading
import urllib.parse
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from ..chunks import ChunkKey
from ..config import parse_bytes, read_secret
from ..errors import BackendError, BackendUnavailableError, ConfigError, StoreClosedError
from .base import BackendSettings, shown_url

__all__ = ["S3Backend"]

Result = TypeVar("Result")

#: Passed on to the client as they are.
_CLIENT_OPTIONS = ("endpoint", "region", "session_token", "skip_signature", "virtual_hosted_style_request", "unsigned_payload")
_KNOWN = frozenset(
    (
        *_CLIENT_OPTIONS,
        "concurrency",
        "part_bytes",
        *(name + end for name in ("access_key_id", "secret_access_key") for end in ("", "_env", "_file")),
    )
)
_LEAST_PART = 5 * 1024**2
_TRUE = ("true", "yes", "on", "1")


class S3Backend:
    """Objects of a bucket, or of a prefix in it. Connects on first use.

    Options, in the tier's ``options`` or the URL's query: ``endpoint`` for storages other than Amazon's, ``region``,
    ``access_key_id`` and ``secret_access_key`` (each also with ``_env`` or ``_file``; else the usual ``AWS_…`` variables),
    ``session_token``, ``skip_signature``, ``virtual_hosted_style_request``, ``unsigned_payload``; ``concurrency`` (16), the
    requests that a call keeps under way; ``part_bytes`` (8 MiB), the size in which larger values are moved.

    Raises:
        ConfigError: a malformed URL or option, a capacity, or no package ``obstore``.
    """

    def __init__(self, settings: BackendSettings) -> None:
        where = f"tier {settings.name}"
        if settings.capacity:
            raise ConfigError(
                f"{where}: expected no capacity for a bucket, whose lifecycle rules bound it; got {settings.capacity}"
            )
        parts = urllib.parse.urlsplit(settings.url)
        if parts.scheme != "s3" or not parts.netloc or "@" in parts.netloc:
            raise ConfigError(f"{where}: expected a url such as s3://bucket/prefix; got {shown_url(settings.url)!r}")
        options = {**dict(urllib.parse.parse_qsl(parts.query)), **settings.options}
        _check_names(where, options)
        self._shown = shown_url(settings.url)
        self._folder = parts.path.strip("/")
        self._deadline = settings.deadline_seconds
        self._report = settings.report
        self._part = _part_bytes(where, options.get("part_bytes", 8 * 1024**2))
        #: Requests that a call keeps under way; also how many keys a lookup asks for at first.
        self.probe_concurrency = _concurrency(where, options.get("concurrency", 16))
        self._obstore, self._store = _open(where, parts.netloc, options, self._deadline)
        self._loop = _Loop()

    def __repr__(self) -> str:
        return f"S3Backend({self._shown})"

    def _path(self, key: ChunkKey) -> str:
        name = key.hex()
        return "/".join(part for part in (self._folder, name[:2], name) if part)

    # -- many requests at once -------------------------------------------------------------------------------------------

    def _each(
        self, operation: str, count: int, one: Callable[[int], Coroutine[Any, Any, Result]], otherwise: Result, seconds: float
    ) -> list[Result]:
        """``one(i)`` for all i, ``otherwise`` for those that failed or were too late.

        Raises:
            BackendUnavailableError: none of them came. If some did, the rest is reported.
        """
        results = [otherwise] * count
        errors: list[str] = []
        done = 0

        async def run(i: int, limit: asyncio.Semaphore) -> None:
            nonlocal done
            async with limit:
                try:
                    results[i] = await one(i)
                    done += 1
                except Exception as error:  # the library's errors have no narrower base than this
                    errors.append(_reason(error))

        async def run_all() -> None:
            limit = asyncio.Semaphore(self.probe_concurrency)
            tasks = [asyncio.ensure_future(run(i, limit)) for i in range(count)]
            _, late = await asyncio.wait(tasks, timeout=seconds)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=1.0)  # they hold views of the caller's buffers until then
                errors.append(f"{len(late)} of {count} requests were not answered within {seconds:.3g} s")

        if count:
            self._loop.run(run_all())
        if errors and not done:
            raise BackendUnavailableError(f"{self._shown}: {errors[0]}")
        if errors:
            self._report(operation, f"{self._shown}: {len(errors)} of {count} failed: {errors[0]}")
        return results

    # -- Backend ---------------------------------------------------------------------------------------------------------

    def contains_many(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """See :class:`lmkv.backends.base.Backend`. One HEAD request a key."""

        async def one(i: int) -> bool:
            try:
                await self._obstore.head_async(self._store, self._path(keys[i]))
            except FileNotFoundError:
                return False
            return True

        return self._each("lookup", len(keys), one, False, self._deadline)

    def read_many(self, keys: Sequence[ChunkKey], out: Sequence[memoryview]) -> list[int | None]:
        """See :class:`lmkv.backends.base.Backend`. Values of several parts come in ranges at once, all of one version."""

        async def one(i: int) -> int | None:
            return await self._get(self._path(keys[i]), out[i])

        return self._each("read", len(keys), one, None, self._deadline)

    async def _get(self, path: str, out: memoryview) -> int | None:
        try:
            got = await self._obstore.get_async(self._store, path, options={"range": (0, self._part)})
        except FileNotFoundError:
            return None
        size = int(got.meta["size"])
        if size > len(out):
            return None
        rest = [(begin, min(begin + self._part, size)) for begin in range(self._part, size, self._part)]
        parts = [_receive(got, out[: min(size, self._part)])]
        parts += [self._get_range(path, got.meta["e_tag"], begin, out[begin:end]) for begin, end in rest]
        return size if all(await asyncio.gather(*parts)) else None

    async def _get_range(self, path: str, tag: str | None, begin: int, out: memoryview) -> bool:
        options: dict[str, Any] = {"range": (begin, begin + len(out))}
        if tag:
            options["if_match"] = tag
        try:
            got = await self._obstore.get_async(self._store, path, options=options)
        except (FileNotFoundError, self._obstore.exceptions.PreconditionError):  # it was deleted or replaced meanwhile
            return False
        return await _receive(got, out)

    def write_many(self, keys: Sequence[ChunkKey], data: Sequence[memoryview]) -> None:
        """See :class:`lmkv.backends.base.Backend`. Each value gets the deadline's time of its own.

        Raises:
            BackendUnavailableError: some were not stored.
        """

        async def one(i: int) -> bool:
            large = len(data[i]) > 2 * self._part
            await self._obstore.put_async(
                self._store, self._path(keys[i]), data[i], use_multipart=large, chunk_size=self._part, max_concurrency=4
            )
            return True

        stored = self._each("write", len(keys), one, False, self._deadline * max(1, len(keys)))
        if not all(stored):
            raise BackendUnavailableError(f"{self._shown}: {stored.count(False)} of {len(keys)} values were not stored")

    def delete_many(self, keys: Sequence[ChunkKey]) -> None:
        """See :class:`lmkv.backends.base.Backend`."""

        async def one(i: int) -> bool:
            try:
                await self._obstore.delete_async(self._store, self._path(keys[i]))
            except FileNotFoundError:
                return False
            return True

        self._each("delete", len(keys), one, False, self._deadline)

    def clear(self) -> None:
        """See :class:`lmkv.backends.base.Clearable`: every object behind the prefix."""

        async def run() -> None:
            async for batch in self._obstore.list(self._store, prefix=self._folder or None, chunk_size=500):
                await self._obstore.delete_async(self._store, [item["path"] for item in batch])

        try:
            self._loop.run(run())
        except Exception as error:
            raise BackendError(f"{self._shown}: clear: {_reason(error)}") from None

    def close(self) -> None:
        """See :class:`lmkv.backends.base.Backend`."""
        self._loop.close()


async def _receive(got: Any, out: memoryview) -> bool:
    """The body of a response into its place; ``False`` if it has another length."""
    done = 0
    async for piece in got.stream(min_chunk_size=1024**2):
        view = memoryview(piece)
        if done + len(view) > len(out):
            return False
        out[done : done + len(view)] = view
        done += len(view)
    return done == len(out)


def _reason(error: BaseException) -> str:
    """What an error says without what was sent: a storage's reply may repeat the caller's credentials."""
    text = str(error)
    code = re.search(r"<Code>(\w+)</Code>", text)
    status = re.search(r"status:? (\d{3}[\w ]*)|\b([45]\d\d [A-Z][\w ]+)", text)
    said = " ".join(filter(None, (code and code[1], status and (status[1] or status[2]))))
    if not said:
        said = "no connection" if "connect" in text.lower() else "no answer" if "timed out" in text.lower() else ""
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


class _Loop:
    """An event loop on a thread of its own, started on first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Wait for ``work``, done on the loop.

        Raises:
            StoreClosedError: the loop was ended.
        """
        with self._lock:
            if self._closed:
                work.close()
                raise StoreClosedError("expected an open backend; it was closed")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="lmkv-s3", daemon=True)
                self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """End the thread; nothing may be under way."""
        with self._lock:
            self._closed = True
            loop, thread, self._loop = self._loop, self._thread, None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(5.0)
            if not thread.is_alive():
                loop.close()


def _open(where: str, bucket: str, options: Mapping[str, Any], deadline: float) -> tuple[Any, Any]:
    try:
        import obstore
        import obstore.store
    except ImportError:
        raise ConfigError(
            f"{where}: expected the package obstore for s3://; it is not installed: pip install 'lmkv[s3]'"
        ) from None
    config = {name: options[name] for name in _CLIENT_OPTIONS if name in options}
    for name in ("skip_signature", "virtual_hosted_style_request", "unsigned_payload"):
        if name in config:
            config[name] = str(config[name]).lower() in _TRUE
    for name in ("access_key_id", "secret_access_key"):
        secret = read_secret(options, name, where)
        if secret:
            config[name] = secret
    if "endpoint" in config:
        config.setdefault("region", "us-east-1")
    limit = datetime.timedelta(seconds=deadline)
    client: dict[str, Any] = {"connect_timeout": limit, "timeout": max(limit * 8, datetime.timedelta(seconds=30))}
    if str(config.get("endpoint", "")).startswith("http://"):
        client["allow_http"] = True
    retry = {
        "max_retries": 3,
        "retry_timeout": limit,
        "backoff": {"init_backoff": limit / 40, "max_backoff": limit / 4, "base": 2},
    }
    try:
        return obstore, obstore.store.S3Store(bucket, client_options=client, retry_config=retry, **config)
    except Exception as error:  # wrong settings, of whatever class the library makes them
        raise ConfigError(f"{where}: expected settings of an S3 bucket; {_reason(error)}") from None


def _check_names(where: str, options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in _KNOWN:
            near = difflib.get_close_matches(name, sorted(_KNOWN), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(_KNOWN))}"
            raise ConfigError(f"{where}: unknown option {name!r} of a bucket; {hint}")


def _part_bytes(where: str, value: object) -> int:
    size = parse_bytes(value)
    if size < _LEAST_PART:
        raise ConfigError(f"{where}: part_bytes: expected at least {_LEAST_PART} bytes, S3's smallest part; got {value!r}")
    return size


def _concurrency(where: str, value: object) -> int:
    text = str(value)
    if not text.isdigit() or not 0 < int(text) <= 1024:
        raise ConfigError(f"{where}: concurrency: expected a whole number from 1 to 1024; got {value!r}")
    return int(text)
