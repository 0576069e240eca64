"""Records in a directory: an LMDB index and segment files of equal slots, which survive restarts and ``kill -9``.

A record is written in two steps: its bytes into free slots, synced; then one transaction that enters it into the index. So a
chunk is there with all its entries or not at all, for all processes. Index transactions sync their data at each commit, LMDB's
meta page at the next one or at ``sync()``: power loss can take the last transactions, not the integrity.

A record is read in two steps, too: its bytes, then a look whether the index still says the same of it. Slots are used again as
soon as a deletion is committed, so whoever read them meanwhile finds another entry or none, and counts the record as absent.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lmdb

from ..chunks import ChunkKey
from ..errors import BackendUnavailableError, CapacityError, ConfigError, LMKVError, StoreClosedError
from ..record import RecordHeader, read_header
from .base import BackendSettings, Entry
from .disk.directory import Directory, ReplacedError, Settings, close_directory, open_directory
from .disk.index import RecordIndex

__all__ = ["LmdbBackend"]

_OPTIONS = ("path", "direct", "depth", "free_space_floor", "ahead", "ttl_seconds")
#: How often a record that is written anew while it is read is looked for again.
_ATTEMPTS = 64
#: Writes in a row without room after which the index is looked at, and how long it is not looked at again.
_REFUSED = 24
_LOOK_SECONDS = 60.0
#: What comes of reading entries that were damaged.
_NONSENSE = (struct.error, ValueError, OverflowError, TypeError)


def _settings(settings: BackendSettings) -> Settings:
    options = dict(settings.options)
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown or not options.get("path"):
        raise ConfigError(
            f"tier {settings.name}: the lmdb backend takes the option path, and {', '.join(_OPTIONS[1:])}; got {options!r}"
        )
    direct = options.get("direct", "auto")
    if direct not in ("auto", True, False):
        raise ConfigError(f"tier {settings.name}: direct: expected true, false or auto; got {direct!r}")
    numbers = {"depth": 4, "free_space_floor": 0}
    for name, default in numbers.items():
        value = options.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < (name == "depth"):
            raise ConfigError(
                f"tier {settings.name}: {name}: expected a number of at least {int(name == 'depth')}; got {value!r}"
            )
        numbers[name] = value
    return Settings(
        path=os.path.realpath(os.path.expanduser(str(options["path"]))),
        name=settings.name,
        layout=settings.layout,
        capacity=settings.capacity,
        direct=None if direct == "auto" else direct,
        depth=numbers["depth"],
        floor=numbers["free_space_floor"],
        ahead=bool(options.get("ahead", True)),
    )


class LmdbBackend:
    """Index in LMDB, records in segment files, within a byte quota for all files of the directory together.

    Options:
        path: the directory; made if missing.
        direct: read and write past the page cache: ``true``, ``false``, or ``auto`` (default) for where the file system can.
        depth: transfers in flight at once; 4 by default.
        free_space_floor: bytes of the file system that are left free; 0 by default.
        ttl_seconds: records older than so many seconds are not there any more, by the wall clock; 0, the default, keeps them.
            Their room is taken when it is needed.
        ahead: write segments over beside the engine before they are used, since fresh blocks are slow; ``true`` by default.

    Raises:
        ConfigError: no path, a wrong option, a path that is no writable directory, something else's directory, or one that is
            open in this process with another capacity.
        LayoutMismatchError: the directory holds chunks of another layout.
        CapacityError: the capacity is below 256 KiB, or leaves no room for one chunk.
    """

    def __init__(self, settings: BackendSettings) -> None:
        ttl = settings.options.get("ttl_seconds", 0)
        if not isinstance(ttl, (int, float)) or isinstance(ttl, bool) or not ttl >= 0:
            raise ConfigError(f"tier {settings.name}: ttl_seconds: expected a number of at least 0; got {ttl!r}")
        self._ttl = ttl
        self._use(open_directory(_settings(settings)))
        #: See :class:`lmkv.backends.base.Renewing`.
        self.generation = 0
        self._gone: list[Directory] = []  # whose files were replaced; somebody may still be in them
        self._renewing = threading.Lock()
        self._closed = False
        self._refused = 0
        self._look_again = 0.0

    def close(self) -> None:
        """See :class:`lmkv.backends.base.Backend`."""
        if self._closed:
            return
        with self._renewing:
            self._closed = True
        for directory in (*self._gone, self._directory):
            close_directory(directory)

    def _use(self, directory: Directory) -> None:
        self._directory = directory
        shares = directory.plan
        self.capacity = shares.segments * shares.geometry.segment_slots * shares.geometry.slot_bytes
        self._most_records = shares.records
        self._geometry = shares.geometry

    def _renew(self, old: Directory) -> None:
        """Go on with what is at the path of a directory that was removed or made anew.

        Raises:
            BackendUnavailableError: it can't be opened.
        """
        with self._renewing:
            if self._closed or self._directory is not old or not old.may_be_made():
                return
            try:
                fresh = open_directory(old.settings)
            except LMKVError as error:
                raise BackendUnavailableError(f"expected to open {old.settings.path}, which was replaced: {error}") from error
            self._use(fresh)
            self._gone.append(old)
            self.generation += 1
        if old.files is not None:
            old.files.let_go()  # what nobody can find any more need not take room

    @contextlib.contextmanager
    def _begin(self, *, write: bool = False) -> Iterator[Any]:
        if self._closed:
            raise StoreClosedError(f"expected an open environment at {self._directory.settings.path}; it was closed")
        directory = self._directory
        try:
            with directory.begin(write) as txn:
                yield txn
        except ReplacedError:
            self._renew(directory)
            raise  # what is being done may have begun in the old one

    @property
    def _index(self) -> RecordIndex:
        return self._directory.index

    # -- Backend ---------------------------------------------------------------------------------------------------------

    def contains_many(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """See :class:`lmkv.backends.base.Backend`."""
        with self._begin() as txn:
            return [self._index.has(txn, key) and self._is_fresh(txn, key) for key in keys]

    def read_many(self, keys: Sequence[ChunkKey], out: Sequence[memoryview]) -> list[int | None]:
        """See :class:`lmkv.backends.base.Backend`."""
        sizes: list[int | None] = [None] * len(keys)
        lost: list[ChunkKey] = []
        with self._begin() as txn:
            places = {i: self._index.place(txn, key) for i, key in enumerate(keys) if self._is_fresh(txn, key)}
        for _ in range(_ATTEMPTS):
            wanted = [(i, place) for i, place in places.items() if place is not None and place.size <= len(out[i])]
            if not wanted:
                break
            whole = self._files.read([(place.runs, out[i].cast("B")[: place.size]) for i, place in wanted])
            with self._begin() as txn:
                places = {i: self._index.place(txn, keys[i]) for i, _ in wanted}
            for (i, place), there in zip(wanted, whole, strict=True):
                if places[i] == place:  # otherwise other bytes may have come into its slots: look where it is now
                    del places[i]
                    sizes[i] = place.size if there else None
                    lost += [] if there else [keys[i]]
        if lost:
            self.delete_many(lost)
        return sizes

    def write_many(self, keys: Sequence[ChunkKey], data: Sequence[memoryview]) -> None:
        """See :class:`lmkv.backends.base.Backend`. Each value is a record whose header is indexed."""
        self.write_numbered(keys, data, [0] * len(keys))

    def write_numbered(self, keys: Sequence[ChunkKey], data: Sequence[memoryview], floors: Sequence[int]) -> None:
        """As :meth:`write_many`; each record's sequence number is higher than its floor."""
        headers = [read_header(piece) for piece in data]
        if not keys:
            return
        try:
            self._put(keys, data, headers, floors)
        except CapacityError:
            self._mend()
            raise
        self._refused = 0

    def _put(
        self, keys: Sequence[ChunkKey], data: Sequence[memoryview], headers: Sequence[RecordHeader], floors: Sequence[int]
    ) -> None:
        with self._begin() as txn:
            count = self._index.count(txn) + len(keys)
        if count > self._most_records:
            raise CapacityError(f"expected at most {self._most_records} records; {count} would be held")
        directory = self._directory
        slots, files = directory.slots, directory.files
        assert files is not None
        places = slots.reserve([self._geometry.slots(len(piece)) for piece in data])
        try:
            files.write([(runs, piece.cast("B")) for runs, piece in zip(places, data, strict=True)])
            now = max(0, min(int(time.time()), 2**32 - 1))  # whatever the clock says

            def enter(txn: Any) -> None:
                if directory is not self._directory:
                    raise BackendUnavailableError(
                        f"expected the files that were written; {directory.settings.path} was made anew"
                    )
                if not self._index.are_free(txn, [run for runs in places for run in runs]):
                    raise CapacityError("expected the slots that were written to be free; their segment was taken away")
                for key, header, piece, runs, floor in zip(keys, headers, data, places, floors, strict=True):
                    self._index.insert(txn, key, header, len(piece), runs, now, floor)

            self._change(enter)
        finally:
            slots.release([run for runs in places for run in runs])

    def delete_many(self, keys: Sequence[ChunkKey]) -> None:
        """See :class:`lmkv.backends.base.Backend`."""

        def remove(txn: Any) -> None:
            for key in keys:
                self._index.delete(txn, key)

        self._change(remove)

    def _change(self, work: Callable[[Any], object]) -> None:
        """Do ``work`` in a write transaction, and once more where the map was full of pages kept for readers that died."""
        try:
            with self._begin(write=True) as txn:
                work(txn)
        except CapacityError as error:
            if not isinstance(error.__cause__, lmdb.MapFullError) or not self._directory.env.reader_check():
                raise
            with self._begin(write=True) as txn:
                work(txn)
        except _NONSENSE as error:
            if isinstance(error, LMKVError):
                raise
            self._empty(f"an entry can't be understood ({error})")

    @property
    def _files(self) -> Any:
        return self._directory.files

    def _is_fresh(self, txn: Any, key: ChunkKey) -> bool:
        """Whether a record has not outlived its time."""
        if not self._ttl:
            return True
        place = self._index.place(txn, key)
        return place is not None and time.time() < place.written + self._ttl

    # -- LocalIndex ------------------------------------------------------------------------------------------------------

    def match_prefix(self, keys: Sequence[ChunkKey], pieces: Sequence[bytes]) -> int:
        """See :class:`lmkv.backends.base.LocalIndex`."""
        with self._begin() as txn:
            held = self._index.match_prefix(txn, keys, pieces)
            stale = (i for i, key in enumerate(keys[:held]) if not self._is_fresh(txn, key))
            return next(stale, held) if self._ttl else held

    def held_many(self, keys: Sequence[ChunkKey], pieces: Sequence[bytes]) -> list[bool]:
        """Which chunks are held, each proved by its tokens."""
        with self._begin() as txn:
            held = self._index.held_many(txn, keys, pieces)
            return [there and self._is_fresh(txn, key) for there, key in zip(held, keys, strict=True)]

    def best_child(self, parent: ChunkKey, tokens: bytes) -> tuple[ChunkKey, bytes, int] | None:
        """See :class:`lmkv.backends.base.LocalIndex`."""
        if not tokens:
            return None
        with self._begin() as txn:
            found = self._index.best_child(txn, parent, tokens)
            return found if found is not None and self._is_fresh(txn, found[0]) else None

    def covered_siblings(self, parent: ChunkKey, tokens: bytes) -> list[ChunkKey]:
        """See :class:`lmkv.backends.base.LocalIndex`."""
        with self._begin() as txn:
            return self._index.covered_siblings(txn, parent, tokens)

    # -- Bounded ---------------------------------------------------------------------------------------------------------

    def used_bytes(self) -> int:
        """See :class:`lmkv.backends.base.Bounded`."""
        with self._begin() as txn:
            return self._index.counter(txn, b"used")

    def cost(self, record_bytes: int) -> int:
        """Whole slots. The index has a part of the quota of its own."""
        return self._geometry.slots(record_bytes) * self._geometry.slot_bytes

    def count(self) -> int:
        """Records held."""
        with self._begin() as txn:
            return self._index.count(txn)

    def entries(self, after: int) -> Iterator[Entry]:
        """See :class:`lmkv.backends.base.Bounded`. Reads in batches, so that no long transaction pins old pages."""
        while True:
            with self._begin() as txn:
                batch = self._index.entries(txn, after)
            if not batch:
                return
            yield from batch
            after = batch[-1].sequence

    def latest(self) -> int:
        """The highest sequence number that any process has given out."""
        with self._begin() as txn:
            return self._index.counter(txn, b"sequence")

    def touch_many(self, keys: Sequence[ChunkKey]) -> None:
        """See :class:`lmkv.backends.base.Bounded`. Where there is no room to note uses, they are not noted."""
        self.touch_numbered(keys, [0] * len(keys))

    def touch_numbered(self, keys: Sequence[ChunkKey], floors: Sequence[int]) -> None:
        """As :meth:`touch_many`; each use's sequence number is higher than its floor."""
        with contextlib.suppress(CapacityError):
            self._change(lambda txn: self._index.touch(txn, keys, floors))

    def tokens_of(self, key: ChunkKey) -> bytes | None:
        """See :class:`lmkv.backends.base.Bounded`."""
        with self._begin() as txn:
            return self._index.tokens_of(txn, key)

    # -- the rest --------------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """See :class:`lmkv.backends.base.Syncing`."""
        with self._begin():
            self._directory.env.sync(True)

    def clear(self) -> None:
        """See :class:`lmkv.backends.base.Clearable`."""
        with self._begin(write=True) as txn:
            self._index.clear(txn)

    def _mend(self) -> None:
        """After many writes without room: if the index contradicts itself, nothing can be evicted that it lost track of."""
        self._refused += 1
        if self._refused < _REFUSED or time.monotonic() < self._look_again:
            return
        self._look_again = time.monotonic() + _LOOK_SECONDS
        problem: str | None
        try:
            with self._begin() as txn:
                problem = next(self._index.problems(txn), None)
        except _NONSENSE as error:
            problem = f"an entry can't be understood ({error})"
        if problem is not None:
            self._empty(problem)

    def _empty(self, problem: str) -> None:
        """Begin anew with a damaged index: what is kept here can be computed again."""
        self.clear()
        raise BackendUnavailableError(f"expected a whole index; {problem}: it was emptied")

    def _check(self) -> None:
        with self._begin() as txn:
            assert not list(self._index.problems(txn))
            records = list(self._index.records(txn))
        buffers = [memoryview(bytearray(place.size)) for _, _, place, _ in records]
        whole = self._files.read([(place.runs, buffer) for (_, _, place, _), buffer in zip(records, buffers, strict=True)])
        assert all(whole)
        for (key, _, _, tokens), buffer in zip(records, buffers, strict=True):
            header = read_header(buffer)
            assert (header.key, header.tokens) == (key, tokens)
