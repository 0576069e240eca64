"""The page store: one rank's KV in an :class:`lmkv.Store`, moved by the slots that SGLang keeps it in.

All doors into SGLang use it. A text is named in one of two ways:

- **by tokens**, where a door sees them: chunks of ``chunk_size`` tokens, whatever SGLang's page size is, so that pages of one
  token cost no record each, hits are proved by their tokens, and engines of other page sizes share them;
- **by page hash**, where a door sees nothing else: each page is a text of its own, whose tokens are the words of its hash
  (SHA-256, which covers everything before the page, the tenant's salt and the adapter). A hit is proved by all 256 bits.

Tenant and adapter are the namespace's ``salt``. Weights that change while the engine runs get a namespace that nobody else has.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...chunks import Namespace
from ...config import StoreConfig
from ...errors import ArgumentError, LMKVError
from ...events import Emitter, Event
from ...handles import Lease, Match, Reservation, Stats
from ...store import Store
from ...transfer import Copy, CopyEngine, Gpu, Part, Pinner
from ..engine_config import on_gpus_node
from .identity import request_salt, unique_mark
from .pools import KVPool

__all__ = ["HASH_WORDS", "Load", "PageStore", "Save", "Text", "renew_all", "slot_numbers"]

#: Words of 32 bits of a page's hash.
HASH_WORDS = 8
_CHUNK = 256
_MAX_TOKEN = (1 << 32) - 1
_MARK = ";weights "

_open_stores: weakref.WeakSet[PageStore] = weakref.WeakSet()


def renew_all() -> None:
    """Weights were changed in place: what any page store of this process held before is a miss from now on."""
    for store in list(_open_stores):
        store.renew()


class Text:
    """Tokens as LMKV takes them and the namespace they count in.

    Args:
        tokens: uint32.
        namespace: with the request's salt.
    """

    __slots__ = ("namespace", "tokens")

    def __init__(self, tokens: npt.NDArray[np.uint32], namespace: Namespace) -> None:
        self.tokens = tokens
        self.namespace = namespace

    def __len__(self) -> int:
        return len(self.tokens)


class Load:
    """A copy from leased chunks into slots that was begun.

    Attributes:
        tokens: how many.
        error: what went wrong, empty if nothing did so far.
    """

    def __init__(self, lease: Lease, copy: Copy | None, tokens: int, error: str = "") -> None:
        self._lease = lease
        self._copy = copy
        self.tokens = tokens
        self.error = error
        self._ended = False

    def wait_layer(self, layer: int, stream: int | None = None) -> None:
        """Have a stream (torch's current one by default) wait until a layer has arrived."""
        if self._copy is not None and not self._ended:
            self._copy.wait_layer(layer, stream)

    def arrived(self) -> bool:
        """Whether :meth:`finish` need not wait. Does not block."""
        try:
            return self._ended or self._copy is None or self._copy.done()
        except LMKVError:
            return True  # which finish() says

    def finish(self) -> bool:
        """Wait for all of it and let the chunks go; whether every byte arrived from chunks that were held throughout."""
        if not self._ended:
            self._ended = True
            try:
                if self._copy is not None:
                    self._copy.wait()
                if not self._lease.held:
                    self.error = self.error or "the chunks' lease ran out under the copy"
            except LMKVError as error:
                self.error = f"{type(error).__name__}: {error}"
            finally:
                self._lease.release()
        return not self.error


class Save:
    """A copy from slots into reserved chunks that was begun. The slots must keep their KV until it is done."""

    def __init__(self, reservation: Reservation | None, copy: Copy | None, error: str = "") -> None:
        self._reservation = reservation
        self._copy = copy
        self.error = error
        #: Tokens newly stored, once it is done.
        self.tokens = 0

    def done(self) -> bool:
        """Whether it has ended, well or not; commits it the first time. Does not block."""
        try:
            if self._copy is not None and not self._copy.done():
                return False
        except LMKVError as error:
            self.error = f"{type(error).__name__}: {error}"
        self._end()
        return True

    def finish(self) -> bool:
        """Wait for it, commit it, and say whether it went well."""
        try:
            if self._copy is not None:
                self._copy.wait()
        except LMKVError as error:
            self.error = f"{type(error).__name__}: {error}"
        self._end()
        return not self.error

    def _end(self) -> None:
        reservation, self._reservation, self._copy = self._reservation, None, None
        if reservation is None:
            return
        try:
            if not self.error:
                self.tokens = reservation.commit()
        except LMKVError as error:
            self.error = f"{type(error).__name__}: {error}"
        finally:
            reservation.abort()


class PageStore:
    """One rank's KV, by text, moved by slots.

    Tokens, slots and positions are SGLang's throughout.

    Args:
        config: of the store, with model, shard and salt filled in (:func:`.identity.identified`).
        extra: what else the KV depends on.
        pool: the tensors that slots are in.
        page_tokens: ``None``: texts are named by tokens. A number: by page hash, of pages of that many tokens.
        on_event: told every event of the store, from any thread.

    Raises:
        LayoutMismatchError, ConfigError, CapacityError: as :class:`lmkv.Store`.
    """

    def __init__(
        self,
        config: StoreConfig,
        extra: str,
        pool: KVPool,
        *,
        page_tokens: int | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.page_tokens = page_tokens
        #: LMKV's tokens for one of SGLang's: several where a page would not have room for its hash.
        self.split = 1 if page_tokens is None else -(-HASH_WORDS // page_tokens)
        self._block_tokens = pool.block_tokens
        if self.split > 1:
            pool = pool.split(self.split)
        if page_tokens is None:
            chunk = config.chunk_size or _CHUNK
        else:
            chunk = page_tokens * self.split
            config = dataclasses.replace(config, chunk_size=None)
        layout = pool.layout(chunk)
        self._engine = CopyEngine(pool.layers, layout, order="NHD")
        if self._engine.device is not None:
            config = on_gpus_node(config, [Gpu.of(self._engine.device).numa_node()])
        self.store = Store(config, layout, on_event=on_event)
        self._namespace = self.store.namespace.replace(extra=extra)
        self._pinner: Pinner | None = None
        if self._engine.device is not None and config.ram_pin:
            slots = self.store._ram.pool
            slots.grow_ahead(config.ram_capacity)  # mapped now, so that all is pinned ahead of use; memory comes with that
            self._pinner = Pinner(slots, Gpu.of(self._engine.device), emit=Emitter(on_event))
        _open_stores.add(self)

    @property
    def device(self) -> int | None:
        """The CUDA device that the slots are on; ``None`` in host memory."""
        return self._engine.device

    @property
    def on_gpu(self) -> bool:
        """Whether copies run beside the caller, on a device."""
        return self.device is not None

    # -- naming --------------------------------------------------------------------------------------------------------------

    def text(self, tokens: Sequence[int], extra_key: str | None = None, cache_salt: str | None = None) -> Text:
        """A prompt from its beginning, named by its tokens.

        Args:
            extra_key, cache_salt: what SGLang keeps the prefixes of requests apart by.

        Raises:
            ArgumentError: the store names texts by page hash, or a token is not a number of 32 bits.
        """
        if self.page_tokens is not None:
            raise ArgumentError("expected page hashes; this store names no texts by tokens")
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.ndim != 1 or not len(ids) or int(ids.min()) < 0 or int(ids.max()) > _MAX_TOKEN:
            raise ArgumentError(f"expected at least one token id from 0 to {_MAX_TOKEN}; got {len(ids)} with others among them")
        salt = request_salt(self._namespace.salt, extra_key, cache_salt)
        return Text(ids.astype(np.uint32), self._namespace.replace(salt=salt))

    def page(self, page_hash: str) -> Text:
        """One page, named by the hash that SGLang chains over everything up to it (64 hexadecimal digits).

        Raises:
            ArgumentError: the store names texts by tokens, or it is no such hash.
        """
        if self.page_tokens is None:
            raise ArgumentError("expected tokens; this store names no texts by page hash")
        try:
            words = np.frombuffer(bytes.fromhex(page_hash), dtype="<u4")
        except ValueError:
            words = np.empty(0, dtype=np.uint32)
        if len(words) != HASH_WORDS:
            raise ArgumentError(f"expected a SHA-256 in hexadecimal, 64 digits; got {page_hash!r}")
        tokens = np.zeros(self.page_tokens * self.split, dtype=np.uint32)
        tokens[:HASH_WORDS] = words
        return Text(tokens, self._namespace)

    def renew(self) -> None:
        """Find nothing any more of what was kept so far, here or elsewhere: the weights are others now."""
        extra = self._namespace.extra.partition(_MARK)[0]
        self._namespace = self._namespace.replace(extra=f"{extra}{_MARK}{unique_mark()}")

    # -- the verbs -----------------------------------------------------------------------------------------------------------

    def find(self, text: Text) -> Match:
        """What the tiers hold of a text; see :meth:`lmkv.Store.lookup`. Never blocks."""
        return self.store.lookup(text.tokens, namespace=text.namespace)

    def tokens(self, found: Match | Lease) -> int:
        """Leading tokens of the text that are found or leased."""
        return found.hit_tokens // self.split

    def lease(self, match: Match) -> Lease:
        """Bring what was found into RAM and hold it; see :meth:`lmkv.Store.lease`. May wait for a slow tier's deadline."""
        return self.store.lease(match)

    def load(
        self,
        lease: Lease,
        slots: Any,
        *,
        first: int = 0,
        stream: int | None = None,
        layerwise: bool = False,
        quick_pass: bool = False,
    ) -> Load:
        """Begin to copy leased tokens, from position ``first`` on, into ``slots``, one for each; takes the lease over.

        Args:
            slots: int64 tensor, array or list of SGLang's slot numbers.
            stream: on a GPU: the copy begins behind what is in this stream (torch's current one by default).
            layerwise: on a GPU: bring the first layers first, for :meth:`Load.wait_layer`.
            quick_pass: as for :meth:`lmkv.transfer.CopyEngine.scatter`.
        """
        numbers = slot_numbers(slots)
        n, at = self.split, first * self.split
        stop = at + len(numbers) * n
        if not 0 <= at <= stop <= lease.hit_tokens:
            lease.release()
            return Load(lease, None, 0, f"expected tokens {at} to {stop} leased; {lease.hit_tokens} are")
        parts = [
            Part(s.payload, s.start - at, s.start + s.tokens - at, max(at, s.start) - at, min(stop, s.start + s.tokens) - at)
            for s in lease.slots
            if at < s.start + s.tokens and s.start < stop
        ]
        try:
            copy = self._engine.scatter(
                parts, [self._blocks(numbers)], stream=stream, layerwise=layerwise, quick_pass=quick_pass
            )
        except LMKVError as error:
            lease.release()
            return Load(lease, None, 0, f"{type(error).__name__}: {error}")
        return Load(lease, copy, len(numbers))

    def save(self, text: Text, slots: Any, *, start: int = 0, stream: int | None = None) -> Save:
        """Begin to keep a text's KV that is in ``slots``, one for each token from ``start`` on; what is kept is skipped.

        The slots must keep their KV until :meth:`Save.done`. Chunks that begin before ``start`` are left out.
        """
        numbers = slot_numbers(slots)
        n, at = self.split, start * self.split
        if at + len(numbers) * n != len(text):
            return Save(None, None, f"expected a slot for each token from {start} on; got {len(numbers)}")
        reservation: Reservation | None = None
        try:
            reservation = self.store.reserve(text.tokens, start=at, namespace=text.namespace)
            parts = [
                Part(s.payload, s.start - at, s.start + s.tokens - at, s.start - at, s.start + s.tokens - at)
                for s in reservation.slots
            ]
            copy = self._engine.gather(parts, [self._blocks(numbers)], stream=stream) if parts else None
        except LMKVError as error:
            if reservation is not None:
                reservation.abort()
            return Save(None, None, f"{type(error).__name__}: {error}")
        return Save(reservation, copy)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything kept is durable in the slow tiers; see :meth:`lmkv.Store.flush`."""
        return self.store.flush(timeout)

    def stats(self) -> Stats:
        """Counts since the store was opened."""
        return self.store.stats()

    def close(self) -> None:
        """Write what waits, and release everything. No copy may be under way. A second call does nothing."""
        _open_stores.discard(self)
        if self._pinner is not None:
            self._pinner.close()
            self._pinner = None
        self.store.close()

    def _blocks(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """The pool's blocks that slots are in; slots come in whole blocks.

        Raises:
            ArgumentError: they do not.
        """
        size = self._block_tokens
        if size == 1:
            return numbers.astype(np.int32)
        pages = numbers.reshape(-1, size) if len(numbers) % size == 0 else numbers[None, :]
        if pages.shape[1] != size or (pages[:, 0] % size).any() or (pages != pages[:, :1] + np.arange(size)).any():
            raise ArgumentError(f"expected slots of whole pages of {size}; got {len(numbers)} slots that are not")
        return (pages[:, 0] // size).astype(np.int32)


def slot_numbers(slots: Any) -> npt.NDArray[np.int64]:
    """SGLang's slot numbers, on a device perhaps, as an array in host memory.

    Raises:
        ArgumentError: they are not one dimension of numbers of at least 0 that 31 bits hold.
    """
    if hasattr(slots, "detach"):
        slots = slots.detach().cpu().numpy()
    numbers = np.asarray(slots, dtype=np.int64)
    if numbers.ndim != 1 or (len(numbers) and (int(numbers.min()) < 0 or int(numbers.max()) >= 1 << 31)):
        raise ArgumentError(f"expected slot numbers of at least 0 in one dimension; got shape {numbers.shape}")
    return numbers
