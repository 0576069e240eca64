"""The GPU half from Python, on the emulated driver: ``gpu_scenario.py PATH_OF_THE_DRIVER``. Prints ``well`` at the end."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np
import pytest

driver = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # under the name by which the real one is looked for

import lmkv  # noqa: E402
from lmkv.errors import ArgumentError, LayoutMismatchError, NativeError  # noqa: E402
from lmkv.pool import HostPool, MappedPool  # noqa: E402
from lmkv.transfer import CopyEngine, Gpu, GpuOptions, PagedKV, Part, PartTable, Pinner  # noqa: E402
from lmkv.transfer.gpu import count  # noqa: E402

LAYOUT = lmkv.KVLayout.dense(layers=5, heads=2, head_size=16, dtype="bfloat16", chunk_tokens=32)
BLOCKS, TOKENS = 20, 16


class Device:
    """What ``tensor.device`` says."""

    type = "cuda"
    index = 0


class DeviceTensor:
    """A tensor on the emulated device: as much of torch's as LMKV looks at, over memory of the driver's."""

    device = Device()
    dtype = "torch.bfloat16"

    def __init__(self, bits: Any) -> None:
        self.bits = bits
        self.shape, self.ndim = bits.shape, bits.ndim

    @classmethod
    def random(cls, *shape: int) -> DeviceTensor:
        address, size = ctypes.c_uint64(), int(np.prod(shape)) * 2
        assert driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size)) == 0
        memory = np.frombuffer((ctypes.c_char * size).from_address(address.value), np.uint16).reshape(shape)
        memory[:] = np.random.default_rng(size).integers(0, 65536, shape, dtype=np.uint16)
        return cls(memory)

    def detach(self) -> DeviceTensor:
        return self

    def data_ptr(self) -> int:
        return int(self.bits.__array_interface__["data"][0])

    def stride(self) -> tuple[int, ...]:
        return tuple(s // 2 for s in self.bits.strides)

    def swapaxes(self, a: int, b: int) -> DeviceTensor:
        return DeviceTensor(self.bits.swapaxes(a, b))

    def __getitem__(self, key: Any) -> DeviceTensor:
        return DeviceTensor(self.bits[key])


def pages() -> list[tuple[DeviceTensor, DeviceTensor]]:
    """[blocks, tokens, heads, head_size] for K and V of each layer."""
    return [(DeviceTensor.random(BLOCKS, TOKENS, 2, 16), DeviceTensor.random(BLOCKS, TOKENS, 2, 16)) for _ in range(5)]


def payload_of(layers: Any, blocks: list[int], first: int) -> bytes:
    """The chunk of two blocks from ``first`` on, as docs/format.md lays it out."""
    rows = [part.bits[[blocks[first], blocks[first + 1]]].reshape(32, 2, 16).swapaxes(0, 1) for pair in layers for part in pair]
    return np.stack(rows).tobytes()


def copies() -> None:
    layers = pages()
    engine = CopyEngine(layers, LAYOUT)
    assert engine.device == 0
    assert engine.block_tokens == [TOKENS]
    pool = HostPool(8192 + LAYOUT.chunk_bytes, 6, extent_bytes=3 * (8192 + LAYOUT.chunk_bytes))
    slots = pool.allocate(3)
    assert slots is not None
    pinner = Pinner(pool, Gpu.of(0), threads=2, at_start=True)
    assert Gpu.of(0).pinned(*pool.extents()[0])
    blocks = [7, 3, 19, 0, 4, 11]
    parts = [
        Part(pool.view(slot)[4096 : 4096 + LAYOUT.chunk_bytes], 32 * i, 32 * i + 32, 32 * i, 32 * i + 32)
        for i, slot in enumerate(slots)
    ]
    for options in (
        GpuOptions(4096, 2, 3, 1, 64, 0),
        GpuOptions(1 << 20, 3, 132, 16, 512, 0),
        GpuOptions(direct_bytes=1 << 30),
    ):
        Gpu.of(0).tune(options)
        for part in parts:
            part.payload[:] = bytes(len(part.payload))
        gathered = engine.gather(parts, [blocks])
        assert gathered.bytes == 96 * LAYOUT.token_bytes
        gathered.wait()
        assert gathered.done()
        for i, part in enumerate(parts):
            assert bytes(part.payload) == payload_of(layers, blocks, 2 * i)
        before = [part.bits.copy() for pair in layers for part in pair]
        for pair in layers:
            for part in pair:
                part.bits[blocks] = 0
        spans = np.array([(part.first, part.last, part.start, part.stop) for part in parts])
        table = PartTable(pool.addresses(np.array(slots)) + 4096, spans)
        scattered = engine.scatter(table, [blocks], layerwise=True)
        assert scattered.bytes == gathered.bytes
        assert [scattered.wait_layer(layer, 0) for layer in range(5)] == [1, 2, 4, 4, 5]  # the last group that was waited for
        while not scattered.done():
            pass
        assert all((x.bits == y).all() for x, y in zip([p for pair in layers for p in pair], before, strict=True))
    later = pool.allocate(3)  # the pool grows: what is new is pinned too
    assert later is not None
    assert pinner.wait(30)
    assert all(Gpu.of(0).pinned(*extent) for extent in pool.extents())
    pinner.close()
    assert not any(Gpu.of(0).pinned(*extent) for extent in pool.extents())
    refusals(engine, parts)


def refusals(engine: CopyEngine, parts: list[Part]) -> None:
    for call, message in (
        (lambda: engine.gather(parts, [[0, 1]]), "expected blocks for tokens 0 to 96; got 2 of 16 tokens"),
        (lambda: engine.gather(parts, [[0, 1, 2, 3, 4, 20]]), "expected a block below 20"),
        (lambda: engine.gather(parts, []), "expected 1 block tables; got 0"),
        (lambda: Gpu(3), "expected a device from 0 to 0; got 3"),
        (lambda: Gpu.of(0).tune(GpuOptions(threads=7)), "of 32 to 1024 threads"),
        (lambda: Gpu.of(0).unpin(4096), "expected the address of a pinned range"),
    ):
        with pytest.raises((ArgumentError, NativeError), match=message):
            call()
    mixed: Any = pages()
    mixed[2] = tuple(np.zeros((BLOCKS, TOKENS, 2, 16), np.uint16) for _ in range(2))
    with pytest.raises(LayoutMismatchError, match="one device"):
        CopyEngine(mixed, LAYOUT)
    driver.emulated_faults(1, 0)
    Gpu.of(0).tune(GpuOptions(entry_bytes=2 << 20))
    with pytest.raises(NativeError, match="out of memory"):
        engine.gather(parts, [[0, 1, 2, 3, 4, 5]])
    driver.emulated_faults(0, 0)
    engine.gather(parts, [[0, 1, 2, 3, 4, 5]]).wait()
    Gpu.of(0).tune(GpuOptions())


def stores() -> None:
    """The store's own verbs with tensors on the device, pinned and not."""
    events: list[lmkv.Event] = []
    for pin in (True, False):
        for refused in (0, 1):
            driver.emulated_faults(0, refused)
            config = lmkv.StoreConfig(model="m", ram_capacity="1MiB", ram_ahead=0, disk_capacity=0, ram_pin=pin)
            with lmkv.Store(config, LAYOUT, on_event=events.append) as store:
                layers, blocks, tokens = pages(), [5, 2, 9, 1], list(range(60))
                assert store.store(tokens, PagedKV(layers, blocks)) == 60
                target = pages()
                with store.lease(store.lookup([*tokens[:45], 999, 1000])) as lease:
                    assert store.retrieve(lease, PagedKV(target, [0, 8, 3])) == 45
                for (k, v), (k2, v2) in zip(layers, target, strict=True):
                    for x, y in ((k, k2), (v, v2)):
                        assert (x.bits[[5, 2]] == y.bits[[0, 8]]).all()
                        assert (x.bits[9, :13] == y.bits[3, :13]).all()
                        assert not (x.bits[9, 13:] == y.bits[3, 13:]).all()
                assert all(pinner.wait(30) for pinner in store._pins._pinners.values())
                assert bool(store._pins._pinners) == pin
            assert ("unpinned" in {event.kind for event in events}) == (pin and refused == 1), (pin, refused)
            events.clear()
    driver.emulated_faults(0, 0)


def shared_pools() -> None:
    """A worker pins slots that another process owns."""
    pool = HostPool(8192, 8, extent_bytes=16384, shared=True)
    pool.allocate(2)
    mapped = MappedPool(pool.handle())
    pinner = Pinner(mapped, Gpu.of(0))
    assert pinner.wait(30)
    assert not mapped.complete()
    pool.allocate(6)
    assert pinner.wait(30)
    assert mapped.complete()
    assert all(Gpu.of(0).pinned(*extent) for extent in mapped.extents())
    pinner.close()
    mapped.close()
    pool.close()


if __name__ == "__main__":
    assert count() == 1
    assert Gpu.of(0).fact("name") == "Emulated"
    assert Gpu.of(0).numa_node() is None  # there is no such device on the bus
    copies()
    stores()
    shared_pools()
    print("well")
