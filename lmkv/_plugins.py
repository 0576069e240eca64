"""Finding policies, codecs and backends by name: built-in ones first, then entry points, each loaded on first use."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from collections.abc import Mapping
from typing import Any

from .errors import ConfigError

__all__ = ["find"]


def find(kind: str, name: str, builtin: Mapping[str, str]) -> Any:
    """The factory that ``name`` stands for.

    Args:
        kind: ``policies``, ``codecs`` or ``backends``; the entry point group is ``lmkv.<kind>``.
        builtin: name -> ``"module:attribute"``.

    Raises:
        ConfigError: no such name; the nearest known one is named.
    """
    wanted = name.lower()
    if wanted in builtin:
        module, attribute = builtin[wanted].split(":")
        return getattr(importlib.import_module(module), attribute)
    points = {point.name.lower(): point for point in importlib.metadata.entry_points(group=f"lmkv.{kind}")}
    if wanted in points:
        try:
            return points[wanted].load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"{kind}: {name!r} is registered as {points[wanted].value}, which does not load: {error}"
            ) from error
    known = sorted({*builtin, *points})
    near = difflib.get_close_matches(wanted, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{kind}: expected one of {', '.join(known)}; got {name!r}{hint}")
