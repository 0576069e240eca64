"""What remote tiers cost, beside their own clients, plain ones and the bare socket in the same run:
``python tests/bench/remote.py [--json] [--only NAME,…]``.

One object a line with ``--json``: name, value, unit, reference, ratio. ``reference`` is the peer's or the limit's figure of the
same run, taken in turn with ours; ``ratio`` = value / reference, or its inverse where less is better. Medians.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import lmkv
from lmkv.backends import BackendSettings, open_backend
from lmkv.chunks import ChunkKey
from lmkv.codecs.blosc2 import Blosc2Codec

Row = dict[str, object]
LAYOUT = lmkv.KVLayout.dense(layers=28, heads=4, head_size=128, dtype="bfloat16")
MIB = 1024**2
ROUNDS = 21


def row(name: str, value: float, unit: str, reference: float, less_is_better: bool = False) -> Row:
    ratio = reference / value if less_is_better else value / reference
    return {"name": name, "value": round(value, 3), "unit": unit, "reference": round(reference, 3), "ratio": round(ratio, 3)}


def against(name: str, times: dict[str, list[float]], size: int, limits: str) -> Row:
    """Ours beside the quickest of the calls whose names begin with ``limits``.

    The ratio is the median of the rounds' own, since what else a machine does moves whole rounds.
    """
    best = min((name for name in times if name.startswith(limits)), key=lambda name: statistics.median(times[name]))
    ours, limit = (size / 1e9 / statistics.median(times[each]) for each in ("ours", best))
    ratio = statistics.median(theirs / mine for theirs, mine in zip(times[best], times["ours"], strict=True))
    return row(name, ours, "GB/s", limit) | {"ratio": round(ratio, 3), "limit": best}


def processors_against(name: str, spent: dict[str, list[float]], limits: str) -> Row:
    """Processor time of ours beside the least of the calls whose names begin with ``limits``."""
    best = min((name for name in spent if name.startswith(limits)), key=lambda name: statistics.median(spent[name]))
    ours, limit = (1e3 * statistics.median(spent[each]) for each in ("ours", best))
    return row(name, ours, "ms", limit, less_is_better=True) | {"limit": best}


def in_turn(size: int, before: Callable[[], object] = lambda: None, **calls: Callable[[], object]) -> dict[str, float]:
    """Median GB/s of each call, the calls taking turns; ``before`` each of them is not timed."""
    times = times_in_turn(before, **calls)
    return {name: size / 1e9 / statistics.median(taken) for name, taken in times.items()}


def times_in_turn(before: Callable[[], object] = lambda: None, **calls: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each call, round by round."""
    return measured_in_turn((time.perf_counter,), before, **calls)[0]


def measured_in_turn(
    clocks: Sequence[Callable[[], float]], before: Callable[[], object] = lambda: None, **calls: Callable[[], object]
) -> list[dict[str, list[float]]]:
    """What each call takes by each clock, round by round."""
    times: list[dict[str, list[float]]] = [{name: [] for name in calls} for _ in clocks]
    names, order = list(calls), random.Random(1)
    for number in range(ROUNDS + 2):
        order.shuffle(names)  # each comes after each other one
        for name in names:
            call = calls[name]
            before()
            begun = [clock() for clock in clocks]
            call()
            ended = [clock() for clock in clocks]
            for of_clock, start, end in zip(times, begun, ended, strict=True):
                of_clock[name] += [end - start] if number >= 2 else []
    return times


