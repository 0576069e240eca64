"""``lmkv run --as-lmcache``: LMCache's commands and imports work inside a command, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import known_kv
import pytest
import servers
from lm_servers import RawClient

import lmkv
from lmkv.adapters.lmcache import load_config

RUN = [sys.executable, "-c", "import sys; from lmkv.cli import main; sys.exit(main())", "run", "--as-lmcache", "--"]
KEY = b"m@1@0@1@half"
SEEDS = Path(__file__).parents[2] / "fixtures" / "seeds"


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "tmp").mkdir()
    return {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PYTHONUNBUFFERED": "1"}


def run(environ: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*RUN, *command], env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert list(Path(environ["TMPDIR"]).iterdir()) == []
    return done


def test_imports_of_lmcaches_examples(environ: dict[str, str]) -> None:
    code = """
import lmcache, lmcache.c_ops, lmkv
from lmcache.v1.cache_engine import LMCacheEngineBuilder
from lmcache.integration.vllm.utils import ENGINE_NAME
LMCacheEngineBuilder.destroy(ENGINE_NAME)
from importlib.metadata import version  # how guides have people check what they installed
assert version("lmcache") == lmcache.__version__
print(ENGINE_NAME, lmcache.__version__ == f"0.3.15+lmkv.{lmkv.__version__}")
"""
    done = run(environ, sys.executable, "-c", code)
    assert (done.stdout, done.stderr) == ("vllm-instance True\n", "")


def test_nothing_of_it_is_seen_outside() -> None:
    code = "import importlib.util; print(importlib.util.find_spec('lmcache'))"
    assert "as-lmcache" not in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "command",
    [
        ["lmcache_server", "{host}", "{port}"],
        ["lmcache_server", "{host}", "{port}", "cpu"],
        [sys.executable, "-m", "lmcache.v1.server", "{host}", "{port}"],
        ["bash", "-c", "exec lmcache_server {host} {port}"],
    ],
)
def test_the_server(command: list[str], environ: dict[str, str]) -> None:
    (port,) = servers.free_ports(1)
    host = "127.0.0.1" if len(command) != 4 else "0.0.0.0"
    words = [word.format(host=host, port=port) for word in command]
    with subprocess.Popen([*RUN, *words], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            servers.until(lambda: servers.listens(port))
            with RawClient(port) as client:
                client.put(KEY, b"1234")
                assert client.get(KEY) == b"1234"
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert ("anyone who reaches 0.0.0.0" in errors) == (host == "0.0.0.0")
    assert list(Path(environ["TMPDIR"]).iterdir()) == []


def test_the_standalone_service(environ: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", exc_type=ModuleNotFoundError)
    (tmp_path / "example.yaml").write_text("chunk_size: 16\nlocal_cpu: true\nmax_local_cpu_size: 0.1\n")
    flags = ["--config", str(tmp_path / "example.yaml"), "--device=cpu", "--model_name", "my_model", "--port", "0"]
    words = [*RUN, sys.executable, "-m", "lmcache.v1.standalone", *flags]
    with subprocess.Popen(words, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            assert "listening on http://127.0.0.1:" in process.stdout.readline()
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("command", [["lmcache_controller"], [sys.executable, "-m", "lmcache.v1.api_server"]])
@pytest.mark.parametrize("older", [False, True])
def test_engines_share_by_what_the_controller_starts(older: bool, command: list[str], environ: dict[str, str]) -> None:
    (port,) = servers.free_ports(1)
    flags = ["--monitor-port", str(port)] if older else ["--monitor-ports", json.dumps({"pull": port, "reply": 8400})]
    words = [*RUN, "PYTHONHASHSEED=123", *command, "--host", "localhost", "--port", "9000", *flags]
    with subprocess.Popen(words, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            servers.until(lambda: servers.listens(port))
            engines = {name: (SEEDS / f"{name}.yaml").read_text(encoding="utf-8") for name in ("p2p-1", "p2p-2")}
            text = list(range(600))
            layout = lmkv.KVLayout.dense(layers=2, heads=2, head_size=8, dtype="float16", chunk_tokens=256)
            for number, (name, yaml) in enumerate(engines.items()):
                file = Path(environ["TMPDIR"]).parent / f"{name}.yaml"
                file.write_text(yaml.replace("localhost:8300", f"localhost:{port}"))
                assert load_config(file, environ={}).config.tiers == ()  # only there
                loaded = load_config(file, environ={"LMKV_AS_LMCACHE": "1"}, overrides={"model": "m", "ram_capacity": "8MiB"})
                assert any(line.endswith(f"lmcache_controller starts here, lm://localhost:{port}") for line in loaded.warnings)
                assert not any("controller_reply_url" in line or "p2p_init_ports" in line for line in loaded.warnings)
                with lmkv.Store(loaded.config, layout) as store:
                    match = store.lookup(text).wait(10)
                    assert match.tokens_by_tier() == ({"remote": 600} if number else {})
                    if number:
                        assert known_kv.fetch(store, text, match) == 600
                    else:
                        assert store.store(text, known_kv.source(layout, text)) == 600
                    assert store.flush(20)
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=20)
        finally:
            if process.poll() is None:
                process.terminate()  # which reaches what it runs
                process.wait(10)
    assert process.returncode == 0
    assert "nothing to control" in errors
    assert "puts 3" in errors


def test_a_controller_with_wrong_ports_says_so(environ: dict[str, str]) -> None:
    done = run(environ, "lmcache_controller", "--monitor-ports", "8300")
    assert done.returncode == 2
    assert "expected JSON such as" in done.stderr


def test_exit_status_and_wrong_command_lines(environ: dict[str, str]) -> None:
    assert run(environ, sys.executable, "-c", "import sys; sys.exit(7)").returncode == 7
    assert run(environ, sys.executable, "-c", "import os; os.kill(os.getpid(), 9)").returncode == 137
    done = run(environ, "/nonexistent/command")
    assert done.returncode == 127
    assert "No such file" in done.stderr
    done = run(environ, "unset", "LMCACHE_CHUNK_SIZE")
    assert done.returncode == 127
    assert "bash -c" in done.stderr
    assert run(environ, "A=1").returncode == 2
    done = run(environ)
    assert done.returncode == 2
    assert "expected a command behind --" in done.stderr


def test_variables_in_front_of_the_command(environ: dict[str, str]) -> None:
    """As guides write them, and as a shell takes them where nothing stands before."""
    code = "import os, lmcache; print([os.environ.get(name) for name in ('LMCACHE_CONFIG_FILE', 'A_1', 'B')])"
    done = run(environ, "LMCACHE_CONFIG_FILE=./a b=c.yaml", "A_1=", sys.executable, "-c", code, "B=2")
    assert (done.stdout, done.stderr) == ("['./a b=c.yaml', '', None]\n", "")
    done = run(environ, f"PATH={environ['PATH']}", "PYTHONPATH=/nowhere", sys.executable, "-c", "import lmcache.c_ops")
    assert done.returncode == 0, done.stderr
