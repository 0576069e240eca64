"""Test infrastructure, run by SGLang as a plug-in: what LMKV's slots and SGLang's pool hold, byte by byte; planted errors.

``PROBE_FILE`` names a file that holds a position, or nothing. The heads of that position are swapped in LMKV's slots while they
are loaded. Beside it, ``.texts`` holds texts (JSON, token ids): when SGLang's tree is next emptied, each is compared between
the pool, at the slots where the tree has it, and the payloads that LMKV finds for it; ``.found`` says what was found.
``PROBE_PLANT`` plants an error that the comparison has to find: ``byte``, ``stale`` (a text's last token is kept as if it were
read before it was computed) or ``load``.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Bytes", "register"]


def register() -> None:
    """The plug-in's function."""
    path = os.environ.get("PROBE_FILE")
    if not path:
        return
    from lmkv.adapters.sglang import radix
    from lmkv.adapters.sglang.pages import PageStore

    _swap_heads(PageStore, path)
    made = radix.open_tree
    probe = Bytes(path)

    def open_tree(*args: Any, **more: Any) -> Any:
        tree = made(*args, **more)
        if hasattr(tree, "lmkv"):
            probe.watch(tree)
        return tree

    radix.open_tree = open_tree
    probe.record(PageStore)


def _swap_heads(store: Any, path: str) -> None:
    original = store.load

    def load(self: Any, lease: Any, slots: Any, **more: Any) -> Any:
        said = Path(path).read_text().strip()
        place = next((slot for slot in lease.slots if said and slot.start <= int(said) < slot.start + slot.tokens), None)
        if place is None:
            return original(self, lease, slots, **more)
        data = np.frombuffer(self.store._ram.payload(place.id, place.tokens), np.uint8)
        rows = _by_position(self.store.layout, data, place.tokens)
        at = int(said) - place.start
        kept = rows[at].copy()
        rows[at] = kept[:, :, ::-1]  # numbers of the right size, in wrong places
        try:
            found = original(self, lease, slots, **more)
            found.finish()
        finally:
            rows[at] = kept
        Path(path + ".seen").write_text(said)
        return found

    store.load = load


def _by_position(layout: Any, data: Any, tokens: int) -> Any:
    """A payload's bytes as [tokens, layers, kv, heads, bytes of a head], a view."""
    (group,) = layout.groups
    rows = data[: group.token_bytes * tokens].reshape(group.layers, group.kv, group.heads, tokens, -1)
    return rows.transpose(3, 0, 1, 2, 4)


class Bytes:
    """Compares the pool with the payloads. All of it runs on the scheduler's thread, but saves.

    Args:
        path: of the probe's file.
    """

    def __init__(self, path: str) -> None:
        self._texts, self._found = Path(path + ".texts"), Path(path + ".found")
        self._plant = os.environ.get("PROBE_PLANT", "")
        self._saves: list[tuple[Any, Any]] = []
        self._loads: list[tuple[int, Any]] = []
        self._tree: Any = None

    def watch(self, tree: Any) -> None:
        """Compare before the tree is emptied."""
        reset, self._tree = tree.reset, tree

        def compared() -> None:
            if self._texts.exists():
                tree._settle()
                texts = json.loads(self._texts.read_text())
                self._texts.unlink()
                done = self._found.with_suffix(".part")
                done.write_text(json.dumps([self._compare(text) for text in texts]))
                done.rename(self._found)
            self._saves.clear()
            self._loads.clear()
            reset()

        tree.reset = compared

    def record(self, store: Any) -> None:
        """Remember which slots are kept and loaded."""
        save, load = store.save, store.load

        def saved(this: Any, text: Any, slots: Any, **more: Any) -> Any:
            found = save(this, text, slots, **more)
            self._saves.append((text.tokens.copy(), np.array(slots)))
            if self._plant in ("byte", "stale") and found._copy is not None:
                found._copy.wait()
                for slot in found._reservation.slots:
                    rows = _by_position(this.store.layout, np.frombuffer(slot.payload, np.uint8), slot.tokens)
                    if self._plant == "byte":
                        rows[slot.tokens // 2, -1, -1, -1, -1] ^= 1
                    elif slot.start + slot.tokens == len(text):
                        rows[-1] = 0
            return found

        def loaded(this: Any, lease: Any, slots: Any, *, first: int = 0, **more: Any) -> Any:
            found = load(this, lease, slots, first=first, **more)
            numbers = np.array(slots.cpu())
            self._loads.append((first, numbers))
            if self._plant == "load":
                found.finish()
                self._layers()[0][0][int(numbers[len(numbers) // 2])] += 1
            return found

        store.save, store.load = saved, loaded

    def _layers(self) -> Any:
        from lmkv.adapters.sglang.pools import device_pool

        return device_pool(self._tree.token_to_kv_pool_allocator.get_kvcache()).layers

    def _compare(self, tokens: list[int]) -> dict[str, Any]:
        """One text: tokens that the tree has (``tree``) and LMKV finds (``kept``), the positions at which they differ among
        those that both have (``differ``), a digest of the tree's KV at each position, which part was loaded into the tree's
        slots (``loaded``), and whether every save of this text named the tree's slots (``same_slots``)."""
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

        key = RadixKey(array("q", tokens), None)
        slots = RadixCache.match_prefix(self._tree, MatchPrefixParams(key=key)).device_indices
        pool = self._pool(slots)
        kept = self._payload(tokens, pool.shape[1])
        both = min(len(pool), len(kept))
        numbers = slots.cpu().numpy()
        differ = np.flatnonzero((pool[:both] != kept[:both]).any(axis=1))
        loaded = [
            [first, first + len(into)]
            for first, into in self._loads
            if len(into) and np.array_equal(numbers[first : first + len(into)], into)
        ]
        mine = [(ids, named) for ids, named in self._saves if np.array_equal(ids, tokens[: len(ids)])]
        return {
            "tree": len(pool),
            "kept": len(kept),
            "differ": differ.tolist(),
            "loaded": loaded,
            "saves": len(mine),
            "same_slots": all(np.array_equal(named, numbers[: len(named)]) for _, named in mine),
            "digests": [hashlib.blake2b(row.tobytes(), digest_size=6).hexdigest() for row in pool],
        }

    def _pool(self, slots: Any) -> Any:
        """The pool's bytes at slots as [slots, bytes], ordered as a payload's are."""
        import torch

        if slots.is_cuda:
            torch.cuda.synchronize(slots.device)
        layers = [torch.stack([part[slots, 0] for part in layer]) for layer in self._layers()]
        rows = torch.stack(layers).permute(2, 0, 1, 3, 4).contiguous()  # [slots, layers, kv, heads, head size]
        data = rows.view(torch.uint8).cpu().numpy()
        return data.reshape(len(slots), int(np.prod(data.shape[1:])))  # of a text that the tree has lost, too

    def _payload(self, tokens: list[int], width: int) -> Any:
        """What LMKV has of a text, as [tokens, bytes]."""
        pages = self._tree.lmkv.pages
        lease = pages.lease(pages.find(pages.text(tokens)).wait(5.0))
        try:
            found = [
                _by_position(pages.store.layout, np.frombuffer(slot.payload, np.uint8), slot.tokens) for slot in lease.slots
            ]
            rows = [np.ascontiguousarray(part).reshape(len(part), -1) for part in found]
            return np.concatenate([np.empty((0, width), np.uint8), *rows])[: lease.hit_tokens]
        finally:
            lease.release()
