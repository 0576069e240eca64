"""Processes that use a disk tier under faults: ``python disk_child.py WORD ARGUMENT…``. Words:

faulty DIRECTORY CONTROL OPERATIONS ERRNO   store, let the named operations fail, store and read on, mend them, store and read
striped FOLDER CONTROL OPERATIONS ERRNO     the same for one of three directories of a tier, FOLDER/0: the others go on
logged DIRECTORY SEED TEXTS LOG             store texts, flushing now and then; say how long LOG was when a flush came back
crowd DIRECTORY KILLS SECONDS               writers and readers that are killed and started again at random moments
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import disk_writer
import faulty_io
import known_kv

import lmkv
from lmkv.store import Store  # loaded before anything is forked

_WRITERS, _READERS = 4, 2
_TEXTS = 400


def _keep(store: lmkv.Store, seed: int, number: int) -> list[int]:
    tokens = disk_writer.text(seed, number)
    store.store(tokens, known_kv.source(disk_writer.LAYOUT, tokens))
    return tokens


def _on_disk(store: lmkv.Store, tokens: list[int]) -> bool:
    keys = lmkv.TokenChunker(store.namespace, disk_writer.LAYOUT.chunk_tokens).prefix_keys(tokens)
    return all(store._slow[0].backend.contains_many(keys))


def faulty(directory: str, control_path: str, operations: str, error: str) -> None:
    """Prints kinds of events while it failed, and how many texts were found again afterwards."""
    control = faulty_io.Control(Path(control_path))
    events: list[lmkv.Event] = []
    config = disk_writer.config(directory, breaker_failures=3, breaker_seconds=0.05)
    with Store(config, disk_writer.LAYOUT, on_event=events.append) as store:
        for number in range(30):
            _keep(store, 1, number)
        assert store._slow[0].flush(60)
        events.clear()
        control.fail(**dict.fromkeys(operations.split(","), int(error)))
        for number in range(30, 90):
            tokens = _keep(store, 1, number)
            assert known_kv.fetch(store, tokens) == len(tokens), "RAM does not suffer"
            known_kv.fetch(store, disk_writer.text(1, number - 30))  # from disk, if it can be read
            assert disk_writer.size_of(directory) <= disk_writer.DISK
        store.flush(60)
        kinds = sorted({event.kind for event in events})
        reasons = [str(event.detail["reason"]) for event in events if event.kind in ("tier_failed", "write_dropped")]
        control.fail()
        for number in range(90, 400):
            tokens = _keep(store, 1, number)
            store.flush(60)
            if _on_disk(store, tokens):
                break
            time.sleep(0.02)
        else:
            raise AssertionError("the tier did not come back")
        store._check()
    with Store(disk_writer.config(directory), disk_writer.LAYOUT) as store:
        found = sum(known_kv.fetch(store, disk_writer.text(1, n)) == len(disk_writer.text(1, n)) for n in range(30))
        assert known_kv.fetch(store, tokens) == len(tokens), "what was stored after the fault is there"
        store._check()
    print(json.dumps({"kinds": kinds, "reasons": reasons, "found": found}))


def striped(folder: str, control_path: str, operations: str, error: str) -> None:
    """Prints kinds of events while one directory failed, and tokens found before, while it did, and afterwards."""
    control = faulty_io.Control(Path(control_path))
    events: list[lmkv.Event] = []
    places = ",".join(f"{folder}/{i}" for i in range(3))
    config = disk_writer.config(places, disk_capacity=3 * disk_writer.DISK, ram_cache=False)
    old, new = range(30), range(30, 60)

    def found(store: Store, numbers: range) -> int:
        return sum(known_kv.fetch(store, disk_writer.text(1, number)) for number in numbers)

    with Store(config, disk_writer.LAYOUT, on_event=events.append) as store:
        for number in old:
            _keep(store, 1, number)
            assert store._slow[0].flush(60)
        before = found(store, old)
        events.clear()
        control.fail(**dict.fromkeys(operations.split(","), int(error)))
        during = found(store, old)
        for number in new:
            _keep(store, 1, number)
            store.flush(60)
        during_new = found(store, new)
        kinds = {event.kind: event.detail for event in events}
        control.fail()
        for stripe in store._slow[0].backend._stripes:
            stripe._until = 0.0  # what it waits for is over
        for number in (*old, *new):
            _keep(store, 1, number)
            assert store._slow[0].flush(60)
        after = found(store, old)
        evicted = store.stats().tiers[1].evictions
        for number in range(60, 400):  # the mirror has forgotten nothing: eviction goes on
            _keep(store, 1, number)
            assert store._slow[0].flush(60)
        assert store.stats().tiers[1].evictions > evicted
        store._check()
    assert disk_writer.size_of(places) <= 3 * disk_writer.DISK
    reason = str(kinds.get("tier_failed", {}).get("reason", ""))
    whole = sum(len(disk_writer.text(1, number)) for number in new)
    tokens = {"before": before, "during": during, "during_new": during_new, "new": whole, "after": after}
    print(json.dumps({"kinds": sorted(kinds), "reason": reason, **tokens}))


def logged(directory: str, seed: str, texts: str, log: str) -> None:
    """Prints a JSON list of [log bytes, texts that were durable then]."""
    marks = []
    with Store(disk_writer.config(directory, disk_capacity=2 << 20), disk_writer.LAYOUT) as store:
        for number in range(int(texts)):
            _keep(store, int(seed), number)
            if number % 7 == 6:
                assert store._slow[0].flush(60)
                marks.append([os.path.getsize(log), number + 1])
    print(json.dumps(marks))


# -- a crowd -----------------------------------------------------------------------------------------------------------------


def _write(directory: str, seed: int) -> None:
    rng = random.Random(os.getpid())
    with Store(disk_writer.config(directory), disk_writer.LAYOUT) as store:
        while True:
            _keep(store, seed, rng.randrange(_TEXTS))
            if rng.random() < 0.2:
                store.flush(60)


def _read(directory: str, seed: int) -> None:
    del seed
    events: list[lmkv.Event] = []
    rng = random.Random(os.getpid())
    with Store(disk_writer.config(directory), disk_writer.LAYOUT, on_event=events.append) as store:
        while True:
            tokens = disk_writer.text(rng.randrange(_WRITERS), rng.randrange(_TEXTS))
            known_kv.fetch(store, tokens)  # asserts every byte
            bad = [event for event in events if event.kind in ("corrupt", "tier_failed")]
            assert not bad, bad
            events.clear()


def _start(number: int, directory: str) -> int:
    child = os.fork()
    if child:
        return child
    try:
        (_write if number < _WRITERS else _read)(directory, number)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(3)


def crowd(directory: str, kills: str, seconds: str) -> None:
    """Prints how many were killed, and the most bytes that the directory had."""
    rng = random.Random(5)
    for place in directory.split(","):
        os.makedirs(place, exist_ok=True)
    running = {number: _start(number, directory) for number in range(_WRITERS + _READERS)}
    most, done, begun = 0, 0, time.monotonic()
    try:
        while done < int(kills) and time.monotonic() - begun < float(seconds):
            time.sleep(rng.random() * 0.12)
            number = rng.randrange(_WRITERS + _READERS)
            most = max(most, disk_writer.size_of(directory))
            os.kill(running[number], signal.SIGKILL)
            _, status = os.waitpid(running[number], 0)
            del running[number]
            assert os.WIFSIGNALED(status), f"process {number} failed by itself, with {status}"
            running[number] = _start(number, directory)
            done += 1
    finally:
        for child in running.values():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    print(json.dumps({"killed": done, "most": most}))


if __name__ == "__main__":
    {"faulty": faulty, "striped": striped, "logged": logged, "crowd": crowd}[sys.argv[1]](*sys.argv[2:])
