"""The linker under SGLang's own radix tree, pools and allocators: what comes back is the text's own KV, or nothing."""

from __future__ import annotations

import logging
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
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang_linked import LinkedRank, make_pool, server_args

from lmkv.adapters.sglang import linker as linker_module
from lmkv.adapters.sglang import weights
from lmkv.adapters.sglang.counter import LayerCounter
from lmkv.errors import ConfigError

torch.set_num_threads(1)
TEXT = [i * 7 % 499 for i in range(100)]
MORE = [(i * 11 + 3) % 499 for i in range(60)]
CORES = ("rust", "python")


@pytest.fixture
def rank_of(tiny_llama: Path) -> Iterator[Callable[..., LinkedRank]]:
    ranks: list[LinkedRank] = []

    def make(*, kind: str = "mha", size: int = 1024, page_size: int = 1, dtype: Any = torch.float32, **more: Any) -> LinkedRank:
        settings = {"ram_capacity": "8MiB", **more.pop("settings", {})}
        pool = more.pop("pool", None) or make_pool(kind, size=size, page_size=page_size, dtype=dtype)
        core = more.pop("core", "rust")
        ranks.append(LinkedRank(server_args(str(tiny_llama)), settings, pool=pool, page_size=page_size, core=core, **more))
        return ranks[-1]

    yield make
    for rank in ranks:
        rank.close()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records if record.name == "lmkv.sglang"]


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("page", [1, 16, 64])
def test_nothing_is_lost_on_a_flush(core: str, page: int, rank_of: Callable[..., LinkedRank]) -> None:
    rank = rank_of(core=core, page_size=page)
    whole = 99 // page * page
    assert rank.run(TEXT) == (0, 0)
    assert rank.run(TEXT) == (whole, 0)
    rank.flush()
    assert rank.run(TEXT) == (0, whole)
    longer = TEXT + MORE
    assert rank.run(longer) == (len(TEXT) // page * page, 0)
    rank.flush()
    assert rank.run([*longer, 1]) == (0, 160 // page * page)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("page", [1, 16])
def test_hits_of_the_tree_and_of_lmkv_add_up(core: str, page: int, rank_of: Callable[..., LinkedRank]) -> None:
    rank = rank_of(core=core, page_size=page, settings={"chunk_size": 64})
    longer = TEXT + MORE
    assert rank.run(longer) == (0, 0)
    rank.flush()
    half = 50 // page * page
    assert rank.run(longer[: half + 1]) == (0, half)
    tree, loaded = rank.run([*longer, 1])
    assert tree == (half + 1) // page * page
    assert tree + loaded == 160 // page * page
    assert rank.run([*longer, 1])[0] == 160 // page * page


@pytest.mark.parametrize(("kind", "dtype"), [("mha", torch.bfloat16), ("mha", torch.float8_e4m3fn), ("mla", torch.bfloat16)])
@pytest.mark.parametrize("page", [1, 16])
def test_kinds_of_pools(kind: str, dtype: Any, page: int, rank_of: Callable[..., LinkedRank]) -> None:
    rank = rank_of(kind=kind, dtype=dtype, page_size=page)
    rank.run(TEXT)
    rank.flush()
    assert rank.run(TEXT) == (0, 99 // page * page)


def test_tenants_and_adapters_share_nothing(rank_of: Callable[..., LinkedRank]) -> None:
    rank = rank_of()
    tenants: list[dict[str, str]] = [{}, {"cache_salt": "a"}, {"cache_salt": "b"}, {"extra_key": "a"}, {"extra_key": "b"}]
    tenants.append({"extra_key": "a", "cache_salt": "b"})
    for tenant in tenants:
        assert rank.run(TEXT, **tenant) == (0, 0)
    rank.flush()
    for tenant in tenants:
        assert rank.run(TEXT, **tenant) == (0, 99)


def test_changed_weights_share_nothing_with_those_before(rank_of: Callable[..., LinkedRank]) -> None:
    from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager

    assert "SchedulerWeightUpdaterManager.update_weights_from_disk" in weights.watch()
    rank = rank_of()
    rank.run(TEXT)
    broken = SimpleNamespace()  # the update fails as early as it can; whoever began one can't be sure of the weights
    with pytest.raises(AttributeError):
        SchedulerWeightUpdaterManager.update_weights_from_tensor(broken, SimpleNamespace())
    rank.flush()
    assert rank.run(TEXT) == (0, 0)
    rank.flush()
    assert rank.run(TEXT) == (0, 99)


def test_two_requests_load_in_one_batch(rank_of: Callable[..., LinkedRank]) -> None:
    rank = rank_of()
    other = [5, *TEXT]
    rank.run(TEXT)
    rank.run(other)
    rank.flush()
    requests = [rank.admit(TEXT), rank.admit(other), rank.admit(MORE)]
    assert [request.cached for request in requests] == [(0, 99), (0, 100), (0, 0)]
    assert rank.forward(*requests) == []
    assert [request.wrong for request in requests] == [[], [], []]
    for request in requests:
        rank.finish(request)
    assert rank.linker.pages is not None
    assert rank.linker.pages.stats().leases == 0


def test_a_request_that_goes_before_its_batch_leaves_no_copy_behind(rank_of: Callable[..., LinkedRank]) -> None:
    rank = rank_of()
    rank.run(TEXT)
    rank.flush()
    request = rank.admit(TEXT)
    assert request.cached == (0, 99)
    before = rank._tensors()[0].clone()
    rank.abort(request)
    assert rank.tree.ready_to_load_host_cache() == -1
    assert torch.equal(rank._tensors()[0], before)
    assert rank.linker.pages is not None
    assert rank.linker.pages.stats().leases == 0
    assert rank.run(TEXT) == (0, 99)


def test_a_load_that_fails_is_told_and_reaches_nobody_else(
    rank_of: Callable[..., LinkedRank], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = rank_of()
    rank.run(TEXT)
    rank.flush()
    request = rank.admit(TEXT)
    assert rank.linker.pages is not None
    found, _ = rank.linker._queued[request.rid]
    assert found.lease is not None
    found.lease.release()  # as if it had run out of time
    assert rank.forward(request) == [request.rid]
    rank.finish(request, insert=False)
    assert rank.linker.telling.counts["load_failures"] == 1
    assert rank.run(TEXT) == (0, 99)


def test_a_hit_that_is_gone_before_its_load_is_computed(rank_of: Callable[..., LinkedRank]) -> None:
    rank = rank_of()
    rank.run(TEXT)
    rank.flush()
    assert rank.linker.pages is not None
    hold = rank.linker.hold

    def too_late(rid: str, tokens: int) -> bool:
        assert rank.linker.pages is not None
        rank.linker.pages.store.clear()
        return hold(rid, tokens)

    rank.linker.hold = too_late  # type: ignore[method-assign]
    assert rank.run(TEXT) == (0, 0)
    rank.linker.hold = hold  # type: ignore[method-assign]
    assert rank.linker.pages.stats().leases == 0


def test_an_offload_under_way_holds_its_slots(rank_of: Callable[..., LinkedRank], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: a copy out of the pool goes on while the scheduler does other things."""
    rank = rank_of(size=128)
    late = True
    done = linker_module.Save.done
    monkeypatch.setattr(linker_module.Save, "done", lambda self: not late and done(self))
    request = rank.admit(TEXT)
    rank.forward(request)
    rank.finish(request)
    assert len(rank.tree.linker.pending_offloads) == 1
    rank.tree.evict(EvictParams(num_tokens=128))
    assert rank.allocator.available_size() == 128 - 100
    late = False
    rank.tree.check_hicache_events()
    assert not rank.tree.linker.pending_offloads
    rank.tree.evict(EvictParams(num_tokens=128))
    assert rank.allocator.available_size() == 128
    assert rank.run(TEXT) == (0, 99)


def test_a_flush_waits_for_offloads(rank_of: Callable[..., LinkedRank], monkeypatch: pytest.MonkeyPatch) -> None:
    rank = rank_of()
    done = linker_module.Save.done
    monkeypatch.setattr(linker_module.Save, "done", lambda self: False)
    request = rank.admit(TEXT)
    rank.forward(request)
    rank.finish(request)
    assert len(rank.tree.linker.pending_offloads) == 1
    rank.flush()
    assert not rank.tree.linker.pending_offloads
    monkeypatch.setattr(linker_module.Save, "done", done)
    assert rank.run(TEXT) == (0, 99)


def on_disk(tmp_path: Path) -> dict[str, Any]:
    return {"disk_path": str(tmp_path / "disk"), "disk_capacity": "64MiB"}


def test_a_new_process_finds_what_the_old_one_kept(rank_of: Callable[..., LinkedRank], tmp_path: Path) -> None:
    rank = rank_of(settings=on_disk(tmp_path))
    rank.run(TEXT)
    rank.close()
    assert rank_of(settings=on_disk(tmp_path)).run(TEXT) == (0, 99)
    assert rank_of(settings=on_disk(tmp_path), page_size=16).run(TEXT) == (0, 96)


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_on_disk_are_misses(rank_of: Callable[..., LinkedRank], tmp_path: Path, seed: int) -> None:
    rank = rank_of(settings=on_disk(tmp_path))
    rank.run(TEXT)
    rank.close()
    rng = random.Random(seed)
    (segment,) = (tmp_path / "disk").glob("segment-*.kv")
    data = bytearray(segment.read_bytes())
    for _ in range(200):
        data[rng.randrange(4096, len(data))] ^= 1 << rng.randrange(8)
    used = [at for at in range(4096, len(data), 512) if any(data[at : at + 512])]
    for at in rng.sample(used, 8):
        data[at + 100] ^= 1
    with segment.open("r+b") as file:
        file.write(data)
    again = rank_of(settings=on_disk(tmp_path))
    tree, loaded = again.run(TEXT)
    assert (tree, loaded) != (0, 99)
    assert again.linker.telling.counts["tier_failures"]
    again.flush()
    assert sum(again.run(TEXT)) in (0, 99)


def test_a_dead_store_is_a_cache_that_misses(rank_of: Callable[..., LinkedRank]) -> None:
    rank = rank_of()
    rank.run(TEXT)
    rank.flush()
    assert rank.linker.pages is not None
    rank.linker.pages.store.close()
    assert rank.run(TEXT) == (0, 0)
    assert rank.run(TEXT) == (99, 0)
    rank.flush()
    assert rank.run(TEXT) == (0, 0)


def test_a_dead_remote_tier_is_a_cache_that_misses(rank_of: Callable[..., LinkedRank]) -> None:
    rank = rank_of(settings={"tiers": [{"url": "redis://127.0.0.1:1", "deadline_seconds": 0.1}]})
    assert rank.run(TEXT) == (0, 0)
    rank.flush()
    assert rank.run(TEXT) == (0, 99)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("page", [1, 8])
def test_any_course_of_events(core: str, page: int, rank_of: Callable[..., LinkedRank], tmp_path: Path) -> None:
    """Texts that share beginnings, tenants, evictions in the pool and in LMKV, flushes, aborts: never other KV."""
    rng = random.Random(f"{core}{page}")
    # RAM for 40 chunks of 16 tokens, a pool for some four texts
    settings = {"ram_capacity": 40 * 12288, "ram_extent": 12288, "ram_ahead": 0, **on_disk(tmp_path)}
    rank = rank_of(core=core, page_size=page, size=512, settings=settings)
    roots = [[rng.randrange(500) for _ in range(rng.randrange(1, 60))] for _ in range(3)]
    loaded = reused = 0
    for _ in range(120):
        batch = []
        for _ in range(rng.randrange(1, 3)):
            text = [*rng.choice(roots)]
            while rng.random() < 0.6:
                text += [rng.choice((1, 2))] * rng.randrange(1, 30)
            request = rank.admit([*text, 3], cache_salt=rng.choice((None, "a")))
            loaded, reused = loaded + request.cached[1], reused + request.cached[0]
            if rng.random() < 0.1:
                rank.abort(request)
            else:
                batch.append(request)
        assert rank.forward(*batch) == []
        assert all(request.wrong == [] for request in batch)
        for request in batch:
            rank.finish(request)
        if rng.random() < 0.1:
            rank.flush()
        if rng.random() < 0.3:
            rank.tree.evict(EvictParams(num_tokens=rng.randrange(1, 512)))
    assert loaded > 500
    assert reused > 500
    assert rank.linker.pages is not None
    assert rank.linker.pages.stats().leases == 0
    rank.linker.pages.store._check()


def test_one_line_says_that_it_is_active(rank_of: Callable[..., LinkedRank], lines: Callable[[], list[str]]) -> None:
    rank_of().run(TEXT)
    (line,) = lines()
    assert line.startswith("LMKV: active (linker, one rank): pages of 1, chunks of 16 tokens")
    assert line.endswith("tiers: ram 8 MiB")


class OddPool(SimpleNamespace):
    """A pool of a kind that nobody knows."""


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"is_eagle": True}, "draft model"),
        ({"sliding_window_size": 128}, "sliding window"),
        ({"pp_size": 2}, "pipeline"),
        ({"attn_cp_size": 2}, "context"),
    ],
)
def test_what_is_not_understood_is_not_served(
    params: dict[str, Any], why: str, rank_of: Callable[..., LinkedRank], lines: Callable[[], list[str]]
) -> None:
    rank = rank_of(core="python", **params)
    (line,) = lines()
    assert "not active" in line
    assert why in line
    assert rank.linker.pages is None
    assert rank.linker.lookup("r", []) == []
    assert rank.linker.offload([]) is False
    assert rank.linker.num_completed_offloads() == 0
    if not params.get("is_eagle"):
        for _ in range(2):
            assert rank.run(TEXT)[1] == 0
            rank.flush()


def test_other_pools_are_not_served(
    rank_of: Callable[..., LinkedRank], lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(size=256, page_size=1)
    pool.__class__ = type("MambaLikePool", (type(pool),), {})
    rank = rank_of(pool=pool)
    (line,) = lines()
    assert "MambaLikePool" in line
    for _ in range(2):
        assert rank.run(TEXT) == (0, 0)
        rank.flush()


def test_a_tree_that_lacks_something_is_not_served(
    rank_of: Callable[..., LinkedRank], lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmkv.adapters.sglang import tree

    monkeypatch.setattr(tree, "_NEEDED", ("no_such_method",))
    rank = rank_of()
    (line,) = lines()
    assert "not active" in line
    assert "no_such_method" in line
    assert rank.run(TEXT) == (0, 0)


def test_a_mistake_in_the_settings_ends_the_start(rank_of: Callable[..., LinkedRank]) -> None:
    with pytest.raises(ConfigError, match="ram_capacity"):
        rank_of(settings={"ram_capacty": "1GiB"})


def test_short_hits_are_computed_if_told_so(rank_of: Callable[..., LinkedRank]) -> None:
    rank = rank_of(settings={"min_load_tokens": 100})
    rank.run(TEXT)
    rank.flush()
    assert rank.run(TEXT) == (0, 0)
    assert rank.run([*TEXT, *MORE]) == (100, 0)
    rank.flush()
    assert rank.run([*TEXT, *MORE]) == (0, 159)


def test_a_counter_orders_layers_of_its_own_batch_alone() -> None:
    waited: list[tuple[str, int]] = []

    def load(name: str, well: bool = True) -> Any:
        return SimpleNamespace(wait_layer=lambda layer: waited.append((name, layer)), finish=lambda: well)

    counter = LayerCounter(3)
    first, second = counter.begin([load("a"), load("b", False)]), counter.begin([load("c")])
    counter.set_consumer(-1)
    counter.wait_until(0)
    assert waited == []
    counter.set_consumer(second)
    counter.wait_until(1)
    assert waited == [("c", 1)]
    assert counter.finish(first) is False
    assert counter.finish(second) is True
    counter.wait_until(2)
    assert waited == [("c", 1)]
    whole = LayerCounter(3, layerwise=False)
    whole.set_consumer(whole.begin([load("d")]))
    for layer in range(3):
        whole.wait_until(layer)
    assert waited[1:] == [("d", 2)]


def test_ranks_serve_together_or_not_at_all(
    rank_of: Callable[..., LinkedRank], lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    monkeypatch.setattr(UnifiedRadixCache, "_all_reduce_attn_groups", lambda self, tensor, op: tensor.zero_())
    rank = rank_of()
    (line,) = lines()
    assert "another rank" in line
    for _ in range(2):
        assert rank.run(TEXT) == (0, 0)
        rank.flush()


def behind_ram(rank: LinkedRank, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Have what the rank kept in its slow tier alone, which answers reads once the event is set."""
    assert rank.linker.pages is not None
    store = rank.linker.pages.store
    assert store.flush(10)
    with store._lock:
        store._ram.clear()
    (tier,) = store._slow
    may_read, read = threading.Event(), tier.backend.read_many

    def slow(*args: Any) -> Any:
        may_read.wait(10)
        return read(*args)

    monkeypatch.setattr(tier.backend, "read_many", slow)
    return may_read


def arrive(rank: LinkedRank, rid: str, text: list[int]) -> Callable[[], bool]:
    """A request comes, as to SGLang's scheduler; returns what the scheduler asks about it."""
    handle = SimpleNamespace(rid=rid)
    rank.tree.prefetch_from_storage(
        handle, None, text[40:-1], None, None, matched_prefix_tokens=text[:40], extra_key=None, cache_salt=None
    )
    return lambda: rank.tree.check_prefetch_progress(handle)


def eventually(asked: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not asked() and time.monotonic() < deadline:
        time.sleep(0.01)
    return asked()


def test_requests_wait_in_the_queue_for_a_slow_tier(
    rank_of: Callable[..., LinkedRank], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = rank_of(settings=on_disk(tmp_path))
    rank.run(TEXT)
    rank.flush()
    may_read = behind_ram(rank, monkeypatch)
    slow, other = arrive(rank, "slow", TEXT), arrive(rank, "other", [9, *MORE])
    assert other()
    assert not slow()
    assert rank.run([9, *MORE]) == (0, 0)
    assert not slow()
    may_read.set()
    assert eventually(slow)
    assert rank.run(TEXT) == (0, 99)


def test_requests_do_not_wait_for_ever(
    rank_of: Callable[..., LinkedRank], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = rank_of(settings={**on_disk(tmp_path), "deadline_seconds": 1.0})
    rank.run(TEXT)
    rank.flush()
    may_read = behind_ram(rank, monkeypatch)
    slow = arrive(rank, "slow", TEXT)
    assert not slow()
    assert eventually(slow)
    assert sum(rank.run(TEXT)) in (0, 99)
    may_read.set()


def test_a_request_that_is_gone_is_not_waited_for(
    rank_of: Callable[..., LinkedRank], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = rank_of(settings=on_disk(tmp_path))
    rank.run(TEXT)
    rank.flush()
    may_read = behind_ram(rank, monkeypatch)
    slow = arrive(rank, "slow", TEXT)
    assert not slow()
    rank.tree.linker.release_request("slow")
    assert slow()
    may_read.set()


def test_ranks_wait_for_the_slowest(rank_of: Callable[..., LinkedRank], tmp_path: Path) -> None:
    from lmkv.adapters.sglang.waiting import Waiting

    rank = rank_of(settings=on_disk(tmp_path))
    assert rank.linker.pages is not None
    others = [0, 0, 1]
    waiting = Waiting(rank.linker.pages, lambda mine: min(mine, others.pop(0)), 2)
    waiting.begin("r", TEXT, None, None)
    assert [waiting.ready("r") for _ in range(4)] == [False, False, True, True]
    assert others == []


def test_the_scheduler_asks_where_there_is_something_to_wait_for(rank_of: Callable[..., LinkedRank], tmp_path: Path) -> None:
    from sglang.srt.managers.scheduler import Scheduler

    with_disk, without = rank_of(settings=on_disk(tmp_path)), rank_of()
    scheduler: Any = object.__new__(Scheduler)
    scheduler.enable_lmcache = False
    assert scheduler.enable_lmcache is False
    for rank, asks in ((with_disk, True), (without, False)):
        scheduler.tree_cache = rank.tree
        assert scheduler.enable_lmcache is asks
    assert with_disk.tree.clear_storage_backend() is True
    assert not with_disk.tree.has_pending_cache_operations()


def test_where_updates_of_weights_are_not_seen_a_flush_forgets(
    rank_of: Callable[..., LinkedRank], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_UPDATERS", (("sglang.no_such_module", "Nobody"),))
    rank = rank_of()
    rank.run(TEXT)
    rank.flush()
    assert rank.run(TEXT) == (0, 0)


def test_ranks_load_what_all_of_them_found(rank_of: Callable[..., LinkedRank], monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    rank = rank_of(page_size=4)
    rank.run(TEXT)
    rank.flush()
    others: list[int] = []
    monkeypatch.setattr(UnifiedRadixCache, "_all_reduce_attn_groups", lambda self, tensor, op: tensor.clamp_(max=others.pop(0)))
    others[:] = [10, 1, 1, 1, 1]  # pages found, held, landed, offloads done, their success
    assert rank.run(TEXT) == (0, 40)
    assert rank.linker.pages is not None
    assert rank.linker.pages.stats().leases == 0
    monkeypatch.undo()
    rank.flush()
    monkeypatch.setattr(UnifiedRadixCache, "_all_reduce_attn_groups", lambda self, tensor, op: tensor.clamp_(max=others.pop(0)))
    others[:] = [24, 0, 1, 1]  # another rank lost it before its load
    assert rank.run(TEXT) == (0, 0)
    assert rank.linker.pages.stats().leases == 0
    others[:] = [0, 1, 1]  # another rank found nothing
    rank.tree.reset()
    rank.allocator.clear()
    assert rank.run(TEXT) == (0, 0)
    assert rank.linker.pages.stats().leases == 0


def test_sglangs_own_flags_find_the_linker(tiny_llama: Path) -> None:
    from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
    from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
    from sglang.srt.mem_cache.unified_cache.linker_factory import create_unified_cache_linker

    from lmkv.adapters.sglang.plugin import LINKER

    pool = make_pool(size=64, page_size=1)
    allocator = TokenToKVPoolAllocator(pool.size, dtype=pool.dtype, device="cpu", kvcache=pool, need_sort=False)
    params = SimpleNamespace(page_size=1, token_to_kv_pool_allocator=allocator, tp_cache_group=None)
    made = create_unified_cache_linker(
        server_args(str(tiny_llama)), params, backend="dynamic", components={ComponentType.FULL},
        config={"linker": LINKER[0], "linker_module_path": LINKER[1], "linker_extra_config": {"ram_capacity": "4MiB"}},
    )  # fmt: skip
    assert isinstance(made, linker_module.LMKVLinker)
    assert made.pages is not None
    assert made.pages.store.config.ram_capacity == 4 << 20
    made.close()


def test_a_disk_that_can_not_be_used_is_no_reason_not_to_start(
    rank_of: Callable[..., LinkedRank], lines: Callable[[], list[str]], tmp_path: Path
) -> None:
    rank_of(settings=on_disk(tmp_path)).close()
    (tmp_path / "file").touch()
    nowhere = {"disk_path": str(tmp_path / "file" / "disk"), "disk_capacity": "64MiB"}
    for settings in ({**on_disk(tmp_path), "chunk_size": 32}, nowhere):
        rank = rank_of(settings=settings)
        assert "not active" in lines()[-1]
        for _ in range(2):
            assert rank.run(TEXT) == (0, 0)
            rank.flush()


def test_a_later_match_takes_back_what_an_earlier_one_promised(rank_of: Callable[..., LinkedRank]) -> None:
    rank = rank_of()
    rank.run(TEXT)
    rank.flush()

    def match(request: Any) -> int:
        key = RadixKey(array("q", TEXT))
        return int(rank.tree.match_prefix(MatchPrefixParams(key=key, req=request)).host_hit_length)

    request = rank.admit([9, *MORE])
    assert match(request) == 100
    assert rank.tree.linker.has_hit(request.rid)
    assert rank.linker.pages is not None
    rank.linker.pages.store.clear()
    assert match(request) == 0
    assert not rank.tree.linker.has_hit(request.rid)
    assert match(request) == 0
    rank.abort(request)


def test_a_store_that_dies_between_lookup_and_load_is_a_miss(rank_of: Callable[..., LinkedRank]) -> None:
    rank = rank_of()
    rank.run(TEXT)
    rank.flush()
    hold = rank.linker.hold

    def dead(rid: str, tokens: int) -> bool:
        assert rank.linker.pages is not None
        rank.linker.pages.store.close()
        return hold(rid, tokens)

    rank.linker.hold = dead  # type: ignore[method-assign]
    assert rank.run(TEXT) == (0, 0)
    assert rank.run(TEXT) == (99, 0)
