"""``lmkv migrate``: what it prints loads, and means what LMCache's file meant."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmkv.adapters.lmcache import load_config
from lmkv.adapters.lmcache.migrate import main
from lmkv.config import StoreConfig

SEEDS = Path(__file__).parents[2] / "fixtures" / "seeds"
FILES = sorted(path.stem for path in SEEDS.glob("*.yaml") if not path.stem.startswith("docker-"))


@pytest.mark.parametrize("name", FILES)
def test_every_configuration_of_the_guides(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = SEEDS / f"{name}.yaml"
    assert main([str(path)], {}) == 0
    text = capsys.readouterr().out
    (tmp_path / "native.yaml").write_text(text, encoding="utf-8")
    loaded = load_config(path, environ={})
    assert StoreConfig.load(tmp_path / "native.yaml", environ={}) == loaded.config
    comments = " ".join(line.lstrip("# -") for line in text.splitlines() if line.startswith("#"))
    for warning in loaded.warnings:
        key, _, why = warning.removeprefix(f"{path}: ").partition(" has no effect: ")
        assert key in comments
        assert " ".join(why.split()) in comments
    assert max(map(len, text.splitlines())) <= 130


def test_a_file_of_many_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lmc.yaml").write_text(
        "max_local_cpu_size: 2.5\nlocal_disk: file:///data/kv\nmax_local_disk_size: 50\ncache_policy: LFU\nnixl_role: both\n"
        "enable_xpyd: true\nsave_unfull_chunk: false\nblocking_timeout_secs: 3\nextra_config: {use_odirect: true}\n"
    )
    assert main([str(tmp_path / "lmc.yaml")], {}) == 0
    text = capsys.readouterr().out
    for line in (
        "ram_capacity: 2560MiB  # max_local_cpu_size",
        "disk_path: /data/kv  # local_disk",
        "disk_capacity: 50GiB  # max_local_disk_size",
        "ram_policy: lfu  # cache_policy",
        "disk_policy: lfu  # cache_policy",
        "save_partial_chunk: false  # save_unfull_chunk",
        "deadline_seconds: 3.0  # blocking_timeout_secs",
        "disk_direct: 'true'  # extra_config.use_odirect",
        "# - nixl_role (pd_role by now), enable_xpyd (enable_pd by now): no effect: prefillers store into, and",
        "# - url: lm://HOST:65432",
    ):
        assert any(found.startswith(line) for found in text.splitlines()), (line, text)


def test_variables_over_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environ = {"LMCACHE_MAX_LOCAL_CPU_SIZE": "7", "LMCACHE_REMOTE_URL": "redis://h:1", "LMCACHE_USE_EXPERIMENTAL": "True"}
    assert main([str(SEEDS / "cpu-5.yaml"), "--environment"], environ) == 0
    text = capsys.readouterr().out
    assert "ram_capacity: 7GiB" in text
    assert "- name: remote\n  url: redis://h:1\n" in text
    assert main(["--environment"], environ) == 0
    assert "chunk_size" not in capsys.readouterr().out
    assert main([str(SEEDS / "cpu-5.yaml")], environ) == 0
    assert "ram_capacity: 5GiB" in capsys.readouterr().out


def test_an_empty_file_is_an_empty_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert main([str(tmp_path / "empty.yaml")], {}) == 0
    (tmp_path / "native.yaml").write_text(capsys.readouterr().out)
    assert StoreConfig.load(tmp_path / "native.yaml", environ={}) == StoreConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chunk_sise: 1\n", "did you mean 'chunk_size'"),
        ("a: [", "syntax error"),
        ("pd_role: chief\nenable_pd: true\n", "pd_role"),
    ],
)
def test_what_is_wrong_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    (tmp_path / "lmc.yaml").write_text(text)
    assert main([str(tmp_path / "lmc.yaml")], {}) == 2
    got = capsys.readouterr()
    assert message in got.err
    assert got.out == ""


def test_the_command() -> None:
    code = "import sys; from lmkv.cli import main; sys.exit(main())"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LMCACHE_")}
    done = subprocess.run(
        [sys.executable, "-c", code, "migrate", str(SEEDS / "redis.yaml")],
        env=environ, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "url: redis://localhost:6379" in done.stdout
    done = subprocess.run([sys.executable, "-c", code, "migrate"], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "expected a file" in done.stderr
