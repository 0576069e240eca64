"""Settings: sizes, files, environment, what wins, and what a mistake is answered with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lmkv
from lmkv.config import ENV_PREFIX, StoreConfig, TierConfig, cache_home, parse_bytes, parse_yaml, read_yaml, service_token
from lmkv.errors import ConfigError

GIB = 1024**3

# -- sizes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0), (7, 7), (7.9, 7), ("0", 0), ("5GiB", 5 * GIB), ("5 gib", 5 * GIB), (" 1.5 KiB ", 1536), ("512MB", 512_000_000),
        ("1e9", 10**9), ("2e3 kB", 2_000_000), ("10b", 10), ("3T", 3 * 10**12), ("1TiB", 1024**4), (".5k", 500),
    ],
)  # fmt: skip
def test_sizes(text: object, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "five", "5 GiBs", "1..5", ".", "1e999", "nan", None, True, -1, float("inf"), [1]]
)
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ConfigError, match="expected a size"):
        parse_bytes(text)


@given(number=st.integers(0, 2**20), unit=st.sampled_from(["", "b", "KiB", "MB", "GiB"]))
def test_whole_numbers_of_a_unit_are_exact(number: int, unit: str) -> None:
    factor = {"": 1, "b": 1, "KiB": 1024, "MB": 10**6, "GiB": GIB}[unit]
    assert parse_bytes(f"{number} {unit}") == number * factor


# -- where they come from ----------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    assert StoreConfig.load(environ={}) == StoreConfig()
    assert StoreConfig.from_dict({}) == StoreConfig()
    assert lmkv.StoreConfig is StoreConfig


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "lmkv.yaml"
    path.write_text(
        """
        model: org/model
        ram_capacity: 5GiB
        disk_capacity: 0
        chunk_size: 64
        chain_aware: no
        deadline_seconds: 2
        disk_path: null
        tiers:
          - backend: memory
            capacity: 1 MiB
            options: {a: 1}
          - {backend: memory, name: second, deadline_seconds: 0.5}
        """,
        encoding="utf-8",
    )
    config = StoreConfig.load(path, environ={})
    assert (config.model, config.ram_capacity, config.disk_capacity, config.chunk_size) == ("org/model", 5 * GIB, 0, 64)
    assert config.chain_aware is False
    assert config.deadline_seconds == 2.0
    assert config.disk_path is None
    assert config.tiers == (
        TierConfig("memory", capacity=1024**2, options={"a": 1}),
        TierConfig("memory", name="second", deadline_seconds=0.5),
    )
    assert [tier.name for tier in config.tiers] == ["memory", "second"]


def test_later_sources_win(tmp_path: Path) -> None:
    path = tmp_path / "lmkv.yaml"
    path.write_text("model: file\nrevision: file\nlora: file\n", encoding="utf-8")
    environ = {"LMKV_CONFIG_FILE": str(path), "LMKV_REVISION": "env", "LMKV_LORA": "env", "PATH": "/bin"}
    config = StoreConfig.load(environ=environ, overrides={"lora": "override"})
    assert (config.model, config.revision, config.lora, config.rope) == ("file", "env", "override", "")
    other = tmp_path / "other.yaml"
    other.write_text("model: other\n", encoding="utf-8")
    assert StoreConfig.load(other, environ=environ).model == "other", "a given path wins over the variable"


def test_an_empty_file_is_no_setting(tmp_path: Path) -> None:
    path = tmp_path / "lmkv.yaml"
    path.write_text("# nothing\n", encoding="utf-8")
    assert StoreConfig.load(path, environ={}) == StoreConfig()


def test_the_environment_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMKV_MODEL", "from the environment")
    assert StoreConfig.load().model == "from the environment"


def test_every_setting_can_come_from_the_environment() -> None:
    texts = {
        "chunk_size": "32", "save_partial_chunk": "off", "ram_capacity": "1GiB", "ram_policy": "lfu", "ram_shared": "true",
        "ram_extent": "1MiB", "chain_aware": "0", "disk_capacity": "2GiB", "disk_path": "/x", "disk_policy": "fifo",
        "disk_codec": "blosc2", "tiers": "[{backend: memory}]", "lease_seconds": "1.5", "deadline_seconds": "3",
        "write_queue": "9", "io_threads": "4", "breaker_failures": "2", "breaker_seconds": "7", "key_hash": "xxh3",
        "disk_direct": "true", "disk_depth": "8", "disk_floor": "1GiB", "disk_write_budget": "1MiB",
        "disk_ttl_seconds": "60",
        "ram_ahead": "1MiB", "ram_huge_pages": "off", "ram_numa_node": "1", "ram_pin": "no", "ram_cache": "false",
        "disk_admission": "second", "disk_paths": "/a,/b",
    }  # fmt: skip
    for field in dataclasses.fields(StoreConfig):
        config = StoreConfig.load(environ={ENV_PREFIX + field.name.upper(): texts.get(field.name, "text")})
        assert getattr(config, field.name) != getattr(StoreConfig(), field.name), field.name
    del texts["disk_paths"]  # one of them at a time
    config = StoreConfig.load(environ={ENV_PREFIX + name.upper(): text for name, text in texts.items()})
    assert config.tiers == (TierConfig("memory"),)
    assert (config.chunk_size, config.save_partial_chunk, config.ram_shared) == (32, False, True)
    assert (config.lease_seconds, config.io_threads, config.ram_extent) == (1.5, 4, 1024**2)


def test_a_node_is_a_number_or_the_gpus() -> None:
    assert StoreConfig.from_dict({"ram_numa_node": 1}).ram_numa_node == "1"
    assert StoreConfig(ram_numa_node=0).ram_numa_node == "0"  # type: ignore[arg-type]
    assert StoreConfig.from_dict({"ram_numa_node": None}).ram_numa_node is None
    with pytest.raises(ConfigError, match="ram_numa_node: expected a node's number or auto; got 'first'"):
        StoreConfig(ram_numa_node="first")


def test_settings_of_others_in_the_environment() -> None:
    assert StoreConfig.load(environ={"LMKV_TOKEN": "secret"}) == StoreConfig()
    assert service_token({"LMKV_TOKEN": "secret"}) == "secret"
    assert service_token({"LMKV_TOKEN": ""}) is None
    assert service_token({}) is None


def test_where_caches_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_home({"XDG_CACHE_HOME": "/var/cache/me"}) == Path("/var/cache/me")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_home({}) == Path("/home/me/.cache")
    assert cache_home({"XDG_CACHE_HOME": "relative"}) == Path("/home/me/.cache"), "the specification says to ignore it"


# -- mistakes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"ram_capasity": 1}, "'ram_capasity'; did you mean 'ram_capacity'?"),
        ({"disk_polcy": "lru"}, "did you mean 'disk_policy'?"),
        ({"zzz": 1}, "known keys: .*ram_capacity"),
        ({"tiers": [{"backend": "memory", "optoins": {}}]}, r"tiers\[0\]: unknown key 'optoins'; did you mean 'options'?"),
        ({"tiers": [{"capacity": 1}]}, "backend"),
        ({"tiers": "memory"}, "tiers"),
        ({"tiers": ["memory"]}, "tiers"),
        ({"tiers": {"backend": "memory"}}, "tiers"),
        ({"tiers": 5}, "tiers"),
        ({"tiers": [{"backend": "memory", "options": [1]}]}, "options"),
        ({"tiers": [{"backend": ""}]}, "backend"),
        ({"tiers": [{"backend": "memory"}, {"backend": "memory"}]}, "names that differ"),
        ({"tiers": [{"backend": "memory", "name": "disk"}]}, "names that differ"),
        ({"tiers": [{"backend": "memory", "deadline_seconds": 0}]}, "deadline_seconds"),
        ({"tiers": [{"backend": "memory", "capacity": "huge"}]}, "capacity"),
        ({"ram_capacity": "lots"}, "ram_capacity: expected a size"),
        ({"ram_capacity": 0}, "ram_capacity: expected at least 1"),
        ({"ram_capacity": None}, "ram_capacity"),
        ({"disk_capacity": -1}, "disk_capacity"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"chunk_size": "big"}, "chunk_size: expected a whole number; got 'big'"),
        ({"chunk_size": 1.5}, "chunk_size"),
        ({"io_threads": True}, "io_threads"),
        ({"io_threads": 0}, "io_threads"),
        ({"write_queue": 0}, "write_queue"),
        ({"write_queue": None}, "write_queue.*leave the key out"),
        ({"breaker_failures": 0}, "breaker_failures"),
        ({"deadline_seconds": 0}, "deadline_seconds"),
        ({"deadline_seconds": "soon"}, "deadline_seconds: expected a number; got 'soon'"),
        ({"lease_seconds": -1}, "lease_seconds"),
        ({"lease_seconds": float("nan")}, "lease_seconds"),
        ({"chain_aware": "maybe"}, "chain_aware: expected true or false; got 'maybe'"),
        ({"key_hash": "sha265"}, "did you mean 'sha256'?"),
        ({"model": ["a"]}, "model: expected a text"),
        ({"model": {"name": "a"}}, "model: expected a text"),
    ],
    ids=str,
)
def test_wrong_settings(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StoreConfig.from_dict(data)


def test_wrong_arguments_in_python() -> None:
    with pytest.raises(ConfigError, match="ram_capacity"):
        StoreConfig(ram_capacity="much")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="key_hash"):
        StoreConfig(key_hash="md5")
    with pytest.raises(ConfigError, match="capacity"):
        TierConfig("memory", capacity="much")  # type: ignore[arg-type]
    assert StoreConfig(ram_capacity="1GiB").ram_capacity == GIB  # type: ignore[arg-type]  # texts are understood
    assert TierConfig("memory", capacity="1GiB").capacity == GIB  # type: ignore[arg-type]


def test_what_is_given_in_code_is_read_as_from_a_file(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "ram_cache": "false",
        "write_queue": "10",
        "lease_seconds": 5,
        "disk_path": tmp_path,
        "disk_direct": True,
    }
    config = StoreConfig(**given)
    assert config == StoreConfig.from_dict({**given, "disk_path": str(tmp_path)})
    assert (config.ram_cache, config.write_queue, config.disk_path) == (False, 10, str(tmp_path))
    assert TierConfig("memory", deadline_seconds="3").deadline_seconds == 3.0  # type: ignore[arg-type]
    for wrong in ({"ram_pin": "maybe"}, {"io_threads": 1.5}, {"io_threads": None}, {"model": ["a"]}, {"lease_seconds": "soon"}):
        with pytest.raises(ConfigError, match=f"^{next(iter(wrong))}: expected"):
            StoreConfig(**wrong)
    with pytest.raises(ConfigError, match="tiers: deadline_seconds: expected a number"):
        TierConfig("memory", deadline_seconds="soon")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"LMKV_RAM_CAPACTIY": "1GiB"}, "LMKV_RAM_CAPACTIY; did you mean LMKV_RAM_CAPACITY?"),
        ({"LMKV_XQJZWVBPFGH": "1"}, "LMKV_XQJZWVBPFGH; known: .*LMKV_MODEL"),
        ({"LMKV_RAM_CAPACITY": "a lot"}, "LMKV_RAM_CAPACITY: ram_capacity: expected a size"),
        ({"LMKV_TIERS": "[{backend: "}, "LMKV_TIERS: expected YAML"),
        ({"LMKV_TIERS": "[{bakcend: memory}]"}, "backend"),
    ],
    ids=str,
)
def test_a_wrong_environment(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StoreConfig.load(environ=environ)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ram_capacity: [1\nmodel", "expected YAML"),
        ("a: b: c", "expected YAML"),
        ("- a\n- b\n", "'key: value' lines; got list"),
        ("just text", "'key: value' lines; got str"),
        ("\x00\x01", "expected YAML"),
        ("!!python/object/apply:os.system ['true']", "expected YAML"),
        ("ram_capasity: 5", "did you mean 'ram_capacity'?"),
        ("1: 2", "unknown key 1"),
    ],
)
def test_a_wrong_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "lmkv.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        StoreConfig.load(path, environ={})
    assert str(path) in str(caught.value)


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(ConfigError, match="readable YAML file"):
            StoreConfig.load(path, environ={})
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    with pytest.raises(ConfigError, match="readable YAML file"):
        read_yaml(tmp_path / "latin.yaml")


def test_yaml_is_plain_data() -> None:
    assert parse_yaml("{a: [1, x]}", "here") == {"a": [1, "x"]}
    with pytest.raises(ConfigError, match="here: expected YAML"):
        parse_yaml("{", "here")
