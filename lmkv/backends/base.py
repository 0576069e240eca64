"""What a slow tier needs of its storage: bytes under keys, many at a time, synchronously.

Small extra Protocols say what only some storages can do; a tier asks for them with ``isinstance``. Third parties register a
factory ``factory(settings: BackendSettings) -> Backend`` under the entry point group ``lmkv.backends``;
``lmkv.testing.BackendSuite`` is the contract.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from ..chunks import ChunkKey
from ..layout import KVLayout

__all__ = [
    "AsksEach",
    "Backend",
    "BackendSettings",
    "Bounded",
    "Clearable",
    "Creating",
    "Entry",
    "LocalIndex",
    "ReadOnly",
    "Renewing",
    "Syncing",
    "shown_url",
]


def _tell_nobody(operation: str, reason: str) -> None:
    del operation, reason


@dataclass(frozen=True)
class BackendSettings:
    """What a backend is opened with.

    Args:
        name: the tier's name, for events and messages.
        layout: what the records' payloads are.
        capacity: bytes it may hold; 0 = unbounded or bounded by itself.
        options: the tier's ``options``; a backend refuses keys that it does not know with a ConfigError.
        url: where the storage is, for backends that are named by a URL's scheme; may hold credentials.
        deadline_seconds: how long one call may take; a backend that waits for others gives up then by itself.
        report: ``report(operation, reason)`` becomes a ``tier_failed`` event; for what fails in part only, such as one node of
            several, and so raises nothing.
    """

    name: str
    layout: KVLayout
    capacity: int = 0
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    url: str = field(default="", repr=False)
    deadline_seconds: float = 2.0
    report: Callable[[str, str], None] = field(default=_tell_nobody, repr=False)


def shown_url(url: str) -> str:
    """A URL without credentials and query, for messages and events."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


@runtime_checkable
class Backend(Protocol):
    """Bytes under keys. All methods may block and may be called from several threads at once.

    Results follow the order of the keys. Failure raises a :class:`lmkv.errors.BackendError`; absence is a value.
    """

    def contains_many(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """Which keys are there, now. Changes nothing."""

    def read_many(self, keys: Sequence[ChunkKey], out: Sequence[memoryview]) -> list[int | None]:
        """Copy values into the caller's writable buffers; returns their sizes in bytes, ``None`` for an absent key.

        A value that is larger than its buffer counts as absent. The bytes are not checked here: the caller verifies records.
        """

    def write_many(self, keys: Sequence[ChunkKey], data: Sequence[memoryview]) -> None:
        """Store values, each whole or not at all; a key that is there already is replaced. The buffers stay the caller's.

        Raises:
            CapacityError: they do not fit; none of them is stored then.
        """

    def delete_many(self, keys: Sequence[ChunkKey]) -> None:
        """Remove keys; absent ones are ignored."""

    def close(self) -> None:
        """Release everything. A second call does nothing."""


@runtime_checkable
class LocalIndex(Protocol):
    """A backend whose index is at hand in microseconds, so that a lookup may ask it on the caller's thread.

    It is given whole records (:mod:`lmkv.record`) and indexes what their headers say.
    """

    def match_prefix(self, keys: Sequence[ChunkKey], pieces: Sequence[bytes]) -> int:
        """How many leading chunks are held, each proved by its tokens."""

    def best_child(self, parent: ChunkKey, tokens: bytes) -> tuple[ChunkKey, bytes, int] | None:
        """The held chunk behind ``parent`` that shares the most leading tokens (at least 1): key, its tokens, how many."""

    def covered_siblings(self, parent: ChunkKey, tokens: bytes) -> list[ChunkKey]:
        """Held chunks behind ``parent`` whose tokens are a true beginning of ``tokens``."""


@dataclass(frozen=True)
class Entry:
    """One held record, as :meth:`Bounded.entries` lists it.

    Args:
        sequence: grows with every write and touch; the order of last use.
        key, parent, root, start: as in the record.
        size: bytes that count towards the capacity.
        fingerprint: of its content (:mod:`lmkv.index.content`), 0 for a short chunk.
        priority: as in the record; lower ones are evicted first.
    """

    sequence: int
    key: ChunkKey
    parent: ChunkKey
    root: ChunkKey
    start: int
    size: int
    fingerprint: int
    priority: int = 0


@runtime_checkable
class Bounded(Protocol):
    """A backend that keeps a byte quota and remembers the order of use, for as long as its data lasts.

    The tier evicts: it deletes what its policy names until a write fits.
    """

    capacity: int

    def used_bytes(self) -> int:
        """Bytes held, counted as the quota counts them."""

    def count(self) -> int:
        """Records held."""

    def cost(self, record_bytes: int) -> int:
        """What a record of that size adds to :meth:`used_bytes`."""

    def entries(self, after: int) -> Iterator[Entry]:
        """What was written or touched since sequence number ``after``, by any process, oldest use first."""

    def touch_many(self, keys: Sequence[ChunkKey]) -> None:
        """Count a use of each key, in this order; absent ones are ignored."""

    def tokens_of(self, key: ChunkKey) -> bytes | None:
        """The tokens of a held record."""


@runtime_checkable
class Syncing(Protocol):
    """A backend that can be told to make what it holds durable."""

    def sync(self) -> None:
        """Return when everything written so far would survive a power loss."""


@runtime_checkable
class AsksEach(Protocol):
    """A backend for which every key that is asked for costs a request, so that lookups begin with few of them."""

    #: Requests that it keeps under way at once.
    probe_concurrency: int


@runtime_checkable
class Creating(Protocol):
    """A backend that can leave alone what another writer stored meanwhile."""

    def create_many(self, keys: Sequence[ChunkKey], data: Sequence[memoryview]) -> None:
        """As :meth:`Backend.write_many`, but a key that is there already keeps its value, as far as the storage can tell."""


@runtime_checkable
class ReadOnly(Protocol):
    """A backend that a tier writes nothing to and deletes nothing from."""

    read_only: bool


@runtime_checkable
class Renewing(Protocol):
    """A :class:`Bounded` backend that may find other entries, numbered anew, in place of those it had, as when its directory
    was removed and made again."""

    #: How often that happened.
    generation: int


@runtime_checkable
class Clearable(Protocol):
    """A backend that can drop everything of its own at once."""

    def clear(self) -> None:
        """Remove every key."""
