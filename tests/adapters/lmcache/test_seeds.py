"""The configurations of guides to LMCache, as people copy them: each is loaded, and means here what its text says."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import known_kv
import pytest
import yaml

import lmkv
from lmkv.adapters.lmcache import load_config
from lmkv.adapters.lmcache.config import Loaded
from lmkv.adapters.lmcache.serve import parse_arguments
from lmkv.backends.disk.survey import survey
from lmkv.config import StoreConfig, parse_bytes

SEEDS = Path(__file__).parents[2] / "fixtures" / "seeds"
GIB = 1024**3
DEFAULT_RAM = StoreConfig().ram_capacity
#: Name of a configuration -> chunk size, GiB of RAM (0: the default), tier as (backend, url or what options say, codec).
MEANINGS: dict[str, tuple[int | None, float, tuple[str, str, str] | None]] = {
    "cpu-80": (256, 80, None),
    "cpu-5": (256, 5, None),
    "sglang": (8, 10, None),
    "shared-server": (256, 0, ("lm", "lm://localhost:65432", "lossless")),
    "compose-server": (256, 0, ("lm", "lm://lmcache-server:65432", "lossless")),
    "lmcache-server": (256, 0, ("lm", "lm://localhost:65432", "naive")),
    "p2p-1": (256, 5, None),
    "p2p-2": (256, 5, None),
    "pd-prefiller": (None, 0, None),
    "pd-decoder": (None, 0, None),
    "redis": (256, 0, ("redis", "redis://localhost:6379", "naive")),
    "redis-offload": (256, 0, ("redis", "redis://your-redis-host:6379", "naive")),
    "redis-sentinel": (
        256,
        0,
        ("redis-sentinel", "redis-sentinel://localhost:26379,localhost:26380,localhost:26381", "naive"),
    ),
    "mooncake": (16, 2, ("mooncakestore", "mooncakestore://localhost:50051/", "naive")),
    "mooncake-decoder": (16, 2, ("mooncakestore", "mooncakestore://mooncake-master:50052/", "naive")),
    "mooncake-prefiller": (16, 2, ("mooncakestore", "mooncakestore://mooncake-master:50052/", "naive")),
    "infinistore": (256, 5, ("infinistore", "infinistore://127.0.0.1:12345/?device=mlx5_1", "naive")),
    "nixl-posix": (256, 0, ("nixl", "", "raw")),
    "nixl-obj": (256, 0, ("s3", "s3://<your_bucket>", "raw")),
}


def words(text: str) -> list[str]:
    return text.split()


#: Words that the warnings of a configuration have, one for each warning; the others need none.
WARNINGS = {
    "sglang": ["use_layerwise"],
    "shared-server": ["cachegen is not here: lossless"],
    "compose-server": ["cachegen is not here: lossless"],
    "p2p-1": words(
        """p2p_host p2p_init_ports p2p_lookup_ports enable_p2p transfer_channel enable_controller lmcache_instance_id
        controller_pull_url controller_reply_url lmcache_worker_ports lookup_backoff_time enable_async_loading"""
    ),
    "pd-prefiller": words(
        "local_cpu enable_pd transfer_channel pd_role pd_proxy_host pd_proxy_port pd_buffer_size pd_buffer_device"
    ),
    "pd-decoder": words(
        """local_cpu enable_pd transfer_channel pd_role pd_peer_host pd_peer_init_port pd_peer_alloc_port pd_buffer_size
        pd_buffer_device"""
    ),
    "nixl-obj": ["OBJ is served by s3://"],
}
WARNINGS["p2p-2"] = WARNINGS["p2p-1"]
#: Files of ``docker compose``, with how many of their services read a configuration.
COMPOSE = {"docker-compose-server": 2, "docker-compose-mooncake": 2}


def load(name: str, environ: dict[str, str] | None = None) -> Loaded:
    return load_config(SEEDS / f"{name}.yaml", environ=environ or {})


def test_none_is_forgotten() -> None:
    assert {path.stem for path in SEEDS.glob("*.yaml")} == {*MEANINGS, *COMPOSE}


@pytest.mark.parametrize("name", MEANINGS)
def test_tiers_sizes_and_encodings(name: str) -> None:
    chunk_size, ram, tier = MEANINGS[name]
    config = load(name).config
    assert config.chunk_size == chunk_size
    assert config.ram_capacity == (int(ram * GIB) or DEFAULT_RAM)
    assert config.disk_capacity == 0  # none of them asks for a disk
    assert config.ram_cache is not name.startswith(("mooncake", "infinistore"))  # the others say nothing, or name no tier
    assert [(found.backend, found.url, found.codec) for found in config.tiers] == ([tier] if tier else [])


@pytest.mark.parametrize("name", MEANINGS)
def test_what_is_said_about_them(name: str) -> None:
    warnings, wanted = list(load(name).warnings), WARNINGS.get(name, [])
    for words in wanted:
        assert any(words in line for line in warnings), (words, warnings)
    assert len(warnings) == len(wanted), warnings
    assert all(line.startswith(str(SEEDS / name)) for line in warnings)


def test_options_of_the_storages() -> None:
    options = {name: load(name).config.tiers[0].options for name in MEANINGS if MEANINGS[name][2]}
    deadlines = {name: load(name).config.tiers[0].deadline_seconds for name in options}
    common = {"protocol": "tcp", "global_segment_size": 30 * GIB, "local_buffer_size": GIB}
    common |= {"metadata_server": "http://mooncake-master:8080/metadata", "master_server_address": "mooncake-master:50052"}
    for role in ("decoder", "prefiller"):
        assert options[f"mooncake-{role}"] == {"local_hostname": role, **common}
        assert deadlines[f"mooncake-{role}"] == 1
    assert options["mooncake"]["global_segment_size"] == 20 * GIB
    assert options["mooncake"]["prefer_local_alloc"] is True
    assert options["nixl-posix"] == {"plugin": "POSIX", "path": "/mnt/nixl/cache/", "direct_io": True}
    secrets = {"access_key_id": "<your_access_key>", "secret_access_key": "<your_secret_key>", "region": "<your_region>"}
    assert options["nixl-obj"] == secrets
    assert load("mooncake").config.key_hash == "sha256"
    assert load("mooncake").config.save_partial_chunk is True


def test_roles_hosts_and_ports() -> None:
    for number, (init, lookup, worker) in enumerate([(8200, 8201, 8500), (8202, 8203, 8501)], 1):
        peers = load(f"p2p-{number}").peers
        assert peers.shares
        assert peers.role == ""
        assert peers.hosts == {"p2p": "localhost"}
        assert peers.ports == {"p2p_init": (init,), "p2p_lookup": (lookup,), "lmcache_worker": (worker,)}
        assert (peers.instance, peers.channel) == (f"lmcache_instance_{number}", "nixl")
        assert peers.controller == ("localhost:8300", "localhost:8400")
    prefiller, decoder = load("pd-prefiller").peers, load("pd-decoder").peers
    assert (prefiller.role, decoder.role) == ("sender", "receiver")
    assert (prefiller.hosts, prefiller.ports) == ({"proxy": "localhost"}, {"pd_proxy": (7500,)})
    assert (decoder.hosts, decoder.ports) == ({"peer": "localhost"}, {"pd_peer_init": (7300,), "pd_peer_alloc": (7400,)})
    for peers in (prefiller, decoder):
        assert (peers.buffer_bytes, peers.buffer_device, peers.channel) == (GIB, "cuda", "nixl")
        assert not peers.shares
        assert peers.controller == ()


def test_every_example_of_a_remote_url() -> None:
    lines = (SEEDS / "remote-urls.txt").read_text().splitlines()
    found = {}
    for line in lines:
        loaded = load_config(environ={}, overrides=yaml.safe_load(line))
        found[line.split('"')[1]] = [tier.backend for tier in loaded.config.tiers] or list(loaded.warnings)
    scheme = {url.partition(":")[0]: backends for url, backends in found.items()}
    for name in ("redis", "redis-sentinel", "lm", "mooncakestore", "infinistore"):
        assert scheme[name] == [name]
    assert len(lines) == 5


# -- environments --------------------------------------------------------------------------------------------------------------


def of_shell(path: Path, uncomment: str = "") -> dict[str, str]:
    """The variables that a shell has after the lines of a file, of which one may be uncommented."""
    text = path.read_text(encoding="utf-8")
    for line in text.splitlines():
        if uncomment and uncomment in line:
            text = text.replace(line, line.removeprefix("# "))
    script = f"cd /tmp\nunset $(env | awk -F= '/^LMCACHE_/ {{print $1}}')\n{text}\nenv -0"
    done = subprocess.run(["bash", "-c", script], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True)
    pairs = (entry.partition("=") for entry in done.stdout.split("\0") if entry)
    return {name: value for name, _, value in pairs if name.startswith("LMCACHE_")}


def test_an_environment_of_memory() -> None:
    loaded = load_config(environ=of_shell(SEEDS / "env-memory.sh"))
    assert (loaded.config.chunk_size, loaded.config.ram_capacity, loaded.config.disk_capacity) == (256, 50 * GIB, 0)
    assert loaded.warnings == ()


def test_an_environment_of_a_disk_with_values_that_a_shell_took_the_quotes_from() -> None:
    environ = of_shell(SEEDS / "env-disk.sh")
    assert environ["LMCACHE_EXTRA_CONFIG"] == "{use_odirect: True}"
    loaded = load_config(environ=environ)
    config = loaded.config
    assert (config.chunk_size, config.disk_path, config.disk_capacity) == (256, "/data/models/lmcache/", 50 * GIB)
    assert config.disk_direct == "true"
    assert config.ram_cache is False
    assert loaded.warnings == ()


@pytest.mark.parametrize(("name", "host"), [("env-redis", "x.x.x.x"), ("env-redis-offload", "your-redis-host")])
@pytest.mark.parametrize("scheme", ["redis", "redis-sentinel", "lm"])
def test_environments_of_remote_storage(name: str, host: str, scheme: str) -> None:
    environ = of_shell(SEEDS / f"{name}.sh", "" if scheme == "redis" else f'"{scheme}://')
    loaded = load_config(environ=environ)
    (tier,) = loaded.config.tiers
    sentinels = "redis-sentinel://localhost:26379,localhost:26380,localhost:26381"
    urls = {"redis": f"redis://{host}:6379", "redis-sentinel": sentinels, "lm": "lm://localhost:65432"}
    assert (tier.backend, tier.url, tier.codec) == (scheme, urls[scheme], "naive")
    assert loaded.config.chunk_size == 256
    assert loaded.warnings == ()


def test_an_environment_that_names_a_file(tmp_path: Path) -> None:
    environ = of_shell(SEEDS / "env-sglang.sh")
    assert environ == {"LMCACHE_USE_EXPERIMENTAL": "True", "LMCACHE_CONFIG_FILE": "/tmp/lmc_config.yaml"}
    environ["LMCACHE_CONFIG_FILE"] = str(SEEDS / "sglang.yaml")
    assert load_config(environ=environ).config.ram_capacity == 10 * GIB


@pytest.mark.parametrize(("name", "ram"), [("env-offline", 5), ("env-offloading-script", 15)])
def test_environments_that_python_sets(name: str, ram: int) -> None:
    code = f"{(SEEDS / f'{name}.py').read_text()}\nprint(dict(os.environ))"
    done = subprocess.run([sys.executable, "-c", code], env={}, capture_output=True, text=True, check=True)
    environ = {key: value for key, value in eval(done.stdout).items() if key.startswith("LMCACHE_")}
    assert len(environ) == 3
    loaded = load_config(environ=environ)
    assert (loaded.config.chunk_size, loaded.config.ram_capacity) == (256, ram * GIB)
    assert loaded.warnings == ()


FILES = {
    "./backend_cpu.yaml": "cpu-80",
    "lmcache_config.yaml": "cpu-5",
    "/etc/lmcache_config.yaml": "compose-server",
    "$YAML_FILES/p2p_example1.yaml": "p2p-1",
    "$YAML_FILES/p2p_example2.yaml": "p2p-2",
    "lmcache-decoder-config.yaml": "pd-decoder",
    "lmcache-prefiller-config.yaml": "pd-prefiller",
    "redis.yaml": "redis",
    "redis-sentinel.yaml": "redis-sentinel",
    "lmcache-server.yaml": "lmcache-server",
    "mooncake-config.yaml": "mooncake",
    "infinistore-config.yaml": "infinistore",
    "/app/mooncake-prefiller-config.yaml": "mooncake-prefiller",
    "/app/mooncake-decoder-config.yaml": "mooncake-decoder",
}


def variables_before_commands() -> list[dict[str, str]]:
    lines = (SEEDS / "env-commands.txt").read_text().splitlines()
    found = [dict(word.split("=", 1) for word in shlex.split(line)) for line in lines]
    services = [service for name in COMPOSE for service in services_of(name).values()]
    return found + [dict(word.split("=", 1) for word in service.get("environment", ())) for service in services]


def services_of(name: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load((SEEDS / f"{name}.yaml").read_text(encoding="utf-8"))["services"]
    return found


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_files(name: str) -> None:
    listed = (SEEDS / "commands.txt").read_text(encoding="utf-8").splitlines()
    configured = 0
    for service in services_of(name).values():
        assert " ".join(service["command"].split()) in listed  # and so a row of the page
        environ = dict(word.split("=", 1) for word in service.get("environment", ()))
        file = environ.get("LMCACHE_CONFIG_FILE", "")
        configured += bool(file)
        assert not file or any(volume.endswith(f":{file}") for volume in service["volumes"])
    assert configured == COMPOSE[name]


def test_the_server_of_a_compose_file_fits_its_container() -> None:
    service = services_of("docker-compose-server")["lmcache-server"]
    *_, command = service["command"].split("&&")
    assert command.split()[0] == "lmcache_server"
    options = parse_arguments([*command.split()[1:], "--insecure"], {})  # which lmcache_server is given by lmkv run
    assert (options.host, options.port) == ("0.0.0.0", 65432)
    assert service["ports"] == ["65432:65432"]
    assert options.capacity < parse_bytes(service["deploy"]["resources"]["limits"]["memory"].replace("G", "GiB"))
    clients = [services_of("docker-compose-server")[f"vllm-instance-{number}"] for number in (1, 2)]
    url = load(FILES[clients[0]["environment"][0].partition("=")[2]]).config.tiers[0].url
    assert url == f"lm://{service['container_name']}:{options.port}"


def test_variables_in_front_of_commands_and_in_compose_files() -> None:
    sets = variables_before_commands()
    for environ in sets:
        name = environ.get("LMCACHE_CONFIG_FILE")
        if name is None:
            loaded = load_config(environ=environ)
            assert loaded.config.chunk_size == (8 if "LMCACHE_CHUNK_SIZE" in environ else None)
            assert loaded.warnings == ()
        else:
            here = {**environ, "LMCACHE_CONFIG_FILE": str(SEEDS / f"{FILES[name]}.yaml")}
            assert load_config(environ=here).config == load(FILES[name]).config
    assert {environ.get("LMCACHE_CONFIG_FILE") for environ in sets} == {*FILES, None}


def test_a_directory_in_which_lmcache_kept_its_values(tmp_path: Path) -> None:
    """The guides' ``local_disk``, switched to LMKV and back: both lie there, and nobody touches what is another's."""
    environ = of_shell(SEEDS / "env-disk.sh")
    environ |= {"LMCACHE_LOCAL_DISK": f"file://{tmp_path}/", "LMCACHE_MAX_LOCAL_DISK_SIZE": "0.1"}
    names = [line for line in (SEEDS / "logs.txt").read_text(encoding="utf-8").splitlines() if line.endswith(".pt")]
    names += ["a-model@1@0@-7542097a982a0d29@half.pt", "a-model@0x1@0@ab12.data"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    layout = lmkv.KVLayout.dense(layers=2, heads=2, head_size=8, dtype="float16", chunk_tokens=256)
    text = list(range(600))
    for held in (0, 600):
        config = load_config(environ=environ, overrides={"model": "m", "ram_capacity": "16MiB"}).config
        with lmkv.Store(config, layout) as store:
            match = store.lookup(text).wait(10)
            assert match.hit_tokens == held
            assert store.store(text, known_kv.source(layout, text)) == 600 - held
            assert store.flush(30)
        assert all((tmp_path / name).read_bytes() == name.encode() for name in names)
    found = survey(tmp_path)
    assert found.bytes_on_disk == sum(path.stat().st_size for path in tmp_path.iterdir() if path.name not in names)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.pt").write_bytes(b"")  # no key of LMCache's
    config = load_config(environ={**environ, "LMCACHE_LOCAL_DISK": str(tmp_path / "other")}, overrides={"model": "m"}).config
    with pytest.raises(lmkv.ConfigError, match=r"it holds 'letter\.pt'"):
        lmkv.Store(config, layout)
