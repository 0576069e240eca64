"""A real service: what is stored from one process is found, bit for bit, from another one and after a restart."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmkv
from lmkv.adapters.standalone import StoreClient

Make = Callable[..., Any]
Text = Callable[[int], list[int]]

#: What a client process runs: its KV follows from the text, as in conftest.py, but is computed there.
CLIENT = """
import sys, json, numpy as np
from lmkv.adapters.standalone import StoreClient
url, verb, tokens = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
with StoreClient(url) as store:
    g = store.layout.groups[0]
    rng = np.random.default_rng(tokens[0])
    kv = rng.integers(0, 2**16, (len(tokens), g.layers, g.kv, g.heads, g.head_size), dtype=np.uint16)
    kv = kv.transpose(1, 2, 3, 0, 4)
    if verb == "store":
        print(store.store(tokens, kv))
    else:
        out = np.zeros(kv.shape, np.uint16)
        match = store.lookup(tokens)
        n = store.retrieve(match, out)
        print(n, match.hit_tokens, bool((out[..., :n, :] == kv[..., :n, :]).all()), bool((out[..., n:, :] == 0).all()))
"""


def in_process(url: str, verb: str, tokens: list[int]) -> str:
    command = [sys.executable, "-c", CLIENT, url, verb, json.dumps(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def request(
    port: int, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, Any, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, json.loads(response.read()), response.headers
    finally:
        connection.close()


def test_one_process_stores_and_another_reads(serve: Any, text: Text) -> None:
    service = serve()
    tokens = text(43)
    assert in_process(service.url, "store", tokens) == "43"
    assert in_process(service.url, "read", tokens) == "43 43 True True"
    assert in_process(service.url, "read", [*tokens[:30], 1, 2]) == "30 30 True True"
    assert in_process(service.url, "store", tokens) == "0"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_restart_on_the_same_directory_finds_everything(
    serve: Any, text: Text, tmp_disk: tuple[str, ...], number: int
) -> None:
    texts = [text(43) for _ in range(5)]
    service = serve(*tmp_disk)
    for tokens in texts:
        assert in_process(service.url, "store", tokens) == "43"
    assert service.stop(number) == 0
    assert service.errors() == ""
    service = serve(*tmp_disk)
    for tokens in texts:
        assert in_process(service.url, "read", tokens) == "43 43 True True"
    with service.client() as store:
        assert store.lookup([*texts[0], 1]).tokens_by_tier() == {"ram": 43}
    assert service.stop() == 0


def test_another_model_finds_nothing_in_the_same_directory(serve: Any, text: Text, tmp_disk: tuple[str, ...]) -> None:
    tokens = text(16)
    service = serve(*tmp_disk, "--model-name", "a")
    in_process(service.url, "store", tokens)
    assert service.stop() == 0
    service = serve(*tmp_disk, "--model-name", "b")
    assert in_process(service.url, "read", tokens) == "0 0 True True"


def test_the_banner_says_where_and_what(serve: Any) -> None:
    service = serve("--ram-capacity", "1GiB")
    expected = f"LMKV standalone listening on http://127.0.0.1:{service.port} (layout tokens=8 groups=3x2x2x4:float16, "
    assert service.banner == expected + "ram 1 GiB, disk off)\n"


def test_an_lmcache_configuration_is_served(serve: Any, tmp_path: Path, text: Text) -> None:
    path = tmp_path / "example.yaml"
    path.write_text("chunk_size: 256\nlocal_cpu: true\nmax_local_cpu_size: 5\nremote_url: lm://127.0.0.1:1\n", encoding="utf-8")
    service = serve("--config", str(path), "--device=cpu", "--model_name", "my_model", "--max_local_cpu_size=0.01")
    assert "tokens=256" in service.banner
    assert "ram 10.2 MiB" in service.banner
    tokens = text(300)
    assert in_process(service.url, "store", tokens) == "300"
    assert in_process(service.url, "read", tokens) == "300 300 True True"
    assert service.stop() == 0
    assert "tier_failed in tier remote" in service.errors(), "nobody is there: an event, and misses"


def test_mla_and_groups(serve: Any, text: Text) -> None:
    service = serve("--kv-shape", "5,1,8,1,16", "--use-mla", "--kvcache_shape_spec", "(1,5,8,1,16):bfloat16:5")
    tokens = text(21)
    assert in_process(service.url, "store", tokens) == "21"
    assert in_process(service.url, "read", tokens) == "21 21 True True"
    service = serve("--kvcache-shape-spec", "(2,1,8,2,4):float32:1;(1,2,8,1,6):uint8:2")
    with service.client() as store:
        rng = np.random.default_rng(1)
        layers: list[Any] = [tuple(rng.random((2, 21, 4), dtype=np.float32) for _ in range(2))]
        layers += [rng.integers(0, 256, (1, 21, 6), dtype=np.uint8) for _ in range(2)]
        assert store.store(tokens, lmkv.DenseKV(layers)) == 21
        out: list[Any] = [
            tuple(np.zeros((2, 21, 4), np.float32) for _ in range(2)),
            *[np.zeros((1, 21, 6), np.uint8) for _ in range(2)],
        ]
        assert store.retrieve(tokens, lmkv.DenseKV(out)) == 21
        assert all((a == b).all() for a, b in zip(layers[0], out[0], strict=True))
        assert all((a == b).all() for a, b in zip(layers[1:], out[1:], strict=True))


def test_torch_tensors_and_other_orders(running: Any, text: Text) -> None:
    torch = pytest.importorskip("torch")
    tokens = text(20)
    layers = [tuple(torch.randn(20, 2, 4, dtype=torch.float16) for _ in range(2)) for _ in range(3)]
    with running.client() as store:
        assert store.store(torch.tensor(tokens), lmkv.DenseKV(layers, order="NHD")) == 20
        out = torch.zeros(3, 2, 2, 20, 4, dtype=torch.float16)
        assert store.retrieve(np.array(tokens), out) == 20
    for layer, pair in enumerate(layers):
        for kv, tensor in enumerate(pair):
            assert torch.equal(out[layer, kv], tensor.transpose(0, 1))


def test_any_range_of_a_text(running: Any, text: Text, make_kv: Make) -> None:
    tokens = text(29)
    kv = make_kv(tokens)
    with running.client() as store:
        store.store(tokens, kv)
        for start in range(0, 30, 3):
            for stop in (None, *range(0, 33, 4)):
                out = np.zeros_like(kv)
                end = max(start, 29 if stop is None else min(stop, 29))
                assert store.retrieve(tokens, out, start=start, stop=stop) == end - start
                assert (out[..., start:end, :] == kv[..., start:end, :]).all()
                out[..., start:end, :] = 0
                assert not out.any()


def test_storing_from_a_later_token(running: Any, text: Text, make_kv: Make) -> None:
    tokens = text(30)
    kv = make_kv(tokens)
    with running.client() as store:
        assert store.store(tokens[:8], kv[..., :8, :]) == 8
        tail = lmkv.DenseKV(kv[..., 13:, :], first_token=13)
        assert store.store(tokens, tail, start=13) == 14  # tokens 16 to 30: the chunk that holds token 13 is not whole
        assert store.lookup(tokens).hit_tokens == 8
        assert store.store(tokens, kv) == 8  # the gap
        out = np.zeros_like(kv)
        assert store.retrieve(tokens, out) == 30
        assert (out == kv).all()


def test_a_hit_ends_at_a_token(running: Any, text: Text, make_kv: Make) -> None:
    tokens = text(24)
    kv = make_kv(tokens)
    with running.client() as store:
        store.store(tokens, kv)
        match = store.lookup([*tokens[:13], 7, 7, 7])
        assert (match.hit_tokens, match.total_tokens, match.pending) == (13, 16, False)
        assert [(h.start, h.tokens, h.stored_tokens, h.tier) for h in match.hits] == [(0, 8, 8, "ram"), (8, 5, 8, "ram")]
        out = np.zeros_like(kv)
        assert store.retrieve(match, out) == 13
        assert (out[..., :13, :] == kv[..., :13, :]).all()
        assert not out[..., 13:, :].any()  # the stored chunk's other tokens never leave the service


def test_chunks_elsewhere_are_found(running: Any, text: Text, make_kv: Make) -> None:
    tokens, lead = text(24), text(3)
    with running.client() as store:
        store.store(tokens, make_kv(tokens))
        match = store.lookup([*lead, *tokens], anywhere=True)
        assert match.hit_tokens == 0
        assert [(h.start, h.tokens, h.position, h.tier) for h in match.elsewhere][:1] == [(3, 8, 0, "ram")]
        assert store.lookup([*lead, *tokens]).elsewhere == ()


def test_scopes_do_not_see_each_other(running: Any, text: Text, make_kv: Make) -> None:
    tokens = text(16)
    first, second = make_kv(tokens), make_kv([t ^ 1 for t in tokens])
    with running.client() as store:
        assert store.store(tokens, first, salt="a") == 16
        assert store.lookup(tokens).hit_tokens == store.lookup(tokens, salt="b").hit_tokens == 0
        assert store.store(tokens, second, salt="b", lora="l@1", extra="image") == 16
        for kv, scope in ((first, {"salt": "a"}), (second, {"salt": "b", "lora": "l@1", "extra": "image"})):
            out = np.zeros_like(kv)
            assert store.retrieve(store.lookup(tokens, **scope), out) == store.retrieve(tokens, out, **scope) == 16
            assert (out == kv).all()
        assert store.retrieve(tokens, np.zeros_like(first), salt="b") == 0


def test_a_text_larger_than_ram_keeps_its_beginning(serve: Any, text: Text, make_kv: Make) -> None:
    service = serve("--ram-capacity", "64KiB")
    tokens = text(400)
    kv = make_kv(tokens)
    with service.client() as store:
        stored = store.store(tokens, kv)
        assert 0 < stored < 400
        assert store.lookup(tokens).hit_tokens == stored
        out = np.zeros_like(kv)
        assert store.retrieve(tokens, out) == stored
        assert (out[..., :stored, :] == kv[..., :stored, :]).all()


@pytest.mark.parametrize("room", ["all fits", "little RAM", "little RAM and a disk"])
def test_many_clients_at_once(serve: Any, make_kv: Make, tmp_disk: tuple[str, ...], room: str) -> None:
    ram = "8MiB" if room == "all fits" else "256KiB"
    service = serve("--ram-capacity", ram, *(tmp_disk if "disk" in room else ()))
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            rng = np.random.default_rng(number % 4)  # four texts, each by several clients at once
            with service.client() as store:
                for _ in range(6):
                    tokens = rng.integers(0, 2**32, 40, dtype=np.uint64).tolist()
                    kv = make_kv(tokens)
                    store.store(tokens, kv)
                    out = np.zeros_like(kv)
                    n = store.retrieve(tokens, out)
                    assert (out[..., :n, :] == kv[..., :n, :]).all()
                    assert not out[..., n:, :].any()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)
    with service.client() as store:
        counts = store.stats()["store"]
        assert (counts["leases"], counts["reservations"]) == (0, 0)


def test_more_clients_than_places_wait_their_turn(serve: Any, text: Text, make_kv: Make) -> None:
    service = serve("--max-requests", "1")
    tokens = text(32)
    kv = make_kv(tokens)
    with service.client() as store:
        store.store(tokens, kv)
        done: list[int] = []
        threads = [threading.Thread(target=lambda: done.append(store.retrieve(tokens, np.zeros_like(kv)))) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert done == [32] * 6


def test_statistics_flush_and_clear(serve: Any, text: Text, make_kv: Make, tmp_disk: tuple[str, ...]) -> None:
    service = serve(*tmp_disk)
    tokens = text(40)
    with service.client() as store:
        assert store.health() is True
        store.store(tokens, make_kv(tokens))
        assert store.flush(20.0) is True
        stats = store.stats()
        assert [(t["name"], t["chunks"]) for t in stats["store"]["tiers"]] == [("ram", 5), ("disk", 5)]
        assert stats["store"]["stored_tokens"] == stats["service"]["stored_tokens"] == 40
        store.clear()
        assert store.lookup(tokens).hit_tokens == 0
        assert store.store(tokens, make_kv(tokens)) == 40


def test_plain_json_is_enough_for_questions(running: Any, text: Text, make_kv: Make) -> None:
    tokens = text(20)
    with running.client() as store:
        store.store(tokens, make_kv(tokens), salt="j")
        layout = store.layout
    status, answer, headers = request(running.port, "POST", "/v1/lookup", json.dumps({"tokens": tokens, "salt": "j"}).encode())
    assert (status, headers["Content-Type"].split(";")[0]) == (200, "application/json")
    assert (answer["hit_tokens"], answer["total_tokens"], answer["tokens_by_tier"]) == (20, 20, {"ram": 20})
    assert [hit["start"] for hit in answer["hits"]] == [0, 8, 16]
    status, answer, _ = request(running.port, "GET", "/v1/layout")
    assert lmkv.KVLayout.from_dict(answer["layout"]) == layout
    assert answer["fingerprint"] == layout.fingerprint.hex()
    assert answer["namespace"]["model"] == "standalone_model"
    assert "salt" not in answer["namespace"]
    assert request(running.port, "GET", "/v1/health")[:2] == (200, {"status": "ok"})


def test_the_service_imports_no_torch_and_the_client_no_aiohttp(running: Any) -> None:
    code = "import sys, lmkv.adapters.standalone.client; print('aiohttp' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "False"]
    maps = Path(f"/proc/{running.process.pid}/maps")
    if maps.exists():
        assert "libtorch" not in maps.read_text(encoding="utf-8")


def test_a_client_may_expect_a_layout(running: Any, layout: lmkv.KVLayout) -> None:
    with StoreClient(running.url, layout=layout) as store:
        assert store.layout == layout
    other = lmkv.KVLayout.dense(layers=3, heads=2, head_size=4, dtype="float16", chunk_tokens=16)
    with StoreClient(running.url, layout=other) as store, pytest.raises(lmkv.LayoutMismatchError, match="the service has"):
        store.store([1], np.zeros((3, 2, 2, 1, 4), np.float16))


def test_two_services_can_not_share_a_port(running: Any) -> None:
    command = [sys.executable, "-m", "lmkv.standalone", "--port", str(running.port), "--disk-capacity", "0"]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LMKV_", "LMCACHE_"))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)
    assert done.returncode == 1
    assert f"expected to listen on 127.0.0.1 port {running.port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_record_on_disk_is_a_miss_and_is_told(
    serve: Any, text: Text, make_kv: Make, tmp_path: Path, tmp_disk: tuple[str, ...]
) -> None:
    service = serve(*tmp_disk)
    tokens = text(24)
    kv = make_kv(tokens)
    with service.client() as store:
        store.store(tokens, kv)
    assert service.stop() == 0
    inside = np.ascontiguousarray(kv[..., 8:16, :]).tobytes()[200:260]  # of the second chunk
    for path in (tmp_path / "disk").rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        at = data.find(inside)
        while at >= 0:
            data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
            path.write_bytes(data)
            at = data.find(inside)
    service = serve(*tmp_disk)
    with service.client() as store:
        out = np.zeros_like(kv)
        assert store.lookup(tokens).hit_tokens == 24  # nothing was read yet
        assert store.retrieve(tokens, out) == 8
        assert (out[..., :8, :] == kv[..., :8, :]).all()
        assert not out[..., 8:, :].any()
        assert store.stats()["events"]["corrupt"] == 1
        assert store.store(tokens, kv) == 8  # what is missing comes again
        assert store.retrieve(tokens, out) == 24
        assert (out == kv).all()
    assert service.stop() == 0
    assert "corrupt in tier disk" in service.errors()


def test_a_tier_that_answers_late_is_waited_for(serve: Any, text: Text, make_kv: Make) -> None:
    service = serve("--ram-capacity", "96KiB", "--tiers", "[{backend: memory, capacity: 8MiB}]")
    first, second = text(64), text(64)
    with service.client() as store:
        assert store.store(first, make_kv(first)) == 64
        assert store.flush(20.0)
        assert store.store(second, make_kv(second)) > 0  # takes the first one's slots
        assert store.flush(20.0)
        out = np.zeros_like(make_kv(first))
        assert store.retrieve(first, out) == 64
        assert (out == make_kv(first)).all()
        tiers = {t["name"]: t for t in store.stats()["store"]["tiers"]}
        assert tiers["memory"]["read_chunks"] > 0
