"""The async face: the same verbs, a loop that never waits, and nothing held when a task is cancelled."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import known_kv
import pytest
import remotes

import lmkv

LAYOUT = lmkv.KVLayout.dense(layers=2, heads=2, head_size=8, dtype="float16", chunk_tokens=16)
TOKENS = list(range(70))


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 120))


def config(path: Path | None = None, **settings: Any) -> lmkv.StoreConfig:
    disk = {"disk_path": str(path), "disk_capacity": 1 << 20} if path else {"disk_capacity": 0}
    return lmkv.StoreConfig(**({"ram_capacity": 1 << 20} | disk | settings))


async def opened(path: Path | None = None, **settings: Any) -> lmkv.AsyncStore:
    return await lmkv.AsyncStore.open(config(path, **settings), LAYOUT)


def proved(arrays: list[Any], loaded: int) -> None:
    for got, wanted in zip(arrays, known_kv.layer_arrays(LAYOUT, TOKENS), strict=True):
        for mine, theirs in zip(got, wanted, strict=True):
            assert known_kv.same_bits(mine[:, :loaded], theirs[:, :loaded])


def test_all_verbs(tmp_path: Path) -> None:
    async def main() -> None:
        async with await opened(tmp_path) as store:
            assert await store.store(TOKENS, known_kv.source(LAYOUT, TOKENS)) == 70
            assert await store.flush(60)
            match = await store.lookup(TOKENS)
            assert match.hit_tokens == 70
        async with await opened(tmp_path) as store:
            match = await store.lookup(TOKENS)
            assert match.tokens_by_tier() == {"disk": 70}
            assert await store.prefetch(match) == 70
            arrays = known_kv.empty_layers(LAYOUT, 70)
            async with store.lease(match) as lease:
                assert lease.hit_tokens == 70
                assert store.stats().leases == 1
                assert await store.retrieve(lease, lmkv.DenseKV(arrays), start=3, stop=60) == 57
                assert await store.retrieve(lease, lmkv.DenseKV(arrays)) == 70
            proved(arrays, 70)
            assert store.stats().leases == 0
            more = [*TOKENS, 1, 2, 3]
            async with store.reserve(more) as reservation:
                assert [(slot.start, slot.tokens) for slot in reservation.slots] == [(64, 9)]
                reservation.slots[0].payload[:] = known_kv.payload(LAYOUT, more, 64, 73)
                assert reservation.commit() == 9
            assert (await store.lookup(more)).hit_tokens == 73
            async with store.reserve([5] * 40) as reservation:
                assert store.stats().reservations == 1
            assert store.stats().reservations == 0
            await store.clear()
            assert (await store.lookup(more)).hit_tokens == 0
            store.sync._check()

    run(main())


def test_errors_come_through() -> None:
    async def main() -> None:
        store = await opened()
        with pytest.raises(lmkv.ArgumentError):
            await store.lookup([])
        with pytest.raises(lmkv.LayoutMismatchError):
            await store.store(
                TOKENS, known_kv.source(lmkv.KVLayout.dense(layers=1, heads=1, head_size=1, dtype="int8"), TOKENS)
            )
        with pytest.raises(RuntimeError, match="theirs"):
            async with store.lease(await store.lookup(TOKENS)):
                raise RuntimeError("theirs")
        with pytest.raises(RuntimeError, match="theirs"):
            async with store.reserve(TOKENS):
                raise RuntimeError("theirs")
        assert (store.stats().leases, store.stats().reservations) == (0, 0)
        store.sync._check()
        await store.close()
        with pytest.raises(lmkv.StoreClosedError):
            await lmkv.AsyncStore(store.sync).lookup(TOKENS)
        with pytest.raises(lmkv.CapacityError):
            await lmkv.AsyncStore.open(config(ram_capacity=1), LAYOUT)

    run(main())


def test_the_loop_goes_on_while_a_tier_is_slow(register: Callable[[str, str, str], None]) -> None:
    register("lmkv.backends", "slow", "remotes:slow")
    tier = lmkv.TierConfig("slow", options={"server": remotes.new_server(), "seconds": 0.1, "operations": ["read_many"]})

    async def main() -> None:
        async with await opened(tiers=(tier,)) as store:
            await store.store(TOKENS, known_kv.source(LAYOUT, TOKENS))
            assert await store.flush(60)
        async with await opened(tiers=(tier,)) as store:
            match = await store.lookup(TOKENS, wait=30)
            assert match.hit_tokens == 70
            ticks = 0

            async def tick() -> None:
                nonlocal ticks
                while True:
                    await asyncio.sleep(0.001)
                    ticks += 1

            ticking = asyncio.create_task(tick())
            async with store.lease(match) as lease:
                assert lease.hit_tokens == 70
            ticking.cancel()
            assert ticks > 3, "others ran meanwhile"

    run(main())


def test_many_tasks_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with await opened(tmp_path, ram_capacity=256 << 10) as store:

            async def work(number: int) -> None:
                tokens = [number // 3, *TOKENS[: 20 + number]]
                await store.store(tokens, known_kv.source(LAYOUT, tokens))
                match = await store.lookup(tokens)
                arrays = known_kv.empty_layers(LAYOUT, len(tokens))
                async with store.lease(match) as lease:
                    loaded = await store.retrieve(lease, lmkv.DenseKV(arrays))
                for got, wanted in zip(arrays, known_kv.layer_arrays(LAYOUT, tokens), strict=True):
                    for mine, theirs in zip(got, wanted, strict=True):
                        assert known_kv.same_bits(mine[:, :loaded], theirs[:, :loaded])

            await asyncio.gather(*(work(number) for number in range(48)))
            assert store.sync._slow[0].flush(60)
            store.sync._check()

    run(main())


@pytest.mark.parametrize("verb", ["lease", "reserve"])
def test_a_cancelled_task_leaves_nothing_behind(verb: str) -> None:
    """The thread goes on after its task was cancelled; what it then brings must be given back."""

    async def main() -> None:
        async with lmkv.AsyncStore(lmkv.Store(config(), LAYOUT), threads=1) as store:
            await store.store(TOKENS, known_kv.source(LAYOUT, TOKENS))
            match = await store.lookup(TOKENS)

            async def hold() -> None:
                async with store.lease(match) if verb == "lease" else store.reserve([9] * 50):
                    await asyncio.sleep(3600)

            for _ in range(5):
                task = asyncio.create_task(hold())
                with store.sync._lock:  # the thread waits for the lock when the task is cancelled
                    await asyncio.sleep(0.05)
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                await store.lookup(TOKENS)  # the one thread is done with it
                stats = store.stats()
                assert (stats.leases, stats.reservations) == (0, 0)
            store.sync._check()

    run(main())


class _Halted(lmkv.DenseKV):
    """Tensors whose copy goes on only once it is let."""

    def __init__(self, layers: Any) -> None:
        super().__init__(layers)
        self.begun, self.go_on = threading.Event(), threading.Event()

    def places(self, start: int, stop: int) -> Any:
        self.begun.set()
        assert self.go_on.wait(60)
        return super().places(start, stop)


@pytest.mark.parametrize("verb", ["store", "retrieve"])
def test_a_cancelled_copy_is_over_when_its_task_is(verb: str) -> None:
    """The caller uses its tensors for something else then: they must be neither read nor written any more."""

    async def main() -> None:
        async with lmkv.AsyncStore(lmkv.Store(config(), LAYOUT), threads=2) as store:
            layers = known_kv.layer_arrays(LAYOUT, TOKENS)
            if verb == "retrieve":
                await store.store(TOKENS, lmkv.DenseKV(layers))
                layers = known_kv.empty_layers(LAYOUT, len(TOKENS))
            halted = _Halted(layers)

            async def copy() -> None:
                if verb == "store":
                    await store.store(TOKENS, halted)
                else:
                    async with store.lease(await store.lookup(TOKENS)) as lease:
                        await store.retrieve(lease, halted)

            task = asyncio.create_task(copy())
            while not halted.begun.is_set():
                await asyncio.sleep(0.001)
            for _ in range(3):
                task.cancel()
                await asyncio.sleep(0.02)
            early = task.done()
            if early:  # the caller's memory is its own again
                for array in (array for parts in layers for array in parts):
                    array[:] = 1
            halted.go_on.set()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled()
            arrays = known_kv.empty_layers(LAYOUT, len(TOKENS))
            async with store.lease(await store.lookup(TOKENS)) as lease:
                proved(arrays, await store.retrieve(lease, lmkv.DenseKV(arrays)))
            if verb == "retrieve":
                proved(layers, len(TOKENS))
                assert not early, "it was written when its task was over"
            store.sync._check()

    run(main())


@pytest.mark.parametrize(
    "verb", ["lookup", "prefetch", "worthwhile", "lease", "retrieve", "reserve", "store", "flush", "clear"]
)
def test_verbs_take_what_the_store_takes(verb: str) -> None:
    here, there = (inspect.signature(getattr(kind, verb)).parameters for kind in (lmkv.AsyncStore, lmkv.Store))
    assert [name for name in here if name != "wait"] == list(there)


def test_priorities() -> None:
    async def main() -> None:
        async with await opened() as store:
            assert await store.store(TOKENS[:16], known_kv.source(LAYOUT, TOKENS[:16]), priority=7) == 16
            async with store.reserve(TOKENS, priority=9) as reservation:
                assert {chunk.priority for chunk in reservation.chunks} == {9}
            assert [node.priority for node in store.sync._ram.index] == [7]

    run(main())
