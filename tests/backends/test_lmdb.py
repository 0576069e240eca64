"""The LMDB backend beside its contract: restart, refusals, the quota, and what LMDB demands of a process."""

from __future__ import annotations

import dataclasses
import mmap
import os
from pathlib import Path

import disk_writer
import lmdb
import pytest

import lmkv
from lmkv.backends import Backend, BackendSettings
from lmkv.backends.base import Bounded, Clearable, LocalIndex, Syncing
from lmkv.backends.lmdb_disk import LmdbBackend
from lmkv.errors import CapacityError, ConfigError, LayoutMismatchError, StoreClosedError
from lmkv.testing import BackendSuite
from lmkv.testing._chunks import Chunk, text_chunks

MIB = 1024**2
LAYOUT = lmkv.KVLayout.dense(layers=1, heads=1, head_size=4, dtype="float32", chunk_tokens=16)


class TestLmdbBackend(BackendSuite):
    offers = (LocalIndex, Bounded, Syncing, Clearable)
    persistent = True

    def make(self, settings: BackendSettings) -> Backend:
        return LmdbBackend(
            dataclasses.replace(settings, options={**settings.options, "path": str(self.directory / settings.name)})
        )


def open_at(path: Path, capacity: int = MIB, layout: lmkv.KVLayout = LAYOUT) -> LmdbBackend:
    return LmdbBackend(BackendSettings("disk", layout, capacity, {"path": str(path)}))


def write(backend: LmdbBackend, chunks: list[Chunk], layout: lmkv.KVLayout = LAYOUT) -> None:
    backend.write_many([chunk.key for chunk in chunks], [chunk.record(layout) for chunk in chunks])


def read(backend: LmdbBackend, chunk: Chunk) -> bytes | None:
    buffer = memoryview(bytearray(1 << 16))
    (size,) = backend.read_many([chunk.key], [buffer])
    return None if size is None else bytes(buffer[:size])


# -- restart -----------------------------------------------------------------------------------------------------------------


def test_a_restart_finds_everything(tmp_path: Path) -> None:
    chunks = text_chunks(LAYOUT, range(100))
    backend = open_at(tmp_path)
    write(backend, chunks)
    backend.touch_many([chunks[2].key])
    used, entries = backend.used_bytes(), list(backend.entries(0))
    backend.close()

    backend = open_at(tmp_path)
    backend._check()
    assert backend.used_bytes() == used
    assert list(backend.entries(0)) == entries
    assert backend.match_prefix([c.key for c in chunks], [c.tokens for c in chunks]) == 7
    assert [read(backend, chunk) for chunk in chunks] == [bytes(chunk.record(LAYOUT)) for chunk in chunks]
    assert backend.best_child(chunks[-1].parent, chunks[-1].tokens) == (chunks[-1].key, chunks[-1].tokens, 4)
    backend.close()


def test_numbers_go_on_after_a_restart(tmp_path: Path) -> None:
    first, second = text_chunks(LAYOUT, range(32))
    backend = open_at(tmp_path)
    write(backend, [first])
    (before,) = backend.entries(0)
    backend.close()
    backend = open_at(tmp_path)
    write(backend, [second])
    assert [entry.key for entry in backend.entries(before.sequence)] == [second.key]
    backend.close()


def test_two_backends_of_a_process_on_one_directory(tmp_path: Path) -> None:
    chunks = text_chunks(LAYOUT, range(32))
    one, two = open_at(tmp_path), open_at(tmp_path / "." / "")
    write(one, chunks)
    assert two.contains_many([chunk.key for chunk in chunks]) == [True, True]
    one.close()
    assert read(two, chunks[0]) == bytes(chunks[0].record(LAYOUT))
    with pytest.raises(StoreClosedError, match="closed"):
        one.contains_many([chunks[0].key])
    two.close()


# -- what it refuses, without changing anything ------------------------------------------------------------------------------


def test_another_layout(tmp_path: Path) -> None:
    chunks = text_chunks(LAYOUT, range(32))
    backend = open_at(tmp_path)
    write(backend, chunks)
    backend.close()
    other = lmkv.KVLayout.dense(layers=2, heads=1, head_size=4, dtype="float32", chunk_tokens=16)
    with pytest.raises(LayoutMismatchError) as caught:
        open_at(tmp_path, layout=other)
    assert LAYOUT.describe in str(caught.value)
    assert other.describe in str(caught.value)
    backend = open_at(tmp_path)
    assert [read(backend, chunk) for chunk in chunks] == [bytes(chunk.record(LAYOUT)) for chunk in chunks]
    backend.close()


