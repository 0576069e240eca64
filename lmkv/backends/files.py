"""Values as files of a directory that several machines share, such as NFS, Lustre or a parallel file system.

One file a value, ``<two hex digits>/<chunk key in hex>``, written under another name and renamed, so that it is there whole or
not at all. Nobody keeps an index or a quota: whoever owns the file system bounds it and deletes old files.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..chunks import ChunkKey
from ..errors import BackendUnavailableError, CapacityError, ConfigError, StoreClosedError
from .base import BackendSettings, shown_url

__all__ = ["FilesBackend"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DIGITS = "0123456789abcdef"
_UNFINISHED = ".part"
#: Names of values, and of unfinished ones.
_OURS = re.compile(r"[0-9a-f]{32}(\.[0-9a-f]{16}\.part)?")


class FilesBackend:
    """Files of a directory. It is made on the first write, if it is not there.

    Raises:
        ConfigError: no absolute path in the URL, an option (there are none), or a capacity.
    """

    def __init__(self, settings: BackendSettings) -> None:
        where = f"tier {settings.name}"
        if settings.options:
            raise ConfigError(f"{where}: expected no options for a shared directory; got {sorted(settings.options)}")
        parts = urllib.parse.urlsplit(settings.url)
        path = urllib.parse.unquote(parts.path)
        if parts.scheme != "file" or parts.netloc not in ("", "localhost") or path in ("", "/"):
            raise ConfigError(f"{where}: expected a url such as file:///mnt/shared/kv; got {shown_url(settings.url)!r}")
        if parts.query:
            raise ConfigError(f"{where}: expected no options for a shared directory; got {parts.query!r}")
        self._use(settings, Path(path))

    def _use(self, settings: BackendSettings, folder: Path) -> None:
        if settings.capacity:
            raise ConfigError(
                f"tier {settings.name}: expected no capacity: a shared directory keeps no quota; got {settings.capacity}"
            )
        self._folder = folder
        self._closed = False

    # -- how bytes move: another mover may take their place ---------------------------------------------------------------

    def _flags(self, view: memoryview, size: int) -> int:
        """Further flags to open a file with, of which ``size`` bytes will be moved from or to ``view``."""
        del view, size
        return 0

    def _fill(self, file: int, out: memoryview) -> bool:
        """Read exactly ``out`` from the file's beginning; ``False`` if it ends before."""
        done = 0
        while done < len(out):
            count = os.readv(file, [out[done:]])
            if not count:
                return False
            done += count
        return True

    def _drain(self, file: int, data: memoryview) -> None:
        """Write all of ``data`` to the file's beginning."""
        done = 0
        while done < len(data):
            done += os.write(file, data[done:])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._folder})"

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        if self._closed:
            raise StoreClosedError("expected an open backend; it was closed")
        try:
            yield
        except OSError as error:
            kind = CapacityError if error.errno in _FULL else BackendUnavailableError
            raise kind(f"{self._folder}: {error.strerror or error}") from None

    def _path(self, key: ChunkKey) -> Path:
        name = key.hex()
        return self._folder / name[:2] / name

    def contains_many(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """See :class:`lmkv.backends.base.Backend`."""
        there = []
        with self._translated():
            for key in keys:
                try:
                    os.stat(self._path(key))
                    there.append(True)
                except FileNotFoundError:
                    there.append(False)
        return there

    def read_many(self, keys: Sequence[ChunkKey], out: Sequence[memoryview]) -> list[int | None]:
        """See :class:`lmkv.backends.base.Backend`. Read straight into the buffers."""
        with self._translated():
            return [self._read(self._path(key), buffer) for key, buffer in zip(keys, out, strict=True)]

    def _read(self, path: Path, out: memoryview) -> int | None:
        try:
            size = os.stat(path).st_size
            if size > len(out):
                return None
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | self._flags(out, size))
        except FileNotFoundError:
            return None
        try:  # a file that was replaced by a longer one meanwhile is cut here, and found out by whoever verifies
            return size if self._fill(file, out[:size]) else None
        finally:
            os.close(file)

    def write_many(self, keys: Sequence[ChunkKey], data: Sequence[memoryview]) -> None:
        """See :class:`lmkv.backends.base.Backend`. If one does not fit, none of them stays."""
        with self._translated():
            try:
                for key, piece in zip(keys, data, strict=True):
                    self._write(self._path(key), piece)
            except OSError as error:
                if error.errno in _FULL:
                    self._remove(keys)
                raise

    def _write(self, path: Path, data: memoryview) -> None:
        unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}{_UNFINISHED}")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | self._flags(data, len(data))
        try:
            file = os.open(unfinished, flags, 0o666)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(unfinished, flags, 0o666)
        try:
            try:
                self._drain(file, data)
            finally:
                os.close(file)  # network file systems tell of a full disk only here
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
            raise

    def _remove(self, keys: Sequence[ChunkKey]) -> None:
        for key in keys:
            self._unlink(self._path(key))

    def delete_many(self, keys: Sequence[ChunkKey]) -> None:
        """See :class:`lmkv.backends.base.Backend`."""
        with self._translated():
            self._remove(keys)

    def clear(self) -> None:
        """See :class:`lmkv.backends.base.Clearable`: every value, unfinished ones of dead writers included, and nothing else
        that lies there."""
        with self._translated():
            for first in _DIGITS:
                for second in _DIGITS:
                    folder = self._folder / (first + second)
                    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                        for name in os.listdir(folder):
                            if _OURS.fullmatch(name) and name.startswith(folder.name):
                                self._unlink(folder / name)

    @staticmethod
    def _unlink(path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def close(self) -> None:
        """See :class:`lmkv.backends.base.Backend`."""
        self._closed = True
