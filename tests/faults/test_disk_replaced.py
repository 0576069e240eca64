"""A disk tier whose files are removed, or made anew by another process, while a store has them open."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import known_kv
import pytest

import lmkv

LAYOUT = lmkv.KVLayout.dense(layers=2, heads=2, head_size=64, dtype="float16", chunk_tokens=16)
MINE, THEIRS = list(range(70)), list(range(500, 570))

#: Another process that stores a text.
OTHER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import known_kv, test_disk_replaced as here
with here.opened(Path(sys.argv[2])) as store:
    here.keep(store, here.THEIRS)
"""


def opened(path: Path, events: list[lmkv.Event] | None = None, **settings: Any) -> lmkv.Store:
    disk = {"disk_path": str(path), "disk_capacity": 4 << 20, "ram_cache": False, "ram_capacity": 1 << 20}
    return lmkv.Store(lmkv.StoreConfig(**disk | settings), LAYOUT, on_event=None if events is None else events.append)


def keep(store: lmkv.Store, tokens: list[int]) -> None:
    assert store.store(tokens, known_kv.source(LAYOUT, tokens)) == len(tokens)
    assert store.flush(60)


def other_process(path: Path) -> None:
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", OTHER, str(Path(known_kv.__file__).parent), str(path)]
    subprocess.run(command, check=True, timeout=120, env=environ)


def test_a_directory_that_another_process_made_anew(tmp_path: Path) -> None:
    path, events = tmp_path / "disk", list[lmkv.Event]()
    with opened(path, events, breaker_failures=100) as store:
        keep(store, MINE)
        assert known_kv.fetch(store, MINE) == 70
        shutil.rmtree(path)
        other_process(path)
        assert store.lookup(MINE).hit_tokens == 0
        assert [event.kind for event in events if event.kind in ("tier_failed", "corrupt")] == ["tier_failed"]
        assert known_kv.fetch(store, THEIRS) == 70
        for i in range(2000, 42000, 100):  # more than there is room for: what the other one wrote is evicted, too
            keep(store, list(range(i, i + 70)))
        assert known_kv.fetch(store, list(range(i, i + 70))) == 70
        assert store.lookup(THEIRS).hit_tokens == 0
        store._check()
        last = list(range(i, i + 70))
    with opened(path) as store:
        assert known_kv.fetch(store, last) == 70


def test_a_directory_that_was_removed(tmp_path: Path) -> None:
    path, events = tmp_path / "disk", list[lmkv.Event]()
    with opened(path, events, breaker_failures=100) as store:
        keep(store, MINE)
        shutil.rmtree(path)
        assert store.lookup(MINE).hit_tokens == 0
        assert "tier_failed" in [event.kind for event in events]
        keep(store, MINE)
        assert known_kv.fetch(store, MINE) == 70
    with opened(path) as store:
        assert known_kv.fetch(store, MINE) == 70


def test_a_segment_file_that_was_replaced(tmp_path: Path) -> None:
    path, events = tmp_path / "disk", list[lmkv.Event]()
    with opened(path, events) as store:
        keep(store, MINE)
        assert known_kv.fetch(store, MINE) == 70
        for segment in path.glob("segment-*.kv"):
            shutil.copyfile(segment, path / "copy")
            os.replace(path / "copy", segment)
        other_process(path)
        assert known_kv.fetch(store, THEIRS) == 70
        assert known_kv.fetch(store, MINE) == 70
        assert not [event for event in events if event.kind == "corrupt"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the system does not list open files")
def test_files_of_a_removed_directory_are_closed(tmp_path: Path) -> None:
    path = tmp_path / "disk"

    def open_files() -> list[str]:
        links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
        return [os.readlink(link) for link in links if os.path.islink(link) and "segment-" in os.readlink(link)]

    with opened(path, breaker_failures=100) as store:
        for _ in range(3):
            keep(store, MINE)
            assert known_kv.fetch(store, MINE) == 70
            shutil.rmtree(path)
            assert store.lookup(MINE).hit_tokens == 0
            assert not [name for name in open_files() if str(path) in name]


def test_who_has_not_noticed_yet_makes_no_segments_in_the_other_ones_directory(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with opened(path, breaker_failures=100) as store:
        keep(store, MINE)
        files = store._slow[0].backend._directory.files
        files.let_go()
        shutil.rmtree(path)
        other_process(path)
        before = {segment.name: segment.read_bytes()[:4096] for segment in path.glob("segment-*.kv")}
        for number in range(3):
            with pytest.raises(OSError, match="made anew"):
                files.make(number)
        assert {segment.name: segment.read_bytes()[:4096] for segment in path.glob("segment-*.kv")} == before
