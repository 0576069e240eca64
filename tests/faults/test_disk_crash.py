"""Processes on one disk directory that die at any moment: whole chunks or none, no slot lost, the quota kept."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import disk_child
import disk_writer
import known_kv
import pytest
from disk_writer import DISK, LAYOUT

import lmkv
from lmkv.backends import BackendSettings
from lmkv.backends.lmdb_disk import LmdbBackend
from lmkv.errors import CapacityError
from lmkv.testing._chunks import text_chunks


@pytest.mark.parametrize(("kills", "places"), [(200, ["disk"]), (80, ["disk-0", "disk-1"])])
def test_kills_under_four_writers_and_two_readers(tmp_path: Path, kills: int, places: list[str]) -> None:
    directory = ",".join(str(tmp_path / place) for place in places)
    command = [sys.executable, disk_child.__file__, "crowd", directory, str(kills), "120"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["killed"] == kills
    assert outcome["most"] <= DISK

    events: list[lmkv.Event] = []
    with lmkv.Store(disk_writer.config(directory), LAYOUT, on_event=events.append) as store:
        store._check()
        found = 0
        for seed in range(4):
            for number in range(400):
                tokens = disk_writer.text(seed, number)
                match = store.lookup(tokens)
                found += known_kv.fetch(store, tokens, match)
        assert found > 1000, "what was stored before is found"
        assert not [event for event in events if event.kind in ("corrupt", "load_failed", "tier_failed")]
    assert sorted(path.name for path in tmp_path.iterdir()) == places


_HOLDER = """
import sys, time
import disk_writer
from lmkv.backends import BackendSettings
from lmkv.backends.lmdb_disk import LmdbBackend
backend = LmdbBackend(BackendSettings("disk", disk_writer.LAYOUT, 1 << 20, {"path": sys.argv[1]}))
slots = backend._directory.slots
held = 0
while True:
    try:
        slots.reserve([1])
        held += 1
    except Exception:
        break
print(held, flush=True)
time.sleep(600)
"""


def test_slots_of_a_process_that_died_are_free_at_once(tmp_path: Path) -> None:
    """A living process sees it, without opening anything anew."""
    backend = LmdbBackend(BackendSettings("disk", LAYOUT, 1 << 20, {"path": str(tmp_path)}))
    chunks = text_chunks(LAYOUT, range(64))
    keys, records = [chunk.key for chunk in chunks], [chunk.record(LAYOUT) for chunk in chunks]
    environment = {"PYTHONPATH": str(Path(disk_writer.__file__).parent)}
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert holder.stdout is not None
    assert int(holder.stdout.readline()) * 4096 == backend.capacity
    try:
        backend.write_many(keys, records)
        raise AssertionError("expected no free slot while the other process holds them all")
    except CapacityError:
        assert not any(backend.contains_many(keys))
    holder.kill()
    holder.communicate()
    backend.write_many(keys, records)
    assert all(backend.contains_many(keys))
    backend._check()
    backend.close()


def test_clocks_that_jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Back, forth, before 1970 and behind 2106: order of use and slots do not depend on them."""
    times = itertools.cycle([1e9, 2e9, -5.0, 1e9, 2.0**40, 0.0])
    monkeypatch.setattr(time, "time", lambda: next(times))
    events: list[lmkv.Event] = []
    with lmkv.Store(disk_writer.config(str(tmp_path)), LAYOUT, on_event=events.append) as store:
        favourite = disk_writer.text(1, 1000)
        store.store(favourite, known_kv.source(LAYOUT, favourite))
        for number in range(150):
            tokens = disk_writer.text(1, number)
            store.store(tokens, known_kv.source(LAYOUT, tokens))
            assert store.flush(60)
            assert known_kv.fetch(store, favourite) == len(favourite), "what is used stays"
        store._check()
        assert store.stats().tiers[1].evictions > 0
    assert not [event for event in events if event.kind in ("corrupt", "tier_failed", "load_failed")]
    with lmkv.Store(disk_writer.config(str(tmp_path)), LAYOUT) as store:
        assert known_kv.fetch(store, favourite) == len(favourite)
