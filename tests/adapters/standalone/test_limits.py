"""What a service refuses, survives and cuts off."""

from __future__ import annotations

import json
import signal
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

import lmkv
from lmkv.adapters.standalone import StoreClient, frames

Make = Callable[..., Any]
Text = Callable[[int], list[int]]

JSON = {"Content-Type": "application/json"}
FRAME = {"Content-Type": frames.CONTENT_TYPE}


class Raw:
    """A plain socket that speaks HTTP to a service."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)

    def head(self, method: str, path: str, length: int | None, headers: dict[str, str]) -> None:
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines += [] if length is None else [f"Content-Length: {length}"]
        self.socket.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self) -> tuple[int, dict[str, Any]]:
        """Status and JSON of an answer that ends the connection or has a length."""
        data = b""
        while b"\r\n\r\n" not in data:
            part = self.socket.recv(65536)
            if not part:
                raise ConnectionResetError("no answer")
            data += part
        head, _, body = data.partition(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
        while len(body) < length:
            body += self.socket.recv(65536)
        return int(head.split()[1]), json.loads(body)

    def close(self) -> None:
        self.socket.close()


def ask(
    port: int, path: str, body: bytes, headers: dict[str, str], method: str = "POST", length: int | None = None
) -> tuple[int, str, str]:
    """Status, error type and message of a request that is refused."""
    raw = Raw(port)
    try:
        raw.head(method, path, len(body) if length is None else length, headers)
        raw.send(body)
        status, answer = raw.answer()
        return status, answer["error"]["type"], answer["error"]["message"]
    finally:
        raw.close()


def store_frame(layout: lmkv.KVLayout, tokens: list[int], kv: Any, **changes: Any) -> bytes:
    """A whole store body; written here by the documentation, not by the client."""
    values = {"start": 0, "stop": len(tokens), "total": len(tokens), "fingerprint": layout.fingerprint, "scope": b"", **changes}
    head = struct.pack(
        "<4sHH16sQQQII",
        b"LMKV",
        1,
        1,
        values["fingerprint"],
        values["total"],
        values["start"],
        values["stop"],
        len(values["scope"]),
        0,
    )
    head += values["scope"] + np.array(tokens, "<u4").tobytes()
    head += struct.pack("<Q", xxhash.xxh3_64_intdigest(head))
    body = [head]
    width = layout.chunk_tokens
    begin = values["start"]
    while begin < values["stop"]:
        end = min(begin // width * width + width, values["stop"])
        payload = np.ascontiguousarray(kv[..., begin:end, :]).tobytes()
        body += [payload, struct.pack("<Q", xxhash.xxh3_64_intdigest(payload, seed=begin))]
        begin = end
    return b"".join(body)


def holds(service: Any) -> int:
    """Reservations and leases that are open."""
    with service.client() as store:
        counts = store.stats()["store"]
        return int(counts["reservations"] + counts["leases"])


def others_running(service: Any) -> int:
    """Requests that a service is working on, besides the question."""
    with service.client() as store:
        return int(store.stats()["service"]["running"]) - 1


def comes(wanted: Callable[[], bool]) -> bool:
    """Whether something comes true within ten seconds."""
    deadline = time.monotonic() + 10
    while not wanted():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def read_back(service: Any, tokens: list[int], kv: Any) -> int:
    """How many tokens a service holds; their bytes are right, the others untouched."""
    with service.client() as store:
        out = np.zeros_like(kv)
        n = int(store.retrieve(tokens, out))
        assert (out[..., :n, :] == kv[..., :n, :]).all()
        assert not out[..., n:, :].any()
        return n


# -- tokens and origins --------------------------------------------------------------------------------------------------


def test_a_token_is_wanted(serve: Any, text: Text, make_kv: Make) -> None:
    service = serve(env={"LMKV_TOKEN": "secret"})
    tokens = text(16)
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}, {"Authorization": "Bearer"}):
        for method, path in (("GET", "/v1/stats"), ("GET", "/v1/layout"), ("POST", "/v1/clear"), ("GET", "/v1/nothing")):
            assert ask(service.port, path, b"", headers, method)[:2] == (401, "Unauthorized")
    for wrong in (None, "wrong", "secret2"):
        with service.client(wrong) as store, pytest.raises(lmkv.ConfigError, match="Bearer TOKEN"):
            store.store(tokens, make_kv(tokens))
    with service.client() as store:
        assert store.health() is True
    with service.client("secret") as store:
        assert store.store(tokens, make_kv(tokens)) == 16
    assert "secret" not in service.banner


def test_a_token_file_is_read(serve: Any, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("from-file\n", encoding="utf-8")
    path.chmod(0o600)
    service = serve("--token-file", str(path), "--host", "0.0.0.0")
    with StoreClient(f"http://127.0.0.1:{service.port}", "from-file") as store:
        assert store.stats()["service"]["requests"] == 1


def test_browser_pages_are_kept_out(running: Any) -> None:
    status, kind, message = ask(running.port, "/v1/clear", b"{}", {"Origin": "http://evil.example", **JSON})
    assert (status, kind) == (403, "Forbidden")
    assert "Origin" in message
    raw = Raw(running.port)
    raw.send(b"GET /v1/stats HTTP/1.1\r\nHost: evil.example:7711\r\n\r\n")  # a name that was made to lead here
    assert raw.answer()[0] == 403
    raw.close()


# -- requests that are not right -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "kind"),
    [
        ("/v1/lookup", b"", JSON, 400, "ArgumentError"),
        ("/v1/lookup", b"{", JSON, 400, "ArgumentError"),
        ("/v1/lookup", b"[" * 100000, JSON, 400, "ArgumentError"),
        ("/v1/lookup", b"\xff\xfe", JSON, 400, "ArgumentError"),
        ("/v1/lookup", b"[1]", JSON, 400, "ArgumentError"),
        ("/v1/lookup", b'{"tokens": []}', JSON, 400, "ArgumentError"),
        ("/v1/lookup", b'{"tokens": "abc"}', JSON, 400, "ArgumentError"),
        ("/v1/lookup", b'{"tokens": [1.5]}', JSON, 400, "ArgumentError"),
        ("/v1/lookup", b'{"tokens": [-1]}', JSON, 400, "ArgumentError"),
        ("/v1/lookup", b'{"tokens": [4294967296]}', JSON, 400, "ArgumentError"),
        ("/v1/lookup", b'{"tokens": [1], "slat": "x"}', JSON, 400, "ArgumentError"),
        ("/v1/lookup", b'{"tokens": [1], "salt": 3}', JSON, 400, "ArgumentError"),
        ("/v1/lookup", b'{"tokens": [1], "anywhere": 1}', JSON, 400, "ArgumentError"),
        ("/v1/lookup", b'{"tokens": [1], "wait_seconds": 1e9}', JSON, 400, "ArgumentError"),
        ("/v1/retrieve", b'{"tokens": [1], "start": 2}', JSON, 400, "ArgumentError"),
        ("/v1/retrieve", b'{"tokens": [1], "stop": -1}', JSON, 400, "ArgumentError"),
        ("/v1/flush", b'{"timeout_seconds": -1}', JSON, 400, "ArgumentError"),
        ("/v1/clear", b'{"tier": "ram"}', JSON, 400, "ArgumentError"),
        ("/v1/store", b"{}", JSON, 415, "UnsupportedMediaType"),
        ("/v1/store", b"", FRAME, 400, "ArgumentError"),
        ("/v1/store", b"garbage" * 40, FRAME, 400, "ArgumentError"),
        ("/v1/retrieve", b"garbage" * 40, FRAME, 400, "ArgumentError"),
        ("/v1/lookup", b"x", {**JSON, "Content-Encoding": "gzip"}, 415, "UnsupportedMediaType"),
        ("/v1/nothing", b"", {}, 404, "NotFound"),
        ("/v2/lookup", b"", {}, 404, "NotFound"),
        ("/v1/health", b"", {}, 405, "MethodNotAllowed"),
    ],
)
def test_wrong_requests_get_json_errors(
    running: Any, path: str, body: bytes, headers: dict[str, str], status: int, kind: str
) -> None:
    got = ask(running.port, path, body, headers)
    assert got[:2] == (status, kind)
    assert got[2]
    assert holds(running) == 0


def test_another_layout_is_refused_on_both_sides(running: Any, text: Text, layout: lmkv.KVLayout, make_kv: Make) -> None:
    tokens = text(16)
    frame = store_frame(layout, tokens, make_kv(tokens), fingerprint=bytes(16))
    status, kind, message = ask(running.port, "/v1/store", frame, FRAME)
    assert (status, kind) == (409, "LayoutMismatchError")
    assert layout.fingerprint.hex() in message
    with running.client() as store:
        for wrong in (np.zeros((3, 2, 2, 16, 5), np.float16), np.zeros((3, 2, 2, 16, 4), np.float32)):
            with pytest.raises(lmkv.LayoutMismatchError):
                store.store(tokens, wrong)
        with pytest.raises(lmkv.ArgumentError):
            store.store(tokens, np.zeros((3, 2, 2, 15, 4), np.float16))
        assert store.lookup(tokens).hit_tokens == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": 3}, "start at a multiple of 8"),
        ({"stop": 8}, "stop at the text's end"),
        ({"total": 17}, "expected"),
        ({"scope": b'{"model":"x"}'}, "expected scope keys"),
    ],
)
def test_store_frames_that_contradict_themselves(
    running: Any, text: Text, layout: lmkv.KVLayout, make_kv: Make, changes: dict[str, Any], message: str
) -> None:
    tokens = text(16)
    status, _, said = ask(running.port, "/v1/store", store_frame(layout, tokens, make_kv(tokens), **changes), FRAME)
    assert status == 400
    assert message in said
    assert read_back(running, tokens, make_kv(tokens)) == 0


def test_a_body_longer_than_its_frame_is_refused_at_once(
    running: Any, text: Text, layout: lmkv.KVLayout, make_kv: Make
) -> None:
    tokens = text(16)
    frame = store_frame(layout, tokens, make_kv(tokens))
    status, _, message = ask(running.port, "/v1/store", frame + b"x", FRAME)
    assert (status, f"{len(frame)} bytes for this head; got {len(frame) + 1}" in message) == (400, True)
    assert read_back(running, tokens, make_kv(tokens)) == 0


def test_the_documented_frame_is_taken_in_one_go_and_in_chunks(
    running: Any, text: Text, layout: lmkv.KVLayout, make_kv: Make
) -> None:
    tokens = text(30)
    frame = store_frame(layout, tokens, make_kv(tokens))
    raw = Raw(running.port)
    raw.head("POST", "/v1/store", len(frame), FRAME)
    raw.send(frame)
    assert raw.answer() == (200, {"tokens": 30, "stored_tokens": 30})
    tokens = text(29)[::-1]
    frame = store_frame(layout, tokens, make_kv(tokens))
    raw.head("POST", "/v1/store", None, {**FRAME, "Transfer-Encoding": "chunked"})
    for begin in range(0, len(frame), 37):
        part = frame[begin : begin + 37]
        raw.send(b"%x\r\n%s\r\n" % (len(part), part))
    raw.send(b"0\r\n\r\n")
    assert raw.answer() == (200, {"tokens": 29, "stored_tokens": 29})
    raw.close()
    assert read_back(running, tokens, make_kv(tokens)) == 29


# -- bodies that break off or are damaged --------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [10, 60, 120, 128, 200, 900, 904, 905, 1672, 1675, 2000])
def test_a_half_sent_body_stores_whole_chunks_only(
    running: Any, text: Text, layout: lmkv.KVLayout, make_kv: Make, cut: int
) -> None:
    tokens = text(24)
    kv = make_kv(tokens)
    frame = store_frame(layout, tokens, kv)
    head = len(frame) - 3 * (768 + 8)
    assert cut < len(frame)
    raw = Raw(running.port)
    raw.head("POST", "/v1/store", len(frame), FRAME)
    raw.send(frame[:cut])
    assert comes(lambda: (holds(running) if cut >= head else others_running(running)) == 1)
    time.sleep(0.05)  # for what is still on its way on this machine
    raw.close()
    assert comes(lambda: others_running(running) == 0)
    assert holds(running) == 0
    whole = max(0, cut - head) // (768 + 8) * 8
    assert read_back(running, tokens, kv) == whole
    with running.client() as store:
        assert store.store(tokens, kv) == 24 - whole
    assert read_back(running, tokens, kv) == 24


@pytest.mark.parametrize("at", [160, 900, 907, 930, 1680, 2400])
def test_a_damaged_piece_is_refused_and_what_came_before_it_is_kept(
    running: Any, text: Text, layout: lmkv.KVLayout, make_kv: Make, at: int
) -> None:
    tokens = text(24)
    kv = make_kv(tokens)
    frame = bytearray(store_frame(layout, tokens, kv))
    head = len(frame) - 3 * (768 + 8)
    frame[at] ^= 4
    status, kind, message = ask(running.port, "/v1/store", bytes(frame), FRAME)
    assert (status, kind) == (400, "CorruptRecordError")
    assert "checksum" in message
    assert read_back(running, tokens, kv) == (at - head) // (768 + 8) * 8
    assert holds(running) == 0


def test_a_damaged_head_stores_nothing(running: Any, text: Text, layout: lmkv.KVLayout, make_kv: Make) -> None:
    tokens = text(24)
    frame = bytearray(store_frame(layout, tokens, make_kv(tokens)))
    frame[60] ^= 1  # a token
    assert ask(running.port, "/v1/store", bytes(frame), FRAME)[:2] == (400, "CorruptRecordError")
    assert read_back(running, tokens, make_kv(tokens)) == 0


def test_pieces_in_the_wrong_order_are_refused(running: Any, text: Text, layout: lmkv.KVLayout, make_kv: Make) -> None:
    tokens = text(24)
    frame = store_frame(layout, tokens, make_kv(tokens))
    head = len(frame) - 3 * (768 + 8)
    a, b, c = (frame[head + i * 776 : head + (i + 1) * 776] for i in range(3))
    assert ask(running.port, "/v1/store", frame[:head] + b + a + c, FRAME)[:2] == (400, "CorruptRecordError")
    assert read_back(running, tokens, make_kv(tokens)) == 0


def test_clients_that_hang_up_leave_no_trace(serve: Any, text: Text, layout: lmkv.KVLayout, make_kv: Make) -> None:
    service = serve()
    tokens = text(24)
    frame = store_frame(layout, tokens, make_kv(tokens))
    for cut in (0, 30, 100, 500, 1000, 2000):
        raw = Raw(service.port)
        raw.head("POST", "/v1/store", len(frame), FRAME)
        raw.send(frame[:cut])
        assert comes(lambda: others_running(service) == 1)
        raw.close()
        assert comes(lambda: others_running(service) == 0)
    assert service.stop() == 0
    assert service.errors() == ""


# -- sizes and times -----------------------------------------------------------------------------------------------------


def test_large_bodies_are_refused(serve: Any, text: Text, layout: lmkv.KVLayout, make_kv: Make) -> None:
    service = serve("--max-body", "2000")
    small, large = text(8), text(40)
    with service.client() as store:
        assert store.store(small, make_kv(small)) == 8
        with pytest.raises(lmkv.CapacityError, match="expected a body of at most 2000 bytes"):
            store.store(large, make_kv(large))
        assert store.lookup(large).hit_tokens == 0
    frame = store_frame(layout, large, make_kv(large))
    assert ask(service.port, "/v1/store", b"", FRAME, length=len(frame))[:2] == (413, "BodyTooLarge")
    raw = Raw(service.port)
    raw.head("POST", "/v1/store", None, {**FRAME, "Transfer-Encoding": "chunked"})
    raw.send(b"%x\r\n%s\r\n" % (300, frame[:300]))
    status, answer = raw.answer()  # the head alone tells that the body will be too large
    assert (status, answer["error"]["type"]) == (413, "BodyTooLarge")
    raw.close()
    raw = Raw(service.port)
    raw.head("POST", "/v1/lookup", None, {**JSON, "Transfer-Encoding": "chunked"})
    raw.send(b"%x\r\n%s\r\n0\r\n\r\n" % (3000, b" " * 3000))
    assert raw.answer()[0] == 413
    raw.close()


def test_slow_clients_are_cut_off(serve: Any, text: Text, layout: lmkv.KVLayout, make_kv: Make) -> None:
    service = serve("--patience-seconds", "0.4", "--max-requests", "1")
    tokens = text(24)
    frame = store_frame(layout, tokens, make_kv(tokens))
    stalled, dripping, silent = Raw(service.port), Raw(service.port), Raw(service.port)
    stalled.head("POST", "/v1/store", len(frame), FRAME)
    stalled.send(frame[:1000])
    status, answer = stalled.answer()
    assert (status, answer["error"]["type"]) == (408, "Timeout")
    dripping.head("POST", "/v1/store", len(frame), FRAME)
    assert hung_up(lambda i: dripping.send(frame[i : i + 1]))
    silent.send(b"POST /v1/st")
    assert silent.socket.recv(100) == b""
    for raw in (stalled, dripping, silent):
        raw.close()
    with service.client() as store:  # the only place is free again, and the one chunk that came whole is there
        assert store.store(tokens, make_kv(tokens)) == 16


def hung_up(send: Callable[[int], None]) -> bool:
    """Whether the other side hangs up while something small is sent again and again."""
    for i in range(200):
        try:
            send(i)
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_client_that_takes_nothing_is_cut_off(serve: Any, text: Text) -> None:
    spec = ("--kvcache-shape-spec", "(2,8,256,4,64):float32:8", "--ram-capacity", "96MiB")
    service = serve("--patience-seconds", "0.4", *spec)
    tokens = text(2048)
    kv = np.random.default_rng(0).random((8, 2, 4, 2048, 64), dtype=np.float32)
    with service.client() as store:
        assert store.store(tokens, kv) == 2048
    raw = Raw(service.port)
    body = json.dumps({"tokens": tokens}).encode()
    raw.head("POST", "/v1/retrieve", len(body), JSON)
    raw.send(body)
    assert comes(lambda: holds(service) == 1)
    assert comes(lambda: holds(service) == 0)  # its lease is given up
    received = 0
    try:
        while part := raw.socket.recv(1 << 20):
            received += len(part)
    except ConnectionResetError:
        pass
    raw.close()
    assert 0 < received < kv.nbytes
    assert read_back(service, tokens, kv) == 2048
    assert service.stop() == 0
    assert service.errors() == ""


# -- the end -------------------------------------------------------------------------------------------------------------


def test_sigterm_in_the_middle_of_a_store_loses_nothing_committed(
    serve: Any, text: Text, layout: lmkv.KVLayout, make_kv: Make, tmp_disk: tuple[str, ...]
) -> None:
    service = serve(*tmp_disk, "--grace-seconds", "0.3")
    before, during = text(40), text(40)
    with service.client() as store:
        assert store.store(before, make_kv(before)) == 40
    frame = store_frame(layout, during, make_kv(during))
    raw = Raw(service.port)
    raw.head("POST", "/v1/store", len(frame), FRAME)
    raw.send(frame[: len(frame) // 2])
    assert comes(lambda: holds(service) == 1)
    assert service.stop() == 0
    with pytest.raises(ConnectionError):
        raw.answer()
    raw.close()
    assert service.errors() == ""
    service = serve(*tmp_disk)
    assert read_back(service, before, make_kv(before)) == 40
    assert read_back(service, during, make_kv(during)) in range(0, 24, 8)


def test_a_store_that_ends_within_the_grace_time_is_kept(
    serve: Any, text: Text, layout: lmkv.KVLayout, make_kv: Make, tmp_disk: tuple[str, ...]
) -> None:
    service = serve(*tmp_disk, "--grace-seconds", "20")
    tokens = text(40)
    frame = store_frame(layout, tokens, make_kv(tokens))
    raw = Raw(service.port)
    raw.head("POST", "/v1/store", len(frame), FRAME)
    raw.send(frame[: len(frame) // 2])
    assert comes(lambda: holds(service) == 1)
    service.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    with service.client() as store, pytest.raises((lmkv.BackendUnavailableError, lmkv.StoreClosedError)):
        store.health()
    raw.send(frame[len(frame) // 2 :])
    assert raw.answer() == (200, {"tokens": 40, "stored_tokens": 40})
    raw.close()
    assert service.process.wait(20) == 0
    service = serve(*tmp_disk)
    assert read_back(service, tokens, make_kv(tokens)) == 40


def test_a_second_signal_ends_the_grace_time(
    serve: Any, text: Text, layout: lmkv.KVLayout, make_kv: Make, tmp_disk: tuple[str, ...]
) -> None:
    service = serve(*tmp_disk, "--grace-seconds", "600")
    before, during = text(16), text(40)
    with service.client() as store:
        store.store(before, make_kv(before))
    raw = Raw(service.port)
    frame = store_frame(layout, during, make_kv(during))
    raw.head("POST", "/v1/store", len(frame), FRAME)
    raw.send(frame[:100])
    assert comes(lambda: others_running(service) == 1)
    service.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert service.process.poll() is None
    assert service.stop() == 0
    raw.close()
    service = serve(*tmp_disk)
    assert read_back(service, before, make_kv(before)) == 16


def test_idle_connections_do_not_hold_up_the_end(serve: Any) -> None:
    service = serve("--grace-seconds", "600")
    idle = [Raw(service.port) for _ in range(5)]
    with service.client() as store:
        store.health()
        begin = time.monotonic()
        assert service.stop() == 0
        assert time.monotonic() - begin < 20  # far below the grace time
    for raw in idle:
        raw.close()


def test_what_is_no_http_is_told_in_a_line(serve: Make) -> None:
    service = serve()
    for request in (
        b"POST /v1/lookup HTTP/1.1\r\nHost: a\r\nContent-Length: many\r\n\r\n",
        b"GET /v1/health HTTP/1.1\r\nHost: a\r\nBroken header\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    ):
        raw = Raw(service.port)
        raw.send(request)
        assert raw.socket.recv(65536).startswith(b"HTTP/1.0 400 ")
        raw.close()
    status, answer = ask_health(service.port)
    assert (status, answer) == (200, {"status": "ok"})
    assert service.stop() == 0
    told = service.errors().splitlines()
    assert [line.split("; got ")[0] for line in told] == ["lmkv.standalone: refused a request: expected HTTP"], told


def ask_health(port: int) -> tuple[int, dict[str, Any]]:
    """Status and answer."""
    raw = Raw(port)
    try:
        raw.head("GET", "/v1/health", None, {})
        return raw.answer()
    finally:
        raw.close()
