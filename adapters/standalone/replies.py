"""Errors as they cross HTTP: ``{"error": {"type": …, "message": …}}`` with a matching status, and back again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NoReturn

from lmkv import errors
from lmkv.errors import (
    ArgumentError,
    BackendError,
    BackendUnavailableError,
    CapacityError,
    ConfigError,
    CorruptRecordError,
    LayoutMismatchError,
    LMKVError,
    StoreClosedError,
)

__all__ = ["RefusedError", "error_body", "raise_reply", "status_of"]

#: The first class that an error is an instance of decides.
_STATUS: tuple[tuple[type[LMKVError], int], ...] = (
    (LayoutMismatchError, 409),
    (ArgumentError, 400),
    (ConfigError, 400),
    (CapacityError, 507),
    (StoreClosedError, 503),
    (CorruptRecordError, 400),
    (BackendUnavailableError, 503),
    (BackendError, 502),
    (LMKVError, 500),
)

#: Types that only the service knows, and what they are to a client.
_SERVICE_TYPES: Mapping[str, type[LMKVError]] = {
    "Unauthorized": ConfigError,
    "Forbidden": ConfigError,
    "NotFound": ConfigError,
    "MethodNotAllowed": ConfigError,
    "UnsupportedMediaType": ArgumentError,
    "BodyTooLarge": CapacityError,
    "Timeout": BackendUnavailableError,
    "Busy": BackendUnavailableError,
    "Stopping": StoreClosedError,
}


class RefusedError(Exception):
    """The service will not do what a request asks, for a reason that has no LMKV error."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


def status_of(error: LMKVError) -> tuple[int, str]:
    """HTTP status and type name of an error."""
    status = next(status for cls, status in _STATUS if isinstance(error, cls))
    return status, type(error).__name__


def error_body(kind: str, message: str) -> bytes:
    """The JSON body of an error reply."""
    return json.dumps({"error": {"type": kind, "message": message}}).encode() + b"\n"


def raise_reply(status: int, body: bytes, where: str) -> NoReturn:
    """Raise the error that a reply holds.

    Raises:
        LMKVError: the class that the reply names, or :class:`BackendError` for a reply that is none of this service's.
    """
    try:
        error = json.loads(body)["error"]
        kind, message = str(error["type"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        text = body[:200].decode("utf-8", "replace").strip()
        raise BackendError(f"{where}: expected a reply of an LMKV service; got status {status}: {text!r}") from None
    cls = _SERVICE_TYPES.get(kind) or getattr(errors, kind, None)
    if not (isinstance(cls, type) and issubclass(cls, LMKVError)):
        cls = BackendError
    raise cls(f"{where}: {message}")
