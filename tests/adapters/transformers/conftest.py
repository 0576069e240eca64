"""Reuses over a directory of the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """``opened(model, **store settings)``: a ``KVReuse`` over one directory, closed at the test's end."""
    from tiny_models import make_store_config

    from lmkv.adapters.transformers import KVReuse

    made: list[KVReuse] = []

    def open_reuse(model: Any, **settings: Any) -> KVReuse:
        made.append(KVReuse.open(model, make_store_config(tmp_path / "kv", **settings)))
        return made[-1]

    yield open_reuse
    for reuse in made:
        reuse.close()
