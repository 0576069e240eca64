"""``--enable-lmcache`` on a real server and a real engine, served by LMKV: the same answers, sooner."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sglang_server import CPU, Server, serving

SEEDS = Path(__file__).parents[2] / "fixtures" / "seeds"
TEXT = [i * 7 % 499 + 3 for i in range(300)]
THIRD = [i * 13 % 499 + 7 for i in range(300)]
OTHER = [i * 11 % 499 + 5 for i in range(300)]


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("LMKV_", "LMCACHE_")):
            monkeypatch.delenv(name)


def on_disk(folder: Path, tokens: int) -> None:
    """Wait until so many tokens are in the disk tier's directory."""
    deadline = time.monotonic() + 30
    found = 0
    while time.monotonic() < deadline:
        told = subprocess.run(
            [sys.executable, "-c", "from lmkv.cli import main; main()", "inspect", "--json", str(folder)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if told.returncode == 0:
            found = json.loads(told.stdout)["tokens"]
            if found >= tokens:
                return
        time.sleep(0.3)
    raise TimeoutError(f"{found} tokens on disk")


def from_host(answer: list[int], cached: int, sources: dict[str, int]) -> tuple[list[int], int, int]:
    """An answer, its cached tokens, and how many of them did not come from SGLang's own cache."""
    return answer, cached, sources["host"]


def damage(folder: Path) -> None:
    """Change a bit in each used part of the disk tier's files, in place, as a device would."""
    for segment in folder.glob("segment-*.kv"):
        data = bytearray(segment.read_bytes())
        for at in range(4096, len(data), 512):
            if any(data[at : at + 512]):
                data[at + 100] ^= 1
        with segment.open("r+b") as file:
            file.write(data)


def many_at_once(server: Server) -> None:
    """Requests that share beginnings, eight at a time: first each for itself, then with what the others left."""
    rng = random.Random(3)
    roots = [[rng.randrange(3, 500) for _ in range(rng.randrange(100, 300))] for _ in range(4)]
    jobs = []
    for _ in range(80):
        text = rng.choice(roots)[: rng.randrange(50, 300)]
        while rng.random() < 0.5:
            text = text + [rng.choice((7, 8))] * rng.randrange(1, 40)
        jobs.append(([*text, 3], rng.choice(("x", "y"))))

    def alone(i: int) -> list[int]:
        answer, cached, _ = server.generate(jobs[i][0], cache_salt=f"alone {i}")
        assert cached == 0
        return answer

    with ThreadPoolExecutor(8) as threads:
        computed = list(threads.map(alone, range(len(jobs))))
        reused = list(threads.map(lambda job: server.generate(job[0], cache_salt=job[1]), jobs))
        server.flush()
        reused += threads.map(lambda job: server.generate(job[0], cache_salt=job[1]), jobs)
    assert [answer for answer, *_ in reused] == 2 * computed
    assert sum(sources["host"] for _, _, sources in reused if sources) > 1000


def test_a_server_and_the_one_after_it(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    environ = {
        "LMCACHE_USE_EXPERIMENTAL": "True",
        "LMCACHE_CONFIG_FILE": str(SEEDS / "sglang.yaml"),
    }  # as LMCache's guide has it
    environ |= {"LMKV_DISK_PATH": str(folder), "LMKV_DISK_CAPACITY": "256MiB", "LMKV_RAM_CAPACITY": "64MiB"}
    before = (sys.executable, "-c", "from lmkv.cli import main; main()", "run", "--as-lmcache", "--")
    flags = ("--enable-lmcache", "--enable-metrics")
    with serving(tiny_llama, tmp_path / "first.log", environ, *flags, before=before) as server:
        computed, cached, _ = server.generate(TEXT)
        assert cached == 0
        assert server.generate(TEXT)[:2] == (computed, 299)
        server.flush()
        assert from_host(*server.generate(TEXT)) == (computed, 299, 299)
        for salt in ("a", "b"):  # tenants
            server.flush()
            assert server.generate(TEXT, cache_salt=salt)[:2] == (computed, 0)
        server.flush()
        assert server.generate(TEXT, cache_salt="a")[:2] == (computed, 299)
        assert server.generate(TEXT, extra_key="a")[:2] == (computed, 0)
        longer = TEXT + OTHER
        answer, cached, _ = server.generate(longer)
        assert cached == 0 or cached >= 299
        server.flush()
        server.generate(longer[:101])
        again, cached, sources = server.generate(longer)
        assert again == answer
        assert cached == 599
        assert sources["device"] >= 100
        assert sources["device"] + sources["host"] == 599
        metrics = server.ask("/metrics")
        assert [
            line for line in metrics.splitlines() if line.startswith("lmkv:loaded_tokens_total") and not line.endswith(" 0.0")
        ]
        (line,) = server.lines("LMKV: active")
        assert "ram 64 MiB, disk 256 MiB" in line
        assert "chunks of 8 tokens" in line
        third = server.generate(THIRD)[0]
        on_disk(folder, 600 + 3 * 300)
        many_at_once(server)
    config = tmp_path / "lmcache.yaml"
    config.write_text(
        f"chunk_size: 8\nlocal_cpu: true\nmax_local_cpu_size: 0.1\nlocal_disk: file://{folder}\nmax_local_disk_size: 0.25\n"
    )
    flags = ("--enable-lmcache", "--lmcache-config-file", str(config), "--page-size", "16")
    with serving(tiny_llama, tmp_path / "second.log", {}, *flags) as server:
        assert from_host(*server.generate(TEXT)) == (computed, 288, 288)
        assert server.generate(longer)[:2] == (answer, 592)
        assert server.generate(OTHER)[1] == 0
        damage(folder)
        answer, cached, _ = server.generate(THIRD)
        assert answer == third
        assert cached < 288
        assert server.lines("LMKV: corrupt in disk")
        (line,) = server.lines("LMKV: active")
        assert "pages of 16" in line


def test_an_engine_of_two_ranks(tiny_llama: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "support" / "sglang_engine.py"
    settings = {**CPU, "model_path": str(tiny_llama), "tp_size": 2, "enable_lmcache": True, "page_size": 1}
    environ = {"LMKV_SGLANG": "1", "LMKV_RAM_CAPACITY": "64MiB", "LMKV_DISK_PATH": str(tmp_path / "disk")}
    told = subprocess.run(
        [sys.executable, str(script), json.dumps(settings), json.dumps([TEXT, OTHER])], capture_output=True, text=True,
        env={**os.environ, **environ, "SGLANG_CPU_OMP_THREADS_BIND": "0|1"},
        timeout=600, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr[-4000:]
    steps = json.loads(told.stdout.splitlines()[-1])
    assert [step["cached"] for step in steps] == [[0, 0], [299, 299], [0, 0], [299, 299]]
    assert [step["host"] for step in steps] == [0, 598, 0, 598]
    first, flushed, changed, again = (step["answers"] for step in steps)
    assert first == flushed
    assert changed == again
    assert first != changed
    lines = [line for line in (told.stdout + told.stderr).splitlines() if "LMKV: " in line]
    assert len([line for line in lines if "LMKV: active (linker, one of 2 ranks)" in line]) == 1
    assert not [line for line in lines if "not active" in line]


def arguments(model: Path, **more: Any) -> Any:
    from sglang.srt.server_args import ServerArgs

    return ServerArgs(model_path=str(model), device="cpu", skip_tokenizer_init=True, **more)


def test_who_did_not_ask_is_left_alone(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    args = arguments(tiny_llama, enable_lmcache=True)
    args.resolve_once()
    assert args.enable_lmcache
    assert not args.enable_unified_cache_external_linker
    monkeypatch.setenv("LMKV_SGLANG", "1")
    args = arguments(tiny_llama)
    args.resolve_once()
    assert not args.enable_unified_cache_external_linker


@pytest.mark.parametrize("way", ["variable", "file of the flag", "file of the variable"])
def test_ways_to_ask(way: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    config = tmp_path / "config.yaml"
    config.write_text("ram_capacity: 64MiB\n")
    more = {}
    if way == "variable":
        monkeypatch.setenv("LMKV_SGLANG", "yes")
    elif way == "file of the flag":
        more["lmcache_config_file"] = str(config)
    else:
        monkeypatch.setenv("LMKV_CONFIG_FILE", str(config))
    args = arguments(tiny_llama, enable_lmcache=True, **more)
    args.resolve_once()
    assert not args.enable_lmcache
    assert args.enable_unified_cache_external_linker
    assert args.unified_cache_external_linker_config["linker"] == "LMKVLinker"
    monkeypatch.setenv("LMKV_SGLANG", "0")
    args = arguments(tiny_llama, enable_lmcache=True, **more)
    args.resolve_once()
    assert args.enable_lmcache


def test_a_file_of_lmcaches_beside_an_lmcache_is_lmcaches(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    (tmp_path / "lmcache").mkdir()
    (tmp_path / "lmcache" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    config = tmp_path / "config.yaml"
    config.write_text("local_cpu: true\n")
    for said, taken in ((None, False), ("1", True)):
        if said:
            monkeypatch.setenv("LMKV_SGLANG", said)
        args = arguments(tiny_llama, enable_lmcache=True, lmcache_config_file=str(config))
        args.resolve_once()
        assert args.enable_unified_cache_external_linker is taken


def test_a_mistake_in_the_file_ends_the_start(tiny_llama: Path, tmp_path: Path) -> None:
    from sglang.srt.plugins import load_plugins

    from lmkv.errors import ConfigError

    load_plugins()
    config = tmp_path / "config.yaml"
    config.write_text("ram_capacty: 64MiB\n")
    with pytest.raises(ConfigError, match="ram_capacity"):
        arguments(tiny_llama, enable_lmcache=True, lmcache_config_file=str(config)).resolve_once()
