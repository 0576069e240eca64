"""LMKV as HiCache's storage on real host pools of SGLang's, on the CPU: orders, page sizes, verbs, and what goes wrong."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache import utils
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory
from sglang_hosts import ORDERS, controlling, fill, holds, indices_of, keys_of, make_config, make_host, page_data

from lmkv.adapters.sglang import page_names
from lmkv.adapters.sglang.hicache import LMKVHiCacheStorage
from lmkv.adapters.sglang.pages import renew_all
from lmkv.errors import ConfigError

torch.set_num_threads(1)
KEYS = keys_of(8)
EVERY_ORDER = [(kind, order) for kind, orders in ORDERS.items() for order in orders]


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Callable[..., LMKVHiCacheStorage]]:
    """``storage(pool, **extra config)``: a storage on this test's disk directory, with the pool registered."""
    opened: list[LMKVHiCacheStorage] = []

    def make(pool: Any = None, *, kind: str = "mha", rank: dict[str, Any] | None = None, **extra: Any) -> LMKVHiCacheStorage:
        small = {"ram_capacity": "8MiB", "ram_extent": "1MiB", "ram_ahead": 0, "disk_capacity": "64MiB"}
        config = make_config({**small, "disk_path": str(tmp_path / "disk"), **extra}, kind=kind, **(rank or {}))
        opened.append(LMKVHiCacheStorage(config, {}))
        if pool is not None:
            opened[-1].register_mem_pool_host(pool)
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def put(storage: Any, pool: Any, keys: list[str] = KEYS) -> list[bool]:
    """Fill the pool's first pages with what ``keys`` name, and have them kept."""
    for page, key in enumerate(keys):
        fill(pool, page, key)
    return storage.batch_set_v1(keys, indices_of(pool, list(range(len(keys)))))


def take(storage: Any, pool: Any, keys: list[str] = KEYS, first: int = 12) -> list[bool]:
    """Have pages brought behind one another; each that is said to have come is proved bit by bit."""
    came = storage.batch_get_v1(keys, indices_of(pool, list(range(first, first + len(keys)))))
    for page, (key, ok) in enumerate(zip(keys, came, strict=True)):
        assert not ok or holds(pool, first + page, key), f"other bytes in page {page}"
    return came


@pytest.mark.parametrize("page", [1, 2, 16])
@pytest.mark.parametrize(("kind", "order"), EVERY_ORDER)
def test_pages_come_back_in_every_order(kind: str, order: str, page: int, storage: Callable[..., Any]) -> None:
    pool = make_host(kind, order, page)
    lmkv = storage(pool, kind=kind)
    assert lmkv.batch_exists(KEYS) == 0
    assert take(lmkv, pool) == [False] * 8
    assert all(put(lmkv, pool))
    assert all(put(lmkv, pool))  # again: nothing changes
    assert lmkv.batch_exists(KEYS) == 8
    assert lmkv.batch_exists([*KEYS[:3], "0" * 64, *KEYS[3:]]) == 3
    assert all(take(lmkv, pool))
    assert take(lmkv, pool, [KEYS[5], "f" * 64, KEYS[0]]) == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_other_numbers(kind: str, dtype: torch.dtype, storage: Callable[..., Any]) -> None:
    pool = make_host(kind, "page_first", 16, dtype=dtype)
    lmkv = storage(pool, kind=kind)
    assert all(put(lmkv, pool))
    assert all(take(lmkv, pool))


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_a_restart_hits_from_disk_in_any_order(kind: str, storage: Callable[..., Any]) -> None:
    first, second = make_host(kind, "layer_first", 16), make_host(kind, "page_first_direct", 16)
    lmkv = storage(first, kind=kind)
    put(lmkv, first)
    lmkv.close()
    again = storage(second, kind=kind)
    assert again.batch_exists(KEYS) == 8
    assert all(take(again, second))


