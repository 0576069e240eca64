"""LMCache's keys and variables: what is translated, what is only named, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lmkv.adapters.lmcache import load_config, translate
from lmkv.config import StoreConfig
from lmkv.errors import ConfigError

GIB = 1024**3


def test_the_usual_example_needs_no_warning() -> None:
    out = translate({"chunk_size": 256, "local_cpu": True, "max_local_cpu_size": 5})
    assert out.settings == {"chunk_size": 256, "ram_capacity": 5 * GIB, "disk_capacity": 0}
    assert out.warnings == []


@pytest.mark.parametrize(
    ("written", "native"),
    [
        ({"max_local_cpu_size": "0.5", "disk_capacity": 7}, {"ram_capacity": GIB // 2, "disk_capacity": 7}),
        ({"local_disk": "file:///data/kv/"}, {"disk_path": "/data/kv/"}),
        ({"local_disk": "/data/kv", "max_local_disk_size": 50}, {"disk_path": "/data/kv", "disk_capacity": 50 * GIB}),
        ({"local_disk": "file://kv/"}, {"disk_path": "kv/"}),
        ({"save_unfull_chunk": "False"}, {"save_partial_chunk": False, "disk_capacity": 0}),
        ({"cache_policy": "LFU"}, {"ram_policy": "lfu", "disk_policy": "lfu", "disk_capacity": 0}),
        ({"blocking_timeout_secs": 3}, {"deadline_seconds": 3.0, "disk_capacity": 0}),
        ({"pin_timeout_sec": 300}, {"lease_seconds": 300.0, "disk_capacity": 0}),
        ({"pre_caching_hash_algorithm": "sha256_cbor_64bit"}, {"key_hash": "sha256", "disk_capacity": 0}),
        (
            {"local_disk": "file:///d", "extra_config": "{'use_odirect': True}"},
            {"disk_path": "/d", "disk_direct": "true"},
        ),
        ({"local_disk": "/d", "extra_config": {"use_odirect": False}}, {"disk_path": "/d", "disk_direct": "false"}),
        ({"ram_capacity": "2GiB"}, {"ram_capacity": "2GiB"}),
        ({"chunk_size": 8}, {"chunk_size": 8}),
        ({}, {}),
    ],
)
def test_keys_that_mean_something(written: dict[str, object], native: dict[str, object]) -> None:
    out = translate(written)
    assert out.settings == native
    assert out.warnings == []
    StoreConfig.from_dict(out.settings)  # a store takes what came out


@pytest.mark.parametrize(
    "key",
    [
        "remote_config_url", "audit_actual_remote_url",
        "nixl_buffer_size", "nixl_buffer_device", "pd_role", "pd_peer_host", "enable_p2p",
        "p2p_init_ports", "enable_controller", "controller_pull_url", "lmcache_worker_ports", "use_layerwise", "gds_path",
        "enable_blending", "enable_xpyd", "internal_api_server_enabled", "weka_path", "enable_async_loading",
        "lookup_timeout_ms",
    ],
)  # fmt: skip
def test_keys_without_effect_are_named(key: str) -> None:
    out = translate({key: "8200"}, where="lmc.yaml")
    assert len(out.warnings) == 1
    assert out.warnings[0].startswith(f"lmc.yaml: {key} ")
    assert " has no effect: " in out.warnings[0]
    assert out.settings == {"disk_capacity": 0}


def test_the_node_of_the_gpu() -> None:
    assert translate({"numa_mode": "auto"}, where="lmc.yaml").settings["ram_numa_node"] == "auto"
    manual = translate({"numa_mode": "manual"}, where="lmc.yaml")
    assert "numa_mode: manual has no effect" in manual.warnings[0]
    assert "ram_numa_node" not in manual.settings
    with pytest.raises(ConfigError, match="expected auto or manual; got 'some'"):
        translate({"numa_mode": "some"}, where="lmc.yaml")


@pytest.mark.parametrize("value", [None, False, "null", "false"])
def test_what_is_switched_off_needs_no_warning(value: object) -> None:
    assert translate({"enable_p2p": value, "remote_url": None}).warnings == []


def test_what_is_understood_only_in_part_is_said() -> None:
    out = translate(
        {
            "local_cpu": False,
            "local_disk": "file:///a,file:///b",
            "pre_caching_hash_algorithm": "blake3",
            "extra_config": "{use_odirect: True, lookup_backoff_time: 0.001, save_chunk_meta: False}",
        }
    )
    assert out.settings == {"disk_paths": ["/a", "/b"], "key_hash": "sha256", "disk_direct": "true", "ram_cache": False}
    text = "\n".join(out.warnings)
    for part in ("blake3", "lookup_backoff_time"):
        assert part in text
    assert "local_cpu" not in text
    assert "save_chunk_meta" not in text
    assert "use_odirect" not in text


@pytest.mark.parametrize(
    ("mapping", "environ", "cache"),
    [
        ({"local_cpu": False, "local_disk": "/a"}, {}, False),
        ({"local_cpu": False, "remote_url": "redis://h"}, {}, False),
        ({"local_cpu": False}, {"LMKV_TIERS": "[{url: redis://h}]"}, False),
        ({"local_cpu": False}, {"LMKV_DISK_CAPACITY": "1GiB"}, False),
        ({"local_cpu": False, "local_disk": "/a"}, {"LMCACHE_LOCAL_CPU": "True"}, True),
        ({"local_cpu": True, "local_disk": "/a"}, {"LMCACHE_LOCAL_CPU": "False"}, False),
        ({"local_cpu": False, "local_disk": "/a"}, {"LMKV_RAM_CACHE": "true"}, True),
        ({"local_cpu": True, "local_disk": "/a"}, {}, True),
    ],
)
def test_without_a_cache_in_ram(tmp_path: Path, mapping: dict[str, object], environ: dict[str, str], cache: bool) -> None:
    path = tmp_path / "lmc.yaml"
    path.write_text(json.dumps(mapping))
    loaded = load_config(path, environ=environ)
    assert loaded.config.ram_cache is cache
    assert not any("local_cpu" in line for line in loaded.warnings)


def test_chunks_have_to_be_kept_somewhere() -> None:
    out = translate({"local_cpu": False, "max_local_cpu_size": 2}, where="lmc.yaml")
    assert out.settings == {"ram_capacity": 2 << 30, "disk_capacity": 0}
    assert out.warnings == ["lmc.yaml: local_cpu: false has no effect: there is no tier behind RAM to keep chunks in"]


def test_a_disk_size_without_a_directory_keeps_nothing_on_disk() -> None:
    out = translate({"max_local_disk_size": 50})
    assert out.settings == {"disk_capacity": 0}
    assert "local_disk names no directory" in out.warnings[0]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"chunk_sise": 256}, "unknown key 'chunk_sise'; did you mean 'chunk_size'"),
        ({"max_local_cpu_sise": 5}, "did you mean 'max_local_cpu_size'"),
        ({"remote_ulr": "x"}, "did you mean 'remote_url'"),
        ({"remote_url": 6379}, "expected a url such as redis://"),
        ({"remote_url": "localhost:6379"}, "got no scheme"),
        ({"remote_url": "redis://h", "remote_serde": "zip"}, "remote_serde: expected one of naive"),
        ({"qqqq": 1}, "known keys: "),
        ({"local_cpu": "perhaps"}, "local_cpu: expected true or false; got 'perhaps'"),
        ({"max_local_cpu_size": "5GB"}, "max_local_cpu_size: expected a number of GiB; got '5GB'"),
        ({"max_local_cpu_size": 0}, "expected more than 0 GiB"),
        ({"max_local_disk_size": -1}, "at least 0"),
        ({"max_local_cpu_size": True}, "expected a number of GiB; got True"),
        ({"local_disk": ["/a"]}, "expected a path or file:///path"),
        ({"local_disk": "file://"}, "expected a path or file:///path"),
        ({"extra_config": "[1, 2]"}, "extra_config: expected keys and values"),
        ({"extra_config": "{a: "}, "expected YAML"),
        ({"ram_capacity": 1, "max_local_cpu_size": 5}, "ram_capacity = 1 and max_local_cpu_size = 5368709120 (both set it)"),
    ],
)
def test_what_is_wrong_is_refused(written: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        translate(written, where="lmc.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("lmc.yaml")


def test_an_unknown_policy_is_refused_by_the_store_config_or_later() -> None:
    assert translate({"cache_policy": "Newest"}).settings["ram_policy"] == "newest"


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    path = tmp_path / "example.yaml"
    path.write_text("chunk_size: 256\nlocal_cpu: true\nmax_local_cpu_size: 5\n", encoding="utf-8")
    return path


def test_later_sources_win(yaml_file: Path) -> None:
    assert load_config(yaml_file, environ={}).config.ram_capacity == 5 * GIB
    environ = {"LMCACHE_MAX_LOCAL_CPU_SIZE": "2", "LMCACHE_CHUNK_SIZE": "8"}
    config = load_config(yaml_file, environ=environ).config
    assert (config.ram_capacity, config.chunk_size) == (2 * GIB, 8)
    environ["LMKV_RAM_CAPACITY"] = "3GiB"
    assert load_config(yaml_file, environ=environ).config.ram_capacity == 3 * GIB
    assert load_config(yaml_file, environ=environ, overrides={"max_local_cpu_size": "1"}).config.ram_capacity == GIB
    assert load_config(yaml_file, environ=environ, overrides={"ram_capacity": "7MiB"}).config.ram_capacity == 7 * 1024**2


@pytest.mark.parametrize("text", ["", "None", "null", '""'])
def test_an_empty_variable_takes_away_what_the_file_says(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lmc.yaml"
    path.write_text("remote_url: redis://h:1\nlocal_disk: /d\nmax_local_disk_size: 5\nextra_config: {use_odirect: true}\n")
    assert [tier.url for tier in load_config(path, environ={}).config.tiers] == ["redis://h:1"]
    assert load_config(path, environ={"LMCACHE_REMOTE_URL": text}).config.tiers == ()
    config = load_config(path, environ={"LMCACHE_LOCAL_DISK": text}).config
    assert (config.disk_path, config.disk_capacity) == (None, 0)
    assert load_config(path, environ={}).config.disk_direct == "true"
    for said in (text, "{}", "{lookup_backoff_time: 0.1}"):  # the bag counts as a whole
        assert load_config(path, environ={"LMCACHE_EXTRA_CONFIG": said}).config.disk_direct == StoreConfig().disk_direct
    assert load_config(path, environ={"LMCACHE_MAX_LOCAL_DISK_SIZE": text}).config.disk_capacity == 5 * GIB
    kept = load_config(path, environ={"LMCACHE_REMOTE_URL": text, "LMKV_TIERS": "[{url: redis://other}]"}).config
    assert [tier.url for tier in kept.tiers] == ["redis://other"]


@pytest.mark.parametrize("quote", ["'", '"', ' "', "'  "])
def test_quotes_that_an_env_file_leaves_around_values(quote: str) -> None:
    """``docker run --env-file`` and some compose files pass them on; LMCache takes them away, too."""
    written = {"CHUNK_SIZE": "64", "LOCAL_CPU": "True", "MAX_LOCAL_CPU_SIZE": "2", "REMOTE_URL": "redis://h:1"}
    written |= {"EXTRA_CONFIG": "{use_odirect: True}", "LOCAL_DISK": "/d"}
    mark = quote.strip()
    environ = {f"LMCACHE_{key}": quote.replace(mark, mark + value + mark) for key, value in written.items()}
    config = load_config(environ=environ).config
    assert (config.chunk_size, config.ram_capacity, config.disk_direct, config.disk_path) == (64, 2 * GIB, "true", "/d")
    assert [tier.url for tier in config.tiers] == ["redis://h:1"]
    several = load_config(environ={"LMCACHE_LOCAL_DISK": "'/a','/b'"}).config.disk_paths
    assert several == ("'/a'", "'/b'")  # two quoted words are not one


def test_files_named_by_the_environment(yaml_file: Path, tmp_path: Path) -> None:
    assert load_config(environ={"LMCACHE_CONFIG_FILE": str(yaml_file)}).config.ram_capacity == 5 * GIB
    other = tmp_path / "native.yaml"
    other.write_text("ram_capacity: 6GiB\n", encoding="utf-8")
    both = {"LMCACHE_CONFIG_FILE": str(yaml_file), "LMKV_CONFIG_FILE": str(other)}
    assert load_config(environ=both).config.ram_capacity == 6 * GIB
    assert load_config(yaml_file, environ=both).config.ram_capacity == 5 * GIB


def test_disk_follows_whoever_asks_for_it(yaml_file: Path) -> None:
    assert load_config(yaml_file, environ={}).config.disk_capacity == 0
    assert load_config(environ={}).config.disk_capacity > 0  # LMKV's own default
    asked = load_config(yaml_file, environ={}, overrides={"disk_path": "/d"}).config
    assert (asked.disk_path, asked.disk_capacity) == ("/d", 10 * GIB)
    assert load_config(yaml_file, environ={"LMKV_DISK_PATH": "/d"}).config.disk_capacity == 10 * GIB
    assert load_config(yaml_file, environ={"LMKV_DISK_CAPACITY": "1GiB"}).config.disk_capacity == GIB
    environ = {"LMCACHE_LOCAL_DISK": "file:///data/kv/", "LMCACHE_MAX_LOCAL_DISK_SIZE": "50", "LMCACHE_LOCAL_CPU": "False"}
    loaded = load_config(environ=environ)
    assert (loaded.config.disk_path, loaded.config.disk_capacity) == ("/data/kv/", 50 * GIB)
    assert loaded.config.ram_cache is False
    assert loaded.warnings == ()


def test_variables_that_steer_other_programs_are_passed_over() -> None:
    environ = {
        "LMCACHE_USE_EXPERIMENTAL": "True",
        "LMCACHE_LOG_LEVEL": "DEBUG",
        "LMCACHE_EC_ANY": "1",
        "LMKV_TOKEN": "t",
        "HOME": "/",
        "LMCACHE_EXTRA_CONFIG": "{use_odirect: True}",
    }
    loaded = load_config(environ=environ)
    assert len(loaded.warnings) == 1
    assert "use_odirect" in loaded.warnings[0]


@pytest.mark.parametrize(
    ("variable", "near"), [("LMCACHE_CHUNKSIZE", "LMCACHE_CHUNK_SIZE"), ("LMKV_RAM_CAPACITI", "LMKV_RAM_CAPACITY")]
)
def test_unknown_variables_are_refused(variable: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown variable {variable}; did you mean {near}"):
        load_config(environ={variable: "1"})


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a readable YAML file"):
        load_config(tmp_path / "none.yaml", environ={})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("enable_xpyd", "enable_pd"),
        ("nixl_role", "pd_role"),
        ("nixl_peer_host", "pd_peer_host"),
        ("nixl_peer_init_port", "pd_peer_init_port"),
        ("nixl_peer_alloc_port", "pd_peer_alloc_port"),
        ("nixl_proxy_host", "pd_proxy_host"),
        ("nixl_proxy_port", "pd_proxy_port"),
        ("controller_url", "controller_pull_url"),
        ("lmcache_worker_port", "lmcache_worker_ports"),
        ("plugin_locations", "runtime_plugin_locations"),
        ("external_backends", "storage_plugins"),
    ],
)
def test_old_spellings_are_understood(old: str, new: str) -> None:
    (line,) = translate({old: "8200"}).warnings
    assert f"{old} ({new} by now) has no effect: " in line
    value = {"nixl_role": "both", "enable_xpyd": "true"}.get(old, "1")
    extra = {"LMCACHE_PD_ROLE": "both"} if old == "enable_xpyd" else {}
    warnings = load_config(environ={f"LMCACHE_{old.upper()}": value, **extra}).warnings
    assert any(f"{old} ({new} by now)" in line for line in warnings)


def test_old_spellings_mean_what_the_new_ones_do() -> None:
    old = {"enable_xpyd": True, "nixl_role": "receiver", "nixl_peer_init_port": [7300, 7301], "nixl_peer_host": "h"}
    old |= {"enable_controller": True, "controller_url": "localhost:8300", "lmcache_worker_port": "8500,8501"}
    peers = load_config(environ={}, overrides=old).peers
    assert (peers.role, peers.hosts, peers.controller) == ("receiver", {"peer": "h"}, ("localhost:8300",))
    assert peers.ports == {"pd_peer_init": (7300, 7301), "lmcache_worker": (8500, 8501)}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"pd_role": "chief"}, "pd_role: expected one of sender, receiver, both; got 'chief'"),
        ({"enable_pd": True}, "pd_role: expected one of sender, receiver, both with enable_pd; got none"),
        ({"p2p_init_ports": "82x"}, "p2p_init_ports: expected a port or a list of ports; got '82x'"),
        ({"p2p_init_ports": [0]}, "expected a port"),
        ({"lmcache_worker_ports": []}, "expected a port"),
        ({"pd_buffer_size": "1GB"}, "pd_buffer_size: expected a number of bytes"),
    ],
)
def test_roles_and_ports_that_are_none_are_refused(written: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(environ={}, overrides=written)


KEYS = (Path(__file__).parents[2] / "fixtures" / "lmcache-keys.txt").read_text(encoding="utf-8").splitlines()
VALUES = {
    "bool": "True", "int": "7", "float": "2.5", "str": "x", "dict": "{}", "list[float]": "[0.1]", "list[int]": "[1, 2]",
    "list[str]": "[a]", "local_disk": "/d", "remote_url": "redis://h", "remote_serde": "naive", "cache_policy": "LRU",
    "numa_mode": "auto", "pd_role": "sender", "pre_caching_hash_algorithm": "builtin",
}  # fmt: skip
#: Keys whose usual value is what LMKV does anyway.
QUIET = {"local_cpu", "remote_serde", "extra_config"}


@pytest.mark.parametrize("line", [line for line in KEYS if line.startswith("key ")])
def test_every_key_of_lmcache_has_a_meaning_or_a_way(line: str) -> None:
    """Of 0.3.9.post2, 0.3.15 and 0.5.6, as a file's value and as a variable."""
    _, key, kind = line.split()
    text = VALUES.get(key) or VALUES[kind]
    with_role = {"pd_role": "sender"} if key == "enable_pd" else {}
    for environ, mapping in ({f"LMCACHE_{key.upper()}": text}, {}), ({}, {key: yaml.safe_load(text)}):
        loaded = load_config(environ=environ, overrides={**mapping, **with_role})
        said = [found for found in loaded.warnings if key in found]
        means = loaded.given - {"disk_capacity"}
        assert means or said or key in QUIET
        assert not any("LMKV has no use for it" in found or "nothing in LMKV" in found for found in said)
        assert not (means and said), (means, said)


@pytest.mark.parametrize("line", [line for line in KEYS if line.startswith("extra ")])
def test_every_key_of_the_bag_has_a_meaning_or_a_way(line: str) -> None:
    _, key, *urls = line.split()
    value: object = {"a": 1} if key == "nixl_backend_params" else "1"
    extra = {key: value} | ({"nixl_path": "/d"} if key == "enable_nixl_storage" else {})
    loaded = load_config(environ={}, overrides={"local_disk": "/d", "extra_config": extra})
    if key not in ("use_odirect", "enable_nixl_storage"):
        (said,) = loaded.warnings
        assert f"extra_config.{key} has no effect: " in said
        assert "LMKV has no use for it" not in said
    for url in urls:  # storages that it belongs to
        loaded = load_config(environ={}, overrides={"remote_url": url, "extra_config": extra})
        assert not any(key in found for found in loaded.warnings)


@pytest.mark.parametrize("line", [line for line in KEYS if line.startswith("env ")])
def test_variables_of_lmcaches_other_programs_are_passed_over(line: str) -> None:
    assert load_config(environ={line.split()[1]: "1"}).warnings == ()
