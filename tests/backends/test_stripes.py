"""Several directories as one tier: its contract, who gets what, what is there after a change."""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path
from typing import Any

import known_kv
import pytest

import lmkv
from lmkv.backends import Backend, BackendSettings
from lmkv.backends.base import Bounded, Clearable, LocalIndex, Syncing
from lmkv.backends.disk import shares
from lmkv.backends.lmdb_disk import LmdbBackend
from lmkv.backends.stripes import StripedBackend
from lmkv.cli import main
from lmkv.errors import BackendUnavailableError
from lmkv.testing import BackendSuite
from lmkv.testing._chunks import Chunk, text_chunks

MIB = 1024**2
LAYOUT = lmkv.KVLayout.dense(layers=2, heads=2, head_size=8, dtype="float16", chunk_tokens=16)


@pytest.fixture(autouse=True)
def equal_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring is slow, and random on a busy machine."""
    monkeypatch.setattr(shares, "_speeds", lambda paths: [1.0] * len(paths))


class TestStripedBackend(BackendSuite):
    offers = (LocalIndex, Bounded, Syncing, Clearable)
    persistent = True

    def make(self, settings: BackendSettings) -> Backend:
        paths = [str(self.directory / f"{settings.name}-{i}") for i in range(3)]
        return StripedBackend(dataclasses.replace(settings, options={**settings.options, "paths": paths}))


def open_at(folder: Path, count: int = 2, capacity: int = 4 * MIB, events: list[Any] | None = None) -> StripedBackend:
    paths = [str(folder / str(i)) for i in range(count)]
    report = (lambda *what: None) if events is None else (lambda *what: events.append(what))
    return StripedBackend(BackendSettings("disk", LAYOUT, capacity, {"paths": paths, "ahead": False}, report=report))


def write(backend: Backend, chunks: list[Chunk]) -> None:
    backend.write_many([chunk.key for chunk in chunks], [chunk.record(LAYOUT) for chunk in chunks])


def read(backend: Backend, chunk: Chunk) -> bytes | None:
    buffer = memoryview(bytearray(1 << 14))
    (size,) = backend.read_many([chunk.key], [buffer])
    return None if size is None else bytes(buffer[:size])


def counts(backend: StripedBackend) -> list[int]:
    return [stripe.backend.count() for stripe in backend._stripes]


def open_store(folder: Path, count: int = 3, events: list[lmkv.Event] | None = None, **settings: Any) -> lmkv.Store:
    paths = tuple(str(folder / str(i)) for i in range(count))
    defaults: dict[str, Any] = {"ram_capacity": 12 * 8192, "disk_capacity": 3 * MIB, "disk_paths": paths}
    config = lmkv.StoreConfig(model="m", **(defaults | settings))
    return lmkv.Store(config, LAYOUT, on_event=None if events is None else events.append)


def text(number: int, length: int = 40) -> list[int]:
    return list(range(number * 1000, number * 1000 + length))


def keep(store: lmkv.Store, tokens: list[int]) -> None:
    store.store(tokens, known_kv.source(LAYOUT, tokens))
    assert store.flush(60)


def test_records_are_spread_by_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {"0": 3.0, "1": 1.0}
    monkeypatch.setattr(shares, "_speeds", lambda paths: [speeds[Path(path).name] for path in paths])
    chunks = text_chunks(LAYOUT, range(16 * 400))
    backend = open_at(tmp_path, capacity=16 * MIB)
    sizes = [stripe.backend._directory.settings.capacity for stripe in backend._stripes]
    assert sum(sizes) <= 16 * MIB
    assert sizes[0] / sizes[1] == pytest.approx(3, rel=0.1)
    for begin in range(0, 400, 20):
        write(backend, chunks[begin : begin + 20])
    assert sum(counts(backend)) == 400
    assert 250 < counts(backend)[0] < 350
    backend._check()
    backend.close()
    speeds["0"] = 1.0
    again = open_at(tmp_path, capacity=16 * MIB)
    assert [stripe.backend._directory.settings.capacity for stripe in again._stripes] == sizes, "measured once"
    assert all(read(again, chunk) == bytes(chunk.record(LAYOUT)) for chunk in chunks)
    again.close()


def test_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {"a": 1.0, "b": 0.8, "c": 0.01}
    monkeypatch.setattr(shares, "_speeds", lambda paths: [speeds[Path(path).name] for path in paths])
    paths = [str(tmp_path / name) for name in "abc"]
    fresh = shares.shares_of(paths, 30 * MIB)
    assert sum(fresh) <= 30 * MIB
    assert fresh[0] == fresh[1], "nearly equal is equal"
    assert 0.08 < (fresh[2] - 256 * 1024) / (fresh[0] - 256 * 1024) < 0.12, "a slow one gets something"
    noted = dict.fromkeys(paths, 8 * MIB)
    monkeypatch.setattr(shares, "_noted_capacity", noted.__getitem__)
    assert shares.shares_of(paths, 24 * MIB) == [8 * MIB] * 3
    grown = shares.shares_of(paths, 48 * MIB)
    assert grown[0] == grown[1] == grown[2]
    assert 47.9 * MIB < sum(grown) <= 48 * MIB
    noted[paths[1]] = 0
    assert shares.shares_of(paths, 24 * MIB) == [8 * MIB, 8 * MIB, 8 * MIB], "one that is gone keeps its share"
    noted.update(dict.fromkeys(paths, 0))
    monkeypatch.setattr(shares, "_speeds", lambda paths: [0.0] * len(paths))
    assert len(set(shares.shares_of(paths, 24 * MIB))) == 1
    with pytest.raises(lmkv.CapacityError, match="expected a capacity of at least 786432 bytes for 3 directories"):
        shares.shares_of(paths, 500_000)


def test_a_device_is_measured_without_leaving_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert shares._speed(str(tmp_path)) > 1e6
    assert list(tmp_path.iterdir()) == []
    assert shares._speed(str(tmp_path / "nowhere")) == 0.0


def test_devices_are_measured_in_turns_and_the_best_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    measured: list[str] = []
    numbers = iter([3.0, 9.0, 5.0, 2.0, 4.0, 8.0, 1.0, 9.5])

    def measure(path: str) -> float:
        measured.append(Path(path).name)
        return next(numbers)

    monkeypatch.setattr(shares, "_speed", measure)
    paths = [str(tmp_path / name) for name in "abc"]
    assert shares._speeds(paths[:1] * 2) == [0.0, 0.0], "one device is as quick as itself"
    monkeypatch.setattr(shares, "_device", lambda path: path.endswith("c"))
    assert shares._speeds(paths) == [5.0, 5.0, 9.5]
    assert measured == ["b", "c"] * 4


def test_the_quota_holds_for_all_together_and_the_oldest_go_wherever_they_lie(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        for number in range(150):
            keep(store, text(number))
            assert known_kv.fetch(store, text(1000)) == (40 if number > 4 else 0)
            if number == 4:
                keep(store, text(1000))
            if number % 10 == 0:
                files = [file for i in range(3) for file in (tmp_path / str(i)).iterdir()]
                assert sum(max(f.stat().st_size, f.stat().st_blocks * 512) for f in files) <= 3 * MIB
        stats = store.stats().tiers[1]
        assert stats.evictions > 100
        assert all(counts(store._slow[0].backend))
        assert stats.used_bytes > 0.85 * stats.capacity_bytes
        assert known_kv.fetch(store, text(0)) == 0
        assert all(known_kv.fetch(store, text(number)) == 40 for number in range(140, 150))
        store._check()
    with open_store(tmp_path) as store:  # order of use survives
        assert known_kv.fetch(store, text(1000)) == 40
        assert all(known_kv.fetch(store, text(number)) == 40 for number in range(140, 150))
        for number in range(150, 200):
            keep(store, text(number))
        assert [store.lookup(text(number)).hit_tokens for number in range(60)] == [0] * 60
        assert known_kv.fetch(store, text(199)) == 40
        store._check()


def test_without_one_of_its_directories_the_rest_is_there(tmp_path: Path) -> None:
    texts = [text(number) for number in range(40)]
    with open_store(tmp_path) as store:
        for tokens in texts:
            keep(store, tokens)
    shutil.rmtree(tmp_path / "1")
    with open_store(tmp_path) as store:
        found = [known_kv.fetch(store, tokens) for tokens in texts]
        assert 0 < sum(found) < 40 * 40
        for tokens in texts:
            keep(store, tokens)
        assert all(known_kv.fetch(store, tokens) == 40 for tokens in texts)
        store._check()
    shutil.rmtree(tmp_path / "1")
    (tmp_path / "1").write_text("a file")  # nothing can be opened here
    events: list[lmkv.Event] = []
    with open_store(tmp_path, events=events) as store:
        (failed,) = [event for event in events if event.kind == "tier_failed"]
        assert (failed.detail["operation"], str(tmp_path / "1") in str(failed.detail["reason"])) == ("open", True)
        for tokens in texts:
            keep(store, tokens)
        assert all(known_kv.fetch(store, tokens) == 40 for tokens in texts)
        store._check()


def test_one_that_fails_rests_longer_each_time_until_what_failed_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    backend = open_at(tmp_path, events=events)
    chunks = text_chunks(LAYOUT, range(16 * 40))
    write(backend, chunks)
    stripe = backend._stripes[0]
    mine = [chunk for chunk in chunks if stripe.backend.contains_many([chunk.key])[0]]
    clock = 1000.0
    monkeypatch.setattr("lmkv.backends.stripes.time.monotonic", lambda: clock)
    with monkeypatch.context() as broken:

        def fails(keys: object, out: object) -> list[int | None]:
            raise lmkv.BackendUnavailableError("it is broken")

        broken.setattr(stripe.backend, "read_many", fails)
        for turn, rest in enumerate([1, 2, 4, 8, 16, 32, 60, 60]):
            assert backend.contains_many([mine[0].key]) == [True], "its index answers"
            assert read(backend, mine[0]) is None
            assert len(events) == turn + 1
            clock += rest - 0.01
            assert backend.contains_many([mine[0].key]) == [False], "it rests"
            assert read(backend, mine[0]) is None
            assert len(events) == turn + 1
            clock += 0.02
    assert read(backend, mine[0]) is not None
    assert all(str(tmp_path / "0") in reason for _, reason in events)
    assert stripe._failures == 0
    backend.close()


def test_more_directories_and_another_order(tmp_path: Path) -> None:
    texts = [text(number) for number in range(30)]
    with open_store(tmp_path, 2) as store:
        for tokens in texts:
            keep(store, tokens)
    with open_store(tmp_path, 3, disk_capacity=5 * MIB) as store:
        assert all(known_kv.fetch(store, tokens) == 40 for tokens in texts)
        for number in range(100, 130):
            keep(store, text(number))
        assert all(counts(store._slow[0].backend))
        store._check()
    paths = tuple(str(tmp_path / name) for name in "201")
    with open_store(tmp_path, disk_paths=paths, disk_capacity=5 * MIB) as store:
        assert all(known_kv.fetch(store, tokens) == 40 for tokens in texts)
        store._check()


def test_two_stores_share_the_directories(tmp_path: Path) -> None:
    rng = random.Random(2)
    with open_store(tmp_path) as one, open_store(tmp_path) as other:
        for _ in range(200):
            keep(rng.choice((one, other)), text(rng.randrange(120)))
            assert known_kv.fetch(rng.choice((one, other)), text(rng.randrange(120))) in (0, 16, 32, 40)
        for store in (one, other):
            mirror = store._slow[0].mirror()
            assert mirror is not None
            backend = store._slow[0].backend
            held = {entry.key for entry in backend.entries(0)}
            assert held <= set(mirror[0].policy), "each knows of what the other wrote"
            store._check()


def test_commands_work_on_each_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_store(tmp_path) as store:
        for number in range(30):
            keep(store, text(number))
        chunks = counts(store._slow[0].backend)
    for i in range(3):
        assert main(["verify", str(tmp_path / str(i))]) == 0
        assert f"{chunks[i]} chunks, 0 problems" in capsys.readouterr().out
        assert main(["inspect", str(tmp_path / str(i))]) == 0
        assert main(["compact", str(tmp_path / str(i))]) == 0
        assert main(["export", str(tmp_path / str(i)), str(tmp_path / f"{i}.safetensors")]) == 0
        assert main(["import", str(tmp_path / f"{i}.safetensors"), str(tmp_path / "one"), "--capacity", "8MiB"]) == 0
    with open_store(tmp_path) as store:
        assert all(known_kv.fetch(store, text(number)) == 40 for number in range(30))
    with open_store(tmp_path, disk_paths=(str(tmp_path / "one"),), disk_capacity=8 * MIB) as store:
        assert isinstance(store._slow[0].backend, LmdbBackend)
        assert all(known_kv.fetch(store, text(number)) == 40 for number in range(30)), "bundles of all make it whole"


@pytest.mark.parametrize("paths", [[], ["a"], "a,b", None])
def test_wrong_paths(tmp_path: Path, paths: object) -> None:
    with pytest.raises(lmkv.ConfigError, match="paths: expected a list of at least two directories"):
        StripedBackend(BackendSettings("disk", LAYOUT, 4 * MIB, {"paths": paths}))


def test_settings(tmp_path: Path) -> None:
    with pytest.raises(lmkv.ConfigError, match="paths: expected different directories"):
        StripedBackend(BackendSettings("disk", LAYOUT, 4 * MIB, {"paths": [str(tmp_path), f"{tmp_path}/../{tmp_path.name}"]}))
    with pytest.raises(lmkv.ConfigError, match="disk_paths: expected it instead of disk_path; got both"):
        lmkv.StoreConfig(disk_path="/a", disk_paths=("/b", "/c"))
    with pytest.raises(lmkv.ConfigError, match="disk_paths: expected a list of texts"):
        lmkv.StoreConfig.from_dict({"disk_paths": [1, 2]})
    (tier,) = lmkv.StoreConfig.from_dict({"disk_paths": ["/b", "/c"]}).slow_tiers("")
    assert (tier.backend, tier.name, tier.options["paths"]) == ("lmdb-stripes", "disk", ["/b", "/c"])
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "letter.txt").write_text("mine")
    with pytest.raises(lmkv.ConfigError, match=r"it holds 'letter\.txt'"):
        open_at(tmp_path)
    assert not (tmp_path / "1" / "data.mdb").exists()


def test_a_directory_that_fails_while_all_are_cleared_is_cleared_before_it_gives_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(tmp_path) as store:
        texts = [text(number) for number in range(12)]
        for tokens in texts:
            keep(store, tokens)
        backend = store._slow[0].backend
        assert isinstance(backend, StripedBackend)
        stripe = next(each for each in backend._stripes if each.backend.count())

        def broken() -> None:
            raise BackendUnavailableError("the device fails")

        with monkeypatch.context() as patch:
            patch.setattr(stripe.backend, "clear", broken)
            store.clear()
        stripe._until = 0.0  # what it waits for is over
        assert [store.lookup(tokens).hit_tokens for tokens in texts] == [0] * 12
        assert sum(counts(backend)) == 0
        keep(store, texts[0])
        store._ram.clear()
        assert known_kv.fetch(store, texts[0]) == 40
        store._check()
