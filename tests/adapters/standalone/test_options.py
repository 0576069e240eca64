"""The command line: spellings, shapes, what is refused and how."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmkv.adapters.access import is_loopback
from lmkv.adapters.standalone.options import Options, parse_options
from lmkv.errors import ConfigError, LayoutMismatchError, LMKVError
from lmkv.layout import KVLayout, LayerGroup

GIB = 1024**3


def options(*argv: str, **environ: str) -> Options:
    return parse_options(argv, environ)


@pytest.fixture
def example(tmp_path: Path) -> str:
    path = tmp_path / "example.yaml"
    path.write_text("chunk_size: 256\nlocal_cpu: true\nmax_local_cpu_size: 5\n", encoding="utf-8")
    return str(path)


def test_defaults() -> None:
    got = options()
    assert got.layout == KVLayout.parse("(2,2,256,4,16):float16:2")
    assert (got.config.model, got.config.shard, got.config.chunk_size) == ("standalone_model", "", 256)
    assert (got.host, got.token, got.warnings) == ("127.0.0.1", None, ())


@pytest.mark.parametrize(
    "words",
    [
        ["--config", "{f}", "--device=cpu", "--model_name", "my_model"],
        ["--config={f}", "--device", "cpu", "--model-name=my_model"],
        ["--config", "{f}", "--model_name=my_model", "--use_mla=false", "--worker_id", "0", "--world-size=1"],
    ],
)
def test_the_usual_commands(example: str, words: list[str]) -> None:
    got = options(*[word.format(f=example) for word in words])
    assert (got.config.model, got.config.ram_capacity, got.config.disk_capacity) == ("my_model", 5 * GIB, 0)
    assert got.warnings == ()


@pytest.mark.parametrize("flag", ["--kvcache_shape_spec", "--kvcache-shape-spec"])
def test_shape_specs_of_several_groups(flag: str) -> None:
    got = options(f"{flag}=(2,2,16,4,16):float16:2;(1,3,16,1,64):bfloat16:3", "--device=cpu")
    assert got.layout == KVLayout((LayerGroup(2, 2, 4, 16, "float16"), LayerGroup(3, 1, 1, 64, "bfloat16")), 16)


@pytest.mark.parametrize(
    ("words", "group"),
    [
        (["--kv-shape", "32,2,256,8,128", "--kv-dtype", "bfloat16"], LayerGroup(32, 2, 8, 128, "bfloat16")),
        (["--kv_shape=2,32,256,8,128"], LayerGroup(32, 2, 8, 128, "float16")),
        (["--kv-shape", "(27,1,256,1,576)", "--use-mla"], LayerGroup(27, 1, 1, 576, "float16")),
        (["--kv-shape", "27,1,256,1,576"], LayerGroup(27, 1, 1, 576, "float16")),
        (["--use_mla"], LayerGroup(2, 1, 1, 64, "float16")),
        (["--use-mla", "true", "--kv-dtype", "half"], LayerGroup(2, 1, 1, 64, "float16")),
        (["--use-mla", "--kvcache-shape-spec", "(2,5,256,4,16):uint8:5"], LayerGroup(5, 1, 1, 64, "uint8")),
    ],
)
def test_shapes(words: list[str], group: LayerGroup) -> None:
    assert options(*words).layout == KVLayout((group,), 256)


def test_an_explicit_chunk_size_replaces_the_shapes_tokens() -> None:
    got = options("--chunk-size", "16")
    assert (got.layout.chunk_tokens, got.config.chunk_size, got.warnings) == (16, 16, ())
    got = options("--chunk_size=16", "--kv-shape", "2,2,256,4,16")
    assert got.layout.chunk_tokens == 16
    assert "chunk_size 16 replaces the 256 tokens" in got.warnings[0]
    assert options(LMCACHE_CHUNK_SIZE="8").layout.chunk_tokens == 8
    assert options("--kv-shape", "2,2,256,4,16", "--chunk-size", "256").warnings == ()


def test_workers_get_shards_of_their_own() -> None:
    assert options("--worker-id", "1", "--world-size", "4").config.shard == "tp1/4"
    with pytest.raises(ConfigError, match="--worker-id < --world-size"):
        options("--worker-id", "4", "--world-size", "4")


def test_other_words_set_config_keys(tmp_path: Path) -> None:
    got = options(
        "--max_local_cpu_size", "0.5", "--local-disk", f"file://{tmp_path}", "--max-local-disk-size=2", "--cache_policy=LFU",
        "--save-unfull-chunk=False", "--tiers", "[{backend: memory, capacity: 1MiB}]", "--ram_shared",
    )  # fmt: skip
    config = got.config
    assert (config.ram_capacity, config.disk_capacity, config.disk_path) == (GIB // 2, 2 * GIB, str(tmp_path))
    assert (config.ram_policy, config.save_partial_chunk, config.tiers[0].capacity) == ("lfu", False, 1024**2)
    assert config.ram_shared is True


def test_a_word_without_effect_is_named() -> None:
    got = options(
        "--fmt",
        "vllm",
        "--kv-shape",
        "2,2,8,1,1",
        "--kvcache-shape-spec",
        "(2,2,8,1,1):uint8:2",
    )
    text = "\n".join(got.warnings)
    for part in ("--fmt has no effect", "--kv-shape has no effect beside"):
        assert part in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cuda"], "--device: expected cpu; got 'cuda'"),
        (["--chunk-sise", "8"], "unknown key --chunk-sise; did you mean --chunk-size?"),
        (["--modle-name", "x"], "did you mean --model-name?"),
        (["--max_local_cpu_sise=5"], "did you mean --max-local-cpu-size?"),
        (["--remote_ulr=x"], "did you mean --remote-url?"),
        (["--zzzz", "1"], "unknown key --zzzz"),
        (["example.yaml"], "expected --key value or --key=value; got 'example.yaml'"),
        (["--token", "secret"], "use --token-file or LMKV_TOKEN"),
        (["--port", "99999"], "--port: expected 0 to 65535"),
        (["--port", "http"], "argument --port: invalid int value"),
        (["--max-body", "much"], "expected a size such as"),
        (["--max-body", "0"], "at least 1 byte"),
        (["--patience-seconds", "0"], "more than 0"),
        (["--max-requests", "0"], "--max-requests: expected at least 1"),
        (["--config"], "argument --config: expected one argument"),
        (["--use-mla=perhaps"], "expected true or false"),
        (["--kv-shape", "2,2,256"], "--kv-shape: expected five whole numbers"),
        (["--kv-shape", "a,2,256,4,16"], "--kv-shape: expected five whole numbers"),
        (["--kv-shape", "3,3,256,4,16"], "with kv = 2, or 1"),
        (["--ram-capacity", "lots"], "ram_capacity: expected a size"),
        (["--model-name", "a", "--model", "b"], "expected one value for model"),
        (["--config", "/nowhere/x.yaml"], "expected a readable YAML file"),
        (["--host", ""], "--host: expected an address"),
    ],
)
def test_wrong_words(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options(*words)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "spec", ["(2,2,256,4):float16:2", "(2,2,256,4,16):float17:2", "2,2,256,4,16", "(2,2,8,1,1):uint8:2;(2,2,9,1,1):uint8:2"]
)
def test_wrong_shape_specs(spec: str) -> None:
    with pytest.raises(LayoutMismatchError, match="--kvcache-shape-spec: "):
        options("--kvcache-shape-spec", spec)


def test_tokens_come_from_the_environment_or_a_file(tmp_path: Path) -> None:
    assert options(LMKV_TOKEN="t0").token == "t0"
    path = tmp_path / "token"
    path.write_text("t1\n", encoding="utf-8")
    path.chmod(0o600)
    got = options("--token-file", str(path), LMKV_TOKEN="t0")
    assert (got.token, got.warnings) == ("t1", ())
    path.chmod(0o644)
    assert "chmod 600" in options("--token-file", str(path)).warnings[0]
    path.write_text("\n", encoding="utf-8")
    for wrong in (str(path), str(tmp_path / "none")):
        with pytest.raises(ConfigError, match="--token-file: expected"):
            options("--token-file", wrong)
    with pytest.raises(ConfigError, match="printable ASCII"):
        options(LMKV_TOKEN="a b")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])
def test_other_hosts_need_a_token(host: str) -> None:
    with pytest.raises(ConfigError, match="expected a loopback address, or a token"):
        options("--host", host)
    assert options("--host", host, LMKV_TOKEN="t").host == host
    assert options("--host", host, "--insecure").host == host


@pytest.mark.parametrize(
    ("host", "near"), [("127.0.0.1", 1), ("127.9.9.9", 1), ("::1", 1), ("[::1]", 1), ("localhost", 1), ("0.0.0.0", 0), ("h", 0)]
)
def test_loopback(host: str, near: int) -> None:
    assert is_loopback(host) == bool(near)


def run(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LMKV_", "LMCACHE_"))}
    command = [sys.executable, "-m", "lmkv.standalone", *argv]
    return subprocess.run(command, capture_output=True, text=True, env={**env, **environ}, timeout=60, check=False)


def test_wrong_arguments_end_the_command_with_one_line() -> None:
    done = run("--device", "cuda", "--port", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lmkv.standalone: --device: expected cpu")
    assert len(done.stderr.splitlines()) == 1


def test_a_store_that_can_not_be_opened_ends_the_command() -> None:
    done = run("--port", "0", "--ram-capacity", "1KiB", "--disk-capacity", "0")
    assert done.returncode in (1, 2)
    assert "ram_capacity" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_help() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "--kvcache-shape-spec" in done.stdout


def test_every_refusal_is_an_lmkv_error() -> None:
    with pytest.raises(LMKVError):
        options("--nothing-like-this")
