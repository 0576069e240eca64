"""An InfiniStore as a backend, against doubles of its server: the real one needs an RDMA device to start.

What the doubles can show is that values, heads and memory are handled as the published client and server ask for; that bytes
cross an RDMA network they can't.
"""

from __future__ import annotations

import dataclasses
import inspect
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import infinistores
import known_kv
import numpy as np
import pytest
import servers
from remote_client import DEADLINE, SLACK, TEXT, Client, other_text

from lmkv.backends import Backend, BackendSettings, open_backend
from lmkv.chunks import ChunkKey
from lmkv.errors import BackendUnavailableError, CapacityError, ConfigError
from lmkv.layout import KVLayout
from lmkv.testing import BackendSuite

LAYOUT = KVLayout.dense(layers=1, heads=1, head_size=4, dtype="float32", chunk_tokens=16)
MIB = 1024**2


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(16, "big"))


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[infinistores.RdmaDouble]:
    made = infinistores.RdmaDouble()
    monkeypatch.setitem(sys.modules, "infinistore", made)
    with infinistores.ControlDouble(made.values) as control:  # the place that is tried before the client is
        made.url = f"infinistore://127.0.0.1:{control.port}/?device=mlx5_1"
        yield made


def opened(double: infinistores.RdmaDouble, deadline: float = 20.0, **options: Any) -> Any:
    return open_backend(
        "infinistore", BackendSettings("remote", LAYOUT, url=double.url, options=options, deadline_seconds=deadline)
    )


class TestInfiniStoreDouble(BackendSuite):
    persistent = True
    refuses_when_full = False
    replaces_at_once = False
    examples = 8
    double: ClassVar[Any]

    @pytest.fixture(autouse=True)
    def _double(self, double: infinistores.RdmaDouble) -> None:
        type(self).double = double

    def make(self, settings: BackendSettings) -> Backend:
        options = {"prefix": f"{self.directory.name}-{settings.name}"[-80:], **settings.options}
        return open_backend(
            "infinistore",
            dataclasses.replace(settings, capacity=0, url=self.double.url, options=options, deadline_seconds=20.0),
        )


def test_slots_are_registered_once_and_sent_from_where_they_lie(double: infinistores.RdmaDouble) -> None:
    slots = mmap.mmap(-1, 16 * MIB)
    view = memoryview(slots)
    view[: 4 * MIB] = np.random.default_rng(1).bytes(4 * MIB)
    backend = opened(double)
    for number in range(4):
        backend.write_many([key(number)], [view[: 4 * MIB]])
        assert backend.read_many([key(number)], [view[8 * MIB : 12 * MIB]]) == [4 * MIB]
        assert view[8 * MIB : 12 * MIB] == view[: 4 * MIB]
    assert sum(size == 16 * MIB for _, size in double.registered) == 1
    count = len(double.registered)
    for number in range(4):
        backend.write_many([key(number)], [memoryview(bytearray(1000))])
        assert backend.read_many([key(number)], [memoryview(bytearray(1000))]) == [1000]
    assert len(double.registered) == count, "memory that passes is not registered: there is no end to a registration"
    assert len(double.values.held) == 8, "what was replaced is deleted: a head and a body each"
    backend.close()


def test_a_full_server_refuses_and_keeps_nothing(double: infinistores.RdmaDouble) -> None:
    double.values.capacity = 3 * MIB
    backend = opened(double)
    backend.write_many([key(1)], [memoryview(bytes(MIB))])
    with pytest.raises(CapacityError, match="no room"):
        backend.write_many([key(2), key(3)], [memoryview(bytes(MIB + 100))] * 2)
    assert backend.contains_many([key(1), key(2), key(3)]) == [True, False, False]
    assert len(double.values.held) == 2
    backend.close()


@pytest.mark.parametrize("damage", ["evicted body", "truncated body", "corrupted body", "swapped heads", "strange head"])
def test_what_is_damaged_is_a_miss(double: infinistores.RdmaDouble, damage: str) -> None:
    mine = Client(double.url, options={"prefix": "x"})
    assert mine.put()
    held = double.values.held
    heads = [f"x-{name}" for name in mine.keys(TEXT)]
    bodies = [next(name for name in held if name.startswith(head + "-")) for head in heads]
    if damage == "evicted body":
        del held[bodies[2]]
    elif damage == "truncated body":
        held[bodies[2]] = held[bodies[2]][:-10]  # what lies behind it is read in its place
    elif damage == "corrupted body":
        held[bodies[2]] = held[bodies[2]][:5000] + b"\x01" + held[bodies[2]][5001:]
    elif damage == "swapped heads":
        held[heads[2]], held[heads[3]] = held[heads[3]], held[heads[2]]
    else:
        held[heads[2]] = b"?" * 64
    assert mine.get() == 32
    assert {"corrupt", "load_failed"} & set(mine.kinds())
    assert mine.put()
    assert mine.get() == 100, "what was damaged is written anew"
    mine.store.close()


def test_a_server_that_goes_and_comes_back(double: infinistores.RdmaDouble) -> None:
    mine = Client(double.url, options={}, breaker_seconds=0.5)
    assert mine.put()
    assert mine.get() == 100
    double.down = True
    for number in range(6):
        assert mine.get(other_text(number)) == 0
    assert {"tier_failed", "tier_disabled"} <= set(mine.kinds())
    double.down = False
    servers.until(lambda: mine.put() and mine.get() == 100, 20)
    mine.store.close()


