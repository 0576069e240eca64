"""Several directories of the disk backend as one tier, so that several devices read and write at once.

Each directory is whole by itself: commands for one work on each, and one that is lost costs what was on it. A record lies in
one of them, chosen by its key and the directories' shares (weighted rendezvous hashing, Schindelhauer and Schomaker 2005),
or in another one where that one has no room or fails. Whoever looks for it asks all, so shares may change at any time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import heapq
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import lmdb
import xxhash

from ..chunks import ChunkKey
from ..errors import BackendUnavailableError, CapacityError, ConfigError, StoreClosedError
from .base import BackendSettings, Entry
from .disk.queue import IoQueue
from .disk.shares import shares_of
from .lmdb_disk import LmdbBackend

__all__ = ["StripedBackend"]

Result = TypeVar("Result")

#: Seconds that a directory is left alone after it failed, doubled each time up to the second number.
_REST = (1.0, 60.0)
#: Keys of a prompt that are looked for together.
_BLOCK = 64
#: Ends of listings that are remembered.
_CURSORS = 16


class _Stripe:
    """One directory, and whether it works."""

    def __init__(self, backend: LmdbBackend, path: str, number: int, share: float) -> None:
        self.backend = backend
        self.path = path
        self.number = number
        self.share = share
        #: It failed since its records were listed last: some may have been taken for deleted.
        self.missed = False
        #: It could not be cleared when all were: it has to be before anything else is done with it.
        self.uncleared = False
        self.clearing = threading.Lock()
        self._failures = 0
        self._operation = ""  # that failed last
        self._until = 0.0

    @property
    def rests(self) -> bool:
        """Whether it failed not long ago."""
        return time.monotonic() < self._until

    def failed(self, operation: str) -> None:
        """Leave it alone for a while."""
        self._failures += 1
        self._operation = operation
        self.missed = True
        self._until = time.monotonic() + min(_REST[1], _REST[0] * float(1 << min(self._failures - 1, 16)))

    def worked(self, operation: str) -> None:
        """It did as it was told. That it can do other things than what failed last says nothing."""
        if operation == self._operation:
            self._failures, self._operation = 0, ""

    def distance(self, key: ChunkKey) -> float:
        """The record of ``key`` belongs where this is the least."""
        return -math.log((xxhash.xxh3_64_intdigest(key, seed=self.number) + 1) / 2**64) / self.share


class StripedBackend:
    """Directories of :class:`LmdbBackend`, of one capacity together.

    Options: ``paths``, a list of directories, best each on a device of its own; the others as of :class:`LmdbBackend`.

    The capacity is shared out by the speed of the directories' devices, measured when they are made, and stays so. A directory
    that fails is reported and left alone for a while: what it holds are misses, what it would have got goes to the others.

    Raises:
        ConfigError: fewer than two paths, one named twice, or as of :class:`LmdbBackend`.
        LayoutMismatchError, CapacityError: as of :class:`LmdbBackend`.
    """

    def __init__(self, settings: BackendSettings) -> None:
        options = dict(settings.options)
        paths = options.pop("paths", ())
        if not isinstance(paths, (list, tuple)) or len(paths) < 2 or "path" in options:
            raise ConfigError(f"tier {settings.name}: paths: expected a list of at least two directories; got {paths!r}")
        places = [os.path.realpath(os.path.expanduser(str(path))) for path in paths]
        if len(set(places)) < len(places):
            raise ConfigError(f"tier {settings.name}: paths: expected different directories; got {list(paths)}")
        self._name = settings.name
        self._report = settings.report
        self._closed = False
        self._cursors: dict[int, tuple[int, ...]] = {}
        self._width = len(places)
        self._stripes: list[_Stripe] = []
        with _alone(places):
            shares = shares_of(places, settings.capacity)
            try:
                self._open(settings, options, places, shares)
            except BaseException:
                self.close()
                raise
        self.capacity = sum(stripe.backend.capacity for stripe in self._stripes)
        self._queue = IoQueue(f"lmkv-{settings.name}-stripes", self._width)

    def _open(self, settings: BackendSettings, options: dict[str, object], places: list[str], shares: list[int]) -> None:
        problem: ConfigError | None = None
        for number, (path, share) in enumerate(zip(places, shares, strict=True)):
            one = dataclasses.replace(settings, capacity=share, options={**options, "path": path})
            try:
                backend = LmdbBackend(one)
            except ConfigError as error:
                if not _of_the_device(error):
                    raise
                problem = error
                self._report("open", f"{path}: {error}")
                continue
            self._stripes.append(_Stripe(backend, path, number, share / sum(shares)))
        if not self._stripes and problem is not None:
            raise problem

    def close(self) -> None:
        """See :class:`lmkv.backends.base.Backend`."""
        if self._closed:
            return
        self._closed = True
        for stripe in self._stripes:
            stripe.backend.close()
        if hasattr(self, "_queue"):
            self._queue.close()

    @property
    def generation(self) -> int:
        """See :class:`lmkv.backends.base.Renewing`."""
        return sum(stripe.backend.generation for stripe in self._stripes)

    # -- asking directories ----------------------------------------------------------------------------------------------

    def _try(self, stripe: _Stripe, operation: str, call: Callable[[LmdbBackend], Result]) -> Result | None:
        """``call`` of a directory's backend; ``None`` if that rests or fails, which is reported.

        Raises:
            BackendUnavailableError: it failed, and no other one is left.
        """
        if self._closed:
            raise StoreClosedError(f"expected an open tier {self._name}; it was closed")
        if stripe.rests:
            return None
        try:
            with stripe.clearing if stripe.uncleared else contextlib.nullcontext():
                if stripe.uncleared:
                    stripe.backend.clear()
                    stripe.uncleared = False
            result = call(stripe.backend)
        except BackendUnavailableError as error:
            stripe.failed(operation)
            self._report(operation, f"{stripe.path}: {error}")
            if all(other.rests for other in self._stripes):
                raise
            return None
        stripe.worked(operation)
        return result

    def _all(self, operation: str, call: Callable[[LmdbBackend], Result]) -> Iterator[tuple[_Stripe, Result]]:
        """What the directories that work answer."""
        answered = False
        for stripe in self._stripes:
            result = self._try(stripe, operation, call)
            if result is not None:
                answered = True
                yield stripe, result
        if not answered:
            raise BackendUnavailableError(f"expected a directory of tier {self._name} that works; all failed a moment ago")

    def _holders(self, keys: Sequence[ChunkKey]) -> list[list[_Stripe]]:
        """By key, the directories that hold it."""
        found: list[list[_Stripe]] = [[] for _ in keys]
        for stripe, there in self._all("lookup", lambda backend: backend.contains_many(keys)):
            for holders, held in zip(found, there, strict=True):
                if held:
                    holders.append(stripe)
        return found

    def _grouped(self, keys: Sequence[ChunkKey]) -> list[tuple[_Stripe, list[int]]]:
        """Directories with the numbers of the keys that they hold."""
        groups: dict[_Stripe, list[int]] = {}
        for i, holders in enumerate(self._holders(keys)):
            for stripe in holders:
                groups.setdefault(stripe, []).append(i)
        return list(groups.items())

    # -- Backend ---------------------------------------------------------------------------------------------------------

    def contains_many(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """See :class:`lmkv.backends.base.Backend`."""
        return [bool(holders) for holders in self._holders(keys)]

    def read_many(self, keys: Sequence[ChunkKey], out: Sequence[memoryview]) -> list[int | None]:
        """See :class:`lmkv.backends.base.Backend`. All directories read at the same time."""
        sizes: list[int | None] = [None] * len(keys)
        groups: dict[_Stripe, list[int]] = {}
        for i, holders in enumerate(self._holders(keys)):
            if holders:
                groups.setdefault(holders[0], []).append(i)

        def read(stripe: _Stripe, some: list[int]) -> None:
            there = self._try(
                stripe, "read", lambda backend: backend.read_many([keys[i] for i in some], [out[i] for i in some])
            )
            for i, size in zip(some, there or (), strict=False):
                sizes[i] = size

        self._queue.run([functools.partial(read, stripe, some) for stripe, some in groups.items()])
        return sizes

    def write_many(self, keys: Sequence[ChunkKey], data: Sequence[memoryview]) -> None:
        """See :class:`lmkv.backends.base.Backend`. All directories write at the same time."""
        held = self._holders(keys)
        if not keys:
            return
        latest = self._latest()
        ways = [self._ways(key, holders) for key, holders in zip(keys, held, strict=True)]
        waiting, done = list(range(len(keys))), list[int]()
        for turn in range(len(self._stripes)):
            groups: dict[_Stripe, list[int]] = {}
            for i in waiting:
                groups.setdefault(ways[i][turn], []).append(i)
            calls = [functools.partial(self._write, stripe, some, keys, data, latest) for stripe, some in groups.items()]
            done += [i for some in self._queue.run(calls) for i in some]
            waiting = sorted(set(waiting) - set(done))
            if not waiting:
                return
        self.delete_many([keys[i] for i in done if not held[i]])
        raise CapacityError(f"expected room for {len(keys)} records in tier {self._name}; {len(waiting)} fit into no directory")

    def _ways(self, key: ChunkKey, holders: Sequence[_Stripe]) -> list[_Stripe]:
        """Where to write a record, best first: where it is already, then by distance."""
        ranked = sorted(self._stripes, key=lambda stripe: stripe.distance(key))
        return [*holders, *(stripe for stripe in ranked if stripe not in holders)]

    def _write(
        self, stripe: _Stripe, some: list[int], keys: Sequence[ChunkKey], data: Sequence[memoryview], latest: int
    ) -> list[int]:
        """Write some of the records into one directory; returns those that it took: all or none."""

        def write(backend: LmdbBackend) -> bool:
            try:
                backend.write_numbered([keys[i] for i in some], [data[i] for i in some], [latest + i for i in some])
            except CapacityError:
                return False
            return True

        return some if self._try(stripe, "write", write) else []

    def _latest(self) -> int:
        """The highest sequence number of all: what comes now is numbered behind it, so that the orders of use fit together."""
        return max(number for _, number in self._all("lookup", lambda backend: backend.latest()))

    def delete_many(self, keys: Sequence[ChunkKey]) -> None:
        """See :class:`lmkv.backends.base.Backend`."""
        for stripe, some in self._grouped(keys):
            self._try(stripe, "delete", lambda backend, some=some: backend.delete_many([keys[i] for i in some]))  # type: ignore[misc]

    # -- LocalIndex ------------------------------------------------------------------------------------------------------

    def match_prefix(self, keys: Sequence[ChunkKey], pieces: Sequence[bytes]) -> int:
        """See :class:`lmkv.backends.base.LocalIndex`."""
        for begin in range(0, len(keys), _BLOCK):
            left = list(range(begin, min(begin + _BLOCK, len(keys))))
            for _, there in self._all(
                "lookup",
                lambda backend, left=left: backend.held_many([keys[i] for i in left], [pieces[i] for i in left]),  # type: ignore[misc]
            ):
                left[:] = [i for i, held in zip(left, there, strict=True) if not held]
                if not left:
                    break
            if left:
                return left[0]
        return len(keys)

    def best_child(self, parent: ChunkKey, tokens: bytes) -> tuple[ChunkKey, bytes, int] | None:
        """See :class:`lmkv.backends.base.LocalIndex`."""
        answers = [child for _, (child,) in self._all("lookup", lambda backend: (backend.best_child(parent, tokens),))]
        return max((child for child in answers if child is not None), key=lambda child: child[2], default=None)

    def covered_siblings(self, parent: ChunkKey, tokens: bytes) -> list[ChunkKey]:
        """See :class:`lmkv.backends.base.LocalIndex`."""
        found: dict[ChunkKey, None] = {}
        for _, keys in self._all("lookup", lambda backend: backend.covered_siblings(parent, tokens)):
            found.update(dict.fromkeys(keys))
        return list(found)

    # -- Bounded ---------------------------------------------------------------------------------------------------------

    def used_bytes(self) -> int:
        """See :class:`lmkv.backends.base.Bounded`. A directory that fails counts as full."""
        answers = dict(self._all("stats", lambda backend: backend.used_bytes()))
        return sum(answers.get(stripe, stripe.backend.capacity) for stripe in self._stripes)

    def cost(self, record_bytes: int) -> int:
        """See :class:`lmkv.backends.base.Bounded`."""
        return max(stripe.backend.cost(record_bytes) for stripe in self._stripes)

    def count(self) -> int:
        """Records held."""
        return sum(count for _, count in self._all("stats", lambda backend: backend.count()))

    def entries(self, after: int) -> Iterator[Entry]:
        """See :class:`lmkv.backends.base.Bounded`.

        A number says the directory's own and which directory. Processes number independently, so one may see a number that is
        lower than another directory's that it saw before: where each listing ended is remembered by directory.
        """
        width = self._width
        ends = list(self._cursors.get(after, ((after - i) // width for i in range(width))))
        awake = [stripe for stripe in self._stripes if not stripe.rests]
        for stripe in awake:
            if stripe.missed:
                ends[stripe.number], stripe.missed = 0, False
        last = after
        listings = [_listed(stripe, ends[stripe.number], width) for stripe in awake]
        try:
            for entry in heapq.merge(*listings, key=lambda entry: entry.sequence):
                last = entry.sequence
                ends[last % width] = last // width
                yield entry
        finally:
            if last != after:
                self._cursors.pop(last, None)
                self._cursors[last] = tuple(ends)
                while len(self._cursors) > _CURSORS:
                    self._cursors.pop(next(iter(self._cursors)))

    def touch_many(self, keys: Sequence[ChunkKey]) -> None:
        """See :class:`lmkv.backends.base.Bounded`."""
        if not keys:
            return
        latest = self._latest()
        for stripe, some in self._grouped(keys):
            uses = [keys[i] for i in some], [latest + i for i in some]
            self._try(stripe, "touch", lambda backend, uses=uses: backend.touch_numbered(*uses))  # type: ignore[misc]

    def tokens_of(self, key: ChunkKey) -> bytes | None:
        """See :class:`lmkv.backends.base.Bounded`."""
        answers = (tokens for _, (tokens,) in self._all("lookup", lambda backend: (backend.tokens_of(key),)))
        return next((tokens for tokens in answers if tokens is not None), None)

    # -- the rest --------------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """See :class:`lmkv.backends.base.Syncing`."""
        for stripe in self._stripes:
            self._try(stripe, "sync", lambda backend: backend.sync())

    def clear(self) -> None:
        """See :class:`lmkv.backends.base.Clearable`. A directory that fails gives nothing until it was cleared."""
        for stripe in self._stripes:
            stripe.uncleared = True
            self._try(stripe, "clear", lambda backend: backend.count())

    def _check(self) -> None:
        for stripe in self._stripes:
            stripe.backend._check()


def _listed(stripe: _Stripe, after: int, width: int) -> Iterator[Entry]:
    """A directory's entries, numbered as those of all are."""
    for entry in stripe.backend.entries(after):
        yield dataclasses.replace(entry, sequence=entry.sequence * width + stripe.number)


def _of_the_device(error: BaseException) -> bool:
    """Whether an opening failed for what the system said, not for what was asked."""
    cause = error.__cause__
    while cause is not None:
        if isinstance(cause, (OSError, lmdb.Error)):
            return True
        cause = cause.__cause__
    return False


@contextlib.contextmanager
def _alone(paths: Sequence[str]) -> Iterator[None]:
    """No other process shares the capacity out meanwhile."""
    fds: list[int] = []
    try:
        for path in sorted(paths):
            with contextlib.suppress(OSError):  # who opens it will say what is wrong
                os.makedirs(path, exist_ok=True)
                fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                fcntl.flock(fds[-1], fcntl.LOCK_EX)
        yield
    finally:
        for fd in fds:
            os.close(fd)
