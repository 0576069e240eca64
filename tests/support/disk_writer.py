"""A process that stores texts on a disk tier, for tests that kill it, starve it or run several of it.

``python disk_writer.py WORD DIRECTORY SEED [TEXTS]``; every text follows from the seed and its number, so that whoever reads
the directory later knows what may be there. Words:

    forever    store until killed, saying how many texts are stored
    threads    store TEXTS texts from each of 8 threads, read others back meanwhile, and check the quota all along
    starved    store TEXTS texts, then as many with no room to write beyond 64 KiB of any file, reading each back from RAM; then
               with room again
    nobody     without root's rights, try to open the directory, and say what happened
"""

from __future__ import annotations

import os
import resource
import sys
import threading
import time

import known_kv
import numpy as np

import lmkv

LAYOUT = lmkv.KVLayout.dense(layers=2, heads=2, head_size=16, dtype="float16", chunk_tokens=16)
DISK = 4 << 20


def size_of(directory: str | os.PathLike[str]) -> int:
    """Bytes of all files of a disk tier's directory: of each, its length or what it takes on the device, if that is more."""
    total = 0
    for place in os.fspath(directory).split(","):
        for entry in os.scandir(place):
            state = entry.stat(follow_symlinks=False)
            total += max(state.st_size, state.st_blocks * 512)
    return total


def config(directory: str, **settings: object) -> lmkv.StoreConfig:
    """Little RAM, so that what is found again comes from the disk. Several directories are separated by commas."""
    place = {"disk_paths" if "," in directory else "disk_path": directory}
    return lmkv.StoreConfig.from_dict({"model": "m", "ram_capacity": 1 << 20, "disk_capacity": DISK, **place, **settings})


def text(seed: int, number: int) -> list[int]:
    """One of the texts: a few chunks, the last one short; some begin alike."""
    rng = np.random.default_rng([seed, number // 4])
    shared = rng.integers(0, 2**32, rng.integers(0, 60)).tolist()
    rng = np.random.default_rng([seed, number, 1])
    return [int(token) for token in (*shared, *rng.integers(0, 2**32, rng.integers(1, 120)))]


def forever(directory: str, seed: int, texts: int) -> None:
    store = lmkv.Store(config(directory), LAYOUT)
    for number in range(texts):
        tokens = text(seed, number)
        store.store(tokens, known_kv.source(LAYOUT, tokens))
        if number % 8 == 7:
            print(number + 1, flush=True)
    store.flush(60)
    print("end", flush=True)
    while True:
        threading.Event().wait(60)


def threads(directory: str, seed: int, texts: int) -> None:
    events: list[lmkv.Event] = []
    store = lmkv.Store(config(directory), LAYOUT, on_event=events.append)
    errors: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            rng = np.random.default_rng([seed, thread])
            for number in range(texts):
                tokens = text(seed, 4 * (number * 8 + thread))
                store.store(tokens, known_kv.source(LAYOUT, tokens))
                if number % 2:
                    store.flush(60)  # with little RAM, what the disk is slower than would not get there
                other = text(int(rng.integers(1, 3)), 4 * int(rng.integers(0, texts * 8)))  # perhaps the other process's
                known_kv.fetch(store, other)
                size = size_of(directory)
                assert size <= DISK, f"the files grew to {size} bytes"
                assert store.stats().tiers[1].used_bytes <= DISK
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    assert store._slow[0].flush(120)
    stats = store.stats()
    store.close()
    assert not [event for event in events if event.kind in ("corrupt", "tier_failed", "tier_disabled")], events
    print(stats.tiers[1].hit_tokens, stats.tiers[1].written_chunks, flush=True)


def starved(directory: str, seed: int, texts: int) -> None:
    events: list[lmkv.Event] = []
    with lmkv.Store(config(directory, breaker_failures=3, breaker_seconds=0.05), LAYOUT, on_event=events.append) as store:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        for number in range(2 * texts):
            if number == texts:
                store.flush(60)
                resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, most))  # from here on every file is full there
            tokens = text(seed, number)
            store.store(tokens, known_kv.source(LAYOUT, tokens))
            assert known_kv.fetch(store, tokens) == len(tokens), "RAM does not suffer"
        store.flush(60)
        dropped = sum(int(str(event.detail["chunks"])) for event in events if event.kind == "write_dropped")
        failed = [str(event.detail["reason"]) for event in events if event.kind == "tier_failed"]
        print(dropped, failed[0] if failed else "", flush=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        for number in range(2 * texts, 2 * texts + 200):
            tokens = text(seed, number)
            store.store(tokens, known_kv.source(LAYOUT, tokens))
            store.flush(60)
            keys = lmkv.TokenChunker(store.namespace, LAYOUT.chunk_tokens).prefix_keys(tokens)
            if all(store._slow[0].backend.contains_many(keys)):
                break
            time.sleep(0.01)
        print(number, flush=True)


def nobody(directory: str, seed: int, texts: int) -> None:
    del seed, texts
    warm = os.path.join(os.getcwd(), "warm")  # loads every module while they can be read
    lmkv.Store(config(warm), LAYOUT).close()
    if os.getuid() == 0:  # root may write everywhere, and nobody may not even pass through other people's directories
        os.chroot(os.getcwd())
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        directory = "/" + os.path.relpath(directory)
        os.chdir("/")
    try:
        lmkv.Store(config(directory), LAYOUT).close()
    except lmkv.LMKVError as error:
        print(type(error).__name__, error, flush=True)


if __name__ == "__main__":
    words = {"forever": forever, "threads": threads, "starved": starved, "nobody": nobody}
    words[sys.argv[1]](sys.argv[2], int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else 1_000_000)
