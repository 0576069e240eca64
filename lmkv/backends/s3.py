"""Values as objects of an S3 bucket, through the package ``obstore``: its signing, retries, multipart uploads and ranges.

One object a value, ``<prefix>/<two hex digits>/<chunk key in hex>``, put whole or not at all. Every key costs a request, so
calls keep several under way at once, on threads of their own; what has not come when the deadline passes is a miss, and is not
copied to where it was meant to go any more.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import difflib
import re
import threading
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from ..chunks import ChunkKey
from ..config import parse_bytes, read_secret
from ..errors import BackendError, BackendUnavailableError, ConfigError, StoreClosedError
from .base import BackendSettings, shown_url
from .place import Place

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
#: A value's object behind the prefix.
_OURS = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{30}")


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
        self._conditional = True
        self._lock = threading.Lock()
        self._threads: concurrent.futures.ThreadPoolExecutor | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"S3Backend({self._shown})"

    def _path(self, key: ChunkKey) -> str:
        name = key.hex()
        return "/".join(part for part in (self._folder, name[:2], name) if part)

    # -- many requests at once -------------------------------------------------------------------------------------------

    def _pool(self) -> concurrent.futures.ThreadPoolExecutor:
        with self._lock:
            if self._closed:
                raise StoreClosedError("expected an open backend; it was closed")
            if self._threads is None:
                self._threads = concurrent.futures.ThreadPoolExecutor(self.probe_concurrency, thread_name_prefix="lmkv-s3")
            return self._threads

    def _each(self, operation: str, calls: Sequence[Callable[[], Result]], otherwise: Result, seconds: float) -> list[Result]:
        """What the calls return, ``otherwise`` for those that failed or were too late.

        Raises:
            BackendUnavailableError: none of them came. If some did, the rest is reported.
        """
        if not calls:
            return []
        pool = self._pool()
        futures = [pool.submit(call) for call in calls]
        _, late = concurrent.futures.wait(futures, seconds)
        for future in late:
            future.cancel()
        results: list[Result] = []
        errors = [f"{len(late)} of {len(calls)} requests were not answered within {seconds:.3g} s"] if late else []
        for future in futures:
            error = None if future in late else future.exception()
            if error is not None:
                errors.append(_reason(error))
            results.append(otherwise if future in late or error is not None else future.result())
        failed = len(late) + len(errors) - bool(late)
        if failed == len(calls):
            raise BackendUnavailableError(f"{self._shown}: {errors[0]}")
        if failed:
            self._report(operation, f"{self._shown}: {failed} of {len(calls)} failed: {errors[0]}")
        return results

    # -- Backend ---------------------------------------------------------------------------------------------------------

    def contains_many(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """See :class:`lmkv.backends.base.Backend`. One HEAD request a key."""

        def ask(path: str) -> bool:
            try:
                self._obstore.head(self._store, path)
            except FileNotFoundError:
                return False
            return True

        return self._each("lookup", [partial(ask, self._path(key)) for key in keys], False, self._deadline)

    def read_many(self, keys: Sequence[ChunkKey], out: Sequence[memoryview]) -> list[int | None]:
        """See :class:`lmkv.backends.base.Backend`. Values of several parts come in ranges of one version."""
        places = [Place(view) for view in out]
        try:
            calls = [partial(self._get, self._path(key), place) for key, place in zip(keys, places, strict=True)]
            return self._each("read", calls, None, self._deadline)
        finally:
            for place in places:
                place.withdraw()

    def _get(self, path: str, place: Place) -> int | None:
        try:
            got = self._obstore.get(self._store, path, options={"range": (0, self._part)})
        except FileNotFoundError:
            return None
        size = int(got.meta["size"])
        if size > place.room or not place.put(0, min(size, self._part), got.bytes()):
            return None
        for begin in range(self._part, size, self._part):
            options: dict[str, Any] = {"range": (begin, min(begin + self._part, size))}
            if got.meta["e_tag"]:
                options["if_match"] = got.meta["e_tag"]
            try:
                more = self._obstore.get(self._store, path, options=options)
            except (FileNotFoundError, self._obstore.exceptions.PreconditionError):  # deleted or replaced meanwhile
                return None
            if not place.put(begin, min(self._part, size - begin), more.bytes()):
                return None
        return size

    def write_many(self, keys: Sequence[ChunkKey], data: Sequence[memoryview]) -> None:
        """See :class:`lmkv.backends.base.Backend`. Each value gets the deadline's time of its own.

        Raises:
            BackendUnavailableError: some were not stored.
        """
        self._store_all(self._put, keys, data)

    def create_many(self, keys: Sequence[ChunkKey], data: Sequence[memoryview]) -> None:
        """See :class:`lmkv.backends.base.Creating`. Puts are conditional (``If-None-Match``), but for multipart uploads.

        Raises:
            BackendUnavailableError: some were not stored.
        """
        self._store_all(self._create, keys, data)

    def _put(self, path: str, piece: memoryview) -> bool:
        large = len(piece) > 2 * self._part
        self._obstore.put(self._store, path, piece, use_multipart=large, chunk_size=self._part, max_concurrency=4)
        return True

    def _create(self, path: str, piece: memoryview) -> bool:
        if not self._conditional or len(piece) > 2 * self._part:
            return self._put(path, piece)
        try:
            self._obstore.put(self._store, path, piece, mode="create", use_multipart=False)
        except self._obstore.exceptions.AlreadyExistsError:
            pass
        except Exception as error:  # whether the storage knows the condition is in the text only
            if "501" not in str(error) and not isinstance(error, NotImplementedError):
                raise
            self._conditional = False  # it is not asked again
            return self._put(path, piece)
        return True

    def _store_all(self, put: Callable[[str, memoryview], bool], keys: Sequence[ChunkKey], data: Sequence[memoryview]) -> None:
        calls = [partial(put, self._path(key), piece) for key, piece in zip(keys, data, strict=True)]
        stored = self._each("write", calls, False, self._deadline * max(1, len(keys)))
        if not all(stored):
            raise BackendUnavailableError(f"{self._shown}: {stored.count(False)} of {len(keys)} values were not stored")

    def delete_many(self, keys: Sequence[ChunkKey]) -> None:
        """See :class:`lmkv.backends.base.Backend`."""

        def delete(path: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._obstore.delete(self._store, path)

        self._each("delete", [partial(delete, self._path(key)) for key in keys], None, self._deadline)

    def clear(self) -> None:
        """See :class:`lmkv.backends.base.Clearable`: every value behind the prefix, and nothing else that lies there."""
        begin = len(self._folder) + 1 if self._folder else 0
        try:
            for batch in self._obstore.list(self._store, prefix=self._folder or None, chunk_size=500):
                paths = [item["path"] for item in batch if _OURS.fullmatch(item["path"], begin)]
                if paths:
                    self._obstore.delete(self._store, paths)
        except Exception as error:  # the library's errors have no narrower base than this
            raise BackendError(f"{self._shown}: clear: {_reason(error)}") from None

    def close(self) -> None:
        """See :class:`lmkv.backends.base.Backend`."""
        with self._lock:
            self._closed = True
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=False, cancel_futures=True)


def _reason(error: BaseException) -> str:
    """What an error says without what was sent: a storage's reply may repeat the caller's credentials."""
    text = str(error)
    code = re.search(r"<Code>(\w+)</Code>", text)
    status = re.search(r"status:? (\d{3}[\w ]*)|\b([45]\d\d [A-Z][\w ]+)", text)
    said = " ".join(filter(None, (code and code[1], status and (status[1] or status[2]))))
    if not said:
        said = "no connection" if "connect" in text.lower() else "no answer" if "timed out" in text.lower() else ""
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


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
    client: dict[str, Any] = {"connect_timeout": limit, "timeout": limit}
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
