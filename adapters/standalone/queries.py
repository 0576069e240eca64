"""Requests about a text: its tokens, the range that is wanted, and the namespace it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lmkv.chunks import token_bytes
from lmkv.errors import ArgumentError

from .frames import MAX_TOKENS, SCOPE_FIELDS, Head, check_scope

__all__ = ["TextQuery", "read_json"]

#: The longest that one request may wait for a slow tier's answer.
MAX_WAIT_SECONDS = 60.0
_FIELDS = ("tokens", "start", "stop", "anywhere", "wait_seconds", *SCOPE_FIELDS)


def read_json(data: bytes, fields: Sequence[str]) -> dict[str, Any]:
    """A JSON object with keys out of ``fields``; an empty body is an empty object.

    Raises:
        ArgumentError: something else.
    """
    if not data.strip():
        return {}
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"expected a JSON body; got: {error}") from None
    if not isinstance(value, dict):
        raise ArgumentError(f"expected a JSON object; got {type(value).__name__}")
    for key in value:
        if key not in fields:
            raise ArgumentError(f"expected keys out of {', '.join(fields) or '(none)'}; got {key!r}")
    return value


@dataclass(frozen=True)
class TextQuery:
    """A text and what is asked about it.

    Args:
        tokens: the whole text, little-endian uint32.
        start, stop: range of tokens to retrieve; ``stop`` ``None`` is the end.
        anywhere: also find its chunks where they stood in other texts.
        wait_seconds: how long to wait for tiers that answer late.
        scope: changes to the service's namespace.
    """

    tokens: npt.NDArray[np.uint32]
    start: int = 0
    stop: int | None = None
    anywhere: bool = False
    wait_seconds: float = 0.0
    scope: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_json(cls, data: bytes) -> TextQuery:
        """From a JSON body.

        Raises:
            ArgumentError: a key is missing, unknown or of the wrong type.
        """
        values = read_json(data, _FIELDS)
        ids = values.get("tokens")
        if not isinstance(ids, list):
            raise ArgumentError(f"expected tokens as a list of whole numbers; got {type(ids).__name__}")
        if len(ids) > MAX_TOKENS:
            raise ArgumentError(f"expected at most {MAX_TOKENS} tokens; got {len(ids)}")
        tokens = np.frombuffer(token_bytes(ids), "<u4")
        start, stop = values.get("start", 0), values.get("stop")
        for name, value in (("start", start), ("stop", len(ids) if stop is None else stop)):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= len(ids):
                raise ArgumentError(f"expected {name} from 0 to {len(ids)}; got {value!r}")
        anywhere, wait = values.get("anywhere", False), values.get("wait_seconds", 0)
        if not isinstance(anywhere, bool):
            raise ArgumentError(f"expected anywhere as true or false; got {anywhere!r}")
        if isinstance(wait, bool) or not isinstance(wait, (int, float)) or not 0 <= wait <= MAX_WAIT_SECONDS:
            raise ArgumentError(f"expected wait_seconds from 0 to {MAX_WAIT_SECONDS:.0f}; got {wait!r}")
        scope = check_scope({name: values[name] for name in SCOPE_FIELDS if name in values})
        return cls(tokens, start, stop, anywhere, float(wait), scope)

    @classmethod
    def of_head(cls, head: Head) -> TextQuery:
        """From the head of a binary request."""
        return cls(np.frombuffer(head.tokens, "<u4"), head.start, head.stop, scope=head.scope)
