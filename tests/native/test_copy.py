"""Copies between payloads and engines' memory, on the host and on a GPU alike: each byte where it belongs, no other touched."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from engine_memory import DTYPES, KINDS, Array, Kind, Memory, Shape, Views, expect, permute
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkv.layout import KVLayout, LayerGroup
from lmkv.pool import HostPool
from lmkv.transfer import CopyEngine, Part
from lmkv.transfer.access import paged_places
from lmkv.transfer.host import copy_compiled
from lmkv.transfer.plan import native
from lmkv.transfer.rows import Layers, row_table


def _no_gpu() -> str:
    """Why there is no GPU to test on; empty if there is one."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return "" if torch.cuda.is_available() else "no CUDA device"


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and _no_gpu():
        pytest.skip(_no_gpu())
    return str(request.param)


class Payloads:
    """Parts of a text's chunks in slots of a pool, between bytes that nobody may write to."""

    def __init__(self, layout: KVLayout, spans: Sequence[tuple[int, int, int, int]], rng: np.random.Generator) -> None:
        self._pool = HostPool(layout.chunk_bytes + 2 * 4096, len(spans), extent_bytes=1 << 20)
        slots = self._pool.allocate(len(spans))
        assert slots is not None
        self._views = [np.frombuffer(self._pool.view(slot), np.uint8) for slot in slots]
        self.parts, self.wanted, self._inside = [], [], []
        for view, (first, last, start, stop) in zip(self._views, spans, strict=True):
            view[:] = rng.integers(0, 256, len(view), dtype=np.uint8)
            begin = int(rng.choice([4096, 4096, 4096 + 64, 4096 + 16]))
            inside = slice(begin, begin + layout.token_bytes * (last - first))
            self.parts.append(Part(memoryview(view)[inside], first, last, start, stop))
            self.wanted.append(view.copy())
            self._inside.append(inside)

    def wanted_inside(self) -> list[Array]:
        return [view[inside] for view, inside in zip(self.wanted, self._inside, strict=True)]

    def check(self) -> None:
        for number, (got, wanted) in enumerate(zip(self._views, self.wanted, strict=True)):
            wrong = np.flatnonzero(got != wanted)
            assert not len(wrong), f"part {number}: {len(wrong)} other bytes, the first at {wrong[0]} of {self._inside[number]}"


def _spans(tokens: int, chunk: int, rng: random.Random) -> list[tuple[int, int, int, int]]:
    """``first, last, start, stop`` of parts: whole chunks, an odd tail, some chunks left out, some of them only in part."""
    spans = []
    for first in range(0, tokens, chunk):
        last = min(first + chunk, tokens)
        start, stop = first, last
        if rng.random() < 0.3:
            start, stop = sorted(rng.sample(range(first, last + 1), 2)) if last - first > 1 else (first, last)
        if first == 0 or rng.random() < 0.8:
            spans.append((first, last, start, stop))
    return spans


