"""LMKV behind the prefix tree of a real SGLang: its pools, allocators and tree on the CPU, with KV that can be checked."""

from __future__ import annotations

import random
import threading
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components import weight_updater
from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey
from sglang.srt.mem_cache.registry import TreeCacheBuildContext, default_radix_cache_factory
from sglang_tree import Machine, make_pool

from lmkv import StoreConfig
from lmkv.adapters.sglang import radix, weights
from lmkv.adapters.sglang.passes import LayerWaits
from lmkv.adapters.sglang.radix_tree import LMKVRadixCache
from lmkv.errors import ConfigError, NativeError

torch.set_num_threads(1)
TEXT = list(range(3, 103))


def settings(path: Path, **more: Any) -> StoreConfig:
    small = {"ram_capacity": "4MiB", "ram_extent": "1MiB", "ram_ahead": 0, "disk_capacity": "16MiB", "disk_path": str(path)}
    return StoreConfig.from_dict({"model": "tiny", **small, **more})


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Callable[..., Machine]]:
    """``machine(kind, page_size, size)``: one rank on this test's disk directory; closed at the end."""
    opened: list[Machine] = []

    def make(
        kind: str = "mha", page_size: int = 1, *, size: int = 512, store: dict[str, Any] | None = None, **own: Any
    ) -> Machine:
        pool = make_pool(kind, size=size, page_size=page_size)
        opened.append(Machine(pool, settings(tmp_path / "disk", **(store or {})), page_size=page_size, **own))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


@pytest.mark.parametrize(("kind", "page"), [("mha", 1), ("mha", 4), ("mha", 64), ("mla", 1), ("mla", 16)])
def test_hits_of_tree_and_store_add_up(kind: str, page: int, machine: Callable[..., Machine]) -> None:
    def whole(tokens: int) -> int:
        return tokens // page * page

    rank = machine(kind, page, size=1024)
    assert rank.run(TEXT, [5, 6, 7, 8]) == (0, 0)
    assert rank.run(TEXT) == (whole(99), 0)
    rank.flush()
    assert rank.run([*TEXT[:70], 300, 301]) == (0, whole(70))
    assert rank.run([*TEXT, 5, 6, 7, 9]) == (whole(70), whole(103) - whole(70))  # generated tokens count, too
    rank.check_pages()


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_a_restart_hits_from_disk_and_another_page_size_shares_it(
    kind: str, queued: bool, machine: Callable[..., Machine]
) -> None:
    first = machine(kind, 1, queued=queued)
    first.run(TEXT, [5, 6, 7])
    first.close()
    assert machine(kind, 1, queued=queued).run(TEXT) == (0, 99)
    assert machine(kind, 8, queued=queued).run(TEXT) == (0, 96)


def test_a_queued_request_waits_for_the_disk(machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch) -> None:
    first = machine()
    first.run(TEXT)
    first.close()
    rank = machine(queued=True)
    store, come = rank.pages.store, Future()
    prefetch = store.prefetch

    def later(match: Any) -> Future[int]:
        prefetch(match).add_done_callback(lambda done: threading.Timer(0.3, come.set_result, (done.result(),)).start())
        return come

    monkeypatch.setattr(store, "prefetch", later)
    text = array("q", TEXT[:99])
    request = SimpleNamespace(rid="waits", extra_key=None)
    assert rank.reuse.find(request, text) == 99
    assert not rank.tree.check_prefetch_progress("waits")  # others have their turn meanwhile
    come.result(30)
    assert rank.tree.check_prefetch_progress("waits")
    assert rank.tree.check_prefetch_progress("another")
    assert rank.reuse.find(request, text) == 99
    rank.tree.release_aborted_request("waits")
    monkeypatch.setattr(store, "prefetch", prefetch)
    assert rank.run(TEXT) == (0, 99)


def test_a_disk_that_takes_too_long_is_a_miss(machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch) -> None:
    first = machine()
    first.run(TEXT)
    first.close()
    rank = machine(queued=True, store={"deadline_seconds": 0.5})
    monkeypatch.setattr(rank.pages.store, "prefetch", lambda match: Future())
    assert rank.run(TEXT) == (0, 0)
    rank.check_pages()


