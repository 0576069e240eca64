"""Records in an LMDB environment: whole records and an index of them that survive restarts and ``kill -9``.

Databases of the environment (``docs/format.md`` says more):

    meta      format, byte order, layout, sequence counter, bytes used
    records   key -> record
    index     key -> parent, root, cost, fingerprint, start, tokens
    uses      key -> sequence number of the last use, number of uses
    order     sequence number -> key
    children  place in the tree of siblings -> keys (see ``_levels``)

Every change is one transaction, so a chunk is there with all its entries or not at all, for all processes. Data are synced at
each commit, the meta page at the next one or at ``sync()``: power loss can take the last transactions, not the integrity.
"""

from __future__ import annotations

import contextlib
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lmdb
import numpy as np
import xxhash

from ..chunks import TOKEN_BYTES, ChunkKey, shared_tokens
from ..errors import BackendUnavailableError, CapacityError, ConfigError, LayoutMismatchError, StoreClosedError
from ..index.content import chunk_fingerprints, root_seed
from ..record import RecordHeader, read_header
from .base import BackendSettings, Entry

__all__ = ["LmdbBackend"]

_FORMAT = b"lmkv-lmdb/1"
_INDEX = struct.Struct("<16s16sQQI4x")  # parent, root, cost, fingerprint, start; the tokens follow
_USE = struct.Struct("<QI")  # sequence number, uses
_PAGE = 4096
#: LMDB's keys have at most 511 bytes; 16 are the place in the tree, so a segment of siblings' tokens is 120 tokens.
_SEGMENT = 480
_DATABASES = (b"meta", b"records", b"index", b"uses", b"order", b"children")
#: The smallest environment LMDB works in with these databases.
_LEAST_CAPACITY = 256 * 1024
#: Free space in LMDB is in pieces: of the map, this share may be held; equal records never met a full map there.
_LIVE_SHARE = 0.9
_BATCH = 1024


@dataclass
class _Shared:
    """One environment a path and process, as LMDB demands."""

    env: Any
    users: int


_registry: dict[str, _Shared] = {}
_registry_lock = threading.Lock()


