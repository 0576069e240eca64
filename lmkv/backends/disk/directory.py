"""One directory, opened once a process: its environment, index, segment files and slots, and what it refuses to be."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import lmdb

from ...errors import BackendUnavailableError, CapacityError, ConfigError, LayoutMismatchError, StoreClosedError
from ...layout import KVLayout
from .geometry import LEAST_CAPACITY, PAGE, Geometry, Plan, plan
from .index import DATABASES, RecordIndex
from .pages import PagesDamagedError, check_pages
from .segments import SEGMENT_NAME, SegmentFiles
from .slots import Slots

__all__ = [
    "FORMAT",
    "Directory",
    "ReplacedError",
    "Settings",
    "close_directory",
    "is_open",
    "open_directory",
    "registered_capacity",
    "translated",
]

FORMAT = b"lmkv-disk/2"
_OWN_FILES = {"data.mdb", "lock.mdb", "slots.lock"}
#: Values of LMCache's, which stay where they are when its ``local_disk`` becomes a ``disk_path``: named by keys, with an @.
BESIDE = re.compile(r".+@.+\.(pt|data)")
#: Directories of at least this capacity can be read by many transactions at once; a place for each takes 64 bytes.
_LARGE = 64 * 1024**2
#: An index of up to this size is checked before it is used; that takes a few milliseconds.
_CHECKED_AT_ONCE = 32 * 1024**2
#: A larger one is checked beside the caller, after so many seconds.
_CHECKED_AFTER = 3.0


@dataclass(frozen=True)
class Settings:
    """How a directory is opened.

    Args:
        path: absolute and without links.
        name: the tier's, for messages.
        capacity: bytes that all its files may take together.
        direct: past the page cache; ``None`` for where the file system can.
        depth: transfers in flight at once.
        floor: bytes of the file system that are left free.
        ahead: write segments over before they are used.
    """

    path: str
    name: str
    layout: KVLayout
    capacity: int
    direct: bool | None = None
    depth: int = 4
    floor: int = 0
    ahead: bool = True


class ReplacedError(BackendUnavailableError):
    """The files that were opened are not the ones at the path any more."""


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """LMDB's errors as LMKV's."""
    try:
        yield
    except lmdb.MapFullError as error:
        raise CapacityError(f"expected room to {what}; the environment is full: {error}") from error
    except (lmdb.Error, OSError) as error:
        if "closed" in str(error).lower():
            raise StoreClosedError(f"expected an open environment to {what}; it was closed") from error
        raise BackendUnavailableError(f"expected to {what}; LMDB says: {error}") from error


class Directory:
    """See :func:`open_directory`.

    Args:
        settings: of the first who opens it in this process.

    Raises:
        ConfigError, LayoutMismatchError, CapacityError: as :class:`lmkv.backends.lmdb_disk.LmdbBackend` says.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.users = 0
        self.closed = False
        self._damage = ""
        self._checking: threading.Thread | None = None
        self._ending = threading.Event()
        self.env = self._environment()
        self._opened = self._there()
        self.files: SegmentFiles | None = None
        try:
            self.env.reader_check()
            self._pad()
            self._check_index()
            self._open()
        except BaseException:
            self.close()
            raise

    def _shares(self, taken: int, held: Geometry | None, index: int) -> Plan:
        try:
            return plan(self.settings.layout, self.settings.capacity, taken, held, index)
        except CapacityError as error:
            raise CapacityError(f"tier {self.settings.name}: {error}") from None

    def _environment(self) -> Any:
        settings = self.settings
        path = settings.path
        self._shares(0, None, 0)  # refuse before anything is made
        try:
            os.makedirs(path, exist_ok=True)
            foreign = self._foreign()
            if foreign:
                raise ConfigError(
                    f"tier {settings.name}: expected an empty directory or one of LMKV's at {path}; "
                    f"it holds {foreign!r}: name another path"
                )
            readers = 512 if settings.capacity >= _LARGE else 126
            # as much as could ever be, since others may be writing; what it may be follows from what is there
            most = settings.capacity // PAGE * PAGE
            # a lookup needs a few pages here and there: reading ahead of each would take most of its time
            return lmdb.open(path, map_size=most, max_dbs=8, max_readers=readers, metasync=False, readahead=False)
        except (lmdb.Error, OSError) as error:
            raise ConfigError(
                f"tier {settings.name}: expected a directory that can be written at {path}; the system says: {error}. "
                "Name another path, make room, or set the capacity to 0"
            ) from error

    def _foreign(self) -> str | None:
        """A file that speaks against this being a directory of ours."""
        names = set(os.listdir(self.settings.path))
        if "data.mdb" in names:
            return None
        others = (name for name in names - _OWN_FILES if not BESIDE.fullmatch(name))
        return min((name for name in others if not self._is_segment(name)), default=None)

    def _is_segment(self, name: str) -> bool:
        """Whether a file is a segment, of this directory or another: by its name and first bytes."""
        path = os.path.join(self.settings.path, name)
        if not SEGMENT_NAME.fullmatch(name) or not stat.S_ISREG(os.lstat(path).st_mode):
            return False
        with open(path, "rb") as file:
            return file.read(8) in (b"LMKVSEG\0", b"\0" * 8, b"")

    def _pad(self) -> None:
        """Let a data file that was cut off reach to its last page: zeros are found out, reading behind its end is fatal."""
        path = os.path.join(self.settings.path, "data.mdb")
        size = os.path.getsize(path)
        claimed = (self.env.info()["last_pgno"] + 1) * self.env.stat()["psize"]
        if claimed > max(size, self.settings.capacity):
            raise BackendUnavailableError(f"it says that it has {claimed} bytes, more than the capacity")
        missing = claimed - size
        if missing > 0 and hasattr(os, "posix_fallocate"):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                os.posix_fallocate(fd, size, missing)  # never shrinks a file that another process makes longer meanwhile
            finally:
                os.close(fd)

    def _check_index(self) -> None:
        """Look for damage before LMDB trips over it: now in a small index, in a large one beside the caller."""
        if os.path.getsize(os.path.join(self.settings.path, "data.mdb")) <= _CHECKED_AT_ONCE:
            try:
                self._check_pages()
            except PagesDamagedError as error:
                raise BackendUnavailableError(f"its pages do not hang together: {error}") from error
        else:
            self._checking = threading.Thread(target=self._check_beside, name="lmkv-disk-check", daemon=True)
            self._checking.start()

    def _check_pages(self) -> None:
        path = os.path.join(self.settings.path, "data.mdb")
        if hasattr(os, "posix_fadvise"):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)  # in one go, not page by page
            os.close(fd)
        with self.env.begin() as txn:
            check_pages(path, txn.id())

    def _check_beside(self) -> None:
        if self._ending.wait(_CHECKED_AFTER):  # the first requests come first: they and this read from the same device
            return
        try:
            self._check_pages()
        except PagesDamagedError as error:
            self._damage = str(error)
        except (lmdb.Error, OSError):
            pass  # closed meanwhile, or whoever uses it next will hear of it

    # -- what it is ------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        settings = self.settings
        with translated(f"open {settings.path}"):
            held = self._held_geometry()
            size = os.path.getsize(os.path.join(settings.path, "data.mdb"))
            taken = os.path.getsize(os.path.join(settings.path, "lock.mdb"))
            self.plan = self._shares(taken, held, size)
            self.env.set_mapsize(max(self.plan.map_bytes, size))
            with self.env.begin(write=True) as txn:  # aborted if a check fails: what is not ours stays as it was
                meta = self._own_meta(txn)
                ident = self._check_meta(txn, meta, self.plan)
                geometry = Geometry.unpack(bytes(txn.get(b"geometry", db=meta)))
                self.index = RecordIndex(self.env, txn, meta, geometry, settings.layout.chunk_tokens)
        self.files = SegmentFiles(settings.path, ident, geometry, settings.direct, settings.depth, lambda: self.replaced)
        self.slots = Slots(
            settings.path,
            self.index,
            self.files,
            self.begin,
            most=self.plan.segments,
            floor=settings.floor,
            ahead=settings.ahead,
        )
        self._drop_surplus()
        self._note_capacity()

    def _held_geometry(self) -> Geometry | None:
        with self.env.begin() as txn:
            if any(bytes(name) not in (*DATABASES, b"records") for name, _ in txn.cursor()):
                raise self._not_ours()
            try:
                meta = self.env.open_db(b"meta", txn=txn, create=False)
            except lmdb.NotFoundError:
                return None
            except lmdb.IncompatibleError:  # a value of somebody else's under that name
                raise self._not_ours() from None
            self._compare_meta(txn, meta)
            data = txn.get(b"geometry", db=meta)
            try:
                return Geometry.unpack(bytes(data)) if data is not None else None
            except ValueError as error:
                raise ConfigError(
                    f"tier {self.settings.name}: expected whole settings in {self.settings.path}; its geometry is damaged "
                    f"({error}): delete the directory or name another path"
                ) from None

    def _own_meta(self, txn: Any) -> Any:
        try:
            return self.env.open_db(b"meta", txn=txn)
        except lmdb.IncompatibleError:
            raise self._not_ours() from None

    def _wanted(self) -> dict[bytes, bytes]:
        return {
            b"format": FORMAT,
            b"byteorder": sys.byteorder.encode(),
            b"layout": self.settings.layout.describe.encode(),
        }

    def _check_meta(self, txn: Any, meta: Any, shares: Plan) -> bytes:
        """Compare, or set in a new directory; returns its id."""
        if not self._compare_meta(txn, meta):
            for name, value in self._wanted().items():
                txn.put(name, value, db=meta)
            txn.put(b"id", uuid.uuid4().bytes, db=meta)
            txn.put(b"geometry", shares.geometry.pack(), db=meta)
        ident = bytes(txn.get(b"id", b"", db=meta))
        if len(ident) != 16:
            raise ConfigError(f"tier {self.settings.name}: expected an id of 16 bytes in {self.settings.path}; got {ident!r}")
        return ident

    def _compare_meta(self, txn: Any, meta: Any) -> bool:
        """Refuse what is not ours; ``False`` if there is nothing yet."""
        settings = self.settings
        if txn.get(b"format", db=meta) is None:
            if txn.stat(meta)["entries"]:
                raise self._not_ours()
            return False
        for name, value in self._wanted().items():
            held = txn.get(name, db=meta)
            if held == value:
                continue
            if name == b"layout":
                theirs = bytes(held or b"").decode(errors="replace")
                raise LayoutMismatchError(
                    f"tier {settings.name}: {settings.path} holds chunks of the layout {theirs!r}; the store has "
                    f"{value.decode()!r}. Nothing was changed: name another path, or open it with the layout it was made for"
                )
            raise ConfigError(
                f"tier {settings.name}: {settings.path} has {name.decode()} {held!r}; this version expects {value!r}. "
                "Nothing was changed: delete the directory's files or name another path"
            )
        return True

    def _not_ours(self) -> ConfigError:
        return ConfigError(
            f"tier {self.settings.name}: {self.settings.path} holds an LMDB environment that is not LMKV's: name another path"
        )

    def _drop_surplus(self) -> None:
        """Bring a directory that was larger, or whose files are more than its index names, within the capacity."""
        assert self.files is not None
        with self.begin(True) as txn:
            held = self.index.segments(txn)
            surplus = sorted(held)[self.plan.segments :]
            for number in surplus:
                for key in self.index.in_segment(txn, number):
                    self.index.delete(txn, key)
                self.index.set_segment(txn, number, None)
            for name in os.listdir(self.settings.path):
                found = SEGMENT_NAME.fullmatch(name)
                if found and (int(found[1]) not in held or int(found[1]) in surplus):
                    self.files.remove(int(found[1]))

    def _note_capacity(self) -> None:
        """For commands that are given nothing but the path; in a full index there may be no room even for that now."""
        mine = self.settings.capacity.to_bytes(8, "little")
        with self.begin(False) as txn:
            known = txn.get(b"capacity", db=self.index.meta) == mine
        if not known:
            with contextlib.suppress(CapacityError), self.begin(True) as txn:
                txn.put(b"capacity", mine, db=self.index.meta)

    # -- whether it is still there ---------------------------------------------------------------------------------------

    def _there(self) -> tuple[int, int] | None:
        """Device and number of the file that the index lies in; ``None`` where none is."""
        try:
            state = os.stat(os.path.join(self.settings.path, "data.mdb"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return state.st_dev, state.st_ino

    @property
    def replaced(self) -> bool:
        """Whether the directory was removed since it was opened, or made anew."""
        return self._there() != self._opened

    def may_be_made(self) -> bool:
        """Whether one at the path is of LMKV's, or can be made where the old one was: not under a device that went away."""
        path = self.settings.path
        if self._there() is not None or self._opened is None:
            return True
        where = path if os.path.exists(path) else os.path.dirname(path)
        return os.path.exists(where) and os.stat(where).st_dev == self._opened[0]

    # -- use -------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def begin(self, write: bool) -> Iterator[Any]:
        """A transaction; LMDB's errors come out as LMKV's."""
        if self.closed:
            raise StoreClosedError(f"expected an open environment at {self.settings.path}; it was closed")
        if self._damage:
            raise BackendUnavailableError(
                f"expected a whole index at {self.settings.path}; its pages do not hang together: {self._damage}. "
                "Delete its data.mdb"
            )
        with translated("look for the index"):
            if self.replaced:
                raise ReplacedError(
                    f"expected the files that were opened in {self.settings.path}; they were removed or made anew"
                )
        with translated("use the index"), self.env.begin(write=write, buffers=True) as txn:
            yield txn

    def change(self) -> AbstractContextManager[Any]:
        """A write transaction."""
        return self.begin(True)

    def close(self) -> None:
        """Close everything, durably."""
        self._ending.set()
        if self._checking is not None:
            self._checking.join()  # it reads from the map
        if self.files is not None and (not hasattr(self, "slots") or self.slots.close()):
            self.files.close()
        self.closed = True
        with contextlib.suppress(lmdb.Error):
            self.env.sync(True)
        self.env.close()


_registry: dict[str, Directory] = {}
_registry_lock = threading.Lock()
#: Of the process that this one was forked from. LMDB would take its readers' places away if it were closed here.
_inherited: list[Directory] = []


def _leave_behind() -> None:
    global _registry_lock
    _registry_lock = threading.Lock()
    _inherited.extend(_registry.values())
    _registry.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_behind)


def open_directory(settings: Settings) -> Directory:
    """The directory at a path; the same one for all in this process who open it, as LMDB demands.

    Raises:
        ConfigError, LayoutMismatchError, CapacityError: as :class:`lmkv.backends.lmdb_disk.LmdbBackend` says.
    """
    if settings.capacity < LEAST_CAPACITY:
        raise CapacityError(
            f"tier {settings.name}: expected a capacity of at least {LEAST_CAPACITY} bytes; got {settings.capacity}"
        )
    if any(directory.settings.path == settings.path for directory in _inherited):
        raise ConfigError(
            f"tier {settings.name}: expected a directory that was not open when this process was forked, which LMDB does not "
            f"allow; {settings.path} was: start the process anew (spawn), or open it in the other one later"
        )
    with _registry_lock:
        found = _registry.get(settings.path)
        if found is None or found.replaced:
            try:
                found = _registry[settings.path] = Directory(settings)
            except BackendUnavailableError as error:
                raise ConfigError(
                    f"tier {settings.name}: expected a whole database at {settings.path}; {error}. "
                    "Delete its data.mdb or name another path"
                ) from error
        else:
            theirs = found.settings
            if theirs.layout.describe != settings.layout.describe:
                raise LayoutMismatchError(
                    f"tier {settings.name}: {settings.path} is open in this process with the layout "
                    f"{theirs.layout.describe!r}; the store has {settings.layout.describe!r}: name another path"
                )
            if theirs.capacity != settings.capacity:
                raise ConfigError(
                    f"tier {settings.name}: {settings.path} is open in this process with a capacity of {theirs.capacity} "
                    f"bytes; expected the same; got {settings.capacity}: name another path or make them equal"
                )
        found.users += 1
        return found


def registered_capacity(path: str) -> int:
    """The capacity of a directory that this process has open; 0 if it has not."""
    with _registry_lock:
        found = _registry.get(os.path.realpath(path))
        return 0 if found is None else found.settings.capacity


def is_open(path: str) -> bool:
    """Whether this process has the directory open."""
    with _registry_lock:
        return os.path.realpath(path) in _registry


def close_directory(directory: Directory) -> None:
    """One user less; the last one closes it."""
    with _registry_lock:
        if directory in _inherited:
            return
        directory.users -= 1
        if not directory.users:
            if _registry.get(directory.settings.path) is directory:
                del _registry[directory.settings.path]
            directory.close()
