"""``--enable-lmcache`` of SGLang 0.5.17 from begin to end on the CPU: a server, a flush, and an engine that starts anew."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_model

PROMPT = [(7 * i) % 200 + 3 for i in range(100)]
#: What a CPU without SGLang's own kernels needs.
ARGUMENTS = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_overlap_schedule": True,
    "disable_cuda_graph": True,
    "skip_tokenizer_init": True,
    "max_total_tokens": 2048,
    "mem_fraction_static": 0.1,
}
SAMPLING = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
_START_SECONDS = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lmkv")
    file = folder / "lmkv.yaml"
    file.write_text(f"chunk_size: 16\nram_capacity: 64MiB\ndisk_capacity: 256MiB\ndisk_path: {folder / 'disk'}\n")
    return file


def environment() -> dict[str, str]:
    return {**os.environ, "LMKV_SGLANG": "1", "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@contextmanager
def server(model: Path, config: Path, log: Path) -> Iterator[str]:
    """A server's address, once it answers; it is stopped at the end, as an operator would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in ARGUMENTS.items()]
    command = [
        *(sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--host", "127.0.0.1", "--port", str(port)),
        *("--enable-lmcache", "--lmcache-config-file", str(config), "--enable-cache-report", *flags),
    ]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment(), start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + _START_SECONDS
        while not answers(f"{address}/health"):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < until, log.read_text()[-4000:]
            time.sleep(0.5)
        yield address
    finally:
        with suppress(ProcessLookupError):  # it failed to start
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=20) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def post(url: str, body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        data = reply.read()
    return json.loads(data) if data.startswith((b"{", b"[")) else data


def ask(address: str, prompt: list[int], **more: Any) -> tuple[list[int], dict[str, int]]:
    answer = post(f"{address}/generate", {"input_ids": prompt, "sampling_params": SAMPLING, **more})
    return answer["output_ids"], answer["meta_info"]["cached_tokens_details"] or {"device": 0, "host": 0}


def flush(address: str) -> None:
    """Empty the device's cache; SGLang refuses while it still clears up behind a request."""
    for _ in range(50):
        try:
            post(f"{address}/flush_cache", {})
            return
        except urllib.error.HTTPError:
            time.sleep(0.2)
    raise AssertionError("the server did not flush its cache")


def test_a_server_that_flushes_and_an_engine_that_restarts(model: Path, config: Path, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with server(model, config, log) as address:
        computed, first = ask(address, PROMPT)
        again, second = ask(address, PROMPT)
        flush(address)
        loaded, third = ask(address, PROMPT)
        partly, fourth = ask(address, PROMPT[:60] + [5] * 40)
        flush(address)
        longer, fifth = ask(address, PROMPT + computed)
        flush(address)
        _, other_tenant = ask(address, PROMPT, extra_key="tenant")
    assert (first, second) == ({"device": 0, "host": 0}, {"device": 99, "host": 0})
    assert third == {"device": 0, "host": 99}
    assert fourth == {"device": 60, "host": 0}
    assert fifth == {"device": 0, "host": 107}  # the last generated token's KV was never computed
    assert other_tenant == {"device": 0, "host": 0}
    assert computed == again == loaded
    said = log.read_text()
    assert "LMKV: active (--enable-lmcache" in said
    assert "impl=LMKVRadixCache" in said

    script = (
        "import json, sys, sglang\n"
        "if __name__ == '__main__':\n"
        "    given = json.loads(sys.argv[1])\n"
        "    engine = sglang.Engine(**given['arguments'])\n"
        "    answers = [engine.generate(input_ids=p, sampling_params=given['sampling']) for p in given['prompts']]\n"
        "    print('ANSWERS', json.dumps([[a['output_ids'], a['meta_info']['cached_tokens_details']] for a in answers]))\n"
        "    engine.shutdown()\n"
    )
    (tmp_path / "engine.py").write_text(script)
    arguments = {**ARGUMENTS, "model_path": str(model), "enable_lmcache": True, "lmcache_config_file": str(config)}
    prompts = [PROMPT[:50], PROMPT, PROMPT[:60] + [5] * 40, PROMPT + computed]
    given = json.dumps({"arguments": arguments, "sampling": SAMPLING, "prompts": prompts})
    done = subprocess.run(
        [sys.executable, str(tmp_path / "engine.py"), given],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=_START_SECONDS,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert lines, done.stderr[-4000:]
    answered = json.loads(lines[0].removeprefix("ANSWERS "))
    assert [answer for answer, _ in answered[1:]] == [computed, partly, longer]
    assert answered[0][1] == {"device": 0, "host": 49}  # from disk
    assert answered[1][1] == {"device": 50, "host": 49}  # the tree's and LMKV's add up
