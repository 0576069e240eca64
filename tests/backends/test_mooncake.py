"""A Mooncake store as a backend, against a real master and its TCP transport."""

from __future__ import annotations

import dataclasses
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import known_kv
import mooncakes
import numpy as np
import pytest

from lmkv.backends import Backend, BackendSettings, open_backend
from lmkv.backends.base import Clearable
from lmkv.chunks import ChunkKey
from lmkv.errors import BackendUnavailableError, ConfigError, StoreClosedError
from lmkv.layout import KVLayout
from lmkv.testing import BackendSuite

LAYOUT = KVLayout.dense(layers=1, heads=1, head_size=4, dtype="float32", chunk_tokens=16)
MIB = 1024**2
SMALL = {"global_segment_size": 128 * MIB, "local_buffer_size": 16 * MIB}


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[mooncakes.MooncakeMaster]:
    with mooncakes.MooncakeMaster(tmp_path_factory.mktemp("mooncake")) as running:
        yield running


@pytest.fixture(scope="module")
def segment(master: mooncakes.MooncakeMaster) -> Iterator[Backend]:
    """A client whose memory holds what others write, so that it outlives them."""
    backend = open_backend("mooncakestore", settings(master.url, **SMALL))
    backend.contains_many([key(1)])
    yield backend
    backend.close()


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(16, "big"))


def settings(url: str, deadline: float = 30.0, **options: Any) -> BackendSettings:
    return BackendSettings("remote", LAYOUT, url=url, options=options, deadline_seconds=deadline)


class TestMooncake(BackendSuite):
    offers = (Clearable,)
    persistent = True
    refuses_when_full = False
    replaces_at_once = False
    examples = 3
    steps = 12
    master: ClassVar[mooncakes.MooncakeMaster]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _master(cls, master: mooncakes.MooncakeMaster, segment: Backend) -> None:
        cls.master = master

    def make(self, settings: BackendSettings) -> Backend:
        prefix = f"{self.directory.name}-{settings.name}"
        options = {"prefix": prefix, "global_segment_size": 0, "local_buffer_size": 16 * MIB, **settings.options}
        return open_backend(
            "mooncakestore",
            dataclasses.replace(settings, capacity=0, url=self.master.url, options=options, deadline_seconds=30.0),
        )


def test_slots_are_registered_once_and_filled_in_place(segment: Any) -> None:
    slots = mmap.mmap(-1, 16 * MIB)
    view = memoryview(slots)
    data = np.random.default_rng(1).bytes(4 * MIB)
    view[: 4 * MIB] = data
    segment.write_many([key(7)], [view[: 4 * MIB]])
    for place in (4, 8, 12):
        out = view[place * MIB : (place + 4) * MIB]
        assert segment.read_many([key(7)], [out]) == [4 * MIB]
        assert out == data
    assert [owner for owner, _, _ in segment._registered.values()] == [slots]
    assert segment.read_many([key(7)], [memoryview(bytearray(100))]) == [None], "a value larger than its buffer is absent"
    assert len(segment._registered) == 1, "other memory is not kept registered"