def processor_seconds(pid: int) -> float:
    """What this process and another one have had of the processors: steadier than time where others want them, too."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return time.process_time() + sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(16, "big"))


# -- the bare socket ---------------------------------------------------------------------------------------------------------


def _peer(listening: socket.socket) -> None:
    """Sends or takes as many bytes as it is asked to, in parts of the size it is told."""
    connection, _ = listening.accept()
    buffer = memoryview(bytearray(b"\1") * (64 * MIB))  # pages of its own, not the one of zeros
    request = memoryview(bytearray(17))
    while True:
        done = 0
        while done < 17:
            count = connection.recv_into(request[done:])
            if not count:
                return
            done += count
        size, part = int.from_bytes(request[1:9], "big"), int.from_bytes(request[9:17], "big")
        if request[:1] == b"g":
            for begin in range(0, size, part):
                connection.sendall(buffer[begin : min(begin + part, size)])
        else:
            done = 0
            while done < size:  # to where it stays, as whoever keeps a value has to
                done += connection.recv_into(buffer[done : min(done + part, size)], 0, socket.MSG_WAITALL)
            connection.sendall(b"k")


class Loopback:
    """A connection to another process that does nothing but send and receive."""

    def __init__(self) -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        self._process = multiprocessing.get_context("fork").Process(target=_peer, args=(listening,), daemon=True)
        self._process.start()
        self._sock = socket.create_connection(listening.getsockname())
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get(self, out: memoryview, part: int) -> None:
        self._sock.sendall(b"g" + len(out).to_bytes(8, "big") + part.to_bytes(8, "big"))
        for begin in range(0, len(out), part):
            end = min(begin + part, len(out))
            got = begin
            while got < end:
                got += self._sock.recv_into(out[got:end], 0, socket.MSG_WAITALL)

    def put(self, data: memoryview, part: int) -> None:
        self._sock.sendall(b"p" + len(data).to_bytes(8, "big") + part.to_bytes(8, "big"))
        for begin in range(0, len(data), part):
            self._sock.sendall(data[begin : begin + part])
        self._sock.recv(1)

    def close(self) -> None:
        self._sock.close()
        self._process.join(5)


# -- Redis -------------------------------------------------------------------------------------------------------------------

PARTS = (256 * 1024, 512 * 1024, MIB, 2 * MIB)


class PlainClient:
    """As little as can talk to the same server: values cut into parts, one connection, ``sendall`` and ``recv_into``.

    No heads, no expiry, no deadlines, nothing that would notice a value that is gone or of two writes.
    """

    def __init__(self, port: int) -> None:
        self._sock = socket.create_connection(("127.0.0.1", port))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._scratch = memoryview(bytearray(64))

    @staticmethod
    def names(size: int, part: int) -> list[bytes]:
        return [b"plain:%07d:%03d" % (part, number) for number in range(-(-size // part))]

    def set(self, data: memoryview, part: int) -> None:
        before, names = b"", self.names(len(data), part)
        for number, name in enumerate(names):
            piece = data[number * part : (number + 1) * part]
            self._sock.sendall(before + b"*3\r\n$3\r\nSET\r\n$17\r\n%b\r\n$%d\r\n" % (name, len(piece)))
            self._sock.sendall(piece)
            before = b"\r\n"
        self._sock.sendall(before)
        left = 5 * len(names)  # of +OK each
        while left:
            left -= self._sock.recv_into(self._scratch[: min(left, 64)])

    def get(self, out: memoryview, part: int, window: int) -> None:
        asks = [b"*2\r\n$3\r\nGET\r\n$17\r\n%b\r\n" % name for name in self.names(len(out), part)]
        self._sock.sendall(b"".join(asks[:window]))
        for number in range(len(asks)):
            piece = out[number * part : (number + 1) * part]
            self._receive(self._scratch[: len(b"$%d\r\n" % len(piece))])
            self._receive(piece)
            self._receive(self._scratch[:2])
            if number + window < len(asks):
                self._sock.sendall(asks[number + window])

    def _receive(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += self._sock.recv_into(view[done:], 0, socket.MSG_WAITALL)

    def close(self) -> None:
        self._sock.close()


def redis_rates() -> Iterator[Row]:
    """Values of 8 and 14 MiB to and from a Redis, beside a plain client of it, redis-py with hiredis, and a bare socket."""
    yield from rates_of("redis-server", "redis")


def valkey_rates() -> Iterator[Row]:
    """The same of a Valkey."""
    import servers

    yield from rates_of(servers.valkey_binary(), "valkey")


def rates_of(binary: str, kind: str, *args: str) -> Iterator[Row]:
    """Rows ``…_against_plain_client`` (of the same server), ``…_against_redis_py`` and, what no Redis can reach since nobody
    keeps or looks for anything there, ``…_against_bare_process``; ``…_processors_…`` is the processor time of client and
    server together, in ms."""
    import redis
    import servers

    with tempfile.TemporaryDirectory() as folder, servers.RedisServer(Path(folder), *args, binary=binary) as server:
        client = redis.Redis(port=server.port, protocol=2)
        backend = open_backend("redis", BackendSettings("bench", LAYOUT, url=server.url, deadline_seconds=60))
        bare, plain = Loopback(), PlainClient(server.port)
        clocks = (time.perf_counter, functools.partial(processor_seconds, server.pid))
        for megabytes in (8, 14):
            size = megabytes * MIB
            data, out = memoryview(np.random.default_rng(1).bytes(size)), memoryview(bytearray(size))
            whole = bytes(data)
            kept = [name for part in PARTS for name in plain.names(size, part)]
            calls: dict[str, Callable[[], object]] = {"ours": lambda data=data: backend.write_many([key(1)], [data])}  # type: ignore[misc]
            sets = calls | {f"bare-{part}": lambda data=data, part=part: bare.put(data, part) for part in PARTS}
            sets |= {f"plain-{part}": lambda data=data, part=part: plain.set(data, part) for part in PARTS}

            def fresh(kept: Sequence[bytes] = kept) -> None:  # new values, as a tier writes them
                client.delete("peer", *kept)
                backend.delete_many([key(1)])

            # redis-py in rounds of its own: its large values leave a server's memory in another state
            times, spent = measured_in_turn(clocks, fresh, **sets)
            yield against(f"{kind}_set_{megabytes}mib_against_plain_client", times, size, "plain")
            yield processors_against(f"{kind}_set_{megabytes}mib_processors_plain_client", spent, "plain")
            yield against(f"{kind}_set_{megabytes}mib_against_bare_process", times, size, "bare")
            times, spent = measured_in_turn(clocks, fresh, **calls, peer=lambda whole=whole: client.set("peer", whole))
            yield against(f"{kind}_set_{megabytes}mib_against_redis_py", times, size, "peer")
            yield processors_against(f"{kind}_set_{megabytes}mib_processors_redis_py", spent, "peer")
            fresh()
            backend.write_many([key(1)], [data])
            for part in PARTS:
                plain.set(data, part)
            calls = {"ours": lambda out=out: backend.read_many([key(1)], [out])}  # type: ignore[misc]
            gets = calls | {f"bare-{part}": lambda out=out, part=part: bare.get(out, part) for part in PARTS}
            for window in (2, 4):
                gets |= {
                    f"plain-{part}-by-{window}": lambda out=out, part=part, window=window: plain.get(out, part, window)
                    for part in PARTS
                }
            for name, call in gets.items():
                out[:] = bytes(size)
                call()
                assert name.startswith("bare") or out == data, name
            times, spent = measured_in_turn(clocks, **gets)
            yield against(f"{kind}_get_{megabytes}mib_against_plain_client", times, size, "plain")
            yield processors_against(f"{kind}_get_{megabytes}mib_processors_plain_client", spent, "plain")
            yield against(f"{kind}_get_{megabytes}mib_against_bare_process", times, size, "bare")
            client.set("peer", whole)
            times, spent = measured_in_turn(clocks, **calls, peer=lambda: client.get("peer"))
            yield against(f"{kind}_get_{megabytes}mib_against_redis_py", times, size, "peer")
            yield processors_against(f"{kind}_get_{megabytes}mib_processors_redis_py", spent, "peer")
            fresh()
        bare.close()
        plain.close()
        backend.close()


def redis_contains() -> Iterator[Row]:
    """Asking for 512 keys: round trips, and microseconds beside a pipeline of redis-py."""
    import proxy
    import redis
    import servers

    keys = [key(i) for i in range(512)]
    with tempfile.TemporaryDirectory() as folder, servers.RedisServer(Path(folder)) as server:
        with proxy.Proxy(server.port) as between:
            far = open_backend("redis", BackendSettings("bench", LAYOUT, url=f"redis://127.0.0.1:{between.port}"))
            far.contains_many(keys[:1])
            between.turns = 0
            far.contains_many(keys)
            yield row("redis_contains_512_round_trips", between.turns, "round trips", 1, less_is_better=True)
            far.close()
        client = redis.Redis(port=server.port, protocol=2)
        backend = open_backend("redis", BackendSettings("bench", LAYOUT, url=server.url))

        def peer() -> None:
            pipe = client.pipeline(transaction=False)
            for one in keys:
                pipe.exists(one)
            pipe.execute()

        rates = in_turn(1, ours=lambda: backend.contains_many(keys), peer=peer)
        yield row("redis_contains_512", 1e-3 / rates["ours"], "us", 1e-3 / rates["peer"], less_is_better=True)
        backend.close()


def dead_server() -> Iterator[Row]:
    """How long requests wait while a Redis stalls: the 99.9th percentile of 2,000, beside the deadline."""
    import known_kv
    import proxy
    import servers

    layout = lmkv.KVLayout.dense(layers=2, heads=2, head_size=64, dtype="float16", chunk_tokens=16)
    deadline = 0.25
    with (
        tempfile.TemporaryDirectory() as folder,
        servers.RedisServer(Path(folder)) as server,
        proxy.Proxy(server.port) as between,
    ):
        tier = lmkv.TierConfig(url=f"redis://127.0.0.1:{between.port}", name="remote", deadline_seconds=deadline)
        config = lmkv.StoreConfig(ram_capacity=64 * MIB, disk_capacity=0, tiers=(tier,))
        with lmkv.Store(config, layout) as store:
            texts = [[number, *range(63)] for number in range(2000)]
            for text in texts:
                store.store(text, known_kv.source(layout, text))
            assert store.flush(60)
            store._ram.clear()
            matches = [store.lookup(text).wait(5) for text in texts[:64]]
            assert all(match.hit_tokens == 64 for match in matches)
            between.stall()
            waits = []
            for number, text in enumerate(texts):
                begun = time.perf_counter()
                match = matches[number] if number < len(matches) else store.lookup(text)
                with store.lease(match):
                    pass
                waits.append(time.perf_counter() - begun)
            between.flow()
        waits.sort()
        yield row("stalled_wait_p999", waits[int(len(waits) * 0.999)] * 1e3, "ms", deadline * 1e3, less_is_better=True)
        yield row("stalled_wait_longest", waits[-1] * 1e3, "ms", deadline * 1e3, less_is_better=True)
        yield row("stalled_wait_median", statistics.median(waits) * 1e3, "ms", deadline * 1e3, less_is_better=True)


# -- S3 ----------------------------------------------------------------------------------------------------------------------


def s3_rates() -> Iterator[Row]:
    """16 values of 14 MiB from and to a bucket, beside the bare library with as many requests at once."""
    import obstore
    import weed

    count, size = 16, 14 * MIB
    login = {"access_key_id": weed.ACCESS, "secret_access_key": weed.SECRET}
    with tempfile.TemporaryDirectory() as folder, weed.s3_server(Path(folder)) as server:
        settings = BackendSettings(
            "bench",
            LAYOUT,
            url=server.url("bench"),
            deadline_seconds=60,
            options={**login, "concurrency": 4, "part_bytes": "16MiB"},
        )
        backend = open_backend("s3", settings)
        bucket = server.bucket("kv-cache")
        data = [memoryview(np.random.default_rng(i).bytes(size)) for i in range(count)]
        out = [memoryview(bytearray(size)) for _ in range(count)]
        keys = [key(i) for i in range(count)]

        def at_once(call: Callable[[int], object]) -> None:
            numbers = iter(range(count))
            lock = threading.Lock()

            def work() -> None:
                while True:
                    with lock:
                        number = next(numbers, None)
                    if number is None:
                        return
                    call(number)

            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        def peer_put(i: int) -> Any:
            return obstore.put(bucket, f"peer/{i}", data[i], use_multipart=False)

        def peer_get(i: int) -> Any:
            return obstore.get(bucket, f"peer/{i}").bytes()

        global ROUNDS
        rounds, ROUNDS = ROUNDS, 5
        puts = in_turn(count * size, ours=lambda: backend.write_many(keys, data), peer=lambda: at_once(peer_put))
        gets = in_turn(count * size, ours=lambda: backend.read_many(keys, out), peer=lambda: at_once(peer_get))
        ROUNDS = rounds
        assert out == data
        yield row("s3_put_14mib_by_4", puts["ours"], "GB/s", puts["peer"])
        yield row("s3_get_14mib_by_4", gets["ours"], "GB/s", gets["peer"])
        backend.close()


# -- Mooncake ----------------------------------------------------------------------------------------------------------------

_HOLDER = """
import sys, mmap
import lmkv
from lmkv.backends import BackendSettings, open_backend
from lmkv.chunks import ChunkKey
layout = lmkv.KVLayout.dense(layers=28, heads=4, head_size=128, dtype="bfloat16")
options = {"global_segment_size": 1 << 30, "local_buffer_size": 1 << 26, "prefer_local_alloc": True}
settings = BackendSettings("holder", layout, url=sys.argv[1], options=options, deadline_seconds=60)
backend = open_backend("mooncakestore", settings)
data = memoryview(mmap.mmap(-1, 16 << 20))
data[:] = bytes(range(256)) * (1 << 16)
for number in range(8):
    backend.write_many([ChunkKey(number.to_bytes(16, "big"))], [data])
