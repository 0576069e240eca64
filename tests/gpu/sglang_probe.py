"""Test infrastructure, run by SGLang as a plug-in: swaps the heads of one position in LMKV's slots while they are loaded.

The file that ``PROBE_FILE`` names holds the position, or nothing, and then loads are left alone.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def register() -> None:
    """The plug-in's function."""
    path = os.environ.get("PROBE_FILE")
    if not path:
        return
    import numpy as np

    from lmkv.adapters.sglang.pages import PageStore

    original = PageStore.load

    def load(self: Any, lease: Any, slots: Any, **more: Any) -> Any:
        said = Path(path).read_text().strip()
        place = next((slot for slot in lease.slots if said and slot.start <= int(said) < slot.start + slot.tokens), None)
        if place is None:
            return original(self, lease, slots, **more)
        layout = self.store.layout
        group = layout.groups[0]
        data = np.frombuffer(self.store._ram.payload(place.id, place.tokens), np.uint8)
        rows = data[: group.token_bytes * place.tokens].reshape(group.layers, group.kv, group.heads, place.tokens, -1)
        at = int(said) - place.start
        kept = rows[:, :, :, at].copy()
        rows[:, :, :, at] = kept[:, :, ::-1]  # numbers of the right size, in wrong places
        try:
            found = original(self, lease, slots, **more)
            found.finish()
        finally:
            rows[:, :, :, at] = kept
        Path(path + ".seen").write_text(said)
        return found

    PageStore.load = load  # type: ignore[method-assign]
