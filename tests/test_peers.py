"""Two stores in two processes: what one has in RAM the other reads from its memory, by NIXL's UCX over loopback."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import known_kv
import pytest
import servers
from remote_client import DEADLINE, LAYOUT, SLACK, TEXT, Client, other_text

import lmkv
from lmkv.backends import BackendSettings, open_backend
from lmkv.backends.nixl_agent import Agent
from lmkv.backends.peer import PeerBackend
from lmkv.errors import BackendUnavailableError, ConfigError

pytest.importorskip("nixl")

#: The plugin reads these when it is loaded: nothing but this machine is meant.
os.environ.setdefault("UCX_TLS", "tcp,sm,self")
os.environ.setdefault("UCX_NET_DEVICES", "lo")

_LENDER = """
import json, sys, lmkv, known_kv
from remote_client import LAYOUT
settings = json.loads(sys.argv[1])
store = lmkv.Store(lmkv.StoreConfig(model="m", ram_capacity=64 << 20, ram_extent=1 << 20, disk_capacity=0, **settings), LAYOUT)
print(store._peers.address[1], flush=True)
for line in sys.stdin:
    what, text = json.loads(line)
    if what == "store":
        said = store.store(text, known_kv.source(LAYOUT, text))
    elif what == "clear":
        with store._lock:
            said = store._ram.clear()
    elif what == "damage":
        node = store._ram.index.get(bytes.fromhex(text))
        store._ram.pool.view(node.slot)[5000:5001] = b"!" if store._ram.pool.view(node.slot)[5000:5001] != b"!" else b"?"
        said = 0
    elif what == "close":
        held = list(store._ram.pool._maps)
        store.close()
        said = sum(not each.closed for each in held)
    elif what == "pins":
        said = sum(node.pins for node in store._ram.index)
    print(said, flush=True)
