"""What a directory says of itself, whoever made it: for commands that are given a path and nothing else."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lmdb

from ...errors import BackendUnavailableError, ConfigError
from ...layout import KVLayout, LayerGroup
from .directory import BESIDE, FORMAT, is_open
from .slots import PRESENCE

__all__ = ["Survey", "compact", "parse_layout", "survey"]

_GROUP = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+):([a-z0-9_]+)")
_LAYOUT = re.compile(r"lmkv-layout/1 tokens=(\d+) groups=(.+)")


@dataclass(frozen=True)
class Survey:
    """A directory's settings.

    Args:
        layout: of its chunks.
        capacity: that it was opened with last, in bytes.
        bytes_on_disk: of all its files.
    """

    layout: KVLayout
    capacity: int
    bytes_on_disk: int


def parse_layout(description: str) -> KVLayout:
    """The layout whose ``describe`` this is.

    Raises:
        ConfigError: it is none.
    """
    whole = _LAYOUT.fullmatch(description)
    parts = [_GROUP.fullmatch(part) for part in whole[2].split(";")] if whole else []
    if whole is None or not all(parts):
        raise ConfigError(f"expected a layout's description; got {description!r}")
    groups = tuple(LayerGroup(int(part[1]), int(part[2]), int(part[3]), int(part[4]), part[5]) for part in parts if part)
    return KVLayout(groups, int(whole[1]))


def survey(path: str) -> Survey:
    """Read a directory's settings, changing nothing.

    Raises:
        ConfigError: it is no directory of this format.
    """
    folder = Path(path)
    if not (folder / "data.mdb").is_file():
        raise ConfigError(f"expected a disk tier's directory; {path} has no data.mdb")
    try:
        with lmdb.open(str(folder), readonly=True, lock=True, max_dbs=8) as env, env.begin() as txn:
            meta = env.open_db(b"meta", txn=txn, create=False)
            format_ = txn.get(b"format", b"", db=meta)
            layout = txn.get(b"layout", b"", db=meta).decode(errors="replace")
            capacity = int.from_bytes(txn.get(b"capacity", b"", db=meta), "little")
    except lmdb.Error as error:
        raise ConfigError(f"expected a disk tier's directory at {path}; LMDB says: {error}") from error
    if format_ != FORMAT:
        raise ConfigError(f"expected the format {FORMAT.decode()} at {path}; it has {format_!r}")
    size = sum(file.lstat().st_size for file in folder.iterdir() if not BESIDE.fullmatch(file.name))
    return Survey(parse_layout(layout), capacity, size)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else has the directory open, and nobody can open it meanwhile."""
    fd = os.open(folder / "slots.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, PRESENCE)
        except OSError:
            raise BackendUnavailableError(f"expected nobody to use {folder}; a process has it open: end it first") from None
        yield
    finally:
        os.close(fd)


def compact(path: str) -> tuple[int, int]:
    """Write the index anew without its free pages and remove segment files that hold nothing.

    Returns:
        Bytes of the directory before and after.

    Raises:
        ConfigError: it is no directory of this format.
        BackendUnavailableError: a process has it open, or the system refuses.
    """
    if is_open(path):  # its locks are this process's own and would not speak against it
        raise BackendUnavailableError(f"expected nobody to use {path}; this process has it open: close it first")
    before = survey(path).bytes_on_disk
    folder = Path(path)
    with _alone(folder):
        try:
            with lmdb.open(str(folder), max_dbs=8, map_size=max(1 << 20, before)) as env:
                segments = env.open_db(b"segments")
                with env.begin(write=True) as txn:
                    empty = [bytes(number) for number, bits in txn.cursor(db=segments) if not any(bits)]
                    for number in empty:
                        txn.delete(number, db=segments)
                env.sync(True)
                for number in empty:
                    (folder / f"segment-{int.from_bytes(number, 'big'):08d}.kv").unlink(missing_ok=True)
                part = folder / "data.mdb.part"
                fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
                try:
                    env.copyfd(fd, compact=True)
                    os.fsync(fd)
                finally:
                    os.close(fd)
            part.replace(folder / "data.mdb")
        except (lmdb.Error, OSError) as error:
            raise BackendUnavailableError(f"expected to compact {path}; the system says: {error}") from error
    return before, survey(path).bytes_on_disk
