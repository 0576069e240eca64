"""vLLM's own hashes of blocks, where nobody would read them.

With prefix caching or a connector vLLM hashes each block of each request as it arrives: 2.5 ms for 10,000 tokens, in a thread
that takes the interpreter from the one that schedules. LMKV names chunks by keys of its own.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.engine.core import EngineCore

__all__ = ["spare_block_hashes"]


def spare_block_hashes(connector: type) -> None:
    """Have this process's engines hash no blocks while prefix caching is off and their connector is one of that class.

    Does nothing under a vLLM whose engine has no such method.
    """
    original = getattr(EngineCore, "preprocess_add_request", None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def preprocess_add_request(engine: Any, request: Any) -> Any:
        if getattr(engine, "request_block_hasher", None) is not None and _unread(engine, connector):
            engine.request_block_hasher = None
        return original(engine, request)

    EngineCore.preprocess_add_request = preprocess_add_request  # type: ignore[method-assign]


def _unread(engine: Any, connector: type) -> bool:
    """Whether prefix caching and another connector, as part of one that joins several, are both absent."""
    used = engine.scheduler.get_kv_connector()
    return isinstance(used, connector) and not engine.vllm_config.cache_config.enable_prefix_caching