"""


class Lender:
    """A process with a store that lends."""

    def __init__(self, port: int = 0, **settings: Any) -> None:
        given = {"peer_listen": f"127.0.0.1:{port}", **settings}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LENDER, json.dumps(given)],
            env={**os.environ, "PYTHONPATH": str(Path(known_kv.__file__).parent)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.url = f"nixl://127.0.0.1:{self.port}"

    def tell(self, what: str, text: Any = None) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([what, text]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def __enter__(self) -> Lender:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]


@pytest.fixture
def lender() -> Iterator[Lender]:
    with Lender() as running:
        yield running


@pytest.fixture
def borrower() -> Iterator[Any]:
    made: list[Client] = []

    def make(url: str, **settings: Any) -> Client:
        made.append(Client(url, options=settings.pop("options", {}), **settings))
        return made[-1]

    yield make
    for each in made:
        each.store.close(2.0)


def test_what_one_has_the_other_reads(lender: Lender, borrower: Any) -> None:
    assert lender.tell("store", TEXT) == 100
    mine = borrower(lender.url, deadline=30)  # nothing is late here, however busy the machine is
    match = mine.store.lookup(TEXT).wait(30)
    assert match.tokens_by_tier() == {"remote": 100}
    assert mine.get() == 100
    servers.until(lambda: lender.tell("pins") == 0, 30)
    for number in range(30):  # more extents than at first: their memory is registered as they come
        text = other_text(number)
        assert lender.tell("store", text) == 101
        assert mine.get(text) == 101
    assert not {"corrupt", "tier_failed", "load_failed"} & set(mine.kinds())
    servers.until(lambda: lender.tell("pins") == 0, 30)  # it is told so after the read


def test_who_lends_may_close_its_store_and_go_on(lender: Lender, borrower: Any) -> None:
    texts = [other_text(number) for number in range(4)]
    for text in texts:
        assert lender.tell("store", text) == 101
    mine = borrower(lender.url, deadline=30)
    assert mine.get(texts[0]) == 101
    assert lender.tell("close") == 0, "nothing keeps the slots from being unmapped"
    assert mine.get(texts[1]) == 0
    assert lender.tell("close") == 0


def test_registered_memory_is_not_unmapped() -> None:
    agent = Agent("lmkv-test-registered", "UCX", {})
    extent = mmap.mmap(-1, 1 << 16)
    assert agent.keep_registered(extent)
    assert not agent.keep_registered(extent)
    with pytest.raises(BufferError):
        extent.close()
    agent.close()
    extent.close()


def test_slots_in_shared_memory_are_lent_too(borrower: Any) -> None:
    with Lender(ram_shared=True) as lender:
        assert lender.tell("store", TEXT) == 100
        mine = borrower(lender.url, ram_shared=True)
        servers.until(lambda: mine.get() == 100, 10)  # an agent may take longer to start than a lookup waits


def test_nothing_is_written_to_a_peer(lender: Lender, borrower: Any) -> None:
    mine = borrower(lender.url)
    assert mine.store.store(TEXT, known_kv.source(LAYOUT, TEXT)) == 100
    assert mine.store.flush(10)
    stats = mine.store.stats().tiers[1]
    assert (stats.written_chunks, stats.dropped_writes, stats.waiting_writes) == (0, 0, 0)
    assert all(node.pins == 0 for node in mine.store._ram.index)
    assert mine.get() == 0
    mine.store._check()


def test_two_lend_to_each_other() -> None:
    here, there = servers.free_ports(2)
    code = _LENDER.replace("**settings)", "tiers=[{'url': settings.pop('peer'), 'deadline_seconds': 30.0}], **settings)")
    processes = []
    try:
        for mine, other in ((here, there), (there, here)):
            given = {"peer_listen": f"127.0.0.1:{mine}"}
            text = code.replace("settings.pop('peer')", repr(f"nixl://127.0.0.1:{other}"))
            text = text.replace(
                "    print(said",
                """    elif what == "load":
        store._ram.clear()
        said = known_kv.fetch(store, text, store.lookup(text).wait(30))
    print(said""",
            )
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", text, json.dumps(given)],
                    env={**os.environ, "PYTHONPATH": str(Path(known_kv.__file__).parent)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )

        def tell(process: Any, what: str, text: Any) -> int:
            process.stdin.write(json.dumps([what, text]) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        for process in processes:
            process.stdout.readline()
        first, second = processes
        assert tell(first, "store", TEXT) == 100
        assert tell(second, "load", TEXT) == 100
        assert tell(second, "store", other_text(5)) == 101
        assert tell(first, "load", other_text(5)) == 101
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


# -- faults --------------------------------------------------------------------------------------------------------------------


def test_a_peer_that_is_killed_and_another_in_its_place(lender: Lender, borrower: Any) -> None:
    mine = borrower(lender.url, breaker_seconds=0.5)
    texts = [other_text(number) for number in range(8)]
    for text in texts:
        lender.tell("store", text)
    assert mine.get(texts[0]) == 101
    lender.process.kill()
    lender.process.wait()
    for text in texts[1:]:
        assert mine.get(text) == 0
    assert mine.slowest < DEADLINE + SLACK
    assert {"tier_failed", "tier_disabled"} <= set(mine.kinds())
    with Lender(lender.port) as second:
        assert second.tell("store", TEXT) == 100
        servers.until(lambda: mine.get() == 100, 20)


def test_a_peer_that_is_stopped_costs_the_deadline(lender: Lender, borrower: Any) -> None:
    mine = borrower(lender.url, breaker_seconds=0.5)
    texts = [other_text(number) for number in range(6)]
    for text in texts:
        lender.tell("store", text)
    assert mine.get(texts[0]) == 101
    lender.process.send_signal(signal.SIGSTOP)
    os.waitpid(lender.process.pid, os.WUNTRACED)  # until all its threads have: some answers could come before
    for text in texts[1:]:
        assert mine.get(text) == 0
    assert mine.slowest < DEADLINE + SLACK
    lender.process.send_signal(signal.SIGCONT)
    servers.until(lambda: mine.get(texts[1]) == 101, 20)


def test_what_changed_or_went_after_it_was_found_is_a_miss(lender: Lender, borrower: Any) -> None:
    lender.tell("store", TEXT)
    mine = borrower(lender.url)
    match = mine.store.lookup(TEXT).wait(10)
    assert match.hit_tokens == 100
    lender.tell("clear")
    assert known_kv.fetch(mine.store, TEXT, match) == 0
    assert "load_failed" in mine.kinds()


def test_a_read_after_the_hold_ended_is_proved_or_a_miss(
    lender: Lender, borrower: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes change between the lender's answer and the read, as when it gave up waiting."""
    lender.tell("store", TEXT)
    mine = borrower(lender.url)
    key = mine.keys()[2]
    from lmkv.backends import peer

    real = peer._Link._move

    def late(self: Any, pairs: Any) -> None:
        lender.tell("damage", key)
        real(self, pairs)

    monkeypatch.setattr(peer._Link, "_move", late)
    assert mine.get() == 32
    assert "corrupt" in mine.kinds()


def test_who_goes_gives_back_what_he_held(lender: Lender) -> None:
    lender.tell("store", TEXT)
    sock = socket.create_connection(("127.0.0.1", lender.port))

    def ask(message: Any) -> Any:
        data = json.dumps(message).encode()
        sock.sendall(struct.pack("<I", len(data)) + data)
        (size,) = struct.unpack("<I", sock.recv(4, socket.MSG_WAITALL))
        return json.loads(sock.recv(size, socket.MSG_WAITALL))

    assert "agent" in ask({"lmkv-peer": 1, "layout": LAYOUT.fingerprint.hex(), "token": ""})
    keys = Client("redis://127.0.0.1:1").keys()
    assert ask({"has": keys}) == {"has": "1" * 7}
    held = ask({"hold": keys})["held"]
    assert len([place for place in held if place]) == 7
    assert lender.tell("pins") == 7
    sock.close()
    servers.until(lambda: lender.tell("pins") == 0, 5)


@pytest.mark.parametrize(
    "sent",
    [
        b"", b"\0" * 4, b"\xff" * 100, b"\x02\0\0\0{}", b"\x04\0\0\0null", b"GET / HTTP/1.1\r\n\r\n",
        b"\x0f\0\0\0" + b'{"lmkv-peer":2}',
    ],
)  # fmt: skip
def test_what_strangers_send_costs_their_connection(lender: Lender, borrower: Any, sent: bytes) -> None:
    lender.tell("store", TEXT)
    with socket.create_connection(("127.0.0.1", lender.port)) as sock:
        sock.settimeout(5)
        try:
            sock.sendall(sent)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1000):
                pass
        except OSError as error:  # it may have ended the connection at any moment, but not kept it
            assert not isinstance(error, TimeoutError)  # noqa: PT017
    assert borrower(lender.url).get() == 100


