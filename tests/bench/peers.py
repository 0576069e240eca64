"""What borrowing from another store and encrypting cost, beside a bare socket and a copy in the same run:
``python tests/bench/peers.py [--json] [--only NAME,…]``. Lines are those of ``remote.py``.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
from remote import MIB, Loopback, Row, against, key, main, times_in_turn

import lmkv
from lmkv.backends import BackendSettings, open_backend
from lmkv.chunks import ChunkKey
from lmkv.tiers import NewChunk
from lmkv.tiers.envelope import OVERHEAD, Envelope

_LENDER = """
import sys
import lmkv
import numpy as np
layout = lmkv.KVLayout.dense(layers=28, heads=4, head_size=128, dtype="bfloat16", chunk_tokens=146)
config = lmkv.StoreConfig(model="m", ram_capacity=1 << 30, disk_capacity=0, peer_listen="127.0.0.1:0")
store = lmkv.Store(config, layout)
tokens = np.arange(146 * 8, dtype="<u4")
with store.reserve(tokens) as reservation:
    for slot in reservation.slots:
        slot.payload[:] = np.random.default_rng(slot.id).bytes(len(slot.payload))
    reservation.commit()
print(store._peers.address[1], *(slot.key.hex() for slot in reservation.slots), flush=True)
sys.stdin.read()
"""


def peer_rates() -> Iterator[Row]:
    """8 records of 8 MiB out of another store's RAM, held, read and released in one call, beside the bare socket."""
    os.environ.setdefault("UCX_NET_DEVICES", "lo")
    layout = lmkv.KVLayout.dense(layers=28, heads=4, head_size=128, dtype="bfloat16", chunk_tokens=146)
    size, count = 4096 + 146 * layout.token_bytes, 8
    holder = subprocess.Popen([sys.executable, "-c", _LENDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    port, *names = holder.stdout.readline().split()
    keys = [ChunkKey(bytes.fromhex(name.decode())) for name in names]
    settings = BackendSettings("bench", layout, url=f"nixl://127.0.0.1:{int(port)}", deadline_seconds=60)
    backend = open_backend("nixl", settings)
    slots = memoryview(mmap.mmap(-1, count * size))
    out = [slots[i * size : (i + 1) * size] for i in range(count)]
    whole = memoryview(bytearray(count * size))
    bare = Loopback()
    times = times_in_turn(
        ours=lambda: backend.read_many(keys, out),
        **{f"bare-{part}": lambda part=part: bare.get(whole[: 48 * MIB], part) for part in (512 * 1024, 2 * MIB)},
    )
    for name in times:  # the socket's peer has 64 MiB; so many bytes are more than enough to tell its speed
        if name.startswith("bare"):
            times[name] = [seconds * count * size / (48 * MIB) for seconds in times[name]]
    assert backend.read_many(keys, out) == [size] * count
    yield against("peer_read_8_of_8mib_against_socket", times, count * size, "bare")
    backend.close()
    bare.close()
    holder.kill()
    holder.wait()


def encryption_rates() -> Iterator[Row]:
    """Records of 8 MiB into envelopes and out of them, beside a copy."""
    size = 8 * MIB
    envelope = Envelope([("bench", bytes(32))], bytes(16), "bench")
    chunk = NewChunk(key(1), key(0), key(0), bytes(1024), 0, 0)
    record = memoryview(bytearray(np.random.default_rng(1).bytes(size)))
    closed, out = envelope.close(chunk, record), memoryview(bytearray(size))
    assert len(closed) == size + OVERHEAD
    times = times_in_turn(ours=lambda: envelope.close(chunk, record), copy=lambda: bytearray(record))
    yield against("encrypt_8mib_against_copy", times, size, "copy")

    def copy() -> None:
        out[:] = record

    times = times_in_turn(ours=lambda: envelope.open(chunk, closed, out), copy=copy)
    assert out == record
    yield against("decrypt_8mib_against_copy", times, size, "copy")


if __name__ == "__main__":
    sys.exit(main([peer_rates, encryption_rates], __doc__))
