"""Whatever is wrong is answered at once, by the right kind of error that says what was expected and what came, and nothing of
what was there is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import known_kv
import numpy as np
import pytest

import lmkv

LAYOUT = lmkv.KVLayout.dense(layers=2, heads=2, head_size=8, dtype="float16", chunk_tokens=16)
TOKENS = list(range(70))
SHAPE = (2, 2, 2, 70, 8)


def config(**settings: Any) -> lmkv.StoreConfig:
    return lmkv.StoreConfig(**({"ram_capacity": 1 << 20, "disk_capacity": 0} | settings))


@pytest.fixture
def store() -> Iterator[lmkv.Store]:
    with lmkv.Store(config(), LAYOUT) as opened:
        opened.store(TOKENS[:32], known_kv.source(LAYOUT, TOKENS[:32]))
        yield opened
        opened._check()
        assert known_kv.fetch(opened, TOKENS) >= 32, "what was there is still there"
        assert (opened.stats().leases, opened.stats().reservations) == (0, 0)


# -- opening -----------------------------------------------------------------------------------------------------------------


def test_ram_smaller_than_one_chunk() -> None:
    with pytest.raises(lmkv.CapacityError, match=r"ram_capacity: .*one chunk of 8192 bytes \(16 tokens\); got 8191"):
        lmkv.Store(config(ram_capacity=8191), LAYOUT)
    lmkv.Store(config(ram_capacity=8192), LAYOUT).close()


def test_a_disk_smaller_than_one_chunk(tmp_path: Path) -> None:
    with pytest.raises(lmkv.CapacityError, match="262144 bytes; got 100000"):
        lmkv.Store(config(disk_capacity=100_000, disk_path=str(tmp_path)), LAYOUT)
    large = lmkv.KVLayout.dense(layers=32, heads=8, head_size=128, dtype="float16", chunk_tokens=16)
    with pytest.raises(lmkv.CapacityError, match=r"tier disk: .*room for a chunk.*got 1048576"):
        lmkv.Store(config(ram_capacity=4 << 20, disk_capacity=1 << 20, disk_path=str(tmp_path)), large)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"chunk_size": 32}, lmkv.ConfigError, "chunk_size: expected the layout's 16 tokens; got 32"),
        ({"ram_policy": "lur"}, lmkv.ConfigError, "got 'lur'; did you mean 'lru'"),
        ({"disk_policy": "lifo", "disk_capacity": 1 << 20}, lmkv.ConfigError, "got 'lifo'; did you mean 'fifo'"),
        ({"disk_codec": "blosc", "disk_capacity": 1 << 20}, lmkv.ConfigError, "got 'blosc'; did you mean 'blosc2'"),
        ({"tiers": [{"backend": "memroy"}]}, lmkv.ConfigError, "got 'memroy'; did you mean 'memory'"),
        ({"tiers": [{"backend": "memory", "options": {"size": 1}}]}, lmkv.ConfigError, "takes no options; got .*size"),
        ({"tiers": [{"backend": "memory", "codec": "zip"}]}, lmkv.ConfigError, "got 'zip'"),
        ({"tiers": [{"backend": "lmdb", "capacity": 1 << 20}]}, lmkv.ConfigError, "takes the option path"),
    ],
)
def test_settings_that_can_not_be(settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        lmkv.Store(config(disk_path=str(tmp_path / "disk"), **settings), LAYOUT)
    assert lmkv.Store(config(disk_capacity=1 << 20, disk_path=str(tmp_path / "disk")), LAYOUT).close() is None, (
        "nothing stays open"
    )


def test_typos_and_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "lmkv.yaml"
    for text, message in (
        ("ram_capcity: 1GiB", "unknown key 'ram_capcity'; did you mean 'ram_capacity'"),
        ("ram_capacity: [1GiB", "expected YAML"),
        ("ram_capacity: 1 gigabyte", "ram_capacity: expected a size"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(lmkv.ConfigError, match=message) as caught:
            lmkv.StoreConfig.load(path, environ={})
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_a_disk_path_that_is_no_directory(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(lmkv.ConfigError, match="tier disk: expected a directory that can be written"):
        lmkv.Store(config(disk_capacity=1 << 20, disk_path=str(tmp_path / path)), LAYOUT)
    assert (tmp_path / "file").read_text() == "precious"


def test_another_layout_on_a_directory_loses_nothing(tmp_path: Path) -> None:
    settings = {"disk_capacity": 1 << 20, "disk_path": str(tmp_path)}
    with lmkv.Store(config(**settings), LAYOUT) as store:
        store.store(TOKENS, known_kv.source(LAYOUT, TOKENS))
    for change in ({"dtype": "bfloat16"}, {"chunk_tokens": 32}, {"layers": 3}, {"heads": 1}, {"head_size": 16}):
        shape: dict[str, Any] = {"layers": 2, "heads": 2, "head_size": 8, "dtype": "float16", "chunk_tokens": 16}
        other = lmkv.KVLayout.dense(**(shape | change))
        with pytest.raises(lmkv.LayoutMismatchError, match="Nothing was changed") as caught:
            lmkv.Store(config(**settings), other)
        assert LAYOUT.describe in str(caught.value)
        assert other.describe in str(caught.value)
    with lmkv.Store(config(**settings), LAYOUT) as store:
        assert known_kv.fetch(store, TOKENS) == 70, "the right layout still finds everything"
        store._check()


def test_without_a_path_every_layout_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    other = lmkv.KVLayout.dense(layers=3, heads=2, head_size=8, dtype="float16", chunk_tokens=16)
    for layout in (LAYOUT, other, LAYOUT):
        with lmkv.Store(config(disk_capacity=1 << 20), layout) as store:
            store.store(TOKENS, known_kv.source(layout, TOKENS))
    assert sorted(path.name for path in (tmp_path / "lmkv").iterdir()) == sorted(x.fingerprint.hex() for x in (LAYOUT, other))
    with lmkv.Store(config(disk_capacity=1 << 20), LAYOUT) as store:
        assert known_kv.fetch(store, TOKENS) == 70


# -- tokens ------------------------------------------------------------------------------------------------------------------

WRONG_TOKENS = [
    ([], "empty text"),
    ("a text", "run the tokenizer first"),
    (b"bytes", "run the tokenizer first"),
    ([1, -2], "0 to 4294967295; got -2"),
    ([1, 2**32], "0 to 4294967295; got 4294967296"),
    ([1.5], "whole numbers"),
    ([[1, 2], [3, 4]], "whole numbers"),
    (np.zeros((2, 4), np.int64), "one dimension"),
    (np.zeros(4), "whole numbers"),
    (None, "NoneType"),
    (17, "int"),
]


@pytest.mark.parametrize(("tokens", "message"), WRONG_TOKENS)
def test_wrong_tokens(store: lmkv.Store, tokens: Any, message: str) -> None:
    for call in (store.lookup, store.reserve, lambda t: store.store(t, np.zeros(SHAPE, np.float16))):
        with pytest.raises(lmkv.ArgumentError, match=message):
            call(tokens)


@pytest.mark.parametrize("start", [-1, 71, 1.0, None, "0"])
def test_wrong_starts(store: lmkv.Store, start: Any) -> None:
    with pytest.raises(lmkv.ArgumentError, match="start from 0 to 70"):
        store.reserve(TOKENS, start=start)
    with pytest.raises(lmkv.ArgumentError, match="start from 0 to 70"):
        store.store(TOKENS, np.zeros(SHAPE, np.float16), start=start)


def test_a_namespace_of_another_layout(store: lmkv.Store) -> None:
    other = lmkv.Namespace.of(lmkv.KVLayout.dense(layers=1, heads=1, head_size=1, dtype="int8"))
    for call in (store.lookup, store.reserve):
        with pytest.raises(lmkv.ArgumentError, match=r"store\.namespace\.replace"):
            call(TOKENS, namespace=other)


# -- tensors -----------------------------------------------------------------------------------------------------------------

WRONG_TENSORS = [
    (np.zeros((3, 2, 2, 70, 8), np.float16), lmkv.LayoutMismatchError, "2 layers; got 3"),
    (np.zeros((2, 1, 2, 70, 8), np.float16), lmkv.LayoutMismatchError, "K and V; got 1"),
    (np.zeros((2, 2, 3, 70, 8), np.float16), lmkv.LayoutMismatchError, "2 heads of size 8"),
    (np.zeros((2, 2, 2, 70, 4), np.float16), lmkv.LayoutMismatchError, "2 heads of size 8"),
    (np.zeros((2, 2, 70, 2, 8), np.float16), lmkv.LayoutMismatchError, "order HND"),
    (np.zeros(SHAPE, np.float32), lmkv.LayoutMismatchError, "dtype float16; got float32"),
    (np.zeros(SHAPE, np.int16), lmkv.LayoutMismatchError, "dtype float16; got int16"),
    (np.zeros((2, 2, 2, 69, 8), np.float16), lmkv.ArgumentError, "holds 0 to 69"),
    (np.zeros((2, 2, 70, 8), np.float16), lmkv.LayoutMismatchError, r"one array \[layers"),
    ([], lmkv.LayoutMismatchError, "2 layers; got 0"),
    ([[None, None]] * 2, lmkv.LayoutMismatchError, "got NoneType"),
    (None, lmkv.LayoutMismatchError, "layers"),
    ("kv", lmkv.LayoutMismatchError, "layer 0"),
]


@pytest.mark.parametrize(("kv", "error", "message"), WRONG_TENSORS)
def test_wrong_tensors_to_store(store: lmkv.Store, kv: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        store.store(TOKENS, kv)
    assert store.lookup(TOKENS).hit_tokens == 32, "nothing was stored"


@pytest.mark.parametrize(("kv", "error", "message"), WRONG_TENSORS)
def test_wrong_tensors_to_fill(store: lmkv.Store, kv: Any, error: type[Exception], message: str) -> None:
    store.store(TOKENS, known_kv.source(LAYOUT, TOKENS))
    with store.lease(store.lookup(TOKENS)) as lease, pytest.raises(error, match=message):
        store.retrieve(lease, kv)
    assert not isinstance(kv, np.ndarray) or not kv.any(), "nothing was copied"


def test_tensors_on_a_device(store: lmkv.Store) -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(lmkv.LayoutMismatchError, match=r"device meta.*\.cpu\(\)"):
        store.store(TOKENS, torch.zeros(SHAPE, dtype=torch.float16, device="meta"))


def test_read_only_tensors_to_fill(store: lmkv.Store) -> None:
    kv = np.zeros(SHAPE, np.float16)
    kv.flags.writeable = False
    with store.lease(store.lookup(TOKENS)) as lease, pytest.raises(lmkv.ArgumentError, match="read-only"):
        store.retrieve(lease, kv)
    assert not kv.any()


def test_positions_outside_a_lease(store: lmkv.Store) -> None:
    kv = np.zeros(SHAPE, np.float16)
    with store.lease(store.lookup(TOKENS)) as lease:
        assert lease.hit_tokens == 32
        for start in (-1, 33):
            with pytest.raises(lmkv.ArgumentError, match="start from 0 to the lease's 32 tokens"):
                store.retrieve(lease, kv, start=start)
        assert store.retrieve(lease, kv, start=8, stop=4) == 0
        assert store.retrieve(lease, kv, start=32) == 0
        assert not kv.any()
        assert store.retrieve(lease, kv, start=30, stop=99) == 2


# -- after the end -----------------------------------------------------------------------------------------------------------


def test_a_closed_store(tmp_path: Path) -> None:
    store = lmkv.Store(config(disk_capacity=1 << 20, disk_path=str(tmp_path), ram_shared=True), LAYOUT)
    store.store(TOKENS, known_kv.source(LAYOUT, TOKENS))
    match = store.lookup(TOKENS)
    lease = store.lease(match)
    reservation = store.reserve([9] * 20)
    kept = reservation.slots[0].payload
    store.close()
    store.close()
    kv = np.zeros(SHAPE, np.float16)
    calls: list[Callable[[], Any]] = [
        lambda: store.lookup(TOKENS),
        lambda: store.prefetch(match),
        lambda: store.lease(match),
        lambda: store.retrieve(lease, kv),
        lambda: store.reserve(TOKENS),
        lambda: store.store(TOKENS, kv),
        lambda: reservation.commit(),
        lambda: store.flush(),
        lambda: store.clear(),
        lambda: store.stats(),
        lambda: store.pool_handle(),
        lambda: lease.slots[0].payload,
    ]
    for call in calls:
        with pytest.raises(lmkv.StoreClosedError, match="closed"):
            call()
    assert not lease.held
    lease.release()
    reservation.abort()
    kept[:4] = b"safe"  # memory that somebody still looks at stays
    assert not kv.any()
    with lmkv.Store(config(disk_capacity=1 << 20, disk_path=str(tmp_path)), LAYOUT) as again:
        assert known_kv.fetch(again, TOKENS) == 70, "what was committed before the end is kept"


def test_a_reservation_twice(store: lmkv.Store) -> None:
    with store.reserve([5] * 20) as reservation:
        reservation.slots[0].payload[:] = bytes(len(reservation.slots[0].payload))
        assert reservation.commit() == 20
        with pytest.raises(lmkv.ArgumentError, match="committed or aborted before"):
            reservation.commit()
    gone = store.reserve([6] * 20)
    gone.abort()
    gone.abort()
    with pytest.raises(lmkv.ArgumentError, match="committed or aborted before"):
        gone.commit()
    store._check()


def test_payloads_of_a_lease_are_read_only(store: lmkv.Store) -> None:
    with store.lease(store.lookup(TOKENS)) as lease:
        assert lease.slots[0].payload.readonly
        with pytest.raises(TypeError):
            lease.slots[0].payload[0] = 1


def test_private_slots_can_not_be_mapped(store: lmkv.Store) -> None:
    with pytest.raises(lmkv.ConfigError, match="ram_shared: true"):
        store.pool_handle()


def test_all_errors_have_one_base() -> None:
    names = [name for name in lmkv.__all__ if name.endswith("Error")]
    assert len(names) == 10
    assert all(issubclass(getattr(lmkv, name), lmkv.LMKVError) for name in names)
    for name in ("ArgumentError", "ConfigError", "LayoutMismatchError"):
        assert issubclass(getattr(lmkv, name), ValueError)


def test_a_lease_of_another_store(store: lmkv.Store) -> None:
    """Its slots are laid out in another way, or are not there at all."""
    layout = lmkv.KVLayout.dense(layers=1, heads=1, head_size=8, dtype="float16", chunk_tokens=16)
    with lmkv.Store(config(), layout) as other:
        other.store(TOKENS[:32], known_kv.source(layout, TOKENS[:32]))
        arrays = known_kv.empty_layers(LAYOUT, 32)
        lease = other.lease(other.lookup(TOKENS))
        with pytest.raises(lmkv.ArgumentError, match="a lease of this store"):
            store.retrieve(lease, lmkv.DenseKV(arrays))
        lease.release()
        assert store.retrieve(lease, lmkv.DenseKV(arrays)) == 0, "one that has ended brings nothing, whosever it was"
    assert not any(array.any() for parts in arrays for array in parts)


@pytest.mark.parametrize("ids", [np.array([2**32]), [1.7], ["1"], np.array([True]), [[0]], [2**31]], ids=repr)
def test_block_ids_that_would_name_other_blocks(store: lmkv.Store, ids: Any) -> None:
    pages = [[np.zeros((2, 16, 2, 8), np.float16) for _ in range(2)] for _ in range(2)]
    with store.lease(store.lookup(TOKENS[:16])) as lease, pytest.raises(lmkv.ArgumentError, match="block ids"):
        store.retrieve(lease, lmkv.PagedKV(pages, ids))
    engine = lmkv.transfer.CopyEngine(pages, LAYOUT)
    part = lmkv.transfer.Part(memoryview(bytearray(LAYOUT.chunk_bytes)), 0, 16, 0, 16)
    with pytest.raises(lmkv.ArgumentError, match="block ids"):
        engine.scatter([part], [ids])
    assert not any(page.any() for pair in pages for page in pair)