def test_pages_as_bytes_are_for_pools_of_the_same_order_and_numbers(storage: Callable[..., Any]) -> None:
    def pool(order: str = "layer_first", dtype: torch.dtype = torch.bfloat16) -> Any:
        return make_host("mha", order, 16, dtype=dtype)

    first = pool()
    lmkv = storage(first, interface_v1=0)
    put(lmkv, first)
    lmkv.close()
    for other in (pool("page_first"), pool(dtype=torch.float16)):
        again = storage(other, interface_v1=0)
        assert again.batch_exists(KEYS) == 0
        again.close()
    assert all(take(storage(first, interface_v1=0), first))


def test_a_ram_smaller_than_a_batch_leaves_the_disk(storage: Callable[..., Any]) -> None:
    pool = make_host("mha", "page_first", 16, pages=120)
    lmkv = storage(pool, ram_capacity="200KiB", ram_extent="200KiB")
    keys = keys_of(50)
    for page, key in enumerate(keys):
        fill(pool, page, key)
    for page in range(0, 50, 5):  # slower than the disk, or the oldest would not be written
        assert all(lmkv.batch_set_v1(keys[page : page + 5], indices_of(pool, list(range(page, page + 5)))))
        assert lmkv.flush(20)
    assert lmkv.batch_exists(keys) == 50
    assert all(take(lmkv, pool, keys, first=60))


