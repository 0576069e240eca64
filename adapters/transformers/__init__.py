"""Reuse of KV between calls of Hugging Face causal language models.

    reuse = KVReuse.open(model)                    # a store with the model's layout and name
    ids = tokenizer(text, return_tensors="pt").input_ids
    out = reuse.generate(ids, max_new_tokens=50)   # what model.generate returns; the known prefix is loaded, not computed
    reuse.last_use[0].hit_tokens                   # how much of it was known

Importing this package imports neither torch nor transformers: names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "KVReuse": "reuse",
    "Prefill": "reuse",
    "RowUse": "rows",
    "layout_of": "model",
    "namespace_settings": "model",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from .model import layout_of as layout_of
    from .model import namespace_settings as namespace_settings
    from .reuse import KVReuse as KVReuse
    from .reuse import Prefill as Prefill
    from .rows import RowUse as RowUse


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
