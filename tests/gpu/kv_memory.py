"""What an engine's workers hold in their KV memory, asked by ``LLM.collective_rpc``; runs in the workers."""

from __future__ import annotations

import hashlib
from typing import Any

__all__ = ["block_hashes", "wipe"]


#: What wiped memory holds; exact in every type, and rare in KV.
_WIPED = -77.0


def wipe(worker: Any) -> None:
    """Overwrite all KV, and see it done, so that what is found later was put there since."""
    import torch

    for cache in worker.model_runner.kv_caches:
        cache.fill_(_WIPED)
    if cache.is_cuda:
        torch.cuda.synchronize(cache.device)  # a load that follows does not wait for it


def block_hashes(worker: Any) -> list[list[str]]:
    """For each layer the hashes of blocks all of whose tokens were written since :func:`wipe`, sorted."""
    import torch

    found = []
    for cache in worker.model_runner.kv_caches:
        blocks = cache.movedim(max(range(cache.dim()), key=cache.shape.__getitem__), 0)
        rows = blocks.reshape(len(blocks), -1).cpu().contiguous()
        whole = (rows == _WIPED).float().mean(dim=1) < 1 / 1024  # no block has so many tokens
        written = rows[whole].view(torch.uint8).numpy()
        found.append(sorted({hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in written}))
    return found