def test_transfers_that_never_end_cost_the_deadline_and_write_nothing_later(double: infinistores.RdmaDouble) -> None:
    backend = opened(double, deadline=0.3)
    value = np.random.default_rng(2).bytes(MIB)
    backend.write_many([key(1)], [memoryview(value)])
    double.stalled.set()
    out = bytearray(MIB)
    begun = time.monotonic()
    with pytest.raises(BackendUnavailableError, match="no answer within"):
        backend.read_many([key(1)], [memoryview(out)])
    assert time.monotonic() - begun < 0.3 + SLACK
    double.stalled.clear()
    servers.until(lambda: backend._resting, 10)
    assert not any(out), "what came late did not land"
    assert backend.read_many([key(1)], [memoryview(out)]) == [MIB]
    assert out == value
    mine = Client(double.url, options={})
    assert mine.put()
    double.stalled.set()
    assert mine.get() == 0
    assert mine.slowest < DEADLINE + SLACK
    double.stalled.clear()
    mine.store.close()
    backend.close()


# -- the real package ----------------------------------------------------------------------------------------------------------


def test_the_double_is_called_as_the_real_client_is() -> None:
    real = pytest.importorskip("infinistore")
    double = infinistores.RdmaDouble()
    for name in ("connect_async", "close", "check_exist", "delete_keys", "rdma_write_cache_async", "rdma_read_cache_async"):
        expected = list(inspect.signature(getattr(real.InfinityConnection, name)).parameters)
        found = list(inspect.signature(getattr(double.InfinityConnection, name)).parameters)
        assert found == expected, name
    assert issubclass(real.InfiniStoreKeyNotFound, Exception)
    config = real.ClientConfig(host_addr="h", service_port=1, connection_type="RDMA", dev_name="d", ib_port=2, link_type="IB")
    config.verify()
    assert (config.dev_name, config.ib_port, config.link_type, config.service_port) == ("d", 2, "IB", 1)


_REAL_CLIENT = """
import os, sys
before = os.environ.get("OMP_NUM_THREADS")
import infinistores
from remote_client import TEXT, Client
with infinistores.ControlDouble() as control:
    mine = Client(f"infinistore://127.0.0.1:{control.port}/?device=none", options={}, breaker_seconds=0.1)
    assert not mine.put()
    assert mine.get() == 0
    kinds = set(mine.kinds())
    mine.store.close()
assert os.environ.get("OMP_NUM_THREADS") == before
print(sorted(kinds & {"tier_failed", "corrupt"}), flush=True)
"""


def test_the_real_client_without_a_device_is_a_miss() -> None:
    """It connects to something that answers as a server does, and finds no RDMA device on this machine."""
    pytest.importorskip("infinistore")
    environment = {**os.environ, "PYTHONPATH": str(Path(known_kv.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", _REAL_CLIENT], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip().splitlines()[-1:]) == (0, ["['tier_failed']"]), done.stderr
    assert "connecting to" not in done.stdout


_REAL_CONTROL = """
import asyncio, infinistore, infinistores
values = infinistores.Values()
values.put("a", b"1")
values.put("b", b"2")
with infinistores.ControlDouble(values) as control:
    config = infinistore.ClientConfig(host_addr="127.0.0.1", service_port=control.port, connection_type="TCP")
    client = infinistore.InfinityConnection(config)
    asyncio.run(client.connect_async())
    print(client.check_exist("a"), client.check_exist("c"), client.delete_keys(["a", "c"]), sorted(values.held), flush=True)
    control.kill()
    for call in (lambda: client.check_exist("a"), lambda: client.delete_keys(["a"])):
        try:
            print(call())
        except Exception as error:
            print(type(error).__name__, flush=True)
    client.close()
"""


def test_the_real_client_asks_as_the_backend_has_it_ask() -> None:
    pytest.importorskip("infinistore")
    environment = {**os.environ, "PYTHONPATH": str(Path(known_kv.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", _REAL_CONTROL], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "[infini]" not in line]  # its logs go there, too
    assert said == ["True False 1 ['b']", "Exception", "Exception"]


# -- settings ------------------------------------------------------------------------------------------------------------------


def test_the_client_is_told_what_the_url_says(double: infinistores.RdmaDouble) -> None:
    backend = opened(double, link_type="ib", ib_port="2")
    backend.contains_many([key(1)])
    told = {name: double.last[name] for name in ("connection_type", "dev_name", "ib_port", "link_type", "host_addr")}
    assert told == {
        "connection_type": "RDMA", "dev_name": "mlx5_1", "ib_port": 2, "link_type": "IB", "host_addr": "127.0.0.1"
    }  # fmt: skip
    backend.close()


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("infinistore://", {}, "expected a url such as"),
        ("infinistore://host:port", {}, "expected a url such as"),
        ("infinistore://host/path", {}, "expected a url such as"),
        ("infinistore://host", {"devise": "x"}, "did you mean 'device'"),
        ("infinistore://host", {"link_type": "wifi"}, "Ethernet or IB"),
        ("infinistore://host", {"ib_port": 0}, "ib_port"),
        ("infinistore://host", {"prefix": "a b"}, "prefix"),
    ],
)
def test_wrong_settings_are_refused(double: infinistores.RdmaDouble, url: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_backend("infinistore", BackendSettings("remote", LAYOUT, url=url, options=options))


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "infinistore", None)
    with pytest.raises(ConfigError, match="pip install --no-deps infinistore"):
        open_backend("infinistore", BackendSettings("remote", LAYOUT, url="infinistore://host"))
