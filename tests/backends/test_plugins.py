"""Backends, codecs and policies of other packages, found by their entry points."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import known_kv
import pytest

import lmkv
from lmkv.backends import BackendSettings, open_backend
from lmkv.codecs import make_codec
from lmkv.errors import ConfigError

LAYOUT = lmkv.KVLayout.dense(layers=1, heads=1, head_size=4, dtype="float32", chunk_tokens=16)
Register = Callable[[str, str, str], None]

_MODULE = '''
import lmkv
from lmkv.backends.memory import MemoryBackend
from lmkv.codecs.raw import RawCodec
from lmkv.eviction.fifo import FIFO

VALUES = {}

class Mine(MemoryBackend):
    """Takes one option, and keeps its values in the module."""

    def __init__(self, settings):
        options = dict(settings.options)
        self.colour = options.pop("colour", "")
        super().__init__(type(settings)(settings.name, settings.layout, settings.capacity, options))
        self._values = VALUES

    def close(self):
        pass

class Reversed(RawCodec):
    name = "reversed"

    def encode(self, payload):
        return bytes(payload)[::-1]

    def decode(self, data, out):
        super().decode(memoryview(bytes(data)[::-1]), out)

class Unlucky(FIFO):
    pass
'''


@pytest.fixture
def plugin(register: Register, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Register:
    """A module of somebody else's, next to its distribution."""
    (tmp_path / "site" / "my_plugin.py").write_text(_MODULE)
    monkeypatch.delitem(sys.modules, "my_plugin", raising=False)
    return register


def test_a_store_with_everything_from_elsewhere(plugin: Register) -> None:
    plugin("lmkv.backends", "mine", "my_plugin:Mine")
    plugin("lmkv.codecs", "reversed", "my_plugin:Reversed")
    plugin("lmkv.policies", "unlucky", "my_plugin:Unlucky")
    assert "my_plugin" not in sys.modules, "nothing is imported before it is asked for"
    tier = lmkv.TierConfig("mine", codec="reversed", options={"colour": "blue"})
    config = lmkv.StoreConfig(ram_capacity=1 << 20, ram_policy="unlucky", disk_capacity=0, tiers=(tier,))
    tokens = list(range(40))
    with lmkv.Store(config, LAYOUT) as store:
        assert store.store(tokens, known_kv.source(LAYOUT, tokens)) == 40
        assert store.flush(60)
        assert [stats.name for stats in store.stats().tiers] == ["ram", "mine"]
    values = list(sys.modules["my_plugin"].VALUES.values())
    assert len(values) == 3
    assert all(value[88:96] == b"reversed" for value in values), "the record names its codec"
    assert values[-1][-16:] != known_kv.payload(LAYOUT, tokens, 0, 16)[-16:]
    with lmkv.Store(config, LAYOUT) as store:
        assert known_kv.fetch(store, tokens, store.lookup(tokens).wait(30)) == 40


def test_built_in_names_can_not_be_taken(plugin: Register) -> None:
    plugin("lmkv.backends", "memory", "my_plugin:Mine")
    backend = open_backend("memory", BackendSettings("m", LAYOUT))
    assert type(backend).__module__ == "lmkv.backends.memory"
    assert "my_plugin" not in sys.modules


def test_a_plugin_that_does_not_load_is_named(plugin: Register) -> None:
    plugin("lmkv.backends", "absent", "no_such_module:Thing")
    plugin("lmkv.codecs", "renamed", "my_plugin:NoSuchName")
    with pytest.raises(ConfigError, match="'absent' is registered as no_such_module:Thing, which does not load"):
        open_backend("absent", BackendSettings("m", LAYOUT))
    with pytest.raises(ConfigError, match="'renamed' is registered as my_plugin:NoSuchName"):
        make_codec("renamed", 2)


def test_names_that_nobody_registered(plugin: Register) -> None:
    plugin("lmkv.backends", "etcetera", "my_plugin:Mine")
    with pytest.raises(ConfigError, match=r"of etcetera, .*lmdb, .*memory, .*; got 'etceterra'; did you mean 'etcetera'"):
        open_backend("etceterra", BackendSettings("m", LAYOUT))
    assert type(open_backend("Etcetera", BackendSettings("m", LAYOUT))).__name__ == "Mine"
