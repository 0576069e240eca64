"""Of what text and layouts ``tests/fixtures/lmcache`` is, and files as LMCache would write them of other texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import lmkv
from lmkv.adapters.lmcache.old_keys import FORMS, chains

__all__ = ["FIXTURE_LAYOUTS", "FIXTURE_TEXT", "write_chunks"]

FIXTURE_TEXT = [7 * i % 50021 for i in range(40)]
FIXTURE_LAYOUTS = {
    "dense": lmkv.KVLayout.dense(layers=3, heads=2, head_size=4, dtype="float16", chunk_tokens=16),
    "latent": lmkv.KVLayout.dense(layers=3, heads=1, head_size=8, dtype="bfloat16", chunk_tokens=16, mla=True),
}


def write_chunks(folder: Path, text: Sequence[int], parts: Sequence[Any], dtype: str, world_size: int = 1) -> None:
    """Files of 16 tokens as LMCache 0.3.15 names them without vLLM, which ``tests/fixtures/lmcache`` proves the names of.

    Args:
        parts: [layers, kv, heads, tokens, head_size] of each worker.
        dtype: as its keys have it.
    """
    form = FORMS[0]
    chain = next(chain for chain in chains("builtin", "", ("vllm",)) if chain.form is form)
    numbers = list(chain.numbers([tuple(text[at : at + 16]) for at in range(0, len(text), 16)]))
    for worker, part in enumerate(parts):
        for i, number in enumerate(numbers):
            chunk = np.ascontiguousarray(part[:, :, :, 16 * i : 16 * i + 16].transpose(1, 0, 3, 2, 4))
            name = form.name("", "org/model", world_size, worker, number, dtype).replace("/", "-")
            (folder / f"{name}.pt").write_bytes(chunk.tobytes())
