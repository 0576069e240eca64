"""What LMCache wrote comes back bit for bit, or not at all; nothing is written where it lies.

``tests/fixtures/lmcache`` holds what real LMCaches wrote of one text: files and Redis values (``lmcache_writer.py`` made them).
"""

from __future__ import annotations

import base64
import dataclasses
import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import known_kv
import numpy as np
import pytest
from lmcache_values import FIXTURE_LAYOUTS, FIXTURE_TEXT, write_chunks
from servers import RedisServer

import lmkv
from lmkv.adapters.lmcache.adopt import Adopter, Origin
from lmkv.adapters.lmcache.old_keys import chains
from lmkv.errors import ConfigError, LayoutMismatchError

FIXTURES = Path(__file__).parents[2] / "fixtures" / "lmcache"
WRITERS = sorted(path.stem for path in FIXTURES.glob("*.json"))
TEXT, DENSE = FIXTURE_TEXT, FIXTURE_LAYOUTS["dense"]
CONFIG = {"model": "ours", "disk_capacity": 0, "ram_capacity": "4MiB"}


def written(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / f"{name}.json").read_text())


def bytes_of(values: dict[str, str]) -> dict[str, bytes]:
    return {key: base64.b64decode(data) for key, data in values.items()}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture(params=["disk", "redis"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Left:
    """A place as LMCache left it."""

    def __init__(self, kind: str, values: dict[str, Any], folder: Path, server: RedisServer) -> None:
        self.kind, self.folder, self.client = kind, folder, server.client()
        self.where = str(folder) if kind == "disk" else server.url
        self.client.flushall()
        for key, data in bytes_of(values[kind]).items():
            if kind == "disk":
                (folder / key).write_bytes(data)
            else:
                self.client.set(key, data)

    def state(self) -> object:
        if self.kind == "redis":
            return sorted((key, self.client.get(key)) for key in self.client.keys("*"))
        return [(path.name, path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(self.folder.iterdir())]

    def change(self, name: str, data: bytes | None) -> None:
        if self.kind == "redis":
            self.client.delete(name)
            if data is not None:
                self.client.set(name, data)
        else:
            (self.folder / name).unlink()
            if data is not None:
                (self.folder / name).write_bytes(data)


def origin_of(about: dict[str, Any], left: Left, **changes: Any) -> Origin:
    origin = Origin(left.where, "org/model", 16, about["algorithm"], about["seed"])
    return dataclasses.replace(origin, **changes)


@pytest.mark.parametrize("layout", ["dense", "latent"])
@pytest.mark.parametrize("writer", WRITERS)
def test_what_lmcache_wrote_comes_back(writer: str, layout: str, kind: str, tmp_path: Path, server: RedisServer) -> None:
    about = written(writer)
    left = Left(kind, about["values"][layout], tmp_path, server)
    before = left.state()
    with lmkv.Store(lmkv.StoreConfig.from_dict(CONFIG), FIXTURE_LAYOUTS[layout]) as store:
        with Adopter(store, origin_of(about, left)) as adopter:
            result = adopter.adopt(TEXT)
            assert (result.tokens, result.held, result.reason) == (40, 40, "")
            assert adopter.adopt(TEXT).tokens == 0
            assert len(adopter.some_names(2)) == 2
        assert known_kv.fetch(store, TEXT) == 40
        store._check()
    assert left.state() == before


@pytest.mark.parametrize("chunk_tokens", [4, 16, 24, 256])
def test_chunks_of_other_sizes(chunk_tokens: int, kind: str, tmp_path: Path, server: RedisServer) -> None:
    about = written("0.3.15")
    left = Left(kind, about["values"]["dense"], tmp_path, server)
    layout = dataclasses.replace(DENSE, chunk_tokens=chunk_tokens)
    with lmkv.Store(lmkv.StoreConfig.from_dict(CONFIG), layout) as store:
        with Adopter(store, origin_of(about, left)) as adopter:
            assert adopter.adopt(TEXT[:37]).held == 32, "the short chunk is of a longer text"
            assert adopter.adopt(TEXT).held == 40
        assert known_kv.fetch(store, TEXT) == 40


def test_redis_is_only_asked(tmp_path: Path, server: RedisServer) -> None:
    about = written("0.3.15")
    left = Left("redis", about["values"]["dense"], tmp_path, server)
    seen: list[str] = []
    with server.client().monitor() as monitor, lmkv.Store(lmkv.StoreConfig.from_dict(CONFIG), DENSE) as store:
        done = threading.Event()

        def listen() -> None:
            for said in monitor.listen():
                if "the-end" in said["command"]:
                    break
                seen.append(said["command"].split()[0].upper())
            done.set()

        threading.Thread(target=listen, daemon=True).start()
        with Adopter(store, origin_of(about, left)) as adopter:
            assert adopter.adopt(TEXT).held == 40
            adopter.some_names()
        left.client.echo("the-end")
        assert done.wait(10)
    assert {"EXISTS", "GET", "SCAN"} <= set(seen) <= {"EXISTS", "GET", "SCAN", "CLIENT", "SELECT", "HELLO", "ECHO"}


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "org/another"}, {"chunk_size": 8}, {"world_size": 2, "workers": (0,)}, {"hash_of_none": 1},
    ],
)  # fmt: skip
def test_other_settings_find_nothing(changes: dict[str, Any], kind: str, tmp_path: Path, server: RedisServer) -> None:
    about = written("0.3.9")
    left = Left(kind, about["values"]["dense"], tmp_path, server)
    with lmkv.Store(lmkv.StoreConfig.from_dict(CONFIG), DENSE) as store:
        with Adopter(store, origin_of(about, left, **changes)) as adopter:
            result = adopter.adopt(TEXT)
        assert (result.tokens, result.held, result.versions) == (0, 0, "")
        assert "no chunk of it" in result.reason