print("ready", flush=True)
sys.stdin.read()
backend.close()
"""


def mooncake_rates() -> Iterator[Row]:
    """Values of 16 MiB out of another process's memory, into slots, beside the bare client's ``get_into``."""
    import mmap
    import subprocess

    import mooncakes
    from mooncake.store import MooncakeDistributedStore

    size, count = 16 * MIB, 8
    with tempfile.TemporaryDirectory() as folder, mooncakes.MooncakeMaster(Path(folder)) as master:
        holder = subprocess.Popen(
            [sys.executable, "-c", _HOLDER, master.url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert holder.stdout is not None
        assert b"ready" in holder.stdout.readline()
        options = {"global_segment_size": 0, "local_buffer_size": 64 * MIB}
        backend: Any = open_backend(
            "mooncakestore", BackendSettings("bench", LAYOUT, url=master.url, options=options, deadline_seconds=60)
        )
        slots = memoryview(mmap.mmap(-1, count * size))
        out = [slots[i * size : (i + 1) * size] for i in range(count)]
        keys = [key(i) for i in range(count)]
        bare = MooncakeDistributedStore()
        bare.setup("127.0.0.1", "P2PHANDSHAKE", 0, 64 * MIB, "tcp", "", f"127.0.0.1:{master.port}")
        target = np.frombuffer(mmap.mmap(-1, count * size), np.uint8)
        address = target.__array_interface__["data"][0]
        bare.register_buffer(address, target.nbytes)

        def peer() -> None:
            for i in range(count):
                bare.get_into(f"lmkv-{keys[i].hex()}", address + i * size, size)

        rates = in_turn(count * size, ours=lambda: backend.read_many(keys, out), peer=peer)
        assert slots[:size] == target[:size].tobytes() == bytes(range(256)) * (1 << 16)
        yield row("mooncake_get_16mib", rates["ours"], "GB/s", rates["peer"])
        backend.close()
        bare.close()
        holder.communicate(b"", timeout=30)


# -- the codec ---------------------------------------------------------------------------------------------------------------


def real_payloads(count: int) -> list[bytes]:
    """Payloads of full chunks of SmolLM2-135M-Instruct's KV in bfloat16, reading chapters of Python's manual."""
    import torch

    from lmkv.adapters.transformers import demo_model, demo_texts

    torch.set_num_threads(2)
    loaded = demo_model.load(demo_model.prepare(None))
    model, payloads = loaded.model.to(torch.bfloat16), []
    for document in demo_texts.documents(None, loaded.tokenizer, 2048):
        ids = loaded.tokenizer(document.text, return_tensors="pt").input_ids[:, :512]
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
        layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]  # [kv, heads, tokens, head_size]
        whole = torch.stack(layers)
        for begin in range(0, ids.shape[1] - 255, 256):
            chunk = whole[:, :, :, begin : begin + 256].contiguous()
            payloads.append(chunk.view(torch.uint8).numpy().tobytes())
        if len(payloads) >= count:
            break
    return payloads[:count]


def lossless() -> Iterator[Row]:
    """Ratio and speed of the codec ``lossless`` on real KV in bfloat16."""
    payloads = real_payloads(8)
    codec, alone = Blosc2Codec(threads=2), Blosc2Codec(threads=1)
    encoded = [bytes(codec.encode(memoryview(payload))) for payload in payloads]
    size = sum(map(len, payloads))
    yield row("lossless_ratio", size / sum(map(len, encoded)), "", 1.35)
    out = [memoryview(bytearray(len(payload))) for payload in payloads]

    def decode(by: Blosc2Codec) -> None:
        for data, view in zip(encoded, out, strict=True):
            by.decode(memoryview(data), view)

    rates = in_turn(
        size,
        two=lambda: decode(codec),
        one=lambda: decode(alone),
        encode=lambda: [codec.encode(memoryview(payload)) for payload in payloads],
    )
    assert [bytes(view) for view in out] == payloads
    yield row("lossless_decode_2_threads", rates["two"], "GB/s", 1.5)
    yield row("lossless_decode_1_thread", rates["one"], "GB/s", 1.5)
    yield row("lossless_encode_1_thread", rates["encode"], "GB/s", 0.5)


ALL = [redis_rates, valkey_rates, redis_contains, dead_server, s3_rates, mooncake_rates, lossless]


def main(parts: Sequence[Callable[[], Iterator[Row]]] = ALL, about: str | None = __doc__) -> int:
    """Run the rows and print them."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--only", default="", help=f"out of {', '.join(part.__name__ for part in parts)}")
    args = parser.parse_args()
    wanted = set(filter(None, args.only.split(",")))
    for part in parts:
        if wanted and part.__name__ not in wanted:
            continue
        for found in part():
            if args.json:
                print(json.dumps(found), flush=True)
            else:
                print(
                    f"{found['name']:44} {found['value']:10} {found['unit']:12} {found['reference']:10} {found['ratio']:8}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