def _levels(parent: bytes, tokens: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The entries of a chunk in ``children``: place and segment.

    LMDB sorts its keys, so a neighbour search finds the longest shared prefix, but keys are short: a chunk's tokens are cut
    into segments, and the second segment stands at a place of its own, named by a hash of the way there. The last segment is
    shorter than the others, if need be empty, so that it tells where the tokens end.
    """
    place = parent
    for begin in range(0, len(tokens) + 1, _SEGMENT):
        segment = tokens[begin : begin + _SEGMENT]
        yield place, segment
        place = xxhash.xxh3_128_digest(place + segment)


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """LMDB's errors as LMKV's."""
    try:
        yield
    except lmdb.MapFullError as error:
        raise CapacityError(f"expected room to {what}; the environment is full: {error}") from error
    except (lmdb.Error, OSError) as error:
        if "closed" in str(error).lower():
            raise StoreClosedError(f"expected an open environment to {what}; it was closed") from error
        raise BackendUnavailableError(f"expected to {what}; LMDB says: {error}") from error


class LmdbBackend:
    """Values and index in one LMDB environment, with a byte quota.

    Options:
        path: the directory; made if missing.

    Raises:
        ConfigError: no path, an unknown option, a path that is no writable directory, or something else's directory.
        LayoutMismatchError: the directory holds chunks of another layout.
        CapacityError: the capacity is below 256 KiB.
    """

    def __init__(self, settings: BackendSettings) -> None:
        unknown = sorted(set(settings.options) - {"path"})
        if unknown or not settings.options.get("path"):
            raise ConfigError(f"tier {settings.name}: the lmdb backend takes the option path; got {dict(settings.options)!r}")
        if settings.capacity < _LEAST_CAPACITY:
            raise CapacityError(
                f"tier {settings.name}: expected a capacity of at least {_LEAST_CAPACITY} bytes; got {settings.capacity}"
            )
        self._name = settings.name
        self._layout = settings.layout
        self._map_bytes = settings.capacity // _PAGE * _PAGE
        self.capacity = int(self._map_bytes * _LIVE_SHARE) - 16 * _PAGE
        self._path = os.path.realpath(os.path.expanduser(str(settings.options["path"])))
        self._closed = False
        self._env = self._acquire()
        try:
            self._open_databases()
        except BackendUnavailableError as error:
            self.close()
            raise ConfigError(
                f"tier {self._name}: expected a whole database at {self._path}; {error}. "
                "Delete its data.mdb or name another path"
            ) from error
        except BaseException:
            self.close()
            raise

    # -- opening and closing ---------------------------------------------------------------------------------------------

    def _acquire(self) -> Any:
        with _registry_lock:
            shared = _registry.get(self._path)
            if shared is None:
                try:
                    os.makedirs(self._path, exist_ok=True)
                    foreign = set(os.listdir(self._path)) - {"data.mdb", "lock.mdb"}
                    if foreign and not os.path.exists(os.path.join(self._path, "data.mdb")):
                        raise ConfigError(
                            f"tier {self._name}: expected an empty directory or one of LMKV's at {self._path}; "
                            f"it holds {min(foreign)!r}: name another path"
                        )
                    env = lmdb.open(
                        self._path, map_size=self._map_bytes, max_dbs=8, max_readers=512, metasync=False, readahead=True
                    )
                except (lmdb.Error, OSError) as error:
                    raise ConfigError(
                        f"tier {self._name}: expected a directory that can be written at {self._path}; the system says: "
                        f"{error}. "
                        "Name another path, make room, or set the capacity to 0"
                    ) from error
                env.reader_check()
                try:
                    self._pad(env)
                except OSError:
                    env.close()
                    raise
                shared = _registry[self._path] = _Shared(env, 0)
            shared.users += 1
            return shared.env

    def _pad(self, env: Any) -> None:
        """Let a data file that was cut off reach to its last page: zeros are found out, reading behind its end is fatal."""
        size = os.path.getsize(os.path.join(self._path, "data.mdb"))
        missing = (env.info()["last_pgno"] + 1) * env.stat()["psize"] - size
        if missing > 0 and hasattr(os, "posix_fallocate"):
            fd = os.open(os.path.join(self._path, "data.mdb"), os.O_RDWR | os.O_CLOEXEC)
            try:
                os.posix_fallocate(fd, size, missing)  # never shrinks a file that another process makes longer meanwhile
            finally:
                os.close(fd)

    def _open_databases(self) -> None:
        with _translated(f"open {self._path}"):
            with self._env.begin(write=True) as txn:  # aborted if a check fails: what is not ours stays as it was
                if any(bytes(name) not in _DATABASES for name, _ in txn.cursor()):
                    raise self._not_ours()
                try:
                    self._meta = self._env.open_db(b"meta", txn=txn)
                except lmdb.IncompatibleError:  # a value of somebody else's under that name
                    raise self._not_ours() from None
                self._check_meta(txn)
            self._records = self._env.open_db(b"records")
            self._index = self._env.open_db(b"index")
            self._uses = self._env.open_db(b"uses")
            self._order = self._env.open_db(b"order")
            self._children = self._env.open_db(b"children", dupsort=True)

    def _check_meta(self, txn: Any) -> None:
        mine = {
            b"format": _FORMAT,
            b"byteorder": sys.byteorder.encode(),
            b"layout": self._layout.describe.encode(),
        }
        if txn.get(b"format", db=self._meta) is None:
            if txn.stat(self._meta)["entries"]:
                raise self._not_ours()
            for name, value in mine.items():
                txn.put(name, value, db=self._meta)
            return
        for name, value in mine.items():
            held = txn.get(name, db=self._meta)
            if held == value:
                continue
            if name == b"layout":
                raise LayoutMismatchError(
                    f"tier {self._name}: {self._path} holds chunks of the layout {held.decode()!r}; the store has "
                    f"{value.decode()!r}. Nothing was changed: name another path, or open it with the layout it was made for"
                )
            raise ConfigError(
                f"tier {self._name}: {self._path} has {name.decode()} {held!r}; this version expects {value!r}. "
                "Nothing was changed: name another path"
            )

    def _not_ours(self) -> ConfigError:
        return ConfigError(f"tier {self._name}: {self._path} holds an LMDB environment that is not LMKV's: name another path")

    def close(self) -> None:
        """See :class:`lmkv.backends.base.Backend`."""
        if self._closed:
            return
        self._closed = True
        with _registry_lock:
            shared = _registry[self._path]
            shared.users -= 1
            if shared.users == 0:
                del _registry[self._path]
                with contextlib.suppress(lmdb.Error):
                    shared.env.sync(True)
                shared.env.close()

    def _begin(self, *, write: bool = False) -> Any:
        if self._closed:
            raise StoreClosedError(f"expected an open environment at {self._path}; it was closed")
        return self._env.begin(write=write, buffers=True)

    # -- Backend ---------------------------------------------------------------------------------------------------------

    def contains_many(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """See :class:`lmkv.backends.base.Backend`."""
        with _translated("look keys up"), self._begin() as txn:
            return [txn.get(key, db=self._uses) is not None for key in keys]

    def read_many(self, keys: Sequence[ChunkKey], out: Sequence[memoryview]) -> list[int | None]:
        """See :class:`lmkv.backends.base.Backend`."""
        sizes: list[int | None] = []
        with _translated("read records"), self._begin() as txn:
            for key, buffer in zip(keys, out, strict=True):
                value = txn.get(key, db=self._records)
                if value is None or len(value) > len(buffer):
                    sizes.append(None)
                    continue
                # numpy copies without holding the interpreter lock; the view is dead after the transaction
                np.copyto(np.frombuffer(buffer, np.uint8, len(value)), np.frombuffer(value, np.uint8))
                sizes.append(len(value))
                del value
        return sizes

    def write_many(self, keys: Sequence[ChunkKey], data: Sequence[memoryview]) -> None:
        """See :class:`lmkv.backends.base.Backend`. Each value is a record whose header is indexed."""
        headers = [read_header(piece) for piece in data]
        self._change("write records", lambda txn: self._insert(txn, keys, data, headers))

    def delete_many(self, keys: Sequence[ChunkKey]) -> None:
        """See :class:`lmkv.backends.base.Backend`."""
        self._change("delete records", lambda txn: self._remove(txn, keys))

    def _change(self, what: str, work: Callable[[Any], object]) -> None:
        """Do ``work`` in a write transaction, and once more where the map was full of pages kept for readers that died."""
        try:
            with _translated(what), self._begin(write=True) as txn:
                work(txn)
        except CapacityError as error:
            if not isinstance(error.__cause__, lmdb.MapFullError) or not self._env.reader_check():
                raise
            with _translated(what), self._begin(write=True) as txn:
                work(txn)

    def _insert(self, txn: Any, keys: Sequence[ChunkKey], data: Sequence[memoryview], headers: Sequence[RecordHeader]) -> None:
        self._remove(txn, keys)
        used = self._counter(txn, b"used") + sum(self.cost(len(piece)) for piece in data)
        if used > self.capacity:
            raise CapacityError(f"expected at most {self.capacity} bytes; {used} would be held")
        sequence = self._counter(txn, b"sequence")
        for key, piece, header in zip(keys, data, headers, strict=True):
            sequence += 1
            place = sequence.to_bytes(8, "big")
            fingerprint = self._fingerprint(header.root, header.tokens)
            entry = _INDEX.pack(header.parent, header.root, self.cost(len(piece)), fingerprint, header.start)
            txn.put(key, piece, db=self._records)
            txn.put(key, entry + header.tokens, db=self._index)
            txn.put(key, _USE.pack(sequence, 1), db=self._uses)
            txn.put(place, key, db=self._order)
            for where, segment in _levels(header.parent, header.tokens):
                txn.put(where + segment, key, db=self._children)
        self._set_counter(txn, b"sequence", sequence)
        self._set_counter(txn, b"used", used)

    def _remove(self, txn: Any, keys: Sequence[ChunkKey]) -> None:
        for key in keys:
            self._delete(txn, key)

    def _delete(self, txn: Any, key: ChunkKey) -> None:
        value = txn.get(key, db=self._index)
        if value is None:
            return
        parent, _, cost, _, _ = _INDEX.unpack_from(value)
        tokens = bytes(value[_INDEX.size :])
        del value
        place = _USE.unpack(txn.get(key, db=self._uses))[0].to_bytes(8, "big")
        for db in (self._records, self._index, self._uses):
            txn.delete(key, db=db)
        txn.delete(place, db=self._order)
        for where, segment in _levels(parent, tokens):
            txn.delete(where + segment, key, db=self._children)
        self._set_counter(txn, b"used", max(0, self._counter(txn, b"used") - cost))

    def _counter(self, txn: Any, name: bytes) -> int:
        return int.from_bytes(txn.get(name, b"", db=self._meta), "little")

    def _set_counter(self, txn: Any, name: bytes, value: int) -> None:
        txn.put(name, value.to_bytes(8, "little"), db=self._meta)

    def _fingerprint(self, root: bytes, tokens: bytes) -> int:
        width = self._layout.chunk_tokens
        if len(tokens) != width * 4:
            return 0
        return int(chunk_fingerprints(np.frombuffer(tokens, "<u4"), width, root_seed(root))[0])

    # -- LocalIndex ------------------------------------------------------------------------------------------------------

    def match_prefix(self, keys: Sequence[ChunkKey], pieces: Sequence[bytes]) -> int:
        """See :class:`lmkv.backends.base.LocalIndex`."""
        held = 0
        with _translated("look a prefix up"), self._begin() as txn:
            for key, piece in zip(keys, pieces, strict=True):
                value = txn.get(key, db=self._index)
                if value is None or bytes(value[_INDEX.size :]) != piece:
                    break
                held += 1
        return held

    def best_child(self, parent: ChunkKey, tokens: bytes) -> tuple[ChunkKey, bytes, int] | None:
        """See :class:`lmkv.backends.base.LocalIndex`."""
        if not tokens:
            return None
        with _translated("look a chunk up"), self._begin() as txn, txn.cursor(db=self._children) as cursor:
            key: ChunkKey | None = None
            for place, segment in _levels(parent, tokens):
                found = self._nearest(cursor, place, segment)
                if found is None:
                    break
                key, shared = found
                if shared < _SEGMENT:
                    break
            if key is None:
                return None
            value = txn.get(key, db=self._index)
            held = bytes(value[_INDEX.size :]) if value is not None else b""
        shared = shared_tokens(held, tokens)
        return (key, held, shared) if shared else None

    @staticmethod
    def _nearest(cursor: Any, place: bytes, segment: bytes) -> tuple[ChunkKey, int] | None:
        """A chunk at ``place`` whose segment shares the most bytes with ``segment``, and how many bytes (whole tokens, > 0)."""
        best: tuple[ChunkKey, int] | None = None
        here = cursor.set_range(place + segment)
        for step in ("here", "before"):
            if step == "before":
                here = cursor.prev_nodup() if here else cursor.last()
            if not here:
                continue
            where = bytes(cursor.key())
            if where[:16] != place:
                continue
            shared = shared_tokens(where[16:], segment) * 4
            if shared and (best is None or shared > best[1]):
                best = (ChunkKey(bytes(cursor.value())), shared)
        return best

    def covered_siblings(self, parent: ChunkKey, tokens: bytes) -> list[ChunkKey]:
        """See :class:`lmkv.backends.base.LocalIndex`."""
        found: list[ChunkKey] = []
        with _translated("look siblings up"), self._begin() as txn, txn.cursor(db=self._children) as cursor:
            for place, segment in _levels(parent, tokens):
                here = cursor.set_range(place + segment)
                here = cursor.prev_nodup() if here else cursor.last()
                while here and bytes(cursor.key())[:16] == place:
                    held = bytes(cursor.key())[16:]
                    if segment.startswith(held):
                        found.extend(ChunkKey(bytes(value)) for value in cursor.iternext_dup())
                        here = cursor.prev_nodup()
                        continue
                    # one that parts from the segment stands between: what is left is at most as long as what they share
                    shorter = place + segment[: shared_tokens(held, segment) * TOKEN_BYTES]
                    if not cursor.set_range(shorter) or bytes(cursor.key()) != shorter:
                        here = cursor.prev_nodup()
        return found

    # -- Bounded ---------------------------------------------------------------------------------------------------------

    def used_bytes(self) -> int:
        """See :class:`lmkv.backends.base.Bounded`."""
        with _translated("read the quota"), self._begin() as txn:
            return self._counter(txn, b"used")

    def cost(self, record_bytes: int) -> int:
        """Whole pages of the record, and a page for its share of the index."""
        return (-(-(record_bytes + 16) // _PAGE) + 1) * _PAGE

    def count(self) -> int:
        """Records held."""
        with _translated("count records"), self._begin() as txn:
            return int(txn.stat(self._index)["entries"])

    def entries(self, after: int) -> Iterator[Entry]:
        """See :class:`lmkv.backends.base.Bounded`. Reads in batches, so that no long transaction pins old pages."""
        while True:
            batch: list[Entry] = []
            with _translated("list records"), self._begin() as txn, txn.cursor(db=self._order) as cursor:
                if cursor.set_range((after + 1).to_bytes(8, "big")):
                    for place, key in cursor:
                        value = txn.get(key, db=self._index)
                        parent, root, cost, fingerprint, start = _INDEX.unpack_from(value)
                        after = int.from_bytes(place, "big")
                        batch.append(Entry(after, ChunkKey(bytes(key)), parent, root, start, cost, fingerprint))
                        if len(batch) == _BATCH:
                            break
            yield from batch
            if len(batch) < _BATCH:
                return

    def touch_many(self, keys: Sequence[ChunkKey]) -> None:
        """See :class:`lmkv.backends.base.Bounded`."""
        self._change("note uses", lambda txn: self._touch(txn, keys))

    def _touch(self, txn: Any, keys: Sequence[ChunkKey]) -> None:
        sequence = self._counter(txn, b"sequence")
        for key in keys:
            value = txn.get(key, db=self._uses)
            if value is None:
                continue
            last, uses = _USE.unpack(value)
            del value
            sequence += 1
            txn.delete(last.to_bytes(8, "big"), db=self._order)
            txn.put(sequence.to_bytes(8, "big"), key, db=self._order)
            txn.put(key, _USE.pack(sequence, min(uses + 1, 2**32 - 1)), db=self._uses)
        self._set_counter(txn, b"sequence", sequence)

    def tokens_of(self, key: ChunkKey) -> bytes | None:
        """See :class:`lmkv.backends.base.Bounded`."""
        with _translated("read tokens"), self._begin() as txn:
            value = txn.get(key, db=self._index)
            return None if value is None else bytes(value[_INDEX.size :])

    # -- the rest --------------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """See :class:`lmkv.backends.base.Syncing`."""
        with _translated("sync"):
            self._env.sync(True)

    def clear(self) -> None:
        """See :class:`lmkv.backends.base.Clearable`."""
        with _translated("clear"), self._begin(write=True) as txn:
            for db in (self._records, self._index, self._uses, self._order, self._children):
                txn.drop(db, delete=False)
            self._set_counter(txn, b"used", 0)

    def _check(self) -> None:
        with self._begin() as txn:
            total = 0
            expected_children = 0
            for key, value in txn.cursor(db=self._index):
                parent, root, cost, fingerprint, start = _INDEX.unpack_from(value)
                tokens = bytes(value[_INDEX.size :])
                record = txn.get(key, db=self._records)
                assert record is not None
                header = read_header(record)
                assert (header.parent, header.root, header.start, header.tokens) == (parent, root, start, tokens)
                assert fingerprint == self._fingerprint(root, tokens)
                assert cost == self.cost(len(record))
                total += cost
                sequence, _ = _USE.unpack(txn.get(key, db=self._uses))
                assert bytes(txn.get(sequence.to_bytes(8, "big"), db=self._order)) == bytes(key)
                expected_children += sum(1 for _ in _levels(parent, tokens))
            entries = txn.stat(self._index)["entries"]
            for db in (self._records, self._uses, self._order):
                assert txn.stat(db)["entries"] == entries
            assert txn.stat(self._children)["entries"] == expected_children
            assert self._counter(txn, b"used") == total <= self.capacity
