"""Closing a disk directory whose device hangs."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

import lmkv
from lmkv.backends import BackendSettings
from lmkv.backends.disk import slots
from lmkv.backends.lmdb_disk import LmdbBackend
from lmkv.testing._chunks import text_chunks

LAYOUT = lmkv.KVLayout.dense(layers=1, heads=1, head_size=4, dtype="float32", chunk_tokens=16)


def test_zeros_that_are_written_ahead_do_not_reach_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are opened next have the descriptors' numbers."""
    monkeypatch.setattr(slots, "_STEP_SECONDS", 0.1)
    backend = LmdbBackend(BackendSettings("disk", LAYOUT, 4 << 20, {"path": str(tmp_path / "kv")}))
    files = backend._directory.files
    write_all = files._write_all
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def hanging(fd: int, views: list[memoryview], offset: int) -> None:
        if threading.current_thread().name == "lmkv-disk-ahead":
            begun.set()
            assert go_on.wait(60)
        try:
            write_all(fd, views, offset)
        finally:
            if threading.current_thread().name == "lmkv-disk-ahead":
                ended.set()

    monkeypatch.setattr(files, "_write_all", hanging)
    for number in range(400):
        chunks = text_chunks(LAYOUT, range(16 * number, 16 * number + 16))
        backend.write_many([chunk.key for chunk in chunks], [chunk.record(LAYOUT) for chunk in chunks])
        if begun.is_set():
            break
    assert begun.wait(20)
    backend.close()
    others: list[Any] = [(tmp_path / f"other-{i}").open("w+b") for i in range(16)]
    for other in others:
        other.write(b"!" * (1 << 20))
        other.flush()
    go_on.set()
    assert ended.wait(20)
    for other in others:
        assert os.pread(other.fileno(), 8 << 20, 0) == b"!" * (1 << 20), "zeros came into another file"
        other.close()
