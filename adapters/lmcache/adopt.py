"""Chunks that LMCache 0.3 left in a Redis or on a disk, brought into a store: read, converted, never written to.

LMCache's keys are hashes of a text's tokens, so whoever has the tokens can ask for its chunks. What is found is checked against
the store's layout by its length and, in Redis, by its description, and is stored under LMKV's own keys; from then on every
engine of the store finds it. **LMCache's values carry no checksum**: a flipped bit passes, which is why nothing of this happens
unless it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lmkv.chunks import Namespace, token_bytes
from lmkv.errors import BackendUnavailableError, ConfigError, LayoutMismatchError
from lmkv.layout import KVLayout, LayerGroup
from lmkv.store import Store
from lmkv.transfer import DenseKV

from .old_keys import HASH_OF_NONE, Chain, chains
from .old_places import Expected, open_place

__all__ = ["Adopted", "Adopter", "Compared", "Origin"]

#: Element types as LMCache's keys have them, where they differ.
_KEY_DTYPES = {
    "float16": "half", "float32": "float", "float64": "double", "float8_e4m3fn": "fp8_e4m3fn", "float8_e5m2": "fp8_e5m2",
}  # fmt: skip
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
#: What engines call themselves at the beginning of LMCache's older keys.
_ENGINES = ("vllm", "sgl")
#: Tokens that are in memory at a time; chunk sizes of both projects have a common multiple below it.
_MOST_WINDOW = 65536
_WAIT_SECONDS = 10.0


@dataclass(frozen=True)
class Origin:
    """Where LMCache kept its values, and the settings that its keys depend on.

    Args:
        where: a directory (its ``local_disk``), or the url of a Redis (its ``remote_url``).
        model: as LMCache had it: the engine's ``--model``, path or name.
        chunk_size: its ``chunk_size``.
        hash_algorithm: its ``pre_caching_hash_algorithm``.
        hash_seed: the ``PYTHONHASHSEED`` of the engine's process; empty for none.
        world_size: tensor times pipeline parallel size of the engine.
        workers: whose parts make up a chunk of the store, in its order of layers; all of them by default, or the first one of
            a model with latents (MLA), which all hold alike. A store of one of several ranks, as SGLang has them, names that.
        engines: names at the beginning of keys of LMCache before 0.3.13.
        hash_of_none: ``hash(None)`` of the engine's process, which is known from Python 3.12 on.
        deadline_seconds: of one request to a Redis.
    """

    where: str
    model: str
    chunk_size: int = 256
    hash_algorithm: str = "builtin"
    hash_seed: str = ""
    world_size: int = 1
    workers: tuple[int, ...] = ()
    engines: tuple[str, ...] = _ENGINES
    hash_of_none: int = HASH_OF_NONE
    deadline_seconds: float = 10.0


@dataclass(frozen=True)
class Adopted:
    """What became of one text.

    Args:
        tokens: newly stored.
        held: its leading tokens that the store holds now.
        reason: why it holds no more of them; empty where it holds all.
        versions: of LMCache, by the form of the keys; empty where none was found.
    """

    tokens: int
    held: int
    reason: str = ""
    versions: str = ""


@dataclass(frozen=True)
class Compared:
    """LMCache's KV beside the store's own of the same text.

    Args:
        tokens: that both have.
        difference: of the layer that differs most: root of the mean squared difference, by that of the store's own numbers.
    """

    tokens: int
    difference: float


@dataclass(frozen=True)
class _Part:
    """What one worker has of a chunk: some neighbouring layers of the store's."""

    worker: int
    first_layer: int
    group: LayerGroup  # with as many layers as the worker has

    def expected(self, tokens: int) -> Expected:
        group = self.group
        shape = (group.kv, group.layers, tokens, group.heads * group.head_size)
        return Expected(shape, group.dtype, group.token_bytes * tokens)


def _parts(layout: KVLayout, workers: Sequence[int]) -> list[_Part]:
    """Who has which layers.

    Raises:
        LayoutMismatchError: the layers can't be divided so that each worker's are alike.
    """
    layers = [group for group in layout.groups for _ in range(group.layers)]
    share, left = divmod(len(layers), len(workers))
    if left:
        raise LayoutMismatchError(f"expected as many layers of each of {len(workers)} workers; got {len(layers)} in all")
    found: list[_Part] = []
    for i, worker in enumerate(workers):
        own = layers[i * share : (i + 1) * share]
        kinds = {(group.kv, group.heads, group.head_size, group.dtype) for group in own}
        if len(kinds) > 1:
            raise LayoutMismatchError(
                f"expected layers of one shape, as LMCache 0.3 keeps them; got {len(kinds)} shapes in {layout.describe}"
            )
        kv, heads, head_size, dtype = kinds.pop()
        found.append(_Part(worker, i * share, LayerGroup(share, kv, heads, head_size, dtype)))
    return found