def test_pythons_hash_is_found_where_lmcache_fell_back_to_it(tmp_path: Path, server: RedisServer) -> None:
    """Asked for sha256, LMCache without vLLM warned and took ``hash``."""
    about = written("0.3.15")
    left = Left("disk", about["values"]["dense"], tmp_path, server)
    origin = origin_of(about, left, hash_algorithm="sha256")
    with lmkv.Store(lmkv.StoreConfig.from_dict(CONFIG), DENSE) as store, Adopter(store, origin) as adopter:
        assert adopter.adopt(TEXT).held == 40


@pytest.mark.parametrize("seed", ["", "1"])
def test_a_seeded_text_is_not_found_without_its_seed(seed: str, kind: str, tmp_path: Path, server: RedisServer) -> None:
    about = written("0.3.15-vllm-sha256_cbor")
    left = Left(kind, about["values"]["dense"], tmp_path, server)
    origin = origin_of(about, left, hash_seed=seed)
    with lmkv.Store(lmkv.StoreConfig.from_dict(CONFIG), DENSE) as store, Adopter(store, origin) as adopter:
        assert adopter.adopt(TEXT).held == 0


@pytest.mark.parametrize(
    "layout",
    [
        dataclasses.replace(DENSE, groups=(dataclasses.replace(DENSE.groups[0], layers=2),)),
        dataclasses.replace(DENSE, groups=(dataclasses.replace(DENSE.groups[0], heads=1),)),
        dataclasses.replace(DENSE, groups=(dataclasses.replace(DENSE.groups[0], dtype="bfloat16"),)),
        dataclasses.replace(DENSE, groups=(dataclasses.replace(DENSE.groups[0], kv=1, heads=1, head_size=8),)),
    ],
    ids=["layers", "heads", "dtype", "latent"],
)
def test_another_layout_is_a_miss(layout: lmkv.KVLayout, kind: str, tmp_path: Path, server: RedisServer) -> None:
    about = written("0.3.15")
    left = Left(kind, about["values"]["dense"], tmp_path, server)
    with lmkv.Store(lmkv.StoreConfig.from_dict(CONFIG), layout) as store:
        with Adopter(store, origin_of(about, left)) as adopter:
            result = adopter.adopt(TEXT)
        assert (result.tokens, result.held) == (0, 0)
        assert "expected" in result.reason or "no chunk" in result.reason


