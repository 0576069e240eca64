"""A disk that is damaged, full, read-only, too small or shared: a miss or a clear refusal, never wrong bytes or a crash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import disk_writer
import known_kv
import pytest
from disk_writer import DISK, LAYOUT

import lmkv
from lmkv.backends.lmdb_disk import LmdbBackend
from lmkv.chunks import TokenChunker

TOKENS = list(range(500, 570))  # four full chunks of 16 and one of six


def run(word: str, directory: Path, texts: int = 10, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, disk_writer.__file__, word, str(directory), "1", str(texts)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def open_store(directory: Path, events: list[lmkv.Event] | None = None, **settings: object) -> lmkv.Store:
    return lmkv.Store(
        disk_writer.config(str(directory), **settings), LAYOUT, on_event=None if events is None else events.append
    )


def fill(directory: Path, tokens: list[int] = TOKENS) -> None:
    with open_store(directory) as store:
        assert store.store(tokens, known_kv.source(LAYOUT, tokens)) == len(tokens)


# -- damaged -----------------------------------------------------------------------------------------------------------------


def places(directory: Path, tokens: list[int], chunk: int) -> tuple[Path, dict[str, int]]:
    """The segment file that a chunk lies in, and where: found by the payload's first bytes, which nothing else has."""
    payload = known_kv.payload(LAYOUT, tokens, chunk * 16, chunk * 16 + 16)
    (file,) = (path for path in directory.glob("segment-*.kv") if payload[:64] in path.read_bytes())
    data = file.read_bytes()
    assert data.count(payload[:64]) == 1
    at = data.index(payload[:64])
    assert data[at : at + len(payload)] == payload
    header = data.rindex(b"LMKVREC\0", 0, at)
    return file, {
        "first": at,
        "middle": at + len(payload) // 2,
        "last": at + len(payload) - 1,
        "tokens": header + 128,
        "key": header + 16,
    }


@pytest.mark.parametrize("place", ["first", "middle", "last", "tokens", "key"])
@pytest.mark.parametrize("chunk", [0, 2])
def test_one_flipped_bit_in_the_file(tmp_path: Path, place: str, chunk: int) -> None:
    fill(tmp_path)
    file, found = places(tmp_path, TOKENS, chunk)
    at = found[place]
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)

    events: list[lmkv.Event] = []
    with open_store(tmp_path, events) as store:
        match = store.lookup(TOKENS)
        assert match.hit_tokens == 70, "the index is whole"
        assert known_kv.fetch(store, TOKENS, match) == chunk * 16, "what comes before the damage, with its right bytes"
        bad = TokenChunker(store.namespace, 16).prefix_keys(TOKENS)[chunk]
        assert [(e.tier, e.detail["key"]) for e in events if e.kind == "corrupt"] == [("disk", bad.hex())]
        assert store.lookup(TOKENS).hit_tokens == chunk * 16
        backend = store._slow[0].backend
        assert backend.contains_many([bad]) == [False], "the damaged record is deleted"
        assert store.store(TOKENS, known_kv.source(LAYOUT, TOKENS)) >= 16
        assert store.flush(60)
        assert backend.contains_many([bad]) == [True]
        store._check()
    with open_store(tmp_path) as store:
        assert known_kv.fetch(store, TOKENS) == 70
        store._check()


