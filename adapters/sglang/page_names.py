"""Names of HiCache's pages under an SGLang that leaves the tenant out of them.

SGLang chains a page's name over the tokens before it. Later versions begin the chain with what else keeps requests apart
(``extra_key``: a cache salt, a LoRA adapter); up to 0.5.17 they do not, and a storage would give one adapter the KV of another.
Here such a version's tree is taught to begin the chains of its nodes likewise. What it looks up for a request that has no node
in the tree yet begins at no tenant: such a request finds nothing in the storage, which is a miss and no more.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import sys
from typing import Any

__all__ = ["tell_tenants_apart"]

_NAMES = "sglang.srt.mem_cache.utils"
_FUNCTION = "compute_node_hash_values"
_TREES = ("sglang.srt.mem_cache.hiradix_cache", "sglang.srt.mem_cache.events", "sglang.srt.mem_cache.hi_mamba_radix_cache")


def tell_tenants_apart() -> bool:
    """Have pages of different tenants named differently in this process; ``False`` if this SGLang is not understood."""
    try:
        names = importlib.import_module(_NAMES)
    except ImportError:
        return False
    if hasattr(names, "storage_namespace_seed"):
        return True
    original = getattr(names, _FUNCTION, None)
    if original is None or not hasattr(names, "get_hash_str"):
        return False
    if hasattr(original, "_lmkv"):
        return True
    seeded = _seeded(original, names)
    for name in _TREES:
        importlib.import_module(name)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("sglang.srt.") and vars(module).get(_FUNCTION) is original:
            setattr(module, _FUNCTION, seeded)
    return True


def _seeded(original: Any, names: Any) -> Any:
    @functools.wraps(original)
    def values(node: Any, page_size: int) -> Any:
        tenant = getattr(node.key, "extra_key", None)
        above = node.parent
        begins = above is None or above.hash_value is None or not len(above.key) or not above.hash_value
        if tenant is None or not begins:
            return original(node, page_size)
        seed = hashlib.sha256(b"lmkv-page-names/1\0" + str(tenant).encode()).hexdigest()
        return names.get_hash_str(node.key, seed, page_size=page_size)

    values._lmkv = True  # type: ignore[attr-defined]
    return values
