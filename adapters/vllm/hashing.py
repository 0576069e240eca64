"""What is done as a request arrives, in a thread beside the one that schedules.

With prefix caching or a connector vLLM hashes each block of each request as it arrives: 2.5 ms for 10,000 tokens, in a thread
that takes the interpreter from the one that schedules. LMKV names chunks by keys of its own; what these are made of, the prompt
as an array, is made here, so that it is there for prompts that came while a step ran once they are scheduled.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.engine.core import EngineCore

from .texts import keep_prompt

__all__ = ["prepare_requests"]


def prepare_requests(connector: type) -> None:
    """Have this process's engines hash no blocks while prefix caching is off and their connector is one of that class, and keep
    prompts as arrays for it.

    Does nothing under a vLLM whose engine has no such method.
    """
    original = getattr(EngineCore, "preprocess_add_request", None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def preprocess_add_request(engine: Any, request: Any) -> Any:
        if getattr(engine, "request_block_hasher", None) is not None and _unread(engine, connector):
            engine.request_block_hasher = None
        made = original(engine, request)
        if isinstance(engine.scheduler.get_kv_connector(), connector):
            keep_prompt(made[0] if isinstance(made, tuple) else made)
        return made

    EngineCore.preprocess_add_request = preprocess_add_request  # type: ignore[method-assign]


def _unread(engine: Any, connector: type) -> bool:
    """Whether prefix caching and another connector, as part of one that joins several, are both absent."""
    used = engine.scheduler.get_kv_connector()
    return isinstance(used, connector) and not engine.vllm_config.cache_config.enable_prefix_caching
