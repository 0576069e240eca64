"""Where the adapter's settings come from, and who asked for it; without SGLang."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmkv.adapters.sglang.settings import asked_for, read_settings
from lmkv.errors import ConfigError

GIB = 1 << 30


@pytest.mark.parametrize(
    ("environ", "file", "asked"),
    [
        ({}, None, False),
        ({"LMKV_SGLANG": "1"}, None, True),
        ({"LMKV_SGLANG": "true"}, None, True),
        ({"LMKV_SGLANG": "0"}, "c.yaml", False),
        ({"LMKV_SGLANG": ""}, None, False),
        ({"LMKV_CONFIG_FILE": "c.yaml"}, None, True),
        ({"LMCACHE_CONFIG_FILE": "c.yaml"}, None, False),
        ({}, "c.yaml", True),
    ],
)
def test_who_asked(environ: dict[str, str], file: str | None, asked: bool) -> None:
    assert asked_for(environ, file) is asked


def test_an_odd_value_is_named() -> None:
    with pytest.raises(ConfigError, match="LMKV_SGLANG"):
        asked_for({"LMKV_SGLANG": "maybe"})


def test_defaults() -> None:
    settings = read_settings(None, {}, {"LMKV_SGLANG": "1"})
    assert settings.store.ram_capacity == 5 * GIB
    assert settings.store.disk_capacity == 0
    assert settings.layerwise
    assert settings.min_load_tokens == 1


def test_files_variables_and_flags_in_this_order(tmp_path: Path) -> None:
    file = tmp_path / "lmcache.yaml"
    file.write_text("chunk_size: 8\nlocal_cpu: true\nuse_layerwise: false\nmax_local_cpu_size: 10\nmin_retrieve_tokens: 64\n")
    settings = read_settings(str(file), {}, {})
    assert (settings.store.chunk_size, settings.store.ram_capacity) == (8, 10 * GIB)
    assert (settings.layerwise, settings.min_load_tokens, settings.warnings) == (False, 64, ())
    environ = {"LMCACHE_CONFIG_FILE": str(file), "LMCACHE_USE_LAYERWISE": "True", "LMKV_CHUNK_SIZE": "16"}
    settings = read_settings(None, {"lmkv.ram_capacity": "1GiB"}, environ)
    assert (settings.store.chunk_size, settings.store.ram_capacity, settings.layerwise) == (16, GIB, True)


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="ram_capacity"):
        read_settings(None, {"ram_capcity": 1}, {})
    with pytest.raises(ConfigError, match="min_load_tokens"):
        read_settings(None, {"min_load_tokens": 0}, {})
