"""LMCache's remote storage keys: what tier they become, and that the usual configurations run as they are."""

from __future__ import annotations

import sys
from pathlib import Path

import infinistores
import known_kv
import lm_servers
import mooncakes
import pytest
import servers
import weed

import lmkv
from lmkv.adapters.lmcache import load_config, translate

SEEDS = Path(__file__).parents[2] / "fixtures" / "seeds"
TEXT = list(range(600))


def run(path: Path, environ: dict[str, str] | None = None, tier: str = "remote") -> None:
    """What one store keeps under a configuration another finds."""
    config = load_config(path, environ=environ or {}, overrides={"model": "m"}).config
    layout = lmkv.KVLayout.dense(layers=2, heads=2, head_size=8, dtype="float16", chunk_tokens=config.chunk_size or 256)
    for stored in (600, 0):
        with lmkv.Store(config, layout) as store:
            match = store.lookup(TEXT).wait(10)
            assert match.hit_tokens == 600 - stored
            if stored:
                assert store.store(TEXT, known_kv.source(layout, TEXT)) == 600
            else:
                assert match.tokens_by_tier() == {tier: 600}
                assert known_kv.fetch(store, TEXT, match) == 600


def with_endpoint(name: str, tmp_path: Path, *replacements: tuple[str, str]) -> Path:
    text = (SEEDS / name).read_text(encoding="utf-8")
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_redis_runs(tmp_path: Path) -> None:
    with servers.RedisServer(tmp_path) as server:
        run(with_endpoint("redis.yaml", tmp_path, ("redis://localhost:6379", server.url)))
        server.client().flushall()
        run(Path("/dev/null"), {"LMCACHE_REMOTE_URL": server.url, "LMCACHE_REMOTE_SERDE": "naive"})
        server.client().flushall()
        run(with_endpoint("redis.yaml", tmp_path, ("redis://localhost:6379", server.url), ("naive", "cachegen")))


def test_redis_sentinel_runs(tmp_path: Path) -> None:
    with servers.redis_sentinels(tmp_path) as (_, _, url):
        old = "redis-sentinel://localhost:26379,localhost:26380,localhost:26381"
        run(with_endpoint("redis-sentinel.yaml", tmp_path, (old, url)))


@pytest.mark.parametrize(
    ("name", "host", "port", "size"),
    [("mooncake", "localhost", 50051, 20 << 30), ("mooncake-decoder", "mooncake-master", 50052, 30 << 30)],
)
def test_mooncake_runs(tmp_path: Path, name: str, host: str, port: int, size: int) -> None:
    with mooncakes.MooncakeMaster(tmp_path) as master:
        address = f"127.0.0.1:{master.port}"
        path = with_endpoint(
            f"{name}.yaml",
            tmp_path,
            (f"{host}:{port}", address),
            (f"http://{host}:8080/metadata", "P2PHANDSHAKE"),
            (str(size), str(64 << 20)),  # a test machine has less memory
            (
                'local_hostname: "localhost"' if host == "localhost" else 'local_hostname: "decoder"',
                'local_hostname: "127.0.0.1"',
            ),
        )
        config = load_config(path, environ={}, overrides={"model": "m"}).config
        layout = lmkv.KVLayout.dense(layers=2, heads=2, head_size=8, dtype="float16", chunk_tokens=16)
        with lmkv.Store(config, layout) as prefiller, lmkv.Store(config, layout) as decoder:  # each lends memory while it lives
            assert prefiller.lookup(TEXT).wait(10).hit_tokens == 0
            assert prefiller.store(TEXT, known_kv.source(layout, TEXT)) == 600
            assert prefiller.flush(30)
            # the clients' first exchange may take longer than the deadline of 1 s that one of the configurations sets
            servers.until(lambda: known_kv.fetch(decoder, TEXT, decoder.lookup(TEXT).wait(10)) == 600)
            assert decoder.stats().tiers[1].read_chunks == 38
        warnings = load_config(path, environ={}).warnings
        assert all("extra_config" not in line for line in warnings), warnings