def test_tenants_are_kept_apart(machine: Callable[..., Machine]) -> None:
    rank = machine()
    for key in ("a", "b", None):
        rank.flush()
        assert rank.run(TEXT, extra_key=key) == (0, 0), key
        rank.flush()
        assert rank.run(TEXT, extra_key=key) == (0, 99), key


@pytest.mark.parametrize("own", [{"input_embeds": [[0.0]]}, {"multimodal_inputs": SimpleNamespace(mm_items=[])}])
def test_what_tokens_do_not_name_is_neither_kept_nor_found(own: dict[str, Any], machine: Callable[..., Machine]) -> None:
    rank = machine()
    rank.run(TEXT, **own)
    rank.flush()
    assert rank.run(TEXT) == (0, 0)
    rank.flush()
    assert rank.run(TEXT, **own) == (0, 0)


def test_deterministic_serving_keeps_prompts_only(machine: Callable[..., Machine]) -> None:
    rank = machine(disable_finished_insert=True)
    rank.run(TEXT, [5, 6, 7, 8])
    rank.flush()
    assert rank.run([*TEXT, 5, 6, 7, 8, 9]) == (0, 100)


class Late:
    """A copy that is made when it is waited for, by a forward pass or by the tree: until then its slots hold other bytes."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make: Callable[[], Any] | None = make
        self.bytes = 0

    def done(self) -> bool:
        return self.make is None

    def wait(self) -> None:
        if self.make is not None:
            self.make()
            self.make = None

    def wait_layer(self, layer: int, stream: int | None = None) -> None:
        self.wait()


def copy_late(rank: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads of this rank do not arrive before they are waited for."""
    scatter = rank.pages._engine.scatter
    monkeypatch.setattr(rank.pages._engine, "scatter", lambda *args, **more: Late(lambda: scatter(*args, **more)))


def test_what_is_still_being_loaded_is_waited_for(machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch) -> None:
    rank = machine(size=128, waits=LayerWaits())
    rank.run(TEXT)
    rank.flush()
    copy_late(rank, monkeypatch)
    assert rank.run(TEXT) == (0, 99)  # verified by the machine behind the waits of a forward pass
    rank.flush()
    found = rank.tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", TEXT[:99]), None), req=rank.ask(TEXT)))
    assert found.host_hit_length == 99
    request = rank.ask(TEXT)
    request.prefix_indices = found.device_indices
    rank.tree.init_load_back(
        InitLoadBackParams(best_match_node=found.best_match_node, host_hit_length=found.host_hit_length, req=request)
    )  # admitted, and then not run
    assert rank.run([300 + i for i in range(90)]) == (0, 0)  # takes the pages; nothing may be written to them behind that
    rank.flush()
    assert rank.run([300 + i for i in range(90)]) == (0, 89)
    rank.check_pages()