def _floats(bits: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float64]:
    """Numbers of a floating-point type, given as bits."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view(dtype).astype(np.float64)


class Adopter:
    """Brings LMCache's chunks into a store, text by text. For one thread at a time; close it at the end.

    Args:
        store: whose layout says what chunks have to be.
        origin: where they are looked for.

    Raises:
        ConfigError: a place that can't be read, or settings that no LMCache could have had.
        LayoutMismatchError: LMCache 0.3 had no such layout.
    """

    def __init__(self, store: Store, origin: Origin) -> None:
        if origin.world_size < 1 or not all(0 <= worker < origin.world_size for worker in origin.workers):
            raise ConfigError(
                f"expected a world size of at least 1 and workers below it; got {origin.world_size} and {list(origin.workers)}"
            )
        if origin.chunk_size < 1:
            raise ConfigError(f"expected LMCache's chunk size, at least 1; got {origin.chunk_size}")
        if not origin.model:
            raise ConfigError("expected the model as LMCache had it, which its keys begin with; got none")
        self._store, self._origin = store, origin
        latent = all(group.kv == 1 for group in store.layout.groups)
        workers = origin.workers or ((0,) if latent else tuple(range(origin.world_size)))
        self._parts = _parts(store.layout, workers)
        # latents were kept once for all ranks, which some versions call a world of one
        self._worlds = (origin.world_size, 1) if latent and origin.world_size > 1 else (origin.world_size,)
        self._window = math.lcm(store.layout.chunk_tokens, origin.chunk_size)
        if self._window > _MOST_WINDOW:
            raise ConfigError(
                f"expected chunk sizes with a common multiple of at most {_MOST_WINDOW} tokens; LMKV has "
                f"{store.layout.chunk_tokens} and LMCache had {origin.chunk_size}"
            )
        found = chains(origin.hash_algorithm, origin.hash_seed, origin.engines, origin.hash_of_none)
        self._ways = [(chain, world) for chain in found for world in self._worlds]
        self._place = open_place(origin.where, origin.deadline_seconds)

    def __enter__(self) -> Adopter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the place."""
        self._place.close()

    # -- names -----------------------------------------------------------------------------------------------------------

    def _names(self, chain: Chain, world: int, number: Any) -> list[str]:
        """A chunk's names, one a worker."""
        form, model = chain.form, self._origin.model
        return [
            form.name(chain.engine, model, world, part.worker, number, _KEY_DTYPES.get(part.group.dtype, part.group.dtype))
            for part in self._parts
        ]

    def _way(self, pieces: list[tuple[int, ...]], index: int) -> tuple[Chain, int] | None:
        """How the chunk of that index is named here, if it is here; the way that was found last is tried first."""
        names: list[str] = []
        for chain, world in self._ways:
            *_, number = chain.numbers(pieces[: index + 1])
            names.append(self._names(chain, world, number)[0])
        there = self._place.present(names)
        if True not in there:
            return None
        way = self._ways.pop(there.index(True))
        self._ways.insert(0, way)
        return way

    def some_names(self, count: int = 3) -> list[str]:
        """A few of the keys that are there, for a person whose texts are not found.

        Raises:
            BackendUnavailableError: the place does not answer.
        """
        return self._place.some(count)

    # -- texts -----------------------------------------------------------------------------------------------------------

    def adopt(self, tokens: object, *, namespace: Namespace | None = None, flush: bool = False) -> Adopted:
        """Bring what LMCache has of a text, from where the store's own knowledge of it ends.

        May block, for as long as reading takes.

        Args:
            tokens: the text, as the engine saw it.
            namespace: to store it in instead of the store's own.
            flush: wait after each part until slow tiers have it, where RAM is smaller than the text.

        Raises:
            ArgumentError: wrong tokens.
            StoreClosedError: the store was closed.
        """
        ids = np.frombuffer(token_bytes(tokens), "<u4")
        total = len(ids)
        held = self._store.lookup(ids, namespace=namespace).wait(_WAIT_SECONDS).hit_tokens
        if held == total:
            return Adopted(0, held)
        begin = held // self._window * self._window
        size = self._origin.chunk_size
        pieces = [tuple(ids[at : at + size].tolist()) for at in range(0, total, size)]
        new, kept = 0, True
        try:
            way = self._way(pieces, begin // size)
            if way is None:
                return Adopted(0, held, f"{self._place.shown} has no chunk of it from token {begin} on")
            numbers = list(way[0].numbers(pieces))
            reason = ""
            while begin < total and not reason and kept:
                stop, reason, layers = self._read(way, numbers, begin, min(begin + self._window, total))
                if stop > begin:
                    source = DenseKV(layers, first_token=begin)
                    new += self._store.store(ids[:stop], source, start=begin, namespace=namespace)
                    kept = not flush or self._store.flush(60.0)
                begin = stop
        except BackendUnavailableError as error:
            reason, way = str(error), None
        held = self._store.lookup(ids, namespace=namespace).wait(_WAIT_SECONDS).hit_tokens
        if not kept:
            reason = "the store's slow tiers did not take all of it: its events (write_dropped) say why"
        elif held < begin and not reason:
            reason = f"the store kept {held} of {begin} tokens: it has no room for more, or keeps no short chunks"
        return Adopted(new, held, reason if held < total or not kept else "", way[0].form.versions if way else "")

    def compare(self, tokens: object, *, namespace: Namespace | None = None) -> Compared | None:
        """LMCache's KV of a text's beginning beside what the store has of it: what an engine computed, not what was adopted.

        Another order of layers, another arrangement of heads or another model's KV shows as a difference of 1 and more; the
        same model on another version of the engine differs by some hundredths.

        Returns:
            ``None`` if one of them has nothing of it, or has numbers that can't be compared (a type of one byte).

        Raises:
            ArgumentError, BackendUnavailableError, StoreClosedError: as :meth:`adopt`, or the place does not answer.
        """
        ids = np.frombuffer(token_bytes(tokens), "<u4")[: self._window]
        match = self._store.lookup(ids, namespace=namespace).wait(_WAIT_SECONDS)
        size = self._origin.chunk_size
        stop = match.hit_tokens // size * size
        pieces = [tuple(ids[at : at + size].tolist()) for at in range(0, stop, size)]
        way = self._way(pieces, 0) if pieces and all(part.group.itemsize > 1 for part in self._parts) else None
        if way is None:
            return None
        stop, _, theirs = self._read(way, list(way[0].numbers(pieces)), 0, stop)
        ours = [[np.empty_like(array) for array in layer] for layer in theirs]
        with self._store.lease(match) as lease:
            stop = min(stop, self._store.retrieve(lease, DenseKV(ours), stop=stop))
        if not stop:
            return None
        groups = [group for group in self._store.layout.groups for _ in range(group.layers)]
        found = 0.0
        for group, own, other in zip(groups, ours, theirs, strict=True):
            a, b = (np.stack([_floats(array[:, :stop], group.dtype) for array in kinds]) for kinds in (own, other))
            found = max(found, float(np.sqrt(np.mean((a - b) ** 2)) / (np.sqrt(np.mean(a**2)) or 1.0)))
        return Compared(stop, found)

    def _read(
        self, way: tuple[Chain, int], numbers: list[Any], begin: int, stop: int
    ) -> tuple[int, str, list[list[npt.NDArray[Any]]]]:
        """Tokens ``begin`` to ``stop`` of a text: how far they could be read, why not further, and the KV as [heads, tokens,
        head_size] a layer and kind."""
        size = self._origin.chunk_size
        layers = [
            [np.empty((group.heads, stop - begin, group.head_size), _BITS[group.itemsize]) for _ in range(group.kv)]
            for group in self._store.layout.groups
            for _ in range(group.layers)
        ]
        for at in range(begin, stop, size):
            tokens = min(size, stop - at)
            names = self._names(way[0], way[1], numbers[at // size])
            for part, name in zip(self._parts, names, strict=True):
                expected, group = part.expected(tokens), part.group
                room = np.empty(expected.size, np.uint8)
                reason = self._place.read(name, expected, room.data)
                if reason:
                    return at, f"tokens {at} to {at + tokens} ({name}): {reason}", layers
                numbers_of = room.view(_BITS[group.itemsize])
                values = numbers_of.reshape(group.kv, group.layers, tokens, group.heads, group.head_size)
                for layer in range(group.layers):
                    for kind in range(group.kv):
                        target = layers[part.first_layer + layer][kind]
                        target[:, at - begin : at - begin + tokens] = values[kind, layer].transpose(1, 0, 2)
        return stop, "", layers