@pytest.mark.parametrize(("name", "value"), [(b"format", b"lmkv-lmdb/999"), (b"byteorder", b"middle")])
def test_another_format(tmp_path: Path, name: bytes, value: bytes) -> None:
    chunks = text_chunks(LAYOUT, range(16))
    backend = open_at(tmp_path)
    write(backend, chunks)
    backend.close()
    with lmdb.open(str(tmp_path), max_dbs=8, map_size=MIB) as env, env.begin(write=True) as txn:
        before = txn.get(name, db=env.open_db(b"meta", txn=txn))
        txn.put(name, value, db=env.open_db(b"meta", txn=txn))
    with pytest.raises(ConfigError, match=f"(?s){name.decode()}.*{value.decode()}.*another path"):
        open_at(tmp_path)
    with lmdb.open(str(tmp_path), max_dbs=8, map_size=MIB) as env, env.begin(write=True) as txn:
        txn.put(name, before, db=env.open_db(b"meta", txn=txn))
    backend = open_at(tmp_path)
    assert read(backend, chunks[0]) == bytes(chunks[0].record(LAYOUT))
    backend.close()


def test_somebody_elses_directory(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="thesis"):
        open_at(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("database", [None, b"theirs", b"meta"])
@pytest.mark.parametrize("key", [b"key", b"meta"])
def test_somebody_elses_environment(tmp_path: Path, database: bytes | None, key: bytes) -> None:
    with lmdb.open(str(tmp_path), max_dbs=2, map_size=MIB) as env, env.begin(write=True, db=env.open_db(database)) as txn:
        txn.put(key, b"value")
    for _ in range(2):
        with pytest.raises(ConfigError, match="not LMKV's"):
            open_at(tmp_path)
    with lmdb.open(str(tmp_path), max_dbs=2, map_size=MIB) as env:
        with env.begin() as txn:
            assert [bytes(name) for name, _ in txn.cursor()] == [key if database is None else database]
        with env.begin(db=env.open_db(database)) as txn:
            assert dict(txn.cursor()) == {key: b"value"}


def test_a_path_under_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="directory that can be written"):
            open_at(path)
    assert (tmp_path / "file").read_text() == "x"


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"\x01" * 8192)
    with pytest.raises(ConfigError, match="another path"):
        open_at(tmp_path)
    assert (tmp_path / "data.mdb").read_bytes() == b"\x01" * 8192


@pytest.mark.parametrize(
    ("name", "value"),
    [("direct", "maybe"), ("direct", 2), ("depth", 0), ("depth", "4"), ("free_space_floor", -1), ("free_space_floor", 1.5)],
)
def test_wrong_values_of_options(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected"):
        LmdbBackend(BackendSettings("disk", LAYOUT, MIB, {"path": str(tmp_path), name: value}))


def test_another_capacity_in_the_same_process(tmp_path: Path) -> None:
    backend = open_at(tmp_path)
    with pytest.raises(ConfigError, match="capacity of 1048576"):
        open_at(tmp_path, capacity=2 * MIB)
    backend.close()


def test_an_older_format(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path), max_dbs=8, map_size=MIB) as env, env.begin(write=True) as txn:
        meta = env.open_db(b"meta", txn=txn)
        for key, value in ((b"format", b"lmkv-lmdb/1"), (b"byteorder", b"little"), (b"layout", LAYOUT.describe.encode())):
            txn.put(key, value, db=meta)
        env.open_db(b"records", txn=txn)
    before = (tmp_path / "data.mdb").read_bytes()
    with pytest.raises(ConfigError, match=r"lmkv-lmdb/1.*delete the directory's files or name another path"):
        open_at(tmp_path)
    assert (tmp_path / "data.mdb").read_bytes() == before


@pytest.mark.parametrize("options", [{}, {"path": ""}, {"path": "p", "pth": 1}, {"speed": 9}])
def test_wrong_options(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="path"):
        LmdbBackend(BackendSettings("disk", LAYOUT, MIB, options))


def test_too_small_a_capacity(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="262144"):
        open_at(tmp_path, capacity=262143)
    open_at(tmp_path, capacity=262144).close()


def test_a_home_directory_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    LmdbBackend(BackendSettings("disk", LAYOUT, MIB, {"path": "~/kv"})).close()
    assert (tmp_path / "kv" / "data.mdb").exists()


