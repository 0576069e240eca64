"""``--enable-lmcache`` of SGLang 0.5.17 from begin to end on the CPU: a server, engines that start anew, two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sglang_server import CPU, serving

TEXT = [(7 * i) % 500 + 3 for i in range(300)]
OTHER = [(11 * i) % 500 + 5 for i in range(100)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lmkv")
    file = folder / "lmkv.yaml"
    file.write_text(f"chunk_size: 32\nram_capacity: 64MiB\ndisk_capacity: 256MiB\ndisk_path: {folder / 'disk'}\n")
    return file


def where(device: int, host: int) -> dict[str, Any]:
    """Where cached tokens came from; with tiers behind RAM SGLang takes LMKV for a storage, and has no name for it."""
    return {"device": device, "host": host, "storage": 0, "storage_backend": "none"}


def engine(settings: dict[str, Any], texts: list[list[int]], **environ: str) -> tuple[list[dict[str, Any]], str]:
    """What an engine of its own says to the steps of ``sglang_engine.py``, and its log."""
    script = Path(__file__).parents[2] / "support" / "sglang_engine.py"
    told = subprocess.run(
        [sys.executable, str(script), json.dumps({**CPU, "enable_lmcache": True, **settings}), json.dumps(texts)],
        env={**os.environ, "LMKV_SGLANG": "1", **environ},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert told.returncode == 0, told.stderr[-4000:]
    return json.loads(told.stdout.splitlines()[-1]), told.stdout + told.stderr


def test_a_server_that_flushes_and_an_engine_that_restarts(tiny_llama: Path, config: Path, tmp_path: Path) -> None:
    flags = ("--enable-lmcache", "--lmcache-config-file", str(config), "--enable-cache-report")
    with serving(tiny_llama, tmp_path / "server.log", {"LMKV_SGLANG": "1"}, *flags) as server:
        computed, cached, _ = server.generate(TEXT)
        assert cached == 0
        assert server.generate(TEXT) == (computed, 299, where(299, 0))
        server.flush()
        assert server.generate(TEXT) == (computed, 299, where(0, 299))
        parted, _, sources = server.generate(TEXT[:150] + OTHER)
        assert sources == where(150, 0)
        server.flush()
        server.generate(TEXT[:100])
        assert server.generate(TEXT[:150] + OTHER) == (parted, 249, where(100, 149))  # tree and LMKV add up
        server.flush()
        assert server.generate(TEXT + computed)[2] == where(0, 307)  # the last answer's KV was never computed
        assert server.generate(TEXT, extra_key="tenant")[:2] == (computed, 0)
        server.flush()
        assert server.generate(TEXT, extra_key="tenant")[1] == 299
        (line,) = server.lines("LMKV: active (--enable-lmcache")
        assert "disk 256 MiB" in line
        assert server.lines("impl=LMKVRadixCache")
        server.ask("/flush_cache", {})
    settings = {"model_path": str(tiny_llama), "lmcache_config_file": str(config)}
    steps, _ = engine(settings, [TEXT, TEXT[:150] + OTHER])
    assert [step["host"] for step in steps] == [299 + 99, 299 + 99, 0, 299 + 99]  # from disk; flushed; other weights; flushed
    assert steps[0]["answers"] == steps[1]["answers"] == [computed, parted]
    assert steps[2]["answers"] == steps[3]["answers"] != steps[0]["answers"]


def test_an_engine_of_two_ranks(tiny_llama: Path) -> None:
    settings = {"model_path": str(tiny_llama), "tp_size": 2}  # pages of 1: larger ones need a GPU in this version
    steps, log = engine(settings, [TEXT, OTHER], LMKV_RAM_CAPACITY="64MiB", SGLANG_CPU_OMP_THREADS_BIND="0|1")
    assert [step["cached"] for step in steps] == [[0, 0], [299, 99], [0, 0], [299, 99]]
    assert [step["host"] for step in steps] == [0, 398, 0, 398]
    assert steps[0]["answers"] == steps[1]["answers"]
    assert steps[2]["answers"] == steps[3]["answers"]
    assert "LMKV: active (--enable-lmcache" in log
    assert "not active" not in log


@pytest.mark.parametrize(
    ("said", "message"), [({"LMKV_SGLANG": "maybe"}, "LMKV_SGLANG"), ({"LMKV_SGLANG": "1"}, "ram_capacity")]
)
def test_a_mistake_is_said_before_a_model_is_loaded(
    said: dict[str, str], message: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    from lmkv.errors import ConfigError

    load_plugins()
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("ram_capasity: 1GiB\n")
    args = ServerArgs(model_path=str(tiny_llama), device="cpu", enable_lmcache=True, lmcache_config_file=str(wrong))
    monkeypatch.setenv("LMKV_SGLANG", "0")
    args.check_server_args()
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        args.check_server_args()
    wrong.write_text("ram_capacity: 1GiB\n")
    monkeypatch.setenv("LMKV_SGLANG", "1")
    args.check_server_args()