def test_page_sizes_models_and_ranks_are_kept_apart(
    storage: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool = make_host("mha", "page_first", 16)
    lmkv = storage(pool)
    put(lmkv, pool)
    assert lmkv.flush(20)
    other = make_host("mha", "page_first", 32)
    assert put(storage(other), other) == [False] * 8  # the directory belongs to pages of 16
    assert "not active" in caplog.text
    assert "tokens=32" in caplog.text
    elsewhere = str(tmp_path / "elsewhere")
    assert storage(make_host("mha", "page_first", 32), disk_path=elsewhere).batch_exists(KEYS) == 0
    ranks = ({"model_name": "other"}, {"tp_rank": 1, "tp_size": 2}, {"tp_rank": 0, "tp_size": 2}, {"pp_rank": 1, "pp_size": 2})
    for rank in (*ranks, {"attn_cp_rank": 1, "attn_cp_size": 2}):
        assert storage(pool, rank=rank).batch_exists(KEYS) == 0, rank
    assert storage(pool, salt="tenant").batch_exists(KEYS) == 0
    assert storage(pool).batch_exists(KEYS) == 8


def test_ranks_of_a_latent_model_share_what_one_stores(storage: Callable[..., Any]) -> None:
    pools = [make_host("mla", "page_first", 16) for _ in range(2)]
    ranks = [storage(pool, kind="mla", rank={"tp_rank": i, "tp_size": 2}) for i, pool in enumerate(pools)]
    put(ranks[0], pools[0])
    assert ranks[0].flush(20)
    assert ranks[1].batch_exists(KEYS) == 8
    assert all(take(ranks[1], pools[1]))


# -- what goes wrong ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [1, 0])
def test_flipped_bits_on_disk_are_misses(direct: int, storage: Callable[..., Any], tmp_path: Path) -> None:
    pool = make_host("mha", "page_first", 16)
    keys = keys_of(10)
    lmkv = storage(pool, interface_v1=direct)
    put(lmkv, pool, keys)
    lmkv.close()
    rng = random.Random(5)
    (folder,) = tmp_path.glob("disk*")
    for path in folder.glob("segment-*.kv"):
        data = bytearray(path.read_bytes())
        used = [at for at in range(4096, len(data), 4096) if any(data[at : at + 4096])]
        for at in rng.sample(used, len(used) // 3):
            data[at + rng.randrange(4096)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    again = storage(pool, interface_v1=direct)
    came = take(again, pool, keys)
    assert True in came
    assert False in came
    assert all(put(again, pool, keys))
    assert all(take(again, pool, keys))


@pytest.mark.parametrize("page", [1, 16])
def test_a_hash_that_begins_like_another_is_not_that_one(page: int, storage: Callable[..., Any]) -> None:
    pool = make_host("mha", "page_first", page)
    lmkv = storage(pool)
    put(lmkv, pool)
    alike = [KEYS[0][:8] + "0" * 56, KEYS[0][:56] + "0" * 8, KEYS[0][:-1] + "0123456789abcdef"[int(KEYS[0][-1], 16) - 1]]
    assert [lmkv.batch_exists([key]) for key in alike] == [0, 0, 0]
    assert take(lmkv, pool, alike) == [False] * 3


def test_pages_whose_hold_is_lost_under_the_copy_did_not_come(
    storage: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_host()
    lmkv = storage(pool)
    put(lmkv, pool)
    lease, lost = lmkv._pages.lease, iter([False, True, False, True, True, False, False, False])

    def perhaps_lost(match: Any) -> Any:
        held = lease(match)
        if next(lost):
            held.release()
        return held

    monkeypatch.setattr(lmkv._pages, "lease", perhaps_lost)
    assert take(lmkv, pool).count(False) == 3


def test_a_disk_that_vanished_is_a_miss(storage: Callable[..., Any], tmp_path: Path) -> None:
    pool = make_host("mha", "page_first", 16)
    lmkv = storage(pool)
    put(lmkv, pool)
    lmkv.close()
    again = storage(pool)
    for path in (tmp_path / "disk").glob("segment-*.kv"):
        with path.open("r+b") as file:
            file.truncate(4096)
    assert take(again, pool) == [False] * 8
    assert all(put(again, pool))


def test_changed_weights_make_all_of_it_a_miss(storage: Callable[..., Any]) -> None:
    pool = make_host()
    lmkv = storage(pool)
    put(lmkv, pool)
    renew_all()
    assert lmkv.batch_exists(KEYS) == 0
    put(lmkv, pool)
    assert lmkv.batch_exists(KEYS) == 8


def test_wrong_calls_serve_nothing(storage: Callable[..., Any]) -> None:
    pool = make_host("mha", "page_first", 16)
    lmkv = storage()
    assert lmkv.batch_exists(KEYS) == 0  # nothing is registered yet
    assert put(lmkv, pool) == [False] * 8
    assert lmkv.batch_get(KEYS) == [None] * 8
    lmkv.register_mem_pool_host(pool)
    assert all(put(lmkv, pool))
    before = pool.kv_buffer.clone()
    whole = indices_of(pool, list(range(8)))
    for wrong in (None, whole[:-1], whole + 1000, whole - 16, whole[torch.randperm(len(whole))]):
        assert lmkv.batch_get_v1(KEYS, wrong) == [False] * 8
        assert lmkv.batch_set_v1(KEYS, wrong) == [False] * 8
    assert torch.equal(pool.kv_buffer.view(torch.int32), before.view(torch.int32))
    assert all(take(lmkv, pool))


def test_another_pool_on_the_same_directory_serves_nothing(
    storage: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    pool = make_host("mha", "page_first", 16)
    lmkv = storage(pool)
    put(lmkv, pool)
    lmkv.close()
    other = make_host("mha", "page_first", 16, dtype=torch.bfloat16)
    refused = storage(other)
    assert "bfloat16" in caplog.text
    assert put(refused, other) == [False] * 8
    assert refused.batch_exists(KEYS) == 0
    assert take(refused, other) == [False] * 8
    assert all(take(storage(pool), pool))


def test_a_pool_of_another_kind_is_kept_as_bytes(storage: Callable[..., Any]) -> None:
    pool = make_host("mha", "page_first", 16)
    pool.__class__ = type("SomeOtherHostPool", (type(pool),), {})
    lmkv = storage(pool)
    assert all(put(lmkv, pool))
    assert all(take(lmkv, pool))
    pool.get_data_page = lambda *_, **__: (_ for _ in ()).throw(NotImplementedError("no pages"))
    assert lmkv.batch_set_v1(["a" * 64], indices_of(pool, [3])) == [False]


def test_settings_are_checked(storage: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="ram_capacity"):
        storage(ram_capasity="1GiB")


def test_a_closed_storage_serves_nothing(storage: Callable[..., Any]) -> None:
    pool = make_host()
    lmkv = storage(pool)
    put(lmkv, pool)
    lmkv.close()
    assert lmkv.batch_exists(KEYS) == 0
    assert take(lmkv, pool) == [False] * 8
    assert put(lmkv, pool) == [False] * 8
    lmkv.register_mem_pool_host(pool)  # attached anew
    assert all(take(lmkv, pool))


@pytest.mark.parametrize("direct", [1, 0])
def test_threads_that_prefetch_and_back_up_at_once(direct: int, storage: Callable[..., Any]) -> None:
    pool = make_host("mha", "page_first", 16, pages=70)
    lmkv = storage(pool, ram_capacity="400KiB", ram_extent="200KiB", interface_v1=direct)
    keys = keys_of(40)
    wrong: list[str] = []
    came = [0]

    def work(number: int) -> None:
        rng = random.Random(number)
        pages = list(range(number * 16, number * 16 + 16))
        try:
            for _ in range(25):
                chosen = rng.sample(keys, rng.randrange(1, 16))
                mine = rng.sample(pages, len(chosen))
                if rng.random() < 0.5:
                    for page, key in zip(mine, chosen, strict=True):
                        with filling:
                            fill(pool, page, key)
                    lmkv.batch_set_v1(chosen, indices_of(pool, mine))
                else:
                    lmkv.batch_exists(chosen)
                    for page, key, ok in zip(mine, chosen, lmkv.batch_get_v1(chosen, indices_of(pool, mine)), strict=True):
                        with filling:
                            if ok and not holds(pool, page, key):
                                wrong.append(key)
                        came[0] += ok
        except Exception as error:  # a thread's fault must reach the test
            wrong.append(repr(error))

    filling = threading.Lock()  # the helper's spare page is one
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert came[0] > 50


# -- the other doors ---------------------------------------------------------------------------------------------------------


def test_sglangs_factory_makes_it(tmp_path: Path) -> None:
    pool = make_host()
    extra = {"module_path": "lmkv.adapters.sglang.hicache", "class_name": "LMKVHiCacheStorage", "ram_capacity": "4MiB"}
    lmkv = StorageBackendFactory.create_backend("dynamic", make_config(extra), pool)
    lmkv.register_mem_pool_host(pool)
    assert all(put(lmkv, pool))
    assert all(take(lmkv, pool))
    lmkv.close()


@pytest.mark.parametrize("direct", [1, 0])
def test_sglangs_controller_backs_up_and_prefetches(direct: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "get_hash_str", chained)  # needs no compiler
    extra = {"interface_v1": direct, "ram_capacity": "8MiB", "disk_capacity": "64MiB", "disk_path": str(tmp_path / "disk")}
    text = array("q", range(3, 3 + 8 * 16))
    names = chained(RadixKey(text), None, 16)
    pool = make_host("mha", "page_first", 16)
    with controlling(pool, extra) as controller:
        slots = pool.alloc(len(text))
        for number, name in enumerate(names):
            fill(pool, int(slots[16 * number]) // 16, name)
        controller.write_storage(slots, RadixKey(text), names)
        assert controller.ack_backup_queue.get(timeout=60).completed_tokens == len(text)
    pool = make_host("mha", "page_first", 16)
    with controlling(pool, extra) as controller:  # a restart
        controller.prefetch("request", RadixKey(text + array("q", [5] * 32)))
        operation = controller.prefetch_hit_queue.get(timeout=60)
        assert operation.storage_hit_count == len(text)
        operation.host_indices = slots = pool.alloc(len(text))
        controller.prefetch_buffer.put(operation)
        until = time.monotonic() + 60
        while not all(holds(pool, int(slots[16 * number]) // 16, name) for number, name in enumerate(names)):
            assert time.monotonic() < until
            time.sleep(0.05)


@pytest.mark.parametrize("direct", [1, 0])
def test_values_one_by_one(direct: int, storage: Callable[..., Any]) -> None:
    pool = make_host("mha", "layer_first", 16)
    lmkv = storage(pool, interface_v1=direct)
    for page, key in enumerate(KEYS):
        fill(pool, page, key)
    data = [pool.get_data_page(page * 16).clone() for page in range(8)]
    drafts = [torch.arange(7) + page for page in range(8)]  # of a draft model: not a multiple of anything
    assert lmkv.batch_set(KEYS, data)
    assert lmkv.batch_set([f"{key}.draft" for key in KEYS], drafts)
    assert lmkv.set("f" * 64, data[3])
    assert not lmkv.set("e" * 64)
    assert lmkv.exists(KEYS[0]) == (not direct)  # with the direct interface, pages are what that one keeps
    found = lmkv.batch_get([*KEYS, "0" * 64], [pool.get_dummy_flat_data_page() for _ in range(9)])
    assert found.pop() is None
    assert all(torch.equal(got.view(torch.int32), wanted.view(torch.int32)) for got, wanted in zip(found, data, strict=True))
    got = lmkv.batch_get([f"{key}.draft" for key in KEYS], [torch.zeros(7, dtype=torch.int64) for _ in KEYS])
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(got, drafts, strict=True))
    assert torch.equal(lmkv.get("f" * 64).view(torch.int32), data[3].view(torch.int32))
    assert lmkv.get("f" * 64, torch.zeros(3)) is None  # a value of another size


def test_pools_beside_the_models(storage: Callable[..., Any]) -> None:
    pool, side = make_host("mha", "page_first", 16), make_host("mla", "layer_first", 16)
    lmkv = storage(pool)
    lmkv.register_mem_host_pool_v2(pool, PoolName.KV)
    lmkv.register_mem_host_pool_v2(side, PoolName.INDEXER)
    for page, key in enumerate(KEYS):
        fill(pool, page, key)
        fill(side, page, key)

    def transfer(name: PoolName, keys: list[str], pages: list[int], **own: Any) -> PoolTransfer:
        return PoolTransfer(name=name, keys=keys, host_indices=indices_of(pool, pages), **own)

    both = [transfer(PoolName.KV, KEYS, list(range(8))), transfer(PoolName.INDEXER, KEYS[:5], list(range(5)))]
    assert lmkv.batch_set_v2(both) == {PoolName.KV: [True] * 8, PoolName.INDEXER: [True] * 5}
    asked = [PoolTransfer(name=PoolName.INDEXER)]
    result = lmkv.batch_exists_v2(KEYS, asked)
    assert (result.kv_hit_pages, result.extra_pool_hit_pages) == (5, {PoolName.KV: 8, PoolName.INDEXER: 5})
    assert lmkv.batch_exists_v2(KEYS, None).kv_hit_pages == 8
    assert lmkv.batch_exists_v2(keys_of(3, seed=9), asked).kv_hit_pages == 0
    both = [transfer(PoolName.KV, KEYS, list(range(12, 20))), transfer(PoolName.INDEXER, KEYS, list(range(12, 20)))]
    came = lmkv.batch_get_v2(both)
    assert came == {PoolName.KV: [True] * 8, PoolName.INDEXER: [True] * 5 + [False] * 3}
    assert all(holds(pool, 12 + i, key) for i, key in enumerate(KEYS))
    assert all(holds(side, 12 + i, key) for i, key in enumerate(KEYS[:5]))
    unknown = transfer(PoolName.MAMBA, KEYS, list(range(8)))
    assert lmkv.batch_set_v2([unknown]) == {PoolName.MAMBA: [False] * 8}


def test_states_that_only_the_last_pages_have(storage: Callable[..., Any]) -> None:
    pool, side = make_host("mha", "page_first", 16), make_host("mla", "layer_first", 16)
    lmkv = storage(pool)
    lmkv.register_mem_host_pool_v2(side, PoolName.SWA)
    put(lmkv, pool)
    kept = [1, 2, 4]
    for page in kept:
        fill(side, page, KEYS[page])
    states = PoolTransfer(name=PoolName.SWA, keys=[KEYS[page] for page in kept], host_indices=indices_of(side, kept))
    assert lmkv.batch_set_v2([states]) == {PoolName.SWA: [True] * 3}

    def asked(window: int) -> Any:
        own = {"keys": KEYS[:window], "hit_policy": PoolHitPolicy.TRAILING_PAGES}
        return lmkv.batch_exists_v2(KEYS, [PoolTransfer(name=PoolName.SWA, **own)])

    assert asked(1).kv_hit_pages == 5  # pages 0 to 4, of which the last has its state
    assert asked(2).kv_hit_pages == 3
    assert asked(3).kv_hit_pages == 0
    if hasattr(asked(1), "restorable_prefix_pages"):
        assert asked(1).restorable_prefix_pages == [2, 3, 5]
        assert asked(2).restorable_prefix_pages == [3]


def test_clearing_and_counting(storage: Callable[..., Any]) -> None:
    pool = make_host()
    lmkv = storage(pool, rank={"enable_storage_metrics": True})
    put(lmkv, pool)
    take(lmkv, pool)
    stats = lmkv.get_stats()
    assert (stats.backup_pgs, stats.prefetch_pgs) == ([8], [8])
    assert min(stats.backup_bandwidth + stats.prefetch_bandwidth) > 0
    assert lmkv.get_stats().backup_pgs == []
    assert lmkv.counts()["stored_tokens"] == lmkv.counts()["loaded_tokens"] == 128
    assert lmkv.clear()
    assert lmkv.batch_exists(KEYS) == 0


# -- tenants -----------------------------------------------------------------------------------------------------------------


def chained(tokens: Any, prior: str | None = None, page_size: int | None = None) -> list[str]:
    """SGLang's names of pages, without its compiled part."""
    found: list[str] = []
    ids = list(tokens.token_ids)
    for at in range(0, len(ids), page_size or len(ids)):
        start = bytes.fromhex(prior) if prior else b""
        prior = hashlib.sha256(start + str(ids[at : at + (page_size or len(ids))]).encode()).hexdigest()
        found.append(prior)
    return found


def test_tenants_pages_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert page_names.tell_tenants_apart()
    monkeypatch.setattr(utils, "get_hash_str", chained)

    class Tokens(SimpleNamespace):
        def __len__(self) -> int:
            return len(self.token_ids)

    def names(extra_key: str | None) -> list[str]:
        root = SimpleNamespace(key=Tokens(token_ids=[]), hash_value=[], parent=None)
        own = {"extra_key": extra_key, "cache_salt": None}
        first = SimpleNamespace(key=Tokens(token_ids=[1, 2, 3, 4], **own), parent=root, hash_value=None)
        first.hash_value = utils.compute_node_hash_values(first, 2)
        second = SimpleNamespace(key=Tokens(token_ids=[5, 6], **own), parent=first, hash_value=None)
        return [*first.hash_value, *utils.compute_node_hash_values(second, 2)]

    found = [names(key) for key in (None, "a", "b")]
    assert len({name for each in found for name in each}) == 9
    assert names("a") == found[1]
    assert found[0] == chained(Tokens(token_ids=[1, 2, 3, 4, 5, 6]), None, 2)  # who keeps nobody apart keeps SGLang's names


def test_the_helper_tells_pages_apart() -> None:
    pool = make_host()
    fill(pool, 0, KEYS[0])
    assert holds(pool, 0, KEYS[0])
    assert not holds(pool, 0, KEYS[1])
    assert page_data(pool, 0) != page_data(pool, 1)