@pytest.mark.parametrize("name", ["data.mdb", "segment-00000000.kv"])
@pytest.mark.parametrize("keep", [0.0, 0.005, 0.01, 0.1, 0.3, 0.5, 0.777, 0.9])
def test_a_file_that_was_cut_off(tmp_path: Path, name: str, keep: float) -> None:
    """Reading behind the end of a mapped file kills the process, so this must be seen before."""
    tokens = list(range(1900))
    fill(tmp_path, tokens)
    file = tmp_path / name
    os.truncate(file, int(file.stat().st_size * keep))
    code = f"""
import disk_writer, known_kv, lmkv
tokens = list(range(1900))
try:
    with lmkv.Store(disk_writer.config({str(tmp_path)!r}), disk_writer.LAYOUT) as store:
        hit = known_kv.fetch(store, tokens)
        assert hit < 1900
        store.store(tokens, known_kv.source(disk_writer.LAYOUT, tokens))
        store.flush(60)
        assert known_kv.fetch(store, tokens) <= 1900
        print("a miss", hit)
except lmkv.ConfigError as error:
    print("refused", error)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(disk_writer.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr}"
    assert done.stdout.startswith(("a miss", "refused"))


# -- full, read-only ---------------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    done = run("starved", tmp_path, texts=60)
    assert done.returncode == 0, done.stderr
    outcome, recovered = done.stdout.strip().rsplit("\n", 1)
    dropped, reason = outcome.split(" ", 1)
    assert int(dropped) > 20, done.stdout
    assert "File too large" in reason, done.stdout
    with open_store(tmp_path) as store:
        store._check()
        found = sum(known_kv.fetch(store, disk_writer.text(1, number)) for number in range(60))
        assert found > 0, "what was written before the disk was full is there"
        last = disk_writer.text(1, int(recovered))
        assert known_kv.fetch(store, last) == len(last), "with room again, the tier works again by itself"
        assert store.store(TOKENS, known_kv.source(LAYOUT, TOKENS)) == 70
        assert store.flush(60)
    with open_store(tmp_path) as store:
        assert known_kv.fetch(store, TOKENS) == 70


def test_a_directory_without_permission_to_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    fill(tmp_path / "filled")
    (tmp_path / "empty").mkdir()
    (tmp_path / "closed").mkdir()
    for name in ("filled", "empty", "closed"):
        (tmp_path / name).chmod(0o555)
    for file in (tmp_path / "filled").iterdir():
        file.chmod(0o444)
    for name in ("filled", "empty", "closed/missing"):
        done = run("nobody", tmp_path / name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("ConfigError "), (name, done.stdout, done.stderr)
        assert "directory that can be written at" in done.stdout
        assert "Permission denied" in done.stdout
    assert not list((tmp_path / "empty").iterdir())
    assert not list((tmp_path / "closed").iterdir())
    for path in (tmp_path / "filled", tmp_path / "filled" / "data.mdb", tmp_path / "filled" / "lock.mdb"):
        path.chmod(0o755)
    with open_store(tmp_path / "filled") as store:
        assert known_kv.fetch(store, TOKENS) == 70


# -- too small, shared -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "chain_aware"), [("lru", True), ("lru", False), ("lfu", True), ("mru", True), ("s3fifo", True)]
)
def test_the_quota_holds_at_every_moment(tmp_path: Path, policy: str, chain_aware: bool) -> None:
    events: list[lmkv.Event] = []
    settings = {"disk_capacity": 1 << 20, "ram_capacity": 512 << 10, "disk_policy": policy, "chain_aware": chain_aware}
    written = 0
    with open_store(tmp_path, events, **settings) as store:
        backend = store._slow[0].backend
        assert isinstance(backend, LmdbBackend)
        number = 0
        while written < 10 << 20:
            tokens = disk_writer.text(5, number)
            number += 1
            written += backend.cost(4096 + len(tokens) * LAYOUT.token_bytes)
            store.store(tokens, known_kv.source(LAYOUT, tokens))
            assert disk_writer.size_of(tmp_path) <= 1 << 20
            assert backend.used_bytes() <= backend.capacity <= 1 << 20
            if number % 10 == 0:
                assert store._slow[0].flush(60)
                back = disk_writer.text(5, number - 1 - number % 7)
                assert known_kv.fetch(store, back) == store.lookup(back).hit_tokens
        assert store._slow[0].flush(60)
        store._check()
        assert backend.used_bytes() > backend.capacity // 2, "the quota is used"
        assert store.stats().tiers[1].evictions > 100
    assert disk_writer.size_of(tmp_path) <= 1 << 20
    assert not [event for event in events if event.kind in ("corrupt", "tier_failed", "tier_disabled")]
    with open_store(tmp_path, **settings) as store:
        store._check()
        for n in range(number):
            tokens = disk_writer.text(5, n)
            match = store.lookup(tokens)
            assert known_kv.fetch(store, tokens, match) == match.hit_tokens


def test_two_processes_on_one_directory(tmp_path: Path) -> None:
    command = [sys.executable, disk_writer.__file__, "threads", str(tmp_path)]
    both = [
        subprocess.Popen([*command, str(seed), "25"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for seed in (1, 2)
    ]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], [err for _, err in outputs]
    hits, written = (sum(numbers) for numbers in zip(*(map(int, out.split()) for out, _ in outputs), strict=True))
    assert hits > 0, "they read from the disk what they and the other wrote"
    assert written * 16384 > 2 * DISK, "the quota was reached"
    assert disk_writer.size_of(tmp_path) <= DISK
    with open_store(tmp_path) as store:
        store._check()
        assert store.stats().tiers[1].used_bytes <= DISK
        for seed in (1, 2):
            for number in range(0, 25 * 8 * 4, 4):
                tokens = disk_writer.text(seed, number)
                match = store.lookup(tokens)
                assert known_kv.fetch(store, tokens, match) == match.hit_tokens
