"""Encrypted records in a real Redis whose owner reads, swaps and alters them: a miss and an event, and nothing to be read."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import known_kv
import numpy as np
import pytest
import servers
from remote_client import LAYOUT, TEXT, other_text

import lmkv
from lmkv.backends.redis.target import DEFAULT_PART
from lmkv.chunks import TOKEN_BYTES
from lmkv.errors import ConfigError
from lmkv.tiers.envelope import OVERHEAD, read_keys

pytest.importorskip("cryptography")
A, B = "a7" * 32, "b8" * 32
HEAD = 32


@pytest.fixture
def server(tmp_path: Path) -> Iterator[servers.RedisServer]:
    with servers.RedisServer(tmp_path) as running:
        yield running


@pytest.fixture
def keys(tmp_path: Path) -> Any:
    def write(*lines: str, name: str = "keys") -> str:
        path = tmp_path / name
        path.write_text("\n".join(lines))
        return f"file:{path}"

    return write


def opened(client: Any, server: servers.RedisServer, encryption: str, **settings: Any) -> Any:
    return client(server.url, options={"part_bytes": DEFAULT_PART}, encryption=encryption, **settings)


def stored(server: servers.RedisServer, each: Any, number: int, text: list[int] = TEXT) -> tuple[str, bytearray]:
    """Name and value of a chunk, as the server's owner sees them."""
    name = f"lmkv:{{{each.keys(text)[number]}}}"
    value = server.client().get(name)
    assert isinstance(value, bytes)
    return name, bytearray(value)


@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_what_one_store_wrote_another_loads(client: Any, server: servers.RedisServer, keys: Any, codec: str) -> None:
    assert opened(client, server, keys(f"a {A}"), codec=codec).put()
    second = opened(client, server, keys("# comment", "", f"a {A}", name="again"), codec=codec)
    assert second.get() == 100
    assert not {"corrupt", "tier_failed"} & set(second.kinds())


@pytest.mark.parametrize(("wrote", "reads"), [("raw", "lossless"), ("lossless", "raw")])
def test_codecs_may_differ(client: Any, server: servers.RedisServer, keys: Any, wrote: str, reads: str) -> None:
    assert opened(client, server, keys(f"a {A}"), codec=wrote).put()
    assert opened(client, server, keys(f"a {A}"), codec=reads).get() == 100


def test_nothing_of_it_can_be_read(client: Any, server: servers.RedisServer, keys: Any) -> None:
    mine = opened(client, server, keys(f"key-1 {A}"))
    assert mine.put()
    _, value = stored(server, mine, 0)
    record = known_kv.source(LAYOUT, TEXT)
    size = LAYOUT.token_bytes * 16
    assert len(value) == HEAD + OVERHEAD + 4096 + size
    assert bytes.fromhex(A) not in value
    assert A.encode() not in value
    tokens = np.array(TEXT[:16], "<u4").tobytes()
    assert len(tokens) == 16 * TOKEN_BYTES
    assert tokens[:8] not in value, "prompts are not to be read either"
    assert np.ascontiguousarray(record).tobytes()[:64] not in value
    assert b"LMKVREC" not in value
    assert b"key-1" in value, "the key's name is no secret"


def test_no_nonce_comes_twice(client: Any, server: servers.RedisServer, keys: Any) -> None:
    mine = opened(client, server, keys(f"a {A}"))
    seen = []
    for _ in range(2):
        server.client().flushall()
        assert mine.put()
        seen += [bytes(stored(server, mine, number)[1][HEAD + 32 : HEAD + 44]) for number in range(7)]
    assert len(set(seen)) == len(seen) == 14


@pytest.mark.parametrize("second", ["another key", "another id"])
def test_what_does_not_open_is_a_miss(client: Any, server: servers.RedisServer, keys: Any, second: str) -> None:
    assert opened(client, server, keys(f"a {A}")).put()
    other = opened(client, server, keys(f"a {B}" if second == "another key" else f"b {A}", name="other"))
    assert other.get() == 0
    said = [str(event.detail["reason"]) for event in other.events if event.kind == "corrupt"]
    assert said
    assert {"another key": "key a opens", "another id": "one of the keys b; got b'a'"}[second] in said[0]
    assert not any(A in reason or B in reason for reason in said)
    assert other.put()
    assert other.get() == 100, "what does not open is written anew"


@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_a_store_without_the_keys_misses(client: Any, server: servers.RedisServer, keys: Any, codec: str) -> None:
    mine = opened(client, server, keys(f"a {A}"), codec=codec)
    assert mine.put()
    other = opened(client, server, "off", codec=codec)
    assert other.get() == 0
    assert {"load_failed", "corrupt"} & set(other.kinds())
    assert mine.get() == 0, "what it could not read it dropped"
    assert other.put()
    assert other.get() == 100, "and wrote anew, though full chunks' records were larger than its own"


def test_records_in_the_clear_are_refused(client: Any, server: servers.RedisServer, keys: Any) -> None:
    """Else whoever can write there could put what he likes."""
    assert opened(client, server, "").put()
    mine = opened(client, server, keys(f"a {A}"))
    assert mine.get() == 0
    assert "corrupt" in mine.kinds()
    assert mine.put()
    assert mine.get() == 100


