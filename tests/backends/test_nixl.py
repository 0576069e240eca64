"""Files that NIXL's POSIX plugin moves, as a backend."""

from __future__ import annotations

import dataclasses
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import known_kv
import numpy as np
import pytest

from lmkv.backends import Backend, BackendSettings, open_backend
from lmkv.backends.base import Clearable
from lmkv.backends.nixl_agent import plugin_states
from lmkv.chunks import ChunkKey
from lmkv.errors import ConfigError
from lmkv.layout import KVLayout
from lmkv.testing import BackendSuite

LAYOUT = KVLayout.dense(layers=1, heads=1, head_size=4, dtype="float32", chunk_tokens=16)
KEY = ChunkKey(b"k" * 16)


class TestNixlPosix(BackendSuite):
    offers = (Clearable,)
    persistent = True
    refuses_when_full = False
    examples = 2
    steps = 10

    def make(self, settings: BackendSettings) -> Backend:
        options = {"plugin": "POSIX", "path": str(self.directory / settings.name), **settings.options}
        return open_backend("nixl", dataclasses.replace(settings, capacity=0, options=options))


def open_at(path: Path, **options: Any) -> Any:
    return open_backend("nixl", BackendSettings("remote", LAYOUT, options={"path": str(path), **options}))


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("size", [0, 1, 4096, 12345, 8 << 20])
def test_from_and_to_slots(tmp_path: Path, direct: bool, size: int) -> None:
    slots = memoryview(mmap.mmap(-1, 16 << 20))
    slots[:size] = np.random.default_rng(1).bytes(size)
    backend = open_at(tmp_path, direct_io=direct)
    backend.write_many([KEY], [slots[:size]])
    assert backend.read_many([KEY], [slots[8 << 20 :]]) == [size]
    assert slots[8 << 20 : (8 << 20) + size] == slots[:size]
    assert not any(slots[(8 << 20) + size : (8 << 20) + size + 4096])
    backend.close()


_OTHER_PROCESS = """
import sys, lmkv
from remote_client import Client
mine = Client("", backend="nixl", options={"path": sys.argv[1]})
print(mine.get(), flush=True)
mine.store.close()
"""


def test_two_processes_share_and_damage_is_a_miss(tmp_path: Path) -> None:
    from remote_client import Client

    mine = Client("", backend="nixl", options={"path": str(tmp_path / "kv"), "direct_io": True})
    assert mine.put()
    environment = {**os.environ, "PYTHONPATH": str(Path(known_kv.__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", _OTHER_PROCESS, str(tmp_path / "kv")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout.strip().splitlines()[-1:]) == (0, ["100"]), done.stderr
    key = mine.keys()[2]
    path = tmp_path / "kv" / key[:2] / key
    for damaged in (b"", path.read_bytes()[:-1], path.read_bytes()[:-1] + b"\xff"):
        path.write_bytes(damaged)
        assert mine.get() == 32
        assert mine.put()
        assert mine.get() == 100
    mine.store.close()


def test_plugins_that_do_not_load_are_named(tmp_path: Path) -> None:
    states = plugin_states()
    assert states["POSIX"] == ""
    assert states["HF3FS"], "its plugin is not in the package"
    with pytest.raises(ConfigError, match=r"HF3FS does not .*; these do: POSIX"):
        open_at(tmp_path, plugin="HF3FS")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "relative"}, "absolute path"),
        ({"plugin": "FTP", "path": "/x"}, "plugin: expected one of POSIX"),
        ({"pathh": "/x"}, "did you mean 'path'"),
        ({"path": "/x", "params": [1]}, "params"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_backend("nixl", BackendSettings("remote", LAYOUT, options=options))