@pytest.mark.parametrize("page", [1, 16])
def test_of_a_text_computed_twice_is_kept_what_the_tree_has(page: int, machine: Callable[..., Machine]) -> None:
    rank = machine("mha", page, chunk_tokens=64)
    first, second = rank.admit(TEXT), rank.admit(TEXT)  # neither finds the other's
    slots = rank.requests.req_to_token[second.req_pool_idx, : len(TEXT) // page * page].long()  # whole pages are shared
    for part in rank._tensors():
        part[slots] ^= 1  # as another order of sums would give
    rank.finish(first)
    more = range(200, 241)
    rank.finish(second, more)  # its text goes on within the first one's last chunk; the tree keeps the first one's pages
    longer = [*TEXT, *more]
    rank.flush()
    held = (len(longer) - 1) // page * page
    assert rank.admit(longer).cached == (0, held)  # bits are compared in there
    assert held > len(TEXT) + 16


@pytest.mark.parametrize("page", [1, 4])
@pytest.mark.parametrize("late", [True, False])
def test_a_last_token_that_is_computed_later_is_not_kept(
    page: int, late: bool, machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_DISABLE_CONSECUTIVE_PREFILL_OVERLAP", str(late))
    rank = machine("mha", page)
    rank.tree = LMKVRadixCache(rank.params, rank.reuse, last_may_be_late=radix._results_before_steps())
    whole = [*TEXT[:97], 200, 201, 202]
    request = rank.admit(whole[:97])
    request.output_ids = array("q", whole[97:])
    rank._compute(request, len(whole))  # with overlap the step behind the last one is counted when the request ends
    last = rank.requests.req_to_token[request.req_pool_idx, len(whole) - 1].long()
    if late:
        for part in rank._tensors():
            part[last] ^= 1  # not computed yet
    rank.tree.cache_finished_req(request, kv_len_to_handle=len(whole))
    rank.requests.free_slots.append(request.req_pool_idx)
    rank.flush()
    held = (len(whole) - late) // page * page
    assert rank.admit([*whole, 7]).cached == (0, held)  # bits are compared in there


def test_two_loads_of_one_text_leave_nothing_to_be_written_later(
    machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = machine(size=256, waits=LayerWaits())
    rank.run(TEXT)
    rank.flush()
    copy_late(rank, monkeypatch)
    requests = [rank.ask(TEXT, rid=rid) for rid in ("one", "two")]
    key = RadixKey(array("q", TEXT[:99]), None)
    found = [rank.tree.match_prefix(MatchPrefixParams(key=key, req=request)) for request in requests]
    for request, match in zip(requests, found, strict=True):  # matched in one round, before either was loaded
        request.prefix_indices = match.device_indices
        more, _ = rank.tree.init_load_back(
            InitLoadBackParams(best_match_node=match.best_match_node, host_hit_length=match.host_hit_length, req=request)
        )
        assert len(more) == 99
    request = rank.admit([300 + i for i in range(90)])  # takes pages that the second one gave back
    rank.finish(request)
    rank.check_pages()


def test_a_load_that_fails_under_a_pass_ends_the_engine(
    machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = machine(waits=LayerWaits())
    rank.run(TEXT)
    rank.flush()

    def fails() -> None:
        raise NativeError("the device")

    late = Late(fails)
    monkeypatch.setattr(late, "wait_layer", lambda *_: None)
    monkeypatch.setattr(rank.pages._engine, "scatter", lambda *_, **__: late)
    monkeypatch.setattr(rank, "_verify", lambda *_: None)
    request = rank.admit(TEXT)
    monkeypatch.setattr(late, "done", lambda: True)
    with pytest.raises(NativeError, match="under the forward pass"):
        rank.finish(request)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("page", [1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_many_requests_at_once_in_little_memory(
    page: int, seed: int, late: bool, machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    waits = LayerWaits() if late else None
    little = {"ram_capacity": "160KiB", "ram_extent": "160KiB"}
    rank = machine("mha", page, size=512, store=little, queued=seed > 0, waits=waits)
    if late:
        copy_late(rank, monkeypatch)
    texts = [[rng.randrange(3, 9) for _ in range(rng.randrange(2, 90))] for _ in range(6)]
    running: list[Any] = []
    loaded = held = 0
    for _ in range(150):
        if rng.random() < 0.05 and not running:
            rank.flush()
        if len(running) < 3 and rng.random() < 0.6:
            text = (rng.choice(texts)[: rng.randrange(2, 90)] + [rng.randrange(3, 9) for _ in range(rng.randrange(20))])[:90]
            request = rank.admit([*text, 7, 7], extra_key=rng.choice([None, "tenant"]))
            held, loaded = held + request.cached[0], loaded + request.cached[1]
            running.append(request)
        elif running:
            rank.finish(running.pop(rng.randrange(len(running))), [rng.randrange(3, 9) for _ in range(rng.randrange(8))])
        rank.pages.store._check()
    while running:
        rank.finish(running.pop())
    rank.check_pages()
    assert held
    assert loaded


@pytest.mark.parametrize("queued", [False, True])
def test_flipped_bits_on_disk_are_a_miss(queued: bool, machine: Callable[..., Machine], tmp_path: Path) -> None:
    first = machine(chunk_tokens=16)
    first.run(TEXT)
    first.close()
    for path in (tmp_path / "disk").glob("segment-*.kv"):
        data = bytearray(path.read_bytes())
        data[4096:] = bytes(byte ^ 0x10 for byte in data[4096:])
        path.write_bytes(data)
    rank = machine(chunk_tokens=16, queued=queued)
    assert rank.run(TEXT) == (0, 0)  # what came is verified by the machine, bit by bit
    rank.check_pages()
    rank.flush()
    assert rank.run(TEXT) == (0, 99)  # and kept anew


def test_a_disk_that_is_gone_is_a_miss(machine: Callable[..., Machine], tmp_path: Path) -> None:
    first = machine()
    first.run(TEXT)
    first.close()
    rank = machine()
    for path in (tmp_path / "disk").glob("segment-*.kv"):
        with path.open("r+b") as file:
            file.truncate(4096)
    assert rank.run(TEXT) == (0, 0)
    rank.check_pages()


def test_a_load_that_fails_gives_its_pages_back(machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch) -> None:
    rank = machine()
    rank.run(TEXT)
    rank.flush()
    lease = rank.pages.lease

    def lost(match: Any) -> Any:
        held = lease(match)
        held.release()
        return held

    monkeypatch.setattr(rank.pages, "lease", lost)
    assert rank.run(TEXT) == (0, 0)
    rank.check_pages()


def test_without_room_on_the_device_it_is_computed_later(machine: Callable[..., Machine]) -> None:
    rank = machine(size=128)
    rank.run(TEXT)
    rank.flush()
    other = rank.admit([200 + i for i in range(60)])  # locked: 68 slots are left
    request = rank.admit(TEXT[:60])
    assert request.cached == (0, 59)
    rank.finish(request)
    rank.finish(other)
    rank.check_pages()


def test_pages_that_are_being_kept_are_waited_for_before_others_get_them(
    machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = machine(size=128)
    go, begun = threading.Event(), threading.Event()
    save = rank.pages.save

    def slow(*args: Any, **more: Any) -> Any:
        begun.set()
        assert go.wait(30)
        return save(*args, **more)

    monkeypatch.setattr(rank.pages, "save", slow)
    rank.run(TEXT)  # returns, whatever the copy does
    assert begun.wait(30)
    assert rank.told.counts["stores"] == 0
    threading.Timer(0.2, go.set).start()
    assert rank.run([300 + i for i in range(90)]) == (0, 0)  # takes the pages of the first
    rank.flush()
    assert rank.told.counts["stores"] == 2
    assert rank.run(TEXT) == (0, 99)  # with the bytes that were there before
    rank.check_pages()


def test_a_copy_that_fails_keeps_nothing_and_holds_nobody_up(
    machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = machine()

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(rank.pages, "save", fails)
    rank.run(TEXT)
    rank.flush()
    assert rank.told.counts["store_failures"] == 1
    assert rank.run(TEXT) == (0, 0)
    rank.check_pages()


def test_changed_weights_make_all_of_it_a_miss(machine: Callable[..., Machine]) -> None:
    assert weights.watch()
    rank = machine()
    rank.run(TEXT)
    under_way = rank.admit([400 + i for i in range(40)])
    rank.finish(rank.admit([*TEXT, 1]))
    updater = next(kind for kind in vars(weight_updater).values() if hasattr(kind, "update_weights_from_disk"))
    with pytest.raises(AttributeError):  # it fails, after some weights perhaps
        updater.update_weights_from_disk(None, None)
    rank.finish(under_way)
    rank.flush()
    assert rank.run(TEXT) == (0, 0)
    assert rank.run([400 + i for i in range(40)]) == (0, 0)
    rank.flush()
    assert rank.run(TEXT) == (0, 99)


def test_where_updates_of_weights_cannot_be_seen_a_flush_forgets(machine: Callable[..., Machine]) -> None:
    rank = machine()
    rank.tree = LMKVRadixCache(rank.params, rank.reuse, forgets_on_flush=True)
    rank.run(TEXT)
    rank.flush()
    assert rank.run(TEXT) == (0, 0)


def test_the_least_that_any_rank_has_is_what_all_load(machine: Callable[..., Machine]) -> None:
    answers: Iterator[int] = iter(())
    rank = machine(agree=lambda number: min(number, next(answers, number)))
    rank.run(TEXT)
    rank.flush()
    answers = iter([80, 75])  # to the lookup, to the load
    assert rank.run(TEXT, rid="x") == (0, 75)
    rank.check_pages()


# -- the door ----------------------------------------------------------------------------------------------------------------


def context(machine: Machine, **arguments: Any) -> TreeCacheBuildContext:
    """What SGLang hands to its choice of a tree."""
    named = {"enable_lmcache": True, "lmcache_config_file": None, "model_path": "tiny", "enable_flexkv": False}
    named = {**named, "enable_multimodal": False, **arguments}
    params = SimpleNamespace(**{**vars(machine.params), "tp_cache_group": None})
    fields = TreeCacheBuildContext.__dataclass_fields__
    given = {"server_args": SimpleNamespace(**named), "params": params, "tp_size": 1, "tp_rank": 0}
    return TreeCacheBuildContext(**{name: given.get(name) if name in given else _blank(name) for name in fields})


def _blank(name: str) -> Any:
    return False if name.startswith(("is_", "enable_", "disable_")) else None


@pytest.fixture
def opted_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMKV_SGLANG", "1")
    monkeypatch.setenv("LMKV_RAM_CAPACITY", "4MiB")


@pytest.mark.usefixtures("opted_in")
def test_the_flag_gives_lmkvs_tree(machine: Callable[..., Machine]) -> None:
    rank = machine()
    tree = radix.serve(default_radix_cache_factory, context(rank))
    assert type(tree).__name__ == "LMKVRadixCache"
    tree.release_host_resources()
    off = radix.serve(default_radix_cache_factory, context(rank, enable_lmcache=False))
    assert type(off) is RadixCache


def test_without_opting_in_it_is_sglangs_own_business(machine: Callable[..., Machine]) -> None:
    rank = machine()
    with pytest.raises(RuntimeError, match="LMCache is not installed"):
        radix.serve(default_radix_cache_factory, context(rank))


@pytest.mark.usefixtures("opted_in")
@pytest.mark.parametrize(
    ("arguments", "why"),
    [({"speculative_draft_model_path": "x"}, "draft model"), ({"enable_unified_memory": True}, "one KV slot a token")],
)
def test_what_is_not_served_runs_without_and_says_why(
    arguments: dict[str, Any], why: str, machine: Callable[..., Machine], caplog: pytest.LogCaptureFixture
) -> None:
    rank = machine()
    tree = radix.serve(default_radix_cache_factory, context(rank, **arguments))
    assert type(tree) is RadixCache
    assert why in caplog.text


@pytest.mark.usefixtures("opted_in")
def test_a_directory_of_another_layout_is_told_and_left_alone(
    machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = machine("mla")
    other.run(TEXT)
    other.close()
    rank = machine(store={"disk_capacity": 0})
    monkeypatch.setenv("LMKV_DISK_PATH", str(tmp_path / "disk"))
    tree = radix.serve(default_radix_cache_factory, context(rank))
    assert type(tree) is RadixCache
    assert "holds chunks of the layout" in caplog.text
    assert machine("mla").run(TEXT) == (0, 99)


@pytest.mark.usefixtures("opted_in")
def test_a_rank_does_not_serve_alone(machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(radix, "_agreement", lambda *_: lambda number: 0)
    assert type(radix.serve(default_radix_cache_factory, context(machine()))) is RadixCache


@pytest.mark.usefixtures("opted_in")
def test_wrong_settings_stop_the_start(machine: Callable[..., Machine], tmp_path: Path) -> None:
    rank = machine()
    (tmp_path / "lmkv.yaml").write_text("ram_capasity: 1GiB\n")
    with pytest.raises(ConfigError, match="ram_capacity"):
        radix.serve(default_radix_cache_factory, context(rank, lmcache_config_file=str(tmp_path / "lmkv.yaml")))


@pytest.mark.usefixtures("opted_in")
def test_the_scheduler_asks_before_a_requests_turn(
    machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rank = machine()
    scheduler = object.__new__(Scheduler)
    scheduler.enable_hicache_storage = False  # as its constructor does
    scheduler.tree_cache = radix.serve(default_radix_cache_factory, context(rank))
    assert not scheduler.enable_hicache_storage  # RAM alone: nothing to wait for
    scheduler.tree_cache.release_host_resources()
    monkeypatch.setenv("LMKV_DISK_PATH", str(tmp_path / "own"))
    scheduler.tree_cache = radix.serve(default_radix_cache_factory, context(rank))
    assert scheduler.enable_hicache_storage
    scheduler.tree_cache.release_host_resources()


def test_the_plugin_can_hook_the_choice() -> None:
    assert radix.install() == ""
