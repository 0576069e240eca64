"""What a forked process may do with a store of its parent's: nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent / "support"
_FORKS = """
import os, sys, threading, time
import known_kv, lmkv

LAYOUT = lmkv.KVLayout.dense(layers=2, heads=2, head_size=64, dtype="float16", chunk_tokens=16)
TEXTS = [list(range(100 * i, 100 * i + 64)) for i in range(40)]

def opened(path=sys.argv[1]):
    disk = {"disk_path": path, "disk_capacity": 4 << 20}
    return lmkv.Store(lmkv.StoreConfig(ram_capacity=1 << 20, ram_shared=True, **disk), LAYOUT)

def keep(store, texts):
    for tokens in texts:
        assert store.store(tokens, known_kv.source(LAYOUT, tokens)) == 64

store = opened()
keep(store, TEXTS[:6])
assert store.flush(60)
match = store.lookup(TEXTS[0])
lease, reservation = store.lease(match), store.reserve([7] * 16)
env = store._slow[0].backend._directory.env
reading = env.begin()
taken, let = threading.Event(), threading.Event()

def hold():
    with store._lock:
        taken.set()
        let.wait(60)

threading.Thread(target=hold, daemon=True).start()
taken.wait()
child = os.fork()
if not child:
    calls = [
        lambda: keep(store, TEXTS[6:]), lambda: store.lookup(TEXTS[0]), lambda: store.lease(match), store.flush, store.clear,
        store.stats, reservation.commit, lambda: store.retrieve(lease, known_kv.empty_layers(LAYOUT, 64)),
    ]
    refused = 0
    for call in calls:
        try:
            call()
        except lmkv.StoreClosedError as error:
            refused += "forked" in str(error)
    reservation.abort()
    lease.release()
    store.close()
    del reservation
    try:
        opened()
    except lmkv.ConfigError as error:
        refused += "forked" in str(error)
    with opened(sys.argv[1] + "-own") as own:
        keep(own, TEXTS[6:16])  # as many as RAM holds, however late the disk is
        assert known_kv.fetch(own, TEXTS[7]) == 64
    sys.exit(0 if refused == len(calls) + 1 else 3)  # by way of what is registered for the end
for _ in range(400):
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        break
    time.sleep(0.05)
else:
    os.kill(child, 9)
assert ended and status == 0, (ended, status)
let.set()
assert len(env.readers().split()) > 3, "the place of a reader was taken away: " + env.readers()
reading.abort()
lease.release()
reservation.abort()
for tokens in TEXTS[:6]:
    assert known_kv.fetch(store, tokens) == 64
keep(store, TEXTS[6:])
assert store._slow[0].flush(60)  # whatever RAM gave up
store._check()
store.close()
print("good")
"""


def test_a_forked_process_leaves_the_store_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FORKS, str(tmp_path / "kv")],
        cwd=SUPPORT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout == "good\n", done.stderr
