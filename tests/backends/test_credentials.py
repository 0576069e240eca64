"""Credentials of remote tiers, wherever they are given, appear in no message, event, log or ``repr``."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from typing import Any

import known_kv
import pytest

import lmkv

SECRET = "pl4nted-S3cret"
LAYOUT = lmkv.KVLayout.dense(layers=1, heads=1, head_size=4, dtype="float32", chunk_tokens=16)
TEXT = list(range(64))

URLS = [
    "redis://user:{}@127.0.0.1:1",
    "redis://127.0.0.1:1?password={}",
    "redis://user:{}@127.0.0.1:port",
    "redis://user:{}@",
    "redis://127.0.0.1:1/name?password={}",
    "redis://127.0.0.1:1?passwrod={}",
    "redis://user:{}@127.0.0.1:1?ttl_seconds=soon",
    "rediss://user:{}@127.0.0.1:1",
    "unix://:{}@/nowhere/redis.sock",
    "valkey://user:{}@127.0.0.1:1",
    "valkeys://user:{}@127.0.0.1:1",
    "redis-sentinel://user:{}@127.0.0.1:1,127.0.0.1:2?master=m",
    "redis-sentinel://127.0.0.1:1?sentinel_password={}",
    "rediss-sentinel://user:{}@127.0.0.1:1",
    "redis-cluster://user:{}@127.0.0.1:1,127.0.0.1:2",
    "rediss-cluster://user:{}@127.0.0.1:1",
    "s3://bucket/prefix?endpoint=http://127.0.0.1:1&access_key_id=name&secret_access_key={}",
    "s3://name:{}@bucket/prefix",
    "lm://127.0.0.1:1?token={}",
    "lm://user:{}@127.0.0.1:port",
    "nixl://127.0.0.1:1?token={}",
    "nixl://user:{}@127.0.0.1:port",
    "mooncakestore://user:{}@127.0.0.1:port",
    "infinistore://user:{}@127.0.0.1:1?device=mlx5_1",
    "file://user:{}@/mnt/shared",
    "nosuch://user:{}@127.0.0.1",
]


def told(tier: lmkv.TierConfig) -> str:
    """Whatever a store says while it uses a tier that can't work, or why it does not open."""
    events: list[lmkv.Event] = []
    config = lmkv.StoreConfig(ram_capacity=4 << 20, disk_capacity=0, tiers=(tier,))
    words: list[Any] = [tier, config]
    try:
        with lmkv.Store(config, LAYOUT, on_event=events.append) as store:
            store.lookup(TEXT).wait(0.5)
            store.store(TEXT, known_kv.source(LAYOUT, TEXT))
            store.flush(2)
            words += [store, store.config, store.stats()]
    except lmkv.LMKVError as error:
        words += [repr(error), "".join(traceback.format_exception(error))]
    assert events or len(words) == 4, "it was refused, or used in vain"
    return " ".join(map(repr, words + events))


@pytest.mark.parametrize("url", URLS)
def test_in_the_url(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    words = told(lmkv.TierConfig(url=url.format(SECRET), name="remote", deadline_seconds=0.3))
    assert SECRET not in words + caplog.text


@pytest.mark.parametrize(
    ("url", "option"),
    [
        ("redis://127.0.0.1:1", "password"),
        ("redis-sentinel://127.0.0.1:1", "sentinel_password"),
        ("s3://bucket?endpoint=http://127.0.0.1:1&access_key_id=name", "secret_access_key"),
        ("lm://127.0.0.1:1", "token"),
        ("nixl://127.0.0.1:1", "token"),
    ],
)
@pytest.mark.parametrize("way", ["", "_env", "_file"])
def test_in_an_option_variable_or_file(
    url: str, option: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("LMKV_TEST_SECRET", SECRET)
    (tmp_path / "secret").write_text(SECRET + "\n")
    value = {"": SECRET, "_env": "LMKV_TEST_SECRET", "_file": str(tmp_path / "secret")}[way]
    words = told(lmkv.TierConfig(url=url, name="remote", deadline_seconds=0.3, options={option + way: value}))
    assert SECRET not in words + caplog.text
