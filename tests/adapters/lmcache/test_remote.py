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