def test_nixl_posix_runs(tmp_path: Path) -> None:
    path = with_endpoint("nixl-posix.yaml", tmp_path, ("/mnt/nixl/cache/", str(tmp_path / "cache")))
    assert load_config(path, environ={}).warnings == ()
    run(path, tier="nixl")
    assert any((tmp_path / "cache").rglob("*"))


def test_nixl_obj_runs_on_a_bucket(tmp_path: Path) -> None:
    with weed.s3_server(tmp_path) as server:
        path = with_endpoint(
            "nixl-obj.yaml",
            tmp_path,
            ("<your_access_key>", weed.ACCESS),
            ("<your_secret_key>", weed.SECRET),
            ("<your_bucket>", "kv-cache"),
            ("<your_region>", f"us-east-1\n    endpoint_override: {server.endpoint}"),
        )
        (line,) = load_config(path, environ={}).warnings
        assert "OBJ is served by s3://" in line
        assert weed.SECRET not in repr(load_config(path, environ={}))
        run(path, tier="nixl")


def test_infinistore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a double of its server and client: a real one needs an RDMA device."""
    double = infinistores.RdmaDouble()
    monkeypatch.setitem(sys.modules, "infinistore", double)
    with infinistores.ControlDouble(double.values) as control:
        run(with_endpoint("infinistore.yaml", tmp_path, ("127.0.0.1:12345", f"127.0.0.1:{control.port}")))
    assert double.last["dev_name"] == "mlx5_1"
    assert double.last["link_type"] == "Ethernet"
    assert any(name.startswith("lmkv-") for name in double.values.held)
    (tier,) = load_config(
        environ={}, overrides={"remote_url": "infinistore://h:1", "extra_config": {"infinistore_link_type": "IB"}}
    ).config.tiers
    assert tier.options == {"link_type": "IB"}


def test_a_master_of_another_name() -> None:
    def master(url: str, environ: dict[str, str]) -> object:
        (tier,) = load_config(environ=environ, overrides={"remote_url": url}).config.tiers
        return tier.options.get("master")

    named = {"REDIS_SERVICE_NAME": "other"}
    assert master("redis-sentinel://a:26379,b:26379", named) == "other"
    assert master("redis-sentinel://a:26379,b:26379", {}) is None
    assert master("redis-sentinel://a:26379?master=third", named) is None, "the URL's own wins"
    assert master("redis://a:6379", named) is None


@pytest.mark.parametrize("name", ["mooncake_prefer_local_alloc", "prefer_local_alloc"])
def test_both_names_of_the_local_allocation(name: str) -> None:
    loaded = load_config(environ={}, overrides={"remote_url": "mooncakestore://m:50051", "extra_config": {name: True}})
    (tier,) = loaded.config.tiers
    assert tier.options == {"prefer_local_alloc": True}
    assert not any(name in line for line in loaded.warnings)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"nixl_backend": "POSIX"}, "nixl_path: expected the directory"),
        ({"nixl_backend": "OBJ"}, "expected the bucket"),
        ({"nixl_backend": "UCX"}, "peer_listen there"),
        ({"nixl_path": "/x", "nixl_backend_params": 3}, "nixl_backend_params: expected keys and values"),
    ],
)
def test_nixl_storage_without_a_place_is_refused(extra: dict[str, object], message: str) -> None:
    with pytest.raises(lmkv.ConfigError, match=message):
        translate({"extra_config": {"enable_nixl_storage": True, **extra}})


def test_an_lm_server_runs(tmp_path: Path) -> None:
    with lm_servers.running() as server:
        run(with_endpoint("lmcache-server.yaml", tmp_path, ("localhost:65432", f"127.0.0.1:{server.address[1]}")))
        assert server.shelf.stats()["values"] == 3


@pytest.mark.parametrize(
    ("written", "tier"),
    [
        ({"remote_url": "redis://h:1"}, {"url": "redis://h:1", "codec": "naive"}),
        ({"remote_url": "redis://h:1", "remote_serde": "lossless"}, {"url": "redis://h:1", "codec": "lossless"}),
        (
            {"remote_url": "redis://h:1", "blocking_timeout_secs": 4},
            {"url": "redis://h:1", "codec": "naive", "deadline_seconds": 4.0},
        ),
        (
            {"remote_url": "s3://bucket/kv", "extra_config": {"s3_region": "eu-west-1"}},
            {"url": "s3://bucket/kv", "codec": "naive", "options": {"region": "eu-west-1"}},
        ),
        (
            {"remote_url": "valkey://h:1", "extra_config": {"valkey_password": "p", "valkey_database": 2}},
            {"url": "valkey://h:1", "codec": "naive", "options": {"password": "p", "db": 2}},
        ),
    ],
)
def test_what_becomes_of_the_keys(written: dict[str, object], tier: dict[str, object]) -> None:
    out = translate(written)
    assert out.settings["tiers"] == [{"name": "remote", "options": {}, **tier}], out
    assert out.warnings == []
    lmkv.StoreConfig.from_dict(out.settings)


def test_cachegen_is_replaced_by_lossless_with_a_warning() -> None:
    out = translate({"remote_url": "redis://h:1", "remote_serde": "cachegen"}, where="lmc.yaml")
    assert out.settings["tiers"][0]["codec"] == "lossless"  # type: ignore[index]
    assert any("lmc.yaml: remote_serde: cachegen is not here" in line for line in out.warnings)


def test_an_encoding_without_a_place_needs_no_tier() -> None:
    assert "tiers" not in translate({"remote_serde": "naive"}).settings


def test_url_and_encoding_may_come_from_different_places(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("remote_url: redis://h:1\n")
    (tier,) = load_config(path, environ={"LMCACHE_REMOTE_SERDE": "lossless"}).config.tiers
    assert (tier.url, tier.codec) == ("redis://h:1", "lossless")
    (tier,) = load_config(path, environ={"LMCACHE_REMOTE_URL": "redis://other:2"}).config.tiers
    assert tier.url == "redis://other:2"


def test_it_stands_behind_the_tiers_that_are_listed(tmp_path: Path) -> None:
    out = translate({"remote_url": "redis://h:1", "tiers": [{"backend": "memory"}]})
    assert [tier.name for tier in lmkv.StoreConfig.from_dict(out.settings).tiers] == ["memory", "remote"]
    loaded = load_config(environ={"LMCACHE_REMOTE_URL": "redis://h:1", "LMKV_TIERS": "[{backend: memory}]"})
    assert [tier.name for tier in loaded.config.tiers] == ["memory"]
    assert any("LMCACHE_REMOTE_URL" in line and "LMKV_TIERS" in line for line in loaded.warnings)


def test_passwords_are_not_shown() -> None:
    loaded = load_config(environ={"LMCACHE_REMOTE_URL": "redis://user:hush@h:1"})
    assert "hush" not in repr(loaded)


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("redis-sentinel://a:1,b:2", {"master": "prod"}), ("redis-sentinel://a:1?master=other", {}), ("redis://a:1", {}),
    ],
)  # fmt: skip
def test_the_name_that_sentinels_are_asked_for(url: str, options: dict[str, str]) -> None:
    environ = {"LMCACHE_REMOTE_URL": url, "REDIS_SERVICE_NAME": "prod"}
    (tier,) = load_config(environ=environ).config.tiers
    assert dict(tier.options) == options


AMAZON = {"s3_region": "us-east-1", "s3_num_io_threads": 64}


@pytest.mark.parametrize(
    ("url", "extra", "wanted", "options"),
    [
        ("fs://host:0/mnt/kv", {"fs_connector_relative_tmp_dir": "tmp"}, "file:///mnt/kv", {}),
        ("resp://h:6379", {"username": "u", "resp_num_threads": 8}, "redis://h:6379", {"username": "u"}),
        ("REDIS://h:6379", {}, "redis://h:6379", {}),
        ("valkey://h:1", {"valkey_database": 2}, "valkey://h:1", {"db": 2}),
        (
            "valkey://a:1,valkey://b:2",
            {"valkey_mode": "cluster", "valkey_username": "u"},
            "redis-cluster://a:1,b:2",
            {"username": "u"},
        ),
        ("s3://b.s3.eu-west-1.amazonaws.com", AMAZON, "s3://b", {"region": "us-east-1", "concurrency": 64}),
        ("s3://b.s3.eu-west-1.amazonaws.com", {}, "s3://b", {"region": "eu-west-1"}),
        ("s3://my.b.s3-us-west-2.amazonaws.com/p", {}, "s3://my.b/p", {"region": "us-west-2"}),
        ("s3://b.s3.amazonaws.com", AMAZON, "s3://b", {"region": "us-east-1", "concurrency": 64}),
        (
            "s3://b.minio.lan:9000",
            {"s3_region": "us-east-1", "disable_tls": True},
            "s3://b",
            {"region": "us-east-1", "endpoint": "http://b.minio.lan:9000", "virtual_hosted_style_request": "true"},
        ),
        ("s3://b", AMAZON, "s3://b", {"region": "us-east-1", "concurrency": 64}),
        ("s3://my.bucket/prefix", {}, "s3://my.bucket/prefix", {}),
    ],
)
def test_urls_that_only_lmcache_has(url: str, extra: dict[str, object], wanted: str, options: dict[str, object]) -> None:
    loaded = load_config(environ={}, overrides={"remote_url": url, "extra_config": extra})
    assert [(tier.url, dict(tier.options)) for tier in loaded.config.tiers] == [(wanted, options)]
    assert loaded.warnings == ()


def test_urls_that_stand_before_another_or_before_none() -> None:
    for given in ({"audit_actual_remote_url": "fs://h:0/d"}, {"extra_config": {"audit_actual_remote_url": "fs://h:0/d"}}):
        loaded = load_config(environ={}, overrides={"remote_url": "audit://h:1?verify=true", **given})
        assert [tier.url for tier in loaded.config.tiers] == ["file:///d"]
        (line,) = loaded.warnings
        assert "audit:// is left out" in line
    loaded = load_config(environ={}, overrides={"remote_url": "blackhole://h:1"})
    assert loaded.config.tiers == ()
    assert "keeps nothing" in loaded.warnings[0]
    loaded = load_config(environ={}, overrides={"remote_url": "s3://b.s3express-use1-az4.us-east-1.amazonaws.com"})
    assert [tier.url for tier in loaded.config.tiers] == ["s3://b"]
    assert "S3 Express" in loaded.warnings[0]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("fs://h:0", "expected one directory"),
        ("fs://h:0/a,/b", "expected one directory"),
        ("audit://h:1", "expected audit_actual_remote_url"),
        ("external://h:0/m", "docs/writing-a-backend.md"),
        ("plugin://x", "docs/writing-a-backend.md"),
        ("eic://h:1", "redis:// or s3://"),
        ("hf3fs://h/x", "plugin: HF3FS"),
        ("mock://100", "tests of LMCache's"),
        ("sagemaker-hyperpod://h", "another slow tier"),
    ],
)
def test_storages_that_lmkv_does_not_have(url: str, message: str) -> None:
    with pytest.raises(lmkv.ConfigError, match=message):
        load_config(environ={}, overrides={"remote_url": url})


def test_a_directory_of_lmcaches_fs_runs(tmp_path: Path) -> None:
    run(Path("/dev/null"), {"LMCACHE_REMOTE_URL": f"fs://localhost:0{tmp_path}/shared"})
    assert any((tmp_path / "shared").rglob("*"))
