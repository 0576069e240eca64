"""The contracts of what third parties can add, as suites of tests to inherit, and backends that misbehave on purpose.

    from lmkv.testing import BackendSuite

    class TestMyBackend(BackendSuite):
        def make(self, settings):
            return MyBackend(settings)

The suites need pytest and hypothesis (``pip install 'lmkv[test]'``); the misbehaving backends need neither. Names load on first
use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "BackendSuite": "backend_suite",
    "CodecSuite": "codec_suite",
    "DelayedBackend": "faults",
    "FlakyBackend": "faults",
    "FlippingBackend": "faults",
    "PolicySuite": "policy_suite",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from .backend_suite import BackendSuite as BackendSuite
    from .codec_suite import CodecSuite as CodecSuite
    from .faults import DelayedBackend as DelayedBackend
    from .faults import FlakyBackend as FlakyBackend
    from .faults import FlippingBackend as FlippingBackend
    from .policy_suite import PolicySuite as PolicySuite


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'lmkv.testing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