def _table(memory: Memory, tokens: int, rng: random.Random, skip: float) -> list[int]:
    s = memory.shape
    ids = rng.sample(range(s.blocks), -(-tokens // s.block_tokens))
    return [-1 if rng.random() < skip else block for block in ids]


def round_trip(
    memories: Sequence[Memory],
    layout: KVLayout,
    tokens: int,
    seed: int,
    *,
    first_layer: int = 0,
    skip: float = 0.0,
    layerwise: bool = False,
) -> None:
    """Gather and scatter random parts of a text through one engine of all memories' layers, a block table for each memory."""
    rng, bytes_of = random.Random(seed), np.random.default_rng(seed)
    tables = [_table(memory, tokens, rng, skip) for memory in memories]
    layers = [layer for memory in memories for layer in memory.layers]
    numbers = [number for number, memory in enumerate(memories) for _ in memory.layers]
    engine = CopyEngine(layers, layout, order=memories[0].kind.order, first_layer=first_layer, tables=numbers)
    assert engine.block_tokens == [memory.shape.block_tokens for memory in memories]
    with_tables = list(zip(memories, tables, strict=True))
    for into_payloads in (True, False):
        payloads = Payloads(layout, _spans(tokens, layout.chunk_tokens, rng), bytes_of)
        expect(
            with_tables,
            payloads.parts,
            layout,
            payloads.wanted_inside(),
            into_payloads=into_payloads,
            first_layer=first_layer,
        )
        if into_payloads:
            copy = engine.gather(payloads.parts, tables)
        else:
            copy = engine.scatter(payloads.parts, tables, layerwise=layerwise)
        copy.wait()
        assert copy.done()
        payloads.check()
        for number, memory in enumerate(memories):
            wrong = np.flatnonzero(memory.read() != memory.wanted)
            assert not len(wrong), f"memory {number}: {len(wrong)} other elements, the first at {wrong[0]}"


# -- every layout, element size, block size and head size with each other -----------------------------------------------------

AXES: dict[str, Sequence[Any]] = {
    "kind": list(KINDS),
    "itemsize": [1, 2, 4],
    "block": [1, 2, 5, 16, 32, 128, 256],
    "size": [64, 72, 80, 96, 128, 192, 256, 576],
    "heads": [1, 2, 3, 8],
    "chunk": [13, 64, 256],
}


def pairwise(axes: dict[str, Sequence[Any]], seed: int = 0) -> Iterator[tuple[Any, ...]]:
    """Combinations in which any two values of two axes meet at least once (greedily, so not the fewest there are)."""
    rng = random.Random(seed)
    names = list(axes)
    pairs = {(a, b, x, y) for a, b in itertools.combinations(names, 2) for x in axes[a] for y in axes[b]}

    def met(row: dict[str, Any]) -> set[tuple[Any, ...]]:
        return {(a, b, row[a], row[b]) for a, b in itertools.combinations(names, 2)}

    while pairs:
        a, b, x, y = min(pairs, key=repr)
        tries = [{**{name: rng.choice(axes[name]) for name in names}, a: x, b: y} for _ in range(20)]
        best = max(tries, key=lambda row: len(met(row) & pairs))
        pairs -= met(best)
        yield tuple(best.values())


CASES = list(pairwise(AXES))


def test_pairs_are_all_there() -> None:
    for a, b in itertools.combinations(range(len(AXES)), 2):
        x, y = list(AXES.values())[a], list(AXES.values())[b]
        assert {(case[a], case[b]) for case in CASES} == set(itertools.product(x, y))


@pytest.mark.parametrize(("kind", "itemsize", "block", "size", "heads", "chunk"), CASES)
def test_layouts(device: str, kind: str, itemsize: int, block: int, size: int, heads: int, chunk: int) -> None:
    seed = itemsize + 10 * block + 10_000 * size + 100_000_000 * heads + chunk
    rng = random.Random(seed)
    layers = 1 if block * size * heads * itemsize > 200_000 else 2
    tokens = rng.randint(block // 2 + 1, max(block + 3, 40))
    blocks = -(-tokens // block) + rng.randint(0, 2)
    shape = Shape(layers, blocks, block, heads, size, itemsize)
    memory = Memory(KINDS[kind], shape, device, np.random.default_rng(seed))
    layout = KVLayout((memory.group(),), chunk)
    round_trip([memory], layout, tokens, seed, skip=rng.choice([0.0, 0.2]), layerwise=rng.random() < 0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "itemsize"), [(128, 2), (77, 1), (80, 2)])
def test_copies_larger_than_caches(device: str, kind: str, size: int, itemsize: int) -> None:
    """From 4 MiB on the host copies in another way than below, for which whole lines and pieces of 16 bytes matter."""
    rng, seed = np.random.default_rng(size), 2
    layers, wide = (4, size) if KINDS[kind].kv == 2 else (8, 8 * size)
    memory = Memory(KINDS[kind], Shape(layers, 76, 16, 8, wide, itemsize), device, rng)
    layout = KVLayout((memory.group(),), 256)
    assert layout.token_bytes * 1000 > 4 << 20
    round_trip([memory], layout, 1211, seed)


@pytest.mark.parametrize(
    "kinds", [("[blocks,2,N,H,D]", "[2,blocks,N,H,D]"), ("MLA", "slots"), ("LBHNC", "BHLNC"), ("MLA", "MLA")]
)
def test_block_tables_of_different_block_sizes(device: str, kinds: tuple[str, str]) -> None:
    rng = np.random.default_rng(5)
    full = Memory(KINDS[kinds[0]], Shape(3, 9, 16, 2, 64, 2), device, rng)
    other = Memory(KINDS[kinds[1]], Shape(2, 4, 48, 4, 96, 1), device, rng)
    layout = KVLayout((full.group(), other.group()), 32)
    for seed in range(4):
        round_trip([full, other], layout, 101 + seed, seed, skip=0.2)


@pytest.mark.parametrize("first_layer", [0, 1, 3])
def test_ranks_that_hold_some_of_the_layers(device: str, first_layer: int) -> None:
    """Only the rank's rows of a payload are touched."""
    memory = Memory(KINDS["[blocks,2,N,H,D]"], Shape(2, 6, 16, 3, 64, 2), device, np.random.default_rng(first_layer))
    group = memory.group()
    before = (LayerGroup(first_layer, 1, 1, 24, "float32"),) if first_layer else ()
    layout = KVLayout((*before, LayerGroup(4, 2, 3, 64, group.dtype)), 32)
    round_trip([memory], layout, 77, 3, first_layer=first_layer)


# -- any order of axes --------------------------------------------------------------------------------------------------------


def _any_order(axes: Sequence[int], kv: int, turned: bool) -> Kind:
    """Layers, K and V, blocks, tokens and heads in any order of memory; ``turned``: layers and blocks run backwards."""

    def views(flat: Any, s: Shape) -> Views:
        sizes = (s.layers, kv, s.blocks, s.block_tokens, s.heads)
        whole = flat.reshape(*(sizes[axis] for axis in axes), s.size)
        whole = permute(whole, [*(axes.index(axis) for axis in range(5)), 5])
        if turned:
            whole = whole[::-1, :, ::-1]
        return [[layer[i] for i in range(kv)] for layer in whole]

    return Kind(lambda s: s.layers * kv * s.blocks * s.block_tokens * s.heads * s.size, views, "NHD", kv=kv)


@settings(max_examples=200)
@given(
    axes=st.permutations(range(5)),
    kv=st.sampled_from([1, 2]),
    turned=st.booleans(),
    itemsize=st.sampled_from(list(DTYPES)),
    block=st.integers(1, 20),
    heads=st.integers(1, 5),
    size=st.integers(1, 140),
    layers=st.integers(1, 3),
    tokens=st.integers(1, 70),
    spare=st.integers(0, 3),
    chunk=st.integers(1, 33),
    skip=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    seed=st.integers(0, 1 << 30),
)
def _any_plan(device: str, **drawn: Any) -> None:
    kv = drawn["kv"]
    heads = drawn["heads"] if kv == 2 else 1
    kind = _any_order(drawn["axes"], kv, drawn["turned"] and device == "host")
    blocks = -(-drawn["tokens"] // drawn["block"]) + drawn["spare"]
    shape = Shape(drawn["layers"], blocks, drawn["block"], heads, drawn["size"], drawn["itemsize"])
    memory = Memory(kind, shape, device, np.random.default_rng(drawn["seed"]))
    layout = KVLayout((memory.group(),), drawn["chunk"])
    round_trip([memory], layout, drawn["tokens"], drawn["seed"], skip=drawn["skip"])


def test_any_plan(device: str) -> None:
    _any_plan(device)


# -- threads ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, 2, 3, 200])
def test_threads_share_a_copy(threads: int) -> None:
    layout = KVLayout.dense(layers=11, heads=3, head_size=64, dtype="float16", chunk_tokens=64)
    pages = np.random.default_rng(3).integers(0, 1 << 16, (11, 2, 20, 16, 3, 64), np.uint16).view("float16")
    blocks = np.random.default_rng(4).permutation(20).astype(np.int32)
    rows = row_table(Layers(pages, "NHD").rows(layout, 4), layout)
    payloads = [bytearray(layout.chunk_bytes) for _ in range(5)]
    parts = [Part(memoryview(room), i * 64, i * 64 + 64, i * 64, i * 64 + 64) for i, room in enumerate(payloads)]
    copy_compiled(rows, parts, [paged_places(blocks, 16, 0, 320)], into_payloads=True, threads=threads)
    whole = pages[:, :, blocks].reshape(11, 2, 320, 3, 64).swapaxes(2, 3)
    for part, room in zip(parts, payloads, strict=True):
        assert bytes(room) == np.ascontiguousarray(whole[:, :, :, part.start : part.stop]).tobytes()
    kept, pages[:] = pages.copy(), 0
    copy_compiled(rows, parts, [paged_places(blocks, 16, 0, 320)], into_payloads=False, threads=threads)
    assert pages.tobytes() == kept.tobytes()


# -- plans that are not valid -------------------------------------------------------------------------------------------------

FAR = 1 << 60
WRONG: dict[str, tuple[str, dict[str, int], str]] = {
    "no base": ("rows", {"base": 0}, "row 1: expected an address; got null"),
    "no blocks": ("rows", {"blocks": 0}, "row 1: expected at least one block, token, head and byte; got 0, 4, 2, 6"),
    "no tokens in a block": ("rows", {"block_tokens": 0}, "got 5, 0, 2, 6"),
    "no heads": ("rows", {"heads": -1}, "got 5, 4, -1, 6"),
    "no bytes": ("rows", {"run": 0}, "got 5, 4, 2, 0"),
    "an offset before the payload": ("rows", {"offset": -6}, "row 1: expected an offset of at least 0; got -6"),
    "an offset far out": ("rows", {"offset": FAR}, "row 1: expected an offset within 2^56 bytes"),
    "a table too high": ("rows", {"table": 2}, "row 1: expected a block table from 0 to 1; got 2"),
    "a table too low": ("rows", {"table": -1}, "got -1"),
    "a block stride far out": ("rows", {"block_stride": FAR}, "row 1: expected strides within 2^56 bytes"),
    "a token stride far out": ("rows", {"token_stride": -FAR}, "row 1: expected strides within 2^56 bytes"),
    "a head stride far out": ("rows", {"head_stride": FAR}, "row 1: expected strides within 2^56 bytes"),
    "a long run": ("rows", {"run": FAR}, "row 1: expected strides within 2^56 bytes"),
    "fewer blocks than others": (
        "rows",
        {"blocks": 2},
        "part 0, token 0: expected a block below 2 and a token in it below 4; got 3 and 0",
    ),
    "no payload": ("parts", {"payload": 0}, "part 1: expected an address; got null"),
    "a part that begins before its payload": (
        "parts",
        {"first": -1},
        "part 1: expected tokens within the 3 held; got 3 from -1 on",
    ),
    "a part that ends behind its payload": ("parts", {"first": 1}, "got 3 from 1 on"),
    "fewer than no tokens": ("parts", {"tokens": -1}, "got -1 from 0 on"),
    "a payload without end": ("parts", {"held": FAR}, "part 1: expected a payload within 2^56 bytes"),
    "places before the table": ("parts", {"at": -1}, "part 1: expected places within the 7 of a table; got 3 from -1 on"),
    "places behind the table": ("parts", {"at": 5}, "got 3 from 5 on"),
    "a block out of range": (
        "places",
        {"block": 5},
        "part 0, token 1: expected a block below 5 and a token in it below 4; got 5 and 1",
    ),
    "a token behind its block": ("places", {"index": 4}, "got 3 and 4"),
    "a token before its block": ("places", {"index": -1}, "got 3 and -1"),
    "negative counts": ("plan", {"n_rows": -1}, "expected counts of at least 0; got -1 rows, 2 parts, 7 places, 2 tables"),
    "too many places": ("plan", {"n_places": FAR}, "expected places within 2^56; got 2 tables"),
    "no rows": ("plan", {"rows": 0}, "expected addresses of rows, parts and places; got null"),
    "no parts": ("plan", {"parts": 0}, "expected addresses of rows, parts and places; got null"),
    "no places": ("plan", {"places": 0}, "expected addresses of rows, parts and places; got null"),
}


@pytest.mark.parametrize(("where", "change", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("into_payloads", [True, False])
def test_invalid_plans_are_refused_and_nothing_is_copied(
    where: str, change: dict[str, int], message: str, into_payloads: bool
) -> None:
    ffi, lib = native.ffi, native.lib
    if lib is None:
        pytest.skip("the compiled part was not built")
    memory, payload = np.arange(480, dtype=np.uint16).view(np.uint8), np.arange(144, 0, -1).astype(np.uint8)
    kept = memory.tobytes(), payload.tobytes()
    base, target = (array.__array_interface__["data"][0] for array in (memory, payload))
    shape = {"block_stride": 48, "token_stride": 12, "head_stride": 6, "blocks": 5, "block_tokens": 4, "heads": 2, "run": 6}
    rows = ffi.new("lmkv_row[]", [{**shape, "base": base + 240 * i, "offset": 12 * i, "table": 0} for i in range(2)])
    parts = ffi.new("lmkv_part[]", [(target, 3, 0, 3, 0), (target + 72, 3, 0, 3, 4)])
    places = ffi.new("lmkv_place[]", [(3, 0), (3, 1), (0, 3), (0, 0), (1, 2), (-1, 0), (2, 1)] * 2)
    counts = {"n_rows": 2, "n_parts": 2, "n_places": 7, "tables": 2}
    plan = ffi.new("lmkv_plan *", {"rows": rows, "parts": parts, "places": places, **counts})
    struct = {"rows": rows[1], "parts": parts[1], "places": places[1], "plan": plan}[where]
    for name, value in change.items():
        setattr(struct, name, value or (ffi.NULL if name in ("rows", "parts", "places") else 0))
    why = ffi.new("char[]", 300)
    assert lib.lmkv_check(plan, why, 300) == -1
    assert message in ffi.string(why).decode()
    why[0] = b"\0"
    assert lib.lmkv_host_copy(plan, into_payloads, 1, why, 300) == -1
    assert message in ffi.string(why).decode()
    assert (memory.tobytes(), payload.tobytes()) == kept
    short = ffi.new("char[]", b"xxxxxxxxxxxx")
    assert lib.lmkv_host_copy(plan, into_payloads, 1, short, 8) == -1
    assert ffi.string(short).decode() == message_of(why)[:7]
    assert ffi.unpack(short, 12)[8:] == b"xxxx"
    assert lib.lmkv_host_copy(plan, into_payloads, 1, ffi.NULL, 0) == -1


def message_of(why: Any) -> str:
    return str(native.ffi.string(why).decode())


def test_the_same_plan_unchanged_is_valid() -> None:
    """What makes the plans above invalid is the one change."""
    ffi, lib = native.ffi, native.lib
    memory, payload = np.arange(240, dtype=np.uint8), np.zeros(36, np.uint8)
    base, target = (array.__array_interface__["data"][0] for array in (memory, payload))
    row = ffi.new("lmkv_row[]", [(base, 48, 12, 6, 5, 4, 2, 6, 0, 0)])
    part = ffi.new("lmkv_part[]", [(target, 3, 0, 3, 0)])
    places = ffi.new("lmkv_place[]", [(3, 0), (-1, 9), (0, 3)])
    plan = ffi.new("lmkv_plan *", (row, 1, part, 1, places, 3, 1))
    assert lib.lmkv_check(plan, ffi.NULL, 0) == lib.lmkv_host_copy(plan, 1, 1, ffi.NULL, 0) == 24
    assert payload.tolist() == [*range(144, 150), *[0] * 6, *range(36, 42), *range(150, 156), *[0] * 6, *range(42, 48)]
    plan.n_parts = 0
    assert lib.lmkv_host_copy(plan, 1, 4, ffi.NULL, 0) == 0