@pytest.mark.parametrize("shape", [(3, 2, 1, 8), (6, 2, 1, 4), (3, 1, 1, 16)])
def test_redis_tells_layouts_of_one_size_apart(shape: tuple[int, ...], tmp_path: Path, server: RedisServer) -> None:
    """As far as LMCache did: it knows of heads times head size only. On disk the length is all there is."""
    about = written("0.3.15")
    left = Left("redis", about["values"]["dense"], tmp_path, server)
    layout = lmkv.KVLayout((lmkv.LayerGroup(*shape, "float16"),), 16)
    assert layout.token_bytes == DENSE.token_bytes
    with lmkv.Store(lmkv.StoreConfig.from_dict(CONFIG), layout) as store, Adopter(store, origin_of(about, left)) as adopter:
        assert adopter.adopt(TEXT).held == (40 if shape[0] * shape[1] == 6 and shape[3] == 8 else 0)


@pytest.mark.parametrize("size", [0, 1, 768, 1535, 1537, 4096])
def test_a_value_of_another_length_ends_the_text_there(size: int, kind: str, tmp_path: Path, server: RedisServer) -> None:
    about = written("0.3.15")
    left = Left(kind, about["values"]["dense"], tmp_path, server)
    second = _name_of_second(about, left)
    left.change(second, bytes(size))
    with lmkv.Store(lmkv.StoreConfig.from_dict(CONFIG), DENSE) as store:
        with Adopter(store, origin_of(about, left)) as adopter:
            result = adopter.adopt(TEXT)
            assert (result.tokens, result.held) == (16, 16)
            assert "tokens 16 to 32" in result.reason
            assert f"got {size}" in result.reason
            left.change(second, None)
            result = adopter.adopt(TEXT)
            assert result.held == 16
            assert any(word in result.reason for word in ("gone", "can't be read", "no chunk"))
        assert known_kv.fetch(store, TEXT) == 16


def _name_of_second(about: dict[str, Any], left: Left) -> str:
    """Where the value of the text's second chunk is."""
    pieces = [tuple(TEXT[:16]), tuple(TEXT[16:32])]
    numbers = [list(chain.numbers(pieces))[1] for chain in chains(about["algorithm"], about["seed"], ("vllm",))]
    hexes = {f"@{number:x}@" for number in numbers if isinstance(number, int)}
    end = "kv_bytes" if left.kind == "redis" else ".pt"
    names = [path.name for path in left.folder.iterdir()] if left.kind == "disk" else map(bytes.decode, left.client.keys("*"))
    (found,) = [name for name in names if name.endswith(end) and any(text in name for text in hexes)]
    return found


@pytest.mark.parametrize("field", range(7))
def test_redis_metadata_that_says_something_else(field: int, tmp_path: Path, server: RedisServer) -> None:
    about = written("0.3.15")
    left = Left("redis", about["values"]["dense"], tmp_path, server)
    name = _name_of_second(about, left).replace("kv_bytes", "metadata")
    said = list(struct.unpack("=7i", left.client.get(name)))
    said[field] += 3
    left.change(name, struct.pack("=7i", *said))
    with lmkv.Store(lmkv.StoreConfig.from_dict(CONFIG), DENSE) as store, Adopter(store, origin_of(about, left)) as adopter:
        assert adopter.adopt(TEXT).held == 16
        left.change(name, struct.pack("=7i", *said)[:-1])
        assert "27" in adopter.adopt(TEXT).reason
        left.change(name, None)
        assert adopter.adopt(TEXT).held == 16


