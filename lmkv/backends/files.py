"""Values as files of a directory that several machines share, such as NFS, Lustre or a parallel file system.

One file a value, ``<two hex digits>/<chunk key in hex>``, written under another name and renamed, so that it is there whole or
not at all. Nobody keeps an index or a quota: whoever owns the file system bounds it and deletes old files.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..chunks import ChunkKey
from ..errors import BackendUnavailableError, CapacityError, ConfigError, StoreClosedError
from .base import BackendSettings

__all__ = ["FilesBackend"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DIGITS = "0123456789abcdef"
_UNFINISHED = ".part"


class FilesBackend:
    """Files of a directory. It is made on the first write, if it is not there.

    Raises:
        ConfigError: no absolute path in the URL, an option (there are none), or a capacity.
    """

    def __init__(self, settings: BackendSettings) -> None:
        where = f"tier {settings.name}"
        if settings.options:
            raise ConfigError(f"{where}: expected no options for a shared directory; got {sorted(settings.options)}")
        if settings.capacity:
            raise ConfigError(
                f"{where}: expected no capacity for a shared directory, which keeps no quota; got {settings.capacity}"
            )
        parts = urllib.parse.urlsplit(settings.url)
        path = urllib.parse.unquote(parts.path)
        if parts.scheme != "file" or parts.netloc not in ("", "localhost") or path in ("", "/"):
            raise ConfigError(f"{where}: expected a url such as file:///mnt/shared/kv; got {settings.url!r}")
        if parts.query:
            raise ConfigError(f"{where}: expected no options for a shared directory; got {parts.query!r}")
        self._folder = Path(path)
        self._closed = False

    def __repr__(self) -> str:
        return f"FilesBackend({self._folder})"

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

    @staticmethod
    def _read(path: Path, out: memoryview) -> int | None:
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            size = os.fstat(file).st_size
            if size > len(out):
                return None
            done = 0
            while done < size:
                count = os.readv(file, [out[done:size]])
                if not count:  # somebody cut it meanwhile
                    return None
                done += count
            return size
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

    @staticmethod
    def _write(path: Path, data: memoryview) -> None:
        unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}{_UNFINISHED}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            file = os.open(unfinished, flags, 0o666)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(unfinished, flags, 0o666)
        try:
            try:
                done = 0
                while done < len(data):
                    done += os.write(file, data[done:])
            finally:
                os.close(file)  # network file systems tell of a full disk only here
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
            raise

    def _remove(self, keys: Sequence[ChunkKey]) -> None:
        for key in keys:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(key))

    def delete_many(self, keys: Sequence[ChunkKey]) -> None:
        """See :class:`lmkv.backends.base.Backend`."""
        with self._translated():
            self._remove(keys)

    def clear(self) -> None:
        """See :class:`lmkv.backends.base.Clearable`: every file, unfinished ones of dead writers included."""
        with self._translated():
            for first in _DIGITS:
                for second in _DIGITS:
                    with contextlib.suppress(FileNotFoundError):
                        shutil.rmtree(self._folder / (first + second))

    def close(self) -> None:
        """See :class:`lmkv.backends.base.Backend`."""
        self._closed = True
