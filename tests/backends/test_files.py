"""A shared directory as a backend."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from lmkv.backends import Backend, BackendSettings, open_backend
from lmkv.backends.base import Clearable
from lmkv.chunks import ChunkKey
from lmkv.errors import BackendUnavailableError, CapacityError, ConfigError
from lmkv.layout import KVLayout
from lmkv.testing import BackendSuite

LAYOUT = KVLayout.dense(layers=1, heads=1, head_size=4, dtype="float32", chunk_tokens=16)
KEY = ChunkKey(b"k" * 16)


class TestFiles(BackendSuite):
    offers = (Clearable,)
    persistent = True
    refuses_when_full = False

    def make(self, settings: BackendSettings) -> Backend:
        url = (self.directory / "a b" / settings.name).as_uri()
        return open_backend("file", dataclasses.replace(settings, capacity=0, url=url))


def open_at(path: Path) -> Backend:
    return open_backend("file", BackendSettings("remote", LAYOUT, url=path.as_uri()))


def test_nothing_is_made_before_the_first_write(tmp_path: Path) -> None:
    backend = open_at(tmp_path / "new" / "folder")
    assert backend.contains_many([KEY]) == [False]
    assert list(tmp_path.iterdir()) == []
    backend.write_many([KEY], [memoryview(b"value")])
    assert [path.name for path in (tmp_path / "new" / "folder").rglob("*") if path.is_file()] == [KEY.hex()]


def test_a_file_that_was_cut_is_a_shorter_value(tmp_path: Path) -> None:
    backend = open_at(tmp_path)
    backend.write_many([KEY], [memoryview(b"value")])
    os.truncate(tmp_path / KEY.hex()[:2] / KEY.hex(), 3)
    assert backend.read_many([KEY], [memoryview(bytearray(10))]) == [3]  # which the tier finds out


def test_an_unusable_directory_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    backend = open_at(tmp_path / "file")
    with pytest.raises(BackendUnavailableError):
        backend.write_many([KEY], [memoryview(b"value")])
    with pytest.raises(BackendUnavailableError):
        backend.contains_many([KEY])


def test_a_full_file_system_is_a_capacity_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = open_at(tmp_path)
    full = os.open("/dev/full", os.O_WRONLY)  # a real file that has no room
    write = os.write

    def to_full(file: int, data: memoryview) -> int:
        return write(full if bytes(data) == b"too much" else file, data)

    monkeypatch.setattr(os, "write", to_full)
    other = ChunkKey(b"o" * 16)
    with pytest.raises(CapacityError):
        backend.write_many([KEY, other], [memoryview(b"fits"), memoryview(b"too much")])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    os.close(full)


@pytest.mark.parametrize("url", ["file://", "file:///", "file://host/path", "file:///kv?a=1", "s3://kv"])
def test_wrong_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"shared directory|file:///mnt/shared/kv"):
        open_backend("file", BackendSettings("remote", LAYOUT, url=url))


def test_clear_leaves_what_is_not_a_value(tmp_path: Path) -> None:
    backend, within = open_at(tmp_path), open_at(tmp_path / "6b")
    assert isinstance(backend, Clearable)
    for each in (backend, within):
        each.write_many([KEY], [memoryview(b"value")])
    unfinished = tmp_path / "6b" / f"{KEY.hex()}.{'0' * 16}.part"
    unfinished.write_bytes(b"val")
    foreign = [tmp_path / "notes.txt", tmp_path / "6b" / "notes.txt", tmp_path / "ab", tmp_path / "6b" / ("0" * 32)]
    for path in foreign:
        path.write_bytes(b"somebody else's")
    backend.clear()
    assert backend.contains_many([KEY]) == [False]
    assert within.contains_many([KEY]) == [True]
    assert not unfinished.exists()
    assert all(path.exists() for path in foreign)
