"""Whole engines of SGLang's with HiCache and LMKV behind it, on the CPU; stand-ins for what of HiCache needs a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sglang_server import CPU

SUPPORT = Path(__file__).parents[2] / "support"
TEXT = [(7 * i) % 500 + 3 for i in range(300)]
OTHER = [(11 * i) % 500 + 5 for i in range(100)]


@pytest.fixture
def standins(register: Callable[[str, str, str], None], tmp_path: Path) -> str:
    """A path for other processes, on which SGLang finds ``sglang_host_copies`` as a plug-in."""
    register("sglang.srt.plugins", "hostcopies", "sglang_host_copies:register")
    return os.pathsep.join([str(tmp_path / "site"), str(SUPPORT)])


def test_an_engine_and_the_one_after_it(tiny_llama: Path, tmp_path: Path, standins: str) -> None:
    extra = {"backend_name": "lmkv", "module_path": "lmkv.adapters.sglang.hicache", "class_name": "LMKVHiCacheStorage"}
    extra |= {"interface_v1": 1, "prefetch_threshold": 16, "ram_capacity": "64MiB", "disk_capacity": "256MiB"}
    settings = {
        **{name: value for name, value in CPU.items() if name != "max_total_tokens"},
        "max_total_tokens": 1024,
        "model_path": str(tiny_llama),
        "enable_hierarchical_cache": True,
        "hicache_ratio": 2.0,
        "hicache_mem_layout": "layer_first",
        "hicache_io_backend": "direct",
        "hicache_write_policy": "write_through",
        "hicache_storage_prefetch_policy": "wait_complete",
        "hicache_storage_backend": "dynamic",
        "hicache_storage_backend_extra_config": json.dumps({**extra, "disk_path": str(tmp_path / "disk")}),
    }
    command = [sys.executable, str(SUPPORT / "sglang_engine.py"), json.dumps(settings), json.dumps([TEXT, OTHER])]
    answers = []
    for cached in ([[0, 0], [299, 99], [0, 0], [299, 99]], [[299, 99], [299, 99], [0, 0], [299, 99]]):
        told = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": standins}, capture_output=True, text=True, timeout=600, check=False
        )
        assert told.returncode == 0, told.stderr[-4000:]
        steps = json.loads(told.stdout.splitlines()[-1])
        # at first; after a flush; with other weights; after another flush
        assert [step["cached"] for step in steps] == cached
        answers += [step["answers"] for step in steps]
        assert "LMKV: active (--hicache-storage-backend" in told.stdout + told.stderr
    first, flushed, changed, again, restarted, *rest = answers
    assert first == flushed == restarted == rest[0]
    assert changed == again == rest[1] == rest[2] != first
