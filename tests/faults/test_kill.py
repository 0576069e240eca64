"""``kill -9`` in the middle of storing, again and again on one directory: whole chunks or none, and the right bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import disk_writer
import known_kv

import lmkv

ROUNDS = 50


def start(word: str, directory: Path, seed: int, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, disk_writer.__file__, word, str(directory), str(seed), *more], stdout=subprocess.PIPE, text=True
    )


def test_fifty_kills(tmp_path: Path) -> None:
    rng = random.Random(11)
    found = survived = 0
    for seed in range(ROUNDS):
        writer = start("forever", tmp_path, seed)
        assert writer.stdout is not None
        stored = 0
        for _ in range(rng.randint(1, 4)):  # in the middle of the work, not before it
            stored = int(writer.stdout.readline())
        time.sleep(rng.random() * 0.02)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        assert writer.returncode == -signal.SIGKILL

        events: list[lmkv.Event] = []
        store = lmkv.Store(disk_writer.config(str(tmp_path)), disk_writer.LAYOUT, on_event=events.append)
        store._check()
        for number in range(stored + 8):
            tokens = disk_writer.text(seed, number)
            match = store.lookup(tokens)
            assert known_kv.fetch(store, tokens, match) == match.hit_tokens, "what a lookup found is there, whole"
            found += match.hit_tokens
        if seed:
            tokens = disk_writer.text(seed - 1, 0)
            survived += known_kv.fetch(store, tokens)
        store._check()
        store.close()
        bad = [event for event in events if event.kind in ("corrupt", "load_failed", "tier_failed")]
        assert not bad, bad
        assert disk_writer.size_of(tmp_path) <= disk_writer.DISK
    assert found > ROUNDS * 100, "most of what was stored is found again"
    assert survived > 0, "and so is what was stored before the process before"


_READER = """
import sys, time, disk_writer
from lmkv.backends import BackendSettings
from lmkv.backends.lmdb_disk import LmdbBackend
backend = LmdbBackend(BackendSettings("disk", disk_writer.LAYOUT, disk_writer.DISK, {"path": sys.argv[1]}))
reading = backend._begin()
print("reading", flush=True)
time.sleep(600)
"""


def test_a_reader_that_was_killed_holds_no_room(tmp_path: Path) -> None:
    """LMDB keeps pages that a reader may still need, so one that died must not count while others work on."""
    with lmkv.Store(disk_writer.config(str(tmp_path)), disk_writer.LAYOUT) as store:
        for number in range(300):
            if number in (40, 160):
                support = str(Path(disk_writer.__file__).parent)
                reader = subprocess.Popen(
                    [sys.executable, "-c", _READER, str(tmp_path)],
                    env={**os.environ, "PYTHONPATH": support},
                    stdout=subprocess.PIPE,
                    text=True,
                )
                assert reader.stdout is not None
                assert reader.stdout.readline() == "reading\n"
                reader.kill()
                reader.communicate()
            tokens = disk_writer.text(77, number)
            store.store(tokens, known_kv.source(disk_writer.LAYOUT, tokens))
            assert store._slow[0].flush(120)
            assert disk_writer.size_of(tmp_path) <= disk_writer.DISK
        store._check()
        kept = store.stats().tiers[1]
        assert kept.used_bytes > kept.capacity_bytes // 2, "the quota is used, not emptied again and again"
        for number in range(270, 300):
            tokens = disk_writer.text(77, number)
            assert known_kv.fetch(store, tokens) == len(tokens), "what was stored last is there"
