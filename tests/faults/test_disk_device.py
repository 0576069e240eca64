"""A device that fails, has no room, turns read-only, or forgets what was not synced: misses and events, never other bytes."""

from __future__ import annotations

import errno
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import disk_child
import disk_writer
import faulty_io
import known_kv
import pytest
from disk_writer import LAYOUT

import lmkv


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faulty_io.build(tmp_path_factory.mktemp("faulty"))


def run(*arguments: str, environment: dict[str, str]) -> Any:
    done = subprocess.run(
        [sys.executable, disk_child.__file__, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("operations", "error"),
    [
        ("writes", errno.EIO),
        ("writes", errno.ENOSPC),
        ("syncs", errno.EIO),
        ("reads", errno.EIO),
        ("allocations", errno.ENOSPC),
        ("writes,syncs,allocations", errno.EROFS),
        ("writes,syncs,allocations,reads", errno.EIO),
    ],
)
def test_a_failing_device(tmp_path: Path, library: Path, operations: str, error: int) -> None:
    control = faulty_io.Control(tmp_path / "control")
    directory = tmp_path / "disk"
    environment = faulty_io.environment(library, directory, control=control)
    outcome = run("faulty", str(directory), str(control.path), operations, str(error), environment=environment)
    if operations != "allocations":  # a tier that can't grow goes on with the room it has
        assert "tier_failed" in outcome["kinds"], outcome
    if "writes" in operations or "syncs" in operations:
        assert "tier_disabled" in outcome["kinds"], outcome
        assert "write_dropped" in outcome["kinds"], outcome
        assert outcome["found"] >= 10, "what was there before is there afterwards"
    assert "corrupt" not in outcome["kinds"], outcome


@pytest.mark.parametrize(
    ("operations", "error"),
    [("writes,syncs,allocations,reads", errno.EIO), ("reads", errno.EIO), ("writes", errno.ENOSPC), ("syncs", errno.EROFS)],
)
def test_one_of_several_devices_fails(tmp_path: Path, library: Path, operations: str, error: int) -> None:
    control = faulty_io.Control(tmp_path / "control")
    folder = tmp_path / "disks"
    environment = faulty_io.environment(library, folder / "0", control=control)
    outcome = run("striped", str(folder), str(control.path), operations, str(error), environment=environment)
    assert "tier_failed" in outcome["kinds"], outcome
    assert str(folder / "0") in outcome["reason"], outcome
    assert not {"tier_disabled", "corrupt", "write_dropped"} & set(outcome["kinds"]), outcome
    assert 0 < outcome["during"] <= outcome["before"], outcome
    if "reads" in operations:
        assert outcome["during"] < outcome["before"], outcome
    assert outcome["during_new"] == outcome["new"], "what comes meanwhile goes to the others"
    assert outcome["after"] == outcome["before"], outcome


def test_a_file_system_without_direct_io(tmp_path: Path, library: Path) -> None:
    control = faulty_io.Control(tmp_path / "control")
    control.fail(direct_opens=errno.EINVAL)
    directory = tmp_path / "disk"
    environment = faulty_io.environment(library, directory, control=control)
    code = f"""
import disk_writer, known_kv, lmkv
with lmkv.Store(disk_writer.config({str(directory)!r}), disk_writer.LAYOUT) as store:
    texts = [disk_writer.text(1, number) for number in range(40)]
    for tokens in texts:
        store.store(tokens, known_kv.source(disk_writer.LAYOUT, tokens))
        assert store.flush(60)
    assert not store._slow[0].backend._directory.files.direct
    assert all(known_kv.fetch(store, tokens) == len(tokens) for tokens in texts)
    store._check()
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("seed", [1, 2])
def test_power_loss(tmp_path: Path, library: Path, seed: int) -> None:
    """At forty moments of a write log: synced writes are there, of the others any part. Whole chunks or none."""
    directory, log = tmp_path / "disk", tmp_path / "log"
    environment = faulty_io.environment(library, directory, log=log)
    marks = run("logged", str(directory), str(seed), "130", str(log), environment=environment)
    changes = list(faulty_io.read_log(log))
    log.unlink()
    rng = random.Random(seed)
    moments = sorted(rng.sample(range(len(changes) // 20, len(changes)), 40))
    replay, at, found, behind = faulty_io.Replay(), 0, 0, 0
    for number, moment in enumerate(moments):
        while at < moment:
            replay.play(changes[at])
            at += 1
        broken = tmp_path / f"broken-{number}"
        broken.mkdir()
        replay.lose_power(broken, rng)
        durable = max((texts for size, texts in marks if size <= changes[at - 1].end), default=0)
        hits, lost = _after_power_loss(broken, seed, durable)
        found += hits
        behind += lost
    assert found > 1000, "most of what was flushed is there"
    assert behind == 0, "what was flushed last is there"


def _after_power_loss(directory: Path, seed: int, durable: int) -> tuple[int, int]:
    """Tokens found, all of them proved, and how many of the last flushed texts are not whole; and the tier works."""
    events: list[lmkv.Event] = []
    settings = {"disk_capacity": 2 << 20}
    with lmkv.Store(disk_writer.config(str(directory), **settings), LAYOUT, on_event=events.append) as store:
        hits = sum(known_kv.fetch(store, disk_writer.text(seed, number)) for number in range(durable + 12))
        # of what was flushed, only eviction since may have taken something: not the last texts
        last = [disk_writer.text(seed, number) for number in range(max(0, durable - 2), durable)]
        lost = sum(known_kv.fetch(store, tokens) < len(tokens) for tokens in last)
        tokens = disk_writer.text(seed, 1000)
        store.store(tokens, known_kv.source(LAYOUT, tokens))
        assert store.flush(60)
        assert disk_child._on_disk(store, tokens)
        assert not [event for event in events if event.kind == "tier_failed"]
        store._check()
    assert disk_writer.size_of(directory) <= 2 << 20
    return hits, lost
