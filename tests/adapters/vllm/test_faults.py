"""What goes wrong is computed again: failed loads and stores, slow tiers, damaged records, processes that are killed."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import assert_same, text

from lmkv.adapters.vllm.copies import Copier, Running
from lmkv.backends.memory import MemoryBackend


def failing(monkeypatch: pytest.MonkeyPatch, way: str, when: Callable[[int], bool]) -> list[int]:
    """Have the worker's loads (or stores) fail whose number, counted from 0, is one of ``when``; returns those that did."""
    real, calls, failed = getattr(Copier, way), iter(range(10**6)), []

    def copy(self: Copier, order: Any, **more: Any) -> Running:
        number = next(calls)
        if when(number):
            failed.append(number)
            return Running(order, error="injected")
        return real(self, order, **more)

    monkeypatch.setattr(Copier, way, copy)
    return failed


@pytest.mark.parametrize(
    ("kind", "load", "caching"),
    [
        ("llama", "sync", False),
        ("llama", "sync", True),
        ("llama", "async", False),
        ("window", "sync", True),
        ("hybrid", "sync", True),
        ("hybrid", "async", False),
    ],
)
def test_failed_loads_are_computed(
    kind: str, load: str, caching: bool, engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = text(150, seed=51)
    prompts = [shared + text(60, seed) for seed in (52, 53, 54)]
    longer = [prompt + text(70, seed=60) for prompt in prompts]
    engine = engine_of(kind, connector={"lmkv.load": load}, enable_prefix_caching=caching, max_num_batched_tokens=256)
    wanted, wanted_longer = engine.computed(prompts), engine.computed(longer)
    assert_same(engine.ask(prompts), wanted)
    engine.settle()
    engine.forget_local()
    with monkeypatch.context() as patch:
        failed = failing(patch, "load", lambda number: number in (0, 1))
        assert_same(engine.ask(longer), wanted_longer)
        assert failed
    assert engine.metric("load_failures_total") == len(failed)
    engine.settle()
    engine.forget_local()
    # nothing that was computed on unfilled blocks was kept
    assert_same(engine.ask(longer), wanted_longer)
    engine.forget_local()
    assert_same(engine.one_by_one(prompts + longer), wanted + wanted_longer)
    engine.check_clean()


@pytest.mark.parametrize("kind", ["llama", "hybrid"])
def test_a_failed_load_ends_the_request_where_vllm_is_told_so(
    kind: str, engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(kind, policy="fail")
    prompt = text(150, seed=61)
    right = engine.ask([prompt])
    with monkeypatch.context() as patch:
        failing(patch, "load", lambda number: True)
        assert engine.ask([prompt])[0].reason == "error"
    engine.settle()
    assert_same(engine.ask([prompt]), right)


def test_a_slow_load_keeps_what_it_copies_from(engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(connector={"lmkv.lease_seconds": 0.05, "lmkv.ram_capacity": "1MiB", "lmkv.ram_extent": "1MiB"})
    prompt = text(300, seed=65)
    wanted = engine.ask([prompt])
    real = Copier.load

    def slow(copier: Copier, order: Any, **more: Any) -> Running:
        time.sleep(0.2)
        with engine.store.reserve(text(48 * 20, seed=66)) as reservation:  # as a tier's thread that needs slots
            for slot in reservation.slots:
                slot.payload[:] = bytes(len(slot.payload))
            return real(copier, order, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Copier, "load", slow)
        found = engine.ask([prompt])
    assert found[0].cached == 299
    assert_same(found, wanted)


def test_failed_stores_are_misses(engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = text(150, seed=71)
    engine = engine_of(max_num_batched_tokens=64)
    wanted = engine.computed([prompt])
    with monkeypatch.context() as patch:
        failed = failing(patch, "store", lambda number: number == 1)
        assert_same(engine.ask([prompt]), wanted)
        assert failed
    again = engine.ask([prompt])
    assert_same(again, wanted)
    assert again[0].cached in (48, 149)  # a chunk that failed is stored again with the next ones
    assert_same(engine.ask([prompt]), wanted)
    engine.check_clean()


def test_texts_come_back_from_disk_after_a_restart(tmp_path: Path, engine_of: Callable[..., Any]) -> None:
    prompts = [text(length, seed=80 + length) for length in (40, 150, 333)]
    disk = {"lmkv.disk_path": str(tmp_path / "kv"), "lmkv.disk_capacity": "64MiB"}
    first = engine_of(connector=disk)
    wanted = first.ask(prompts)
    first.close()
    second = engine_of(connector=disk)
    found = second.one_by_one(prompts)
    assert_same(found, wanted)
    assert [answer.cached for answer in found] == [39, 149, 332]
    assert second.store.stats().tiers[1].read_chunks > 0


def test_a_killed_process_leaves_a_disk_that_serves(
    tmp_path: Path, models: Callable[[str], Path], engine_of: Callable[..., Any]
) -> None:
    prompts = [text(300, seed=90 + i) for i in range(6)]
    disk = {"lmkv.disk_path": str(tmp_path / "kv"), "lmkv.disk_capacity": "64MiB"}
    code = f"""
from engines import Engine, text
engine = Engine({str(models("llama"))!r}, connector={disk!r})
for i in range(6):
    engine.ask([text(300, seed=90 + i)])
    print("asked", i, flush=True)
while True:
    pass
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    timer = threading.Timer(400, process.kill)
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("asked 3"):
                break
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    finally:
        timer.cancel()
        process.kill()
    engine = engine_of(connector=disk)
    wanted = engine.computed(prompts)
    found = engine.one_by_one(prompts)
    assert_same(found, wanted)
    assert found[0].cached > 0
    assert_same(engine.one_by_one(prompts), wanted)


class SlowBackend(MemoryBackend):
    """A memory backend that takes its time, or none at all, as the test says."""

    delay = 0.0

    def read_many(self, keys: Any, out: Any) -> Any:
        time.sleep(SlowBackend.delay)
        return super().read_many(keys, out)


def test_slow_tiers_are_waited_for_until_their_deadline(
    engine_of: Callable[..., Any], register: Callable[[str, str, str], None]
) -> None:
    register("lmkv.backends", "slow", f"{__name__}:SlowBackend")
    prompt = text(250, seed=95)
    tier = {"backend": "slow", "capacity": "64MiB", "deadline_seconds": 1.0}
    engine = engine_of(connector={"lmkv.tiers": [tier]})
    wanted = engine.ask([prompt])
    engine.settle()
    assert engine.store.flush(10)
    for delay, cached in ((0.2, 249), (4.0, 0)):
        with engine.store._lock:
            engine.store._ram.clear()
        time.sleep(1.1)  # a tier's answer, at first that it has nothing, is believed for a second
        SlowBackend.delay = delay
        try:
            begun = time.monotonic()
            found = engine.ask([prompt], params={"lmkv.skip_save": True})
            took = time.monotonic() - begun
        finally:
            SlowBackend.delay = 0.0
        assert_same(found, wanted)
        assert found[0].cached == cached
        assert took < 4.0, "the engine waited for a tier beyond its deadline"
    assert engine.metric("late_prefetches_total") == 1
    time.sleep(3.5)  # the read that was given up holds slots until it ends


def test_nothing_grows(engine_of: Callable[..., Any]) -> None:
    engine = engine_of(max_num_seqs=16, connector={"lmkv.ram_capacity": "2MiB", "lmkv.ram_extent": "1MiB"})
    sizes = []
    for round_ in range(20):
        engine.ask([text(60, seed=1000 + 60 * round_ + i % 60) for i in range(100)], tokens=1)
        gc.collect()
        sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    engine.check_clean()
    assert engine.store.stats().tiers[0].evictions > 500
    assert sizes[-1] - sizes[4] < 24 * 1024**2, f"resident bytes after each 100 requests: {sizes}"