def test_closed_while_calls_are_under_way(master: mooncakes.MooncakeMaster, segment: Backend) -> None:
    mine: Any = open_backend("mooncakestore", settings(master.url, **{**SMALL, "global_segment_size": 0}))
    values = [memoryview(bytes([i]) * 5000) for i in range(8)]
    mine.write_many([key(2000 + i) for i in range(8)], values)
    real, begun, goes_on, ended = mine._client, threading.Semaphore(0), threading.Event(), []

    class Slow:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def batch_get_into(self, *how: Any) -> Any:
            begun.release()
            assert goes_on.wait(30)
            return real.batch_get_into(*how)

        def close(self) -> None:
            ended.append(dict(mine._registered))
            real.close()

    mine._client = Slow()
    outs = [memoryview(mmap.mmap(-1, 8192))[:5000] for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        reads = [pool.submit(mine.read_many, [key(2000 + i)], [outs[i]]) for i in range(8)]
        for _ in reads:
            assert begun.acquire(timeout=30)
        mine.close()
        assert not ended, "memory that is being written to stays registered, and the client open"
        goes_on.set()
        assert [read.result() for read in reads] == [[5000]] * 8
    assert outs == values
    assert ended == [{}], "once, with nothing registered"
    with pytest.raises(StoreClosedError):
        mine.read_many([key(2000)], [outs[0]])


def test_memory_of_ones_own_is_preferred(master: mooncakes.MooncakeMaster, segment: Backend) -> None:
    mine = open_backend("mooncakestore", settings(master.url, prefer_local_alloc="true", **SMALL))
    keys = [key(1000 + i) for i in range(16)]
    mine.write_many(keys, [memoryview(bytes([i]) * 1000) for i in range(16)])
    assert segment.contains_many(keys) == [True] * 16
    mine.close()
    assert segment.contains_many(keys) == [False] * 16, "all of it lay in the memory that went"


_OTHER_PROCESS = """
import sys, known_kv, lmkv
from remote_client import TEXT, Client
mine = Client(sys.argv[1], options={"global_segment_size": 0, "local_buffer_size": 1 << 24})
print(mine.get(), flush=True)
mine.store.close()
"""


def test_two_processes_share(segment: Backend, master: mooncakes.MooncakeMaster) -> None:
    from remote_client import TEXT, Client

    mine = Client(master.url, options={"global_segment_size": 0, "local_buffer_size": 16 * MIB})
    assert mine.put()
    assert mine.get() == len(TEXT)
    environment = {**os.environ, "PYTHONPATH": str(Path(known_kv.__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", _OTHER_PROCESS, master.url], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.strip().splitlines()[-1:]) == (0, ["100"]), done.stderr
    mine.store.close()


def test_a_master_that_dies_is_a_miss_and_comes_back(tmp_path: Path) -> None:
    from remote_client import DEADLINE, SLACK, Client, other_text, until_served

    with mooncakes.MooncakeMaster(tmp_path) as own:
        mine = Client(own.url, options=SMALL, breaker_seconds=1.0)
        assert mine.put()
        assert mine.get() == 100
        own.kill()
        for number in range(5):
            assert mine.get(other_text(number)) == 0
        assert mine.slowest < DEADLINE + SLACK
        assert "tier_failed" in mine.kinds()
        own.start()
        until_served(mine, 40)
        mine.store.close()


def test_a_master_that_starts_late(tmp_path: Path) -> None:
    from remote_client import DEADLINE, SLACK, Client, until_served

    own = mooncakes.MooncakeMaster(tmp_path)
    mine = Client(own.url, options=SMALL, breaker_seconds=1.0)
    assert not mine.put()
    assert mine.get() == 0
    assert mine.slowest < DEADLINE + SLACK
    with own:
        until_served(mine, 20)
        mine.store.close()


def test_no_master_costs_the_deadline(tmp_path: Path) -> None:
    backend = open_backend("mooncakestore", settings("mooncakestore://127.0.0.1:1", 0.2, **SMALL))
    begun = time.monotonic()
    with pytest.raises(BackendUnavailableError, match=r"127\.0\.0\.1:1 does not answer"):
        backend.contains_many([key(1)])
    assert time.monotonic() - begun < 5
    backend.close()


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("mooncakestore://", {}, "such as mooncakestore://host:50051"),
        ("mooncakestore://h:x", {}, "such as mooncakestore://host:50051"),
        ("mooncakestore://h", {"protocol": "udp"}, "protocol"),
        ("mooncakestore://h", {"global_segment_size": "big"}, "global_segment_size"),
        ("mooncakestore://h", {"local_hostnam": "x"}, "did you mean 'local_hostname'"),
    ],
)
def test_wrong_urls_and_options_are_refused(url: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_backend("mooncakestore", settings(url, **options))
    assert message in str(caught.value)


def test_a_missing_package_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "mooncake.py").write_text("raise ImportError('not here')")
    code = (
        "import lmkv, lmkv.backends as b\nlayout = lmkv.KVLayout.dense(layers=1, heads=1, head_size=4, dtype='float32')\n"
        "try: b.open_backend('mooncakestore', b.BackendSettings('m', layout, url='mooncakestore://h'))\n"
        "except lmkv.ConfigError as error: print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "pip install 'lmkv[mooncake]'" in done.stdout