# -- the quota ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [256 * 1024, MIB + 5])
def test_the_files_stay_within_the_capacity(tmp_path: Path, capacity: int) -> None:
    backend = open_at(tmp_path, capacity=capacity)
    held: list[Chunk] = []
    for i in range(2 * capacity // 8192):
        (chunk,) = text_chunks(LAYOUT, [i] * (1 + i % 16))
        while True:
            try:
                write(backend, [chunk])
                break
            except CapacityError:
                backend.delete_many([held.pop(0).key])
        held.append(chunk)
        assert backend.used_bytes() <= backend.capacity < capacity
        assert disk_writer.size_of(tmp_path) <= capacity
    backend._check()
    assert backend.count() == len(held) > capacity // 8192 // 4
    backend.close()


def test_one_value_larger_than_everything(tmp_path: Path) -> None:
    layout = lmkv.KVLayout.dense(layers=64, heads=16, head_size=64, dtype="float32", chunk_tokens=16)
    backend = open_at(tmp_path, layout=layout)
    chunk = text_chunks(layout, range(16))[0]
    with pytest.raises(CapacityError):
        write(backend, [chunk], layout)
    assert (backend.count(), backend.used_bytes()) == (0, 0)
    backend.close()


# -- a directory that grows and shrinks --------------------------------------------------------------------------------------


def fill(backend: LmdbBackend, count: int) -> list[Chunk]:
    """Chunks of texts of their own, deleting the oldest where there is no room; what is left of them."""
    held: list[Chunk] = []
    for i in range(count):
        (chunk,) = text_chunks(LAYOUT, [i] * 16)
        while True:
            try:
                write(backend, [chunk])
                break
            except CapacityError:
                backend.delete_many([held.pop(0).key])
        held.append(chunk)
    return held


def test_another_capacity_after_a_restart(tmp_path: Path) -> None:
    backend = open_at(tmp_path, capacity=4 * MIB)
    held = fill(backend, 600)
    backend.close()
    assert disk_writer.size_of(tmp_path) > 2 * MIB
    backend = open_at(tmp_path, capacity=3 * MIB)
    backend._check()
    left = [chunk for chunk in held if backend.contains_many([chunk.key])[0]]
    assert 0 < len(left) < len(held)
    assert all(read(backend, chunk) == bytes(chunk.record(LAYOUT)) for chunk in left)
    fill(backend, 700)
    backend._check()
    assert disk_writer.size_of(tmp_path) <= 3 * MIB
    backend.close()
    backend = open_at(tmp_path, capacity=6 * MIB)
    assert len(fill(backend, 900)) > len(held), "with more capacity more is held"
    backend._check()
    assert disk_writer.size_of(tmp_path) <= 6 * MIB
    backend.close()


def test_too_small_for_what_is_there(tmp_path: Path) -> None:
    backend = open_at(tmp_path, capacity=16 * MIB)
    fill(backend, 100)
    backend.close()
    with pytest.raises(CapacityError, match="one segment file as large as those that are there"):
        open_at(tmp_path, capacity=MIB)
    backend = open_at(tmp_path, capacity=16 * MIB)
    assert backend.count() == 100
    backend.close()


def test_a_floor_of_free_space(tmp_path: Path) -> None:
    state = os.statvfs(tmp_path)
    free = state.f_bavail * state.f_frsize
    options = {"path": str(tmp_path), "free_space_floor": 2 * free}
    backend = LmdbBackend(BackendSettings("disk", LAYOUT, MIB, options))
    with pytest.raises(CapacityError):
        write(backend, text_chunks(LAYOUT, range(16)))
    assert not list(tmp_path.glob("segment-*"))
    backend.close()
    options["free_space_floor"] = 0
    backend = LmdbBackend(BackendSettings("disk", LAYOUT, MIB, options))
    write(backend, text_chunks(LAYOUT, range(16)))
    backend.close()


@pytest.mark.parametrize("direct", [True, False])
def test_buffers_at_any_address(tmp_path: Path, direct: bool) -> None:
    """Records of odd sizes, read to and written from odd places; slots that do not lie side by side."""
    layout = lmkv.KVLayout.dense(layers=3, heads=7, head_size=33, dtype="float16", chunk_tokens=64)
    backend = LmdbBackend(BackendSettings("disk", layout, 2 * MIB, {"path": str(tmp_path), "direct": direct}))
    assert backend._directory.files is not None
    assert backend._directory.files.direct is direct
    room = mmap.mmap(-1, MIB)
    chunks = [text_chunks(layout, [i] * (1 + i * 7 % 64))[0] for i in range(60)]
    for i, chunk in enumerate(chunks):
        record = chunk.record(layout)
        view = memoryview(room)[i * 37 : i * 37 + len(record)]
        view[:] = record
        while True:
            try:
                backend.write_many([chunk.key], [view])
                break
            except CapacityError:
                backend.delete_many([chunks[k].key for k in range(i % 3, i, 3)])
        for at in (0, 1, 4096, 511):
            target = memoryview(room)[600_000 + at : 600_000 + at + len(record)]
            assert backend.read_many([chunk.key], [target]) == [len(record)]
            assert target == record
    backend._check()
    backend.close()