def test_a_peer_lends_in_the_clear(lender: Lender, borrower: Any, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    keys = tmp_path / "keys"
    keys.write_text("a " + "a7" * 32)
    lender.tell("store", TEXT)
    config = lmkv.StoreConfig(
        model="m", ram_capacity=8 << 20, disk_capacity=0, encryption=f"file:{keys}", tiers=({"url": lender.url},)
    )
    with lmkv.Store(config, LAYOUT) as store:
        assert known_kv.fetch(store, TEXT, store.lookup(TEXT).wait(10)) == 100
    with pytest.raises(ConfigError, match="peer"):
        borrower(lender.url, encryption=f"file:{keys}")


def test_another_layout_and_another_token_are_refused(borrower: Any, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a-secret-word\n")
    with Lender(peer_token=f"file:{secret}") as lender:
        lender.tell("store", TEXT)
        mine = borrower(lender.url, options={"token": "another-word"})
        assert mine.get() == 0
        said = [str(event.detail) for event in mine.events if event.kind == "tier_failed"]
        assert "token" in said[0]
        assert "word" not in "".join(said)
        assert borrower(lender.url, options={"token_file": str(secret)}).get() == 100
        other = lmkv.KVLayout.dense(layers=1, heads=1, head_size=4, dtype="float32", chunk_tokens=16)
        settings = BackendSettings("remote", other, url=lender.url, options={"token_file": str(secret)})
        backend = open_backend("nixl", settings)
        assert isinstance(backend, PeerBackend)
        with pytest.raises(BackendUnavailableError, match="layout"):
            backend.contains_many([lmkv.ChunkKey(bytes(16))])
        backend.close()


@pytest.mark.parametrize(
    ("listen", "message"),
    [("0.0.0.0:0", "peer_token"), ("nowhere", "host:port"), ("127.0.0.1:99999", "host:port"), ("192.0.2.1:1", "peer_token")],
)
def test_wrong_addresses_are_refused(listen: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lmkv.Store(lmkv.StoreConfig(ram_capacity=8 << 20, disk_capacity=0, peer_listen=listen), LAYOUT)


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("nixl://host", {}, "such as nixl://host:18300"),
        ("nixl://host:1/path", {}, "such as nixl://host:18300"),
        ("nixl://host:1", {"plugin": "POSIX"}, "expected UCX"),
        ("nixl://host:1", {"tokken": "x"}, "did you mean 'token'"),
    ],
)
def test_wrong_settings_are_refused(url: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_backend("nixl", BackendSettings("remote", LAYOUT, url=url, options=options))


def test_nobody_there_is_a_miss_in_time(borrower: Any) -> None:
    mine = borrower("nixl://127.0.0.1:1")
    begun = time.monotonic()
    assert mine.get() == 0
    assert time.monotonic() - begun < DEADLINE + SLACK
