"""vLLM: ``vllm serve MODEL --kv-transfer-config '{"kv_connector":"LMKVConnector","kv_role":"kv_both"}'``.

Installing LMKV beside vLLM is enough: an entry point registers the connector. ``docs/vllm.md`` says the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .connector import LMKVConnector

__all__ = ["LMKVConnector", "register"]


def register() -> None:
    """Tell vLLM's factory the connector's name; called by vLLM in each of its processes (``vllm.general_plugins``)."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if "LMKVConnector" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector("LMKVConnector", "lmkv.adapters.vllm.connector", "LMKVConnector")


def __getattr__(name: str) -> Any:
    if name == "LMKVConnector":
        from .connector import LMKVConnector

        return LMKVConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