def test_a_redis_that_is_gone_is_a_reason(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        where = server.url
    with lmkv.Store(lmkv.StoreConfig.from_dict(CONFIG), DENSE) as store:
        with Adopter(store, Origin(where, "org/model", deadline_seconds=1.0)) as adopter:
            result = adopter.adopt(TEXT)
        assert (result.tokens, result.held) == (0, 0)
        assert result.reason


def test_parts_of_several_workers(tmp_path: Path) -> None:
    """Two ranks of tensor parallelism, whose layers stand one rank behind the other in the store."""
    layout = lmkv.KVLayout((lmkv.LayerGroup(3, 2, 1, 4, "float16"), lmkv.LayerGroup(3, 2, 1, 4, "float16")), 16)
    text = list(range(500, 540))
    write_chunks(tmp_path, text, known_kv.group_bits(layout, text), "half", world_size=2)
    origin = Origin(str(tmp_path), "org/model", 16, world_size=2)
    with lmkv.Store(lmkv.StoreConfig.from_dict(CONFIG), layout) as store:
        with Adopter(store, origin) as adopter:
            assert adopter.adopt(text).held == 40
        assert known_kv.fetch(store, text) == 40
    next(path for path in tmp_path.iterdir() if "@2@1@" in path.name).unlink()
    with lmkv.Store(lmkv.StoreConfig.from_dict(CONFIG), layout) as store, Adopter(store, origin) as adopter:
        assert adopter.adopt(text).held < 40, "a chunk of which one rank's part is missing"


def test_a_store_without_room_says_so(tmp_path: Path, server: RedisServer) -> None:
    about = written("0.3.15")
    left = Left("disk", about["values"]["dense"], tmp_path, server)
    small = {**CONFIG, "ram_capacity": 2 * DENSE.chunk_bytes + 64 * 1024}
    with lmkv.Store(lmkv.StoreConfig.from_dict(small), DENSE) as store:
        with Adopter(store, origin_of(about, left)) as adopter, store.lease(store.lookup(TEXT)):
            result = adopter.adopt(TEXT)
        assert result.held == 40 or "no room" in result.reason


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_same_kv_and_another_are_told_apart(dtype: str, tmp_path: Path) -> None:
    layout = lmkv.KVLayout.dense(layers=3, heads=2, head_size=4, dtype=dtype, chunk_tokens=16)
    values = np.random.default_rng(1).normal(size=(3, 2, 2, 40, 4)).astype(np.float32)

    def typed(numbers: Any) -> Any:
        return (numbers.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else numbers.astype(dtype)

    write_chunks(tmp_path, TEXT, [typed(values)], {"float16": "half", "float32": "float"}.get(dtype, dtype))
    origin = Origin(str(tmp_path), "org/model", 16)
    for computed, low, high in ((values * np.float32(1.03), 0.02, 0.04), (values[::-1].copy(), 0.9, 9.0)):
        with lmkv.Store(lmkv.StoreConfig.from_dict(CONFIG), layout) as store, Adopter(store, origin) as adopter:
            assert adopter.compare(TEXT) is None, "the store has nothing yet"
            store.store(TEXT, lmkv.DenseKV(typed(computed)))
            found = adopter.compare(TEXT)
            assert found is not None
            assert found.tokens == 16
            assert low < found.difference < high
            assert adopter.compare(TEXT[::-1]) is None


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"where": "/nowhere"}, ConfigError), ({"where": "s3://bucket"}, ConfigError), ({"model": ""}, ConfigError),
        ({"world_size": 0}, ConfigError), ({"world_size": 2, "workers": (2,)}, ConfigError), ({"chunk_size": 0}, ConfigError),
        ({"chunk_size": 65537}, ConfigError), ({"hash_algorithm": "md5"}, ConfigError), ({"hash_seed": "random"}, ConfigError),
        ({"hash_seed": "4294967296"}, ConfigError), ({"world_size": 2}, LayoutMismatchError),
    ],
)  # fmt: skip
def test_wrong_settings_are_said(changes: dict[str, Any], error: type[Exception], tmp_path: Path) -> None:
    origin = dataclasses.replace(Origin(str(tmp_path), "m"), **changes)
    with lmkv.Store(lmkv.StoreConfig.from_dict(CONFIG), DENSE) as store, pytest.raises(error, match="expected"):
        Adopter(store, origin)
