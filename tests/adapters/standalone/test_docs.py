"""docs/standalone.md names every flag, path and translated key that there is."""

from __future__ import annotations

from pathlib import Path

import lmkv
from lmkv.adapters.lmcache import config as lmcache_config
from lmkv.adapters.standalone import options, replies
from lmkv.adapters.standalone.service import Service

TEXT = (Path(__file__).parents[3] / "docs" / "standalone.md").read_text(encoding="utf-8")


def test_every_flag_is_documented() -> None:
    for action in options._parser()._actions:
        for flag in action.option_strings:
            assert f"`{flag}" in TEXT or flag in ("-h", "--help"), flag


def test_every_path_is_documented() -> None:
    given = options.parse_options(["--disk-capacity", "0", "--ram-capacity", "1MiB"], {})
    with lmkv.Store(given.config, given.layout) as store:
        routes = list(Service(store, given).app().router.routes())
    assert len(routes) > 8
    for route in routes:
        assert route.resource is not None
        if route.method != "HEAD":
            assert f"`{route.method} {route.resource.canonical}`" in TEXT


def test_every_translated_key_and_error_type_is_documented() -> None:
    for name in (*lmcache_config._TRANSLATED, *replies._SERVICE_TYPES):
        assert f"`{name}`" in TEXT, name