def test_keys_may_be_changed_step_by_step(client: Any, server: servers.RedisServer, keys: Any) -> None:
    old, both, new = keys(f"a {A}"), keys(f"b {B}", f"a {A}", name="both"), keys(f"b {B}", name="new")
    assert opened(client, server, old).put()
    mine = opened(client, server, both)
    assert mine.get() == 100, "the second key opens"
    assert mine.put(other_text(1))
    last = opened(client, server, new)
    assert last.get(other_text(1)) == 101, "the first key closes"
    assert last.get() == 0


@pytest.mark.parametrize(
    "place", ["magic", "version", "id", "nonce", "size", "record", "tag", "truncated", "longer", "swapped", "another text's"]
)
def test_what_was_tampered_with_is_a_miss(client: Any, server: servers.RedisServer, keys: Any, place: str) -> None:
    mine = opened(client, server, keys(f"a {A}"))
    assert mine.put()
    assert mine.put(other_text(3))
    name, value = stored(server, mine, 2)
    at = {"magic": 0, "version": 8, "id": 16, "nonce": 33, "size": 48, "tag": len(value) - HEAD - 5}
    if place in at:
        value[HEAD + at[place]] ^= 1
    elif place == "record":
        value[HEAD + 64 + random.Random(2).randrange(len(value) - HEAD - OVERHEAD)] ^= 0x20
    elif place in ("swapped", "another text's"):
        value = stored(server, mine, 3)[1] if place == "swapped" else stored(server, mine, 2, other_text(3))[1]
    else:
        value = value[:-1] if place == "truncated" else value + b"x"
        value[8:16] = (len(value) - HEAD).to_bytes(8, "little")  # the head that says where it ends is the server's to change
    server.client().set(name, bytes(value))
    assert mine.get() == 32
    if place == "longer":  # than anything there is room for
        assert "load_failed" in mine.kinds()
        return
    assert "corrupt" in mine.kinds()
    assert mine.put()
    assert mine.get() == 100


# -- keys --------------------------------------------------------------------------------------------------------------------


def test_keys_come_from_files_and_variables(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# rotated in May\n  second {B}\n\nfirst\t{A.upper()}\n")
    expected = [("second", bytes.fromhex(B)), ("first", bytes.fromhex(A))]
    assert read_keys(f"file:{path}", "here") == expected
    variables = {"KEYS": f"second {B},first {A}"}
    assert read_keys("env:KEYS", "here", variables) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "at least one line"), ("# nothing", "at least one line"), (A, "line 1: expected an id"),
        (f"a {A[:-1]}", "line 1"), (f"a {A}\na {B}", "line 2.*came before"), (f"{'i' * 17} {A}", "line 1"),
        (f"ä {A}", "line 1"),
    ],
)  # fmt: skip
def test_wrong_keys_are_told_without_being_repeated(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as told:
        read_keys(f"file:{path}", "here")
    assert A[:-1] not in str(told.value)


@pytest.mark.parametrize("source", [A, f"a {A}", "file:", "vault:x", "file:/nowhere/at/all", "env:NOT_SET_ANYWHERE"])
def test_a_wrong_source_is_told(client: Any, server: servers.RedisServer, source: str) -> None:
    with pytest.raises(ConfigError, match="tier remote: encryption") as told:
        opened(client, server, source)
    assert A not in str(told.value)


def test_a_tier_s_own_setting_wins(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"a {A}")
    tiers = ({"backend": "memory"}, {"backend": "memory", "name": "clear", "encryption": "off"})
    config = lmkv.StoreConfig.from_dict({"disk_capacity": 0, "tiers": tiers, "encryption": f"file:{path}"})
    assert config.encryption == f"file:{path}"
    assert config.tiers[1].encryption == "off"


@pytest.mark.parametrize("off", ["off", "'off'", "false", "no"])
def test_off_may_be_written_as_yaml_likes_it(tmp_path: Path, off: str) -> None:
    (tmp_path / "keys").write_text(f"a {A}")
    path = tmp_path / "lmkv.yaml"
    tier = f"{{backend: lmdb, capacity: 64MiB, options: {{path: {tmp_path / 'disk'}}}, encryption: {off}}}"
    path.write_text(f"disk_capacity: 0\nram_capacity: 8MiB\nencryption: file:{tmp_path / 'keys'}\ntiers: [{tier}]\n")
    with lmkv.Store(lmkv.StoreConfig.load(path, environ={}), LAYOUT) as store:  # else such a tier would be refused
        assert store.store(TEXT, known_kv.source(LAYOUT, TEXT)) == 100


def test_a_storage_that_reads_records_can_not_be_encrypted(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"a {A}")
    tier = lmkv.TierConfig("lmdb", capacity=64 << 20, options={"path": str(tmp_path / "disk")}, encryption=f"file:{path}")
    with pytest.raises(ConfigError, match="encrypted file system"):
        lmkv.Store(lmkv.StoreConfig(ram_capacity=8 << 20, disk_capacity=0, tiers=(tier,)), LAYOUT)


def test_without_the_package_it_says_what_to_install(
    client: Any, server: servers.RedisServer, keys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(ConfigError, match=r"lmkv\[encryption\]"):
        opened(client, server, keys(f"a {A}"))
