"""The client against services that are dead, silent, damaged or something else."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import lmkv
from lmkv.adapters.standalone import StoreClient

Make = Callable[..., Any]
Text = Callable[[int], list[int]]


class Listener:
    """A port whose connections are given to ``serve``, one thread each."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._serve = serve
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self._open.append(connection)
            threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        try:
            self._serve(connection)
        except OSError:
            pass
        finally:
            with contextlib.suppress(OSError):  # another thread may wait on it: closing alone would not end the connection
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for connection in self._open:
            connection.close()


@pytest.fixture
def listen() -> Iterator[Callable[[Callable[[socket.socket], None]], Listener]]:
    started: list[Listener] = []

    def start(serve: Callable[[socket.socket], None]) -> Listener:
        started.append(Listener(serve))
        return started[-1]

    yield start
    for listener in started:
        listener.close()


class Meddler:
    """Passes bytes between a client and a service; meddles with the answer whose status line was seen last."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.flip_at = self.cut_at = -1  # bytes of the next large answer

    def __call__(self, client: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as service:
            client.settimeout(20)
            threading.Thread(target=self._up, args=(client, service), daemon=True).start()
            seen = 0
            while data := service.recv(65536):
                if b"application/x-lmkv" in data:
                    seen = 0
                part = bytearray(data)
                if seen <= self.flip_at < seen + len(part):
                    part[self.flip_at - seen] ^= 1
                if 0 <= self.cut_at < seen + len(part):
                    client.sendall(part[: self.cut_at - seen])
                    return
                seen += len(part)
                client.sendall(part)

    @staticmethod
    def _up(client: socket.socket, service: socket.socket) -> None:
        try:
            while data := client.recv(65536):
                service.sendall(data)
            service.shutdown(socket.SHUT_WR)
        except OSError:
            pass


@pytest.mark.parametrize("offset", [0, 20, 300, 700, 1200, 1700])
@pytest.mark.parametrize("kind", ["flip", "cut"])
def test_a_damaged_answer_never_reaches_a_tensor(
    running: Any, listen: Any, text: Text, make_kv: Make, offset: int, kind: str
) -> None:
    tokens = text(24)
    kv = make_kv(tokens)
    meddler = Meddler(running.port)
    with running.client() as direct, StoreClient(listen(meddler).url) as store:
        direct.store(tokens, kv)
        out = np.zeros_like(kv)
        assert store.retrieve(tokens, out) == 24
        assert (out == kv).all()
        at = 180 + offset  # behind the HTTP head
        meddler.flip_at, meddler.cut_at = (at, -1) if kind == "flip" else (-1, at)
        out[:] = 0
        with pytest.raises(lmkv.LMKVError) as caught:
            store.retrieve(tokens, out)
        if kind == "cut":
            assert isinstance(caught.value, lmkv.BackendUnavailableError)
        touched = out.any(axis=(0, 1, 2, 4))
        whole = int(touched.sum())
        assert whole % 8 == 0
        assert whole <= max(0, offset) // 776 * 8
        assert (out[..., :whole, :] == kv[..., :whole, :]).all()
        assert not out[..., whole:, :].any()
        meddler.flip_at = meddler.cut_at = -1
        assert store.retrieve(tokens, out) == 24  # the next request takes a new connection
        assert (out == kv).all()


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with StoreClient(f"http://127.0.0.1:{port}") as store:
        for call in (store.health, store.stats, store.clear, lambda: store.lookup([1]), lambda: store.store([1], None)):
            with pytest.raises(lmkv.BackendUnavailableError, match=r"expected an LMKV service.*Is it running there"):
                call()


def test_a_service_that_died(serve: Any, text: Text, make_kv: Make) -> None:
    service = serve()
    tokens = text(16)
    with service.client() as store:
        assert store.store(tokens, make_kv(tokens)) == 16
        service.process.kill()
        service.process.wait(10)
        with pytest.raises(lmkv.BackendUnavailableError):
            store.lookup(tokens)
        with pytest.raises(lmkv.BackendUnavailableError):
            store.store(text(17), make_kv(text(17)))


def test_a_restarted_service_is_found_again(serve: Any, text: Text, make_kv: Make, tmp_disk: tuple[str, ...]) -> None:
    service = serve(*tmp_disk)
    tokens = text(16)
    with service.client() as store:
        assert store.store(tokens, make_kv(tokens)) == 16
        assert service.stop() == 0
        again = serve(*tmp_disk, f"--port={service.port}")
        assert again.port == service.port
        out = np.zeros_like(make_kv(tokens))
        assert store.retrieve(tokens, out) == 16  # over a connection that broke meanwhile
        assert (out == make_kv(tokens)).all()


def test_silence_is_bounded(listen: Any) -> None:
    listener = listen(lambda connection: time.sleep(5))
    with StoreClient(listener.url, timeout_seconds=0.3) as store:
        begin = time.monotonic()
        with pytest.raises(lmkv.BackendUnavailableError, match=r"no answer within 0\.3 seconds"):
            store.health()
        assert time.monotonic() - begin < 4


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", lmkv.BackendUnavailableError),
        (b"SSH-2.0-OpenSSH_9.2\r\n", lmkv.BackendUnavailableError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", lmkv.BackendError),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 5\r\n\r\nhello", lmkv.BackendError),
        (b"HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\n{}", lmkv.BackendError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{}", lmkv.BackendUnavailableError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", lmkv.BackendError),
    ],
)
def test_something_else_is_there(listen: Any, answer: bytes, error: type[lmkv.LMKVError]) -> None:
    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(answer)

    with StoreClient(listen(serve).url, timeout_seconds=5) as store, pytest.raises(error):
        _ = store.layout


@pytest.mark.parametrize("url", ["127.0.0.1:7711", "ftp://h", "http://", "http://h:99999", "http://h/path", "unix:///x", ""])
def test_wrong_urls(url: str) -> None:
    with pytest.raises(lmkv.ConfigError, match=r"expected a service's URL such as http://127\.0\.0\.1:7711"):
        StoreClient(url)


def test_wrong_arguments(running: Any, text: Text, make_kv: Make) -> None:
    tokens = text(9)
    kv = make_kv(tokens)
    with running.client() as store:
        store.store(tokens, kv)
        match = store.lookup(tokens)
        for call in (
            lambda: store.lookup([]),
            lambda: store.lookup("text"),
            lambda: store.store(tokens, kv, start=10),
            lambda: store.store(tokens, kv, start=-1),
            lambda: store.retrieve(tokens, kv, start=10),
            lambda: store.retrieve(match, kv, salt="x"),
            lambda: store.lookup(tokens, salt=3),
            lambda: store.retrieve(tokens, kv[..., :5, :]),
            lambda: store.flush(-1.0),
        ):
            with pytest.raises(lmkv.ArgumentError):
                call()
        with pytest.raises(lmkv.LayoutMismatchError):
            store.retrieve(tokens, kv.astype(np.float64))
        assert store.retrieve(tokens, kv) == 9
    with pytest.raises(lmkv.StoreClosedError, match="it was closed"):
        store.lookup(tokens)
    store.close()


def test_one_client_in_many_threads(running: Any, text: Text, make_kv: Make) -> None:
    tokens = text(40)
    kv = make_kv(tokens)
    failures: list[BaseException] = []
    with running.client() as store:
        store.store(tokens, kv)

        def work() -> None:
            try:
                for _ in range(10):
                    out = np.zeros_like(kv)
                    assert store.retrieve(tokens, out) == 40
                    assert (out == kv).all()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not failures


def test_an_answer_that_nobody_asked_for_is_not_taken_for_the_next_one() -> None:
    """As of a proxy that says 408 on a connection at rest, or sends an answer twice."""
    sent = threading.Event()

    def answer(status: bytes, text: bytes) -> bytes:
        return b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (status, len(text), text)

    def serve(listening: socket.socket) -> None:
        for unasked in (answer(b"408 Request Timeout", b"{}"), answer(b"200 OK", b'{"status": "stale"}'), b""):
            connection, _ = listening.accept()
            with connection:
                while not connection.recv(65536).endswith(b"\r\n\r\n"):
                    pass
                connection.sendall(answer(b"200 OK", b'{"status": "ok"}'))
                if unasked:
                    assert sent.wait(30)
                    sent.clear()
                    connection.sendall(unasked)
                    with contextlib.suppress(ConnectionError):
                        connection.recv(1)  # until the client ends it

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        with StoreClient(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout_seconds=30) as client:
            for _ in range(2):
                assert client.health()
                (idle,) = client._wire._idle
                sent.set()
                assert select.select([idle.sock], [], [], 30)[0], "the answer that nobody asked for"
            assert client.health()
