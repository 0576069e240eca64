"""Copies between payloads and tensors: every layout, order and stride moves the right bytes, and nothing beside them."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from typing import Any

import known_kv
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lmkv
from lmkv.errors import ArgumentError, LayoutMismatchError
from lmkv.layout import DTYPES, KVLayout, LayerGroup
from lmkv.transfer import CopyEngine, DenseKV, KVAccess, PagedKV, Part, PartTable, as_access, gather, payload_arrays, scatter
from lmkv.transfer.engine import _early_groups, _late_groups

native: Any = importlib.import_module("lmkv._native")


@pytest.fixture(params=["compiled", "numpy"], autouse=True)
def copier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to copy: with the compiled part, and as where there was no compiler."""
    if request.param == "compiled" and native.lib is None:
        pytest.skip("the compiled part was not built")
    if request.param == "numpy":
        monkeypatch.setattr(native, "lib", None)
    return str(request.param)


LAYOUTS = {
    "one group": KVLayout.dense(layers=3, heads=2, head_size=5, dtype="float32", chunk_tokens=8),
    "halves": KVLayout.dense(layers=2, heads=3, head_size=4, dtype="float16", chunk_tokens=8),
    "bytes": KVLayout.dense(layers=2, heads=1, head_size=7, dtype="int8", chunk_tokens=8),
    "doubles": KVLayout.dense(layers=1, heads=2, head_size=3, dtype="float64", chunk_tokens=8),
    "MLA": KVLayout.dense(layers=4, heads=1, head_size=9, dtype="float32", chunk_tokens=8, mla=True),
    "groups": KVLayout(
        (LayerGroup(2, 2, 2, 4, "float16"), LayerGroup(1, 1, 1, 6, "float32"), LayerGroup(1, 2, 1, 3, "uint8")), 8
    ),
}
TORCH_ONLY = {
    "bfloat16": KVLayout.dense(layers=2, heads=3, head_size=4, dtype="bfloat16", chunk_tokens=8),
    "float8": KVLayout.dense(layers=2, heads=2, head_size=5, dtype="float8_e4m3fn", chunk_tokens=8),
    "float8 e5m2": KVLayout.dense(layers=1, heads=2, head_size=5, dtype="float8_e5m2", chunk_tokens=8),
    "groups of torch": KVLayout((LayerGroup(2, 1, 1, 6, "bfloat16"), LayerGroup(2, 2, 2, 4, "float8_e4m3fn")), 8),
}
TOKENS = list(range(40, 69))  # 29 tokens: three full chunks and a short one


def pieces(n: int, width: int = 8) -> list[tuple[int, int]]:
    return [(i, min(i + width, n)) for i in range(0, n, width)]


def gathered(access: KVAccess, layout: KVLayout, start: int, stop: int) -> bytes:
    """The payload of tokens ``start`` to ``stop``, between guards that must stay."""
    size = layout.token_bytes * (stop - start)
    room = bytearray(b"\xab" * (size + 64))
    access.check(layout, start, stop)
    gather(access, [Part(memoryview(room)[32 : 32 + size], start, stop, start, stop)], layout)
    assert room[:32] == room[32 + size :] == b"\xab" * 32, "written beside the payload"
    return bytes(room[32 : 32 + size])


def as_nhd(layers: list[list[Any]]) -> list[list[Any]]:
    return [[np.ascontiguousarray(part.swapaxes(0, 1)) for part in parts] for parts in layers]


def paged(layers: list[list[Any]], order: str, block_tokens: int, block_ids: list[int], blocks: int) -> list[list[Any]]:
    """Dense HND layers laid out in an engine's pages; what belongs to no token is 0xEE."""
    found = []
    for parts in layers:
        pages = []
        for part in parts:
            heads, tokens, size = part.shape
            page = np.full((blocks, heads, block_tokens, size), 0xEE, np.uint8).astype(part.dtype)
            for i in range(tokens):
                page[block_ids[i // block_tokens], :, i % block_tokens] = part[:, i]
            pages.append(page if order == "HND" else np.ascontiguousarray(page.swapaxes(1, 2)))
        found.append(pages)
    return found


# -- the right bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("order", ["HND", "NHD"])
def test_dense_numpy(layout: KVLayout, order: str) -> None:
    layers = known_kv.layer_arrays(layout, TOKENS)
    access = DenseKV(layers if order == "HND" else as_nhd(layers), order=order)
    empty = known_kv.empty_layers(layout, len(TOKENS))
    sink = DenseKV(empty if order == "HND" else as_nhd(empty), order=order)
    sink.check(layout, 0, len(TOKENS))
    for start, stop in pieces(len(TOKENS)):
        payload = gathered(access, layout, start, stop)
        assert payload == known_kv.payload(layout, TOKENS, start, stop)
        scatter(sink, [Part(memoryview(payload), start, stop, start, stop)], layout)
    for mine, theirs in zip(access.rows, sink.rows, strict=True):
        assert known_kv.same_bits(mine, theirs)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("order", ["HND", "NHD"])
@pytest.mark.parametrize("block_tokens", [1, 4, 16])
def test_paged_numpy(layout: KVLayout, order: str, block_tokens: int) -> None:
    layers = known_kv.layer_arrays(layout, TOKENS)
    needed = -(-len(TOKENS) // block_tokens)
    ids = np.random.default_rng(block_tokens).permutation(needed + 3)[:needed].tolist()
    access = PagedKV(paged(layers, order, block_tokens, ids, needed + 3), ids, order=order)
    blank = paged(known_kv.empty_layers(layout, len(TOKENS)), order, block_tokens, ids, needed + 3)
    sink = PagedKV(blank, ids, order=order)
    sink.check(layout, 0, len(TOKENS))
    for start, stop in pieces(len(TOKENS)):
        payload = gathered(access, layout, start, stop)
        assert payload == known_kv.payload(layout, TOKENS, start, stop)
        scatter(sink, [Part(memoryview(payload), start, stop, start, stop)], layout)
    for mine, theirs in zip(access.rows, sink.rows, strict=True):
        assert known_kv.same_bits(mine, theirs)


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), *TORCH_ONLY.values()], ids=[*LAYOUTS, *TORCH_ONLY])
@pytest.mark.parametrize("order", ["HND", "NHD"])
def test_dense_torch(layout: KVLayout, order: str) -> None:
    torch = pytest.importorskip("torch")
    dtypes = [getattr(torch, g.dtype) for g in layout.groups for _ in range(g.layers)]

    def tensors(layers: list[list[Any]]) -> list[list[Any]]:
        layers = layers if order == "HND" else as_nhd(layers)
        signed = {1: "i1", 2: "i2", 4: "i4", 8: "i8"}
        return [
            [torch.from_numpy(part.view(signed[part.dtype.itemsize])).view(dtype) for part in parts]
            for parts, dtype in zip(layers, dtypes, strict=True)
        ]

    access = DenseKV(tensors(known_kv.layer_arrays(layout, TOKENS)), order=order)
    sink = DenseKV(tensors(known_kv.empty_layers(layout, len(TOKENS))), order=order)
    sink.check(layout, 0, len(TOKENS))
    for start, stop in pieces(len(TOKENS)):
        payload = gathered(access, layout, start, stop)
        assert payload == known_kv.payload(layout, TOKENS, start, stop)
        scatter(sink, [Part(memoryview(payload), start, stop, start, stop)], layout)
    for mine, theirs in zip(access.rows, sink.rows, strict=True):
        assert known_kv.same_bits(mine, theirs)


def test_torch_tensors_of_a_model_in_training() -> None:
    torch = pytest.importorskip("torch")
    layout = LAYOUTS["one group"]
    layers = [
        [torch.from_numpy(part.copy()).requires_grad_() for part in parts] for parts in known_kv.layer_arrays(layout, TOKENS)
    ]
    assert gathered(DenseKV(layers), layout, 0, 8) == known_kv.payload(layout, TOKENS, 0, 8)


def test_several_parts_at_once() -> None:
    layout = LAYOUTS["groups"]
    access = DenseKV(known_kv.layer_arrays(layout, TOKENS))
    access.check(layout, 0, 24)
    payloads = [bytearray(layout.chunk_bytes) for _ in range(3)]
    parts = [Part(memoryview(room), i * 8, i * 8 + 8, i * 8, i * 8 + 8) for i, room in enumerate(payloads)]
    gather(access, parts, layout)
    assert [bytes(room) for room in payloads] == [known_kv.payload(layout, TOKENS, i, i + 8) for i in (0, 8, 16)]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_payload_is_groups_of_layers_kinds_heads_tokens(layout: KVLayout) -> None:
    payload = memoryview(known_kv.payload(layout, TOKENS, 8, 13))
    arrays = payload_arrays(payload, layout, 5)
    wanted = [bits[:, :, :, 8:13] for bits in known_kv.group_bits(layout, TOKENS)]
    assert [array.shape for array in arrays] == [(g.layers, g.kv, g.heads, 5, g.head_size) for g in layout.groups]
    assert all(known_kv.same_bits(array, bits) for array, bits in zip(arrays, wanted, strict=True))


# -- any strides -------------------------------------------------------------------------------------------------------------


def strided(kind: str, part: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same values as ``part`` [heads, tokens, size] in memory of another order."""
    heads, tokens, size = part.shape
    if kind == "size first":  # as some engines keep K: the last axis is not contiguous
        return np.ascontiguousarray(part.transpose(0, 2, 1)).transpose(0, 2, 1)
    if kind == "tokens first":
        return np.ascontiguousarray(part.transpose(1, 0, 2)).transpose(1, 0, 2)
    if kind == "every other":
        room = np.zeros((heads * 2, tokens * 2, size * 2), part.dtype)
        room[::2, ::2, ::2] = part
        return room[::2, ::2, ::2]
    if kind == "padded":
        room = np.zeros((heads + 1, tokens + 3, size + 2), part.dtype)
        room[1:, 3:, 2:] = part
        return room[1:, 3:, 2:]
    if kind == "rows backwards":
        return np.ascontiguousarray(part[::-1, ::-1])[::-1, ::-1]
    if kind == "backwards":
        return np.ascontiguousarray(part[::-1, ::-1, ::-1])[::-1, ::-1, ::-1]
    return np.asfortranarray(part)


KINDS = ["size first", "tokens first", "every other", "padded", "rows backwards", "backwards", "fortran"]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["HND", "NHD"])
def test_any_strides_of_dense_tensors(layout: KVLayout, kind: str, order: str) -> None:
    def turned(layers: list[list[Any]]) -> list[list[Any]]:
        found = [[strided(kind, part) for part in parts] for parts in layers]
        return found if order == "HND" else [[part.swapaxes(0, 1) for part in parts] for parts in found]

    access = DenseKV(turned(known_kv.layer_arrays(layout, TOKENS)), order=order)
    assert gathered(access, layout, 8, 21) == known_kv.payload(layout, TOKENS, 8, 21)
    sink = DenseKV(turned(known_kv.empty_layers(layout, len(TOKENS))), order=order)
    sink.check(layout, 0, len(TOKENS))
    scatter(sink, [Part(memoryview(known_kv.payload(layout, TOKENS, 8, 21)), 8, 21, 9, 20)], layout)
    for mine, theirs in zip(access.rows, sink.rows, strict=True):
        assert known_kv.same_bits(mine[:, :, 9:20], theirs[:, :, 9:20])
        assert not theirs[:, :, :9].any()
        assert not theirs[:, :, 20:].any()


def test_any_strides_of_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    layout = TORCH_ONLY["bfloat16"]
    for kind in ("size first", "tokens first", "every other", "padded"):
        bits = [[strided(kind, part.view("i2")) for part in parts] for parts in known_kv.layer_arrays(layout, TOKENS)]
        layers = [[torch.from_numpy(part).view(torch.bfloat16) for part in parts] for parts in bits]
        assert gathered(DenseKV(layers), layout, 3, 17) == known_kv.payload(layout, TOKENS, 3, 17), kind


def test_pages_that_are_a_view_of_something_larger() -> None:
    layout = LAYOUTS["one group"]
    ids = [5, 0, 3, 1]
    pages = paged(known_kv.layer_arrays(layout, TOKENS), "NHD", 8, ids, 6)
    joined = [np.stack(parts, axis=1) for parts in pages]  # [blocks, kv, block tokens, heads, size], as some engines have it
    access = PagedKV([[layer[:, 0], layer[:, 1]] for layer in joined], ids)
    assert gathered(access, layout, 2, 29) == known_kv.payload(layout, TOKENS, 2, 29)


# -- any way to hand them over -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one group", "MLA"])
def test_one_array_for_all_layers(name: str) -> None:
    layout = LAYOUTS[name]
    whole = np.stack([np.stack(parts) for parts in known_kv.layer_arrays(layout, TOKENS)])
    assert gathered(as_access(whole), layout, 0, 29) == known_kv.payload(layout, TOKENS, 0, 29)
    torch = pytest.importorskip("torch")
    assert gathered(as_access(torch.from_numpy(whole)), layout, 0, 29) == known_kv.payload(layout, TOKENS, 0, 29)


def test_a_layer_as_one_array_of_k_and_v() -> None:
    layout = LAYOUTS["one group"]
    layers = [np.stack(parts) for parts in known_kv.layer_arrays(layout, TOKENS)]
    assert gathered(DenseKV(layers), layout, 0, 8) == known_kv.payload(layout, TOKENS, 0, 8)


@pytest.mark.parametrize("order", ["HND", "NHD"])
def test_latents_without_an_axis_of_heads(order: str) -> None:
    layout = LAYOUTS["MLA"]
    layers = [parts[0][0] for parts in known_kv.layer_arrays(layout, TOKENS)]  # [tokens, size]
    assert gathered(DenseKV(layers, order=order), layout, 5, 29) == known_kv.payload(layout, TOKENS, 5, 29)
    pages = [parts[0][:, 0] for parts in paged(known_kv.layer_arrays(layout, TOKENS), "HND", 4, list(range(8)), 8)]
    assert gathered(PagedKV(pages, range(8), order=order), layout, 5, 29) == known_kv.payload(layout, TOKENS, 5, 29)


def test_bits_stand_for_types_that_numpy_lacks() -> None:
    layout = TORCH_ONLY["bfloat16"]
    assert known_kv.layer_arrays(layout, TOKENS)[0][0].dtype == np.uint16
    assert gathered(DenseKV(known_kv.layer_arrays(layout, TOKENS)), layout, 0, 29) == known_kv.payload(layout, TOKENS, 0, 29)


def test_the_first_token_need_not_be_the_texts_first() -> None:
    layout = LAYOUTS["one group"]
    layers = [[part[:, 16:] for part in parts] for parts in known_kv.layer_arrays(layout, TOKENS)]
    access = DenseKV(layers, first_token=16)
    assert gathered(access, layout, 16, 29) == known_kv.payload(layout, TOKENS, 16, 29)
    for start, stop in ((15, 20), (16, 30), (0, 8)):
        with pytest.raises(ArgumentError, match="16 to 29"):
            access.check(layout, start, stop)


def test_one_access_for_two_layouts() -> None:
    small = KVLayout.dense(layers=3, heads=2, head_size=5, dtype="float32", chunk_tokens=4)
    access = DenseKV(known_kv.layer_arrays(small, TOKENS))
    assert gathered(access, small, 0, 4) == known_kv.payload(small, TOKENS, 0, 4)
    assert gathered(access, LAYOUTS["one group"], 0, 8) == known_kv.payload(small, TOKENS, 0, 8)
    with pytest.raises(LayoutMismatchError):
        access.check(LAYOUTS["halves"], 0, 4)


# -- nothing beside them -----------------------------------------------------------------------------------------------------

ALL = st.sampled_from(list(LAYOUTS.values()))


@settings(max_examples=120)
@given(layout=ALL, data=st.data(), order=st.sampled_from(["HND", "NHD"]), block_tokens=st.sampled_from([0, 1, 3, 8, 16]))
def test_round_trips_leave_everything_else_alone(layout: KVLayout, data: st.DataObject, order: str, block_tokens: int) -> None:
    first = data.draw(st.integers(0, 28), "first token of the payload")
    last = data.draw(st.integers(first + 1, 29), "its end")
    start = data.draw(st.integers(first, last), "first token to copy")
    stop = data.draw(st.integers(start, last), "its end")
    layers = known_kv.layer_arrays(layout, TOKENS)
    blank = [[np.full(part.shape, 0x77, np.uint8).astype(part.dtype) for part in parts] for parts in layers]
    source: KVAccess
    sink: KVAccess
    if block_tokens:
        needed = -(-29 // block_tokens)
        ids = np.random.default_rng(first).permutation(needed + 2)[:needed].tolist()
        source = PagedKV(paged(layers, order, block_tokens, ids, needed + 2), ids, order=order)
        target = paged(blank, order, block_tokens, ids, needed + 2)
        sink = PagedKV(target, ids, order=order)
    else:
        source = DenseKV(layers if order == "HND" else as_nhd(layers), order=order)
        target = blank if order == "HND" else as_nhd(blank)
        sink = DenseKV(target, order=order)
    payload = gathered(source, layout, first, last)
    assert payload == known_kv.payload(layout, TOKENS, first, last)
    before = [[part.copy() for part in parts] for parts in target]
    sink.check(layout, start, stop)
    scatter(sink, [Part(memoryview(payload), first, last, start, stop)], layout)
    wanted = DenseKV(layers)
    wanted.check(layout, 0, 29)
    untouched = PagedKV(before, ids, order=order) if block_tokens else DenseKV(before, order=order)
    untouched.check(layout, 0, 29)
    copied = np.zeros(29, bool)
    copied[start:stop] = True
    for got, right, old in zip(sink.rows, wanted.rows, untouched.rows, strict=True):
        for i, (block, index) in enumerate(sink.places(0, 29).tolist()):
            expected = right[0, :, i] if copied[i] else old[block, :, index]
            assert known_kv.same_bits(got[block, :, index], expected)
        changed = (got != old).any(axis=(1, 3))
        assert changed.sum() <= stop - start, "a place that belongs to no copied token has changed"


@pytest.mark.parametrize("size", [16 << 10, 100_003, (4 << 20) + 13])
def test_long_runs(size: int) -> None:
    """Copies that are too large for the caches may go another way."""
    layout = KVLayout.dense(layers=1, heads=1, head_size=size, dtype="uint8", chunk_tokens=3, mla=True)
    rng = np.random.default_rng(size)
    for shift in (0, 1, 63):
        room = rng.integers(0, 256, 3 * size + 64, dtype=np.uint8)
        latent = room[shift : shift + 3 * size].reshape(3, size)
        payload = gathered(DenseKV([latent]), layout, 0, 3)
        assert payload == latent.tobytes()
        target = np.full(3 * size + 64, 0x55, np.uint8)
        sink = DenseKV([target[shift : shift + 3 * size].reshape(3, size)])
        sink.check(layout, 1, 3)
        scatter(sink, [Part(memoryview(payload), 0, 3, 1, 3)], layout)
        assert (target[: shift + size] == 0x55).all()
        assert (target[shift + 3 * size :] == 0x55).all()
        assert (target[shift + size : shift + 3 * size].reshape(2, size) == latent[1:]).all()


# -- what is refused ---------------------------------------------------------------------------------------------------------

LAYOUT = LAYOUTS["one group"]
SHAPE = (2, 29, 5)


def layers_of(shape: tuple[int, ...] = SHAPE, dtype: Any = "float32", count: int = 3, kinds: int = 2) -> list[list[Any]]:
    return [[np.zeros(shape, dtype) for _ in range(kinds)] for _ in range(count)]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (layers_of(count=2), "3 layers; got 2"),
        (layers_of(count=4), "3 layers; got 4"),
        ([], "3 layers; got 0"),
        (layers_of(kinds=1), "layer 0: expected K and V; got 1 tensors"),
        (layers_of(kinds=3), "layer 0: expected K and V; got 3 tensors"),
        (
            [*layers_of(count=2), [np.zeros(SHAPE, "float32"), np.zeros((2, 29, 6), "float32")]],
            "layer 2 V: expected 2 heads of size 5",
        ),
        (layers_of((3, 29, 5)), r"layer 0 K: expected 2 heads of size 5 in order HND; got shape \(3, 29, 5\)"),
        (layers_of((29, 2, 5)), "layer 0 K: expected 2 heads"),
        (layers_of((29, 5)), "layer 0 K: expected 3 dimensions"),
        (layers_of((1, 2, 29, 5)), "layer 0 K: expected 3 dimensions"),
        (layers_of(dtype="float16"), "layer 0 K: expected dtype float32; got float16"),
        (layers_of(dtype="float64"), "layer 0 K: expected dtype float32; got float64"),
        (layers_of(dtype="int32"), "layer 0 K: expected dtype float32; got int32"),
        (layers_of(dtype=">f4"), "layer 0 K: expected dtype float32; got >f4"),
        (layers_of(dtype="uint16"), "layer 0 K: expected dtype float32"),
        (layers_of(dtype=object), "layer 0 K: expected dtype float32; got object"),
        (
            [[part.tolist() for part in parts] for parts in layers_of()],
            "layer 0 K: expected a numpy array or torch tensor; got list",
        ),
        ([[None, None]] * 3, "layer 0 K: expected a numpy array or torch tensor; got NoneType"),
        ([None] * 3, "layer 0: expected K and V"),
        ([5] * 3, "layer 0: expected K and V"),
        ([np.zeros((1, *SHAPE), "float32")] * 3, "layer 0: expected K and V; got 1"),
        ([np.zeros((3, *SHAPE), "float32")] * 3, "layer 0: expected K and V; got 3"),
        ([np.zeros((0, *SHAPE), "float32")] * 3, "layer 0: expected K and V; got 0"),
        (np.zeros((3, 1, *SHAPE), "float32"), "layer 0: expected K and V; got 1"),
        (np.zeros((3, 3, *SHAPE), "float32"), "layer 0: expected K and V; got 3"),
        (np.zeros((2, 2, *SHAPE), "float32"), "3 layers; got 2"),
        (np.zeros(SHAPE, "float32"), r"one array \[layers, kv, heads, tokens, head_size\]"),
        (None, "expected layers"),
        (7, "expected layers"),
    ],
)
def test_wrong_tensors(layers: Any, message: str) -> None:
    with pytest.raises(LayoutMismatchError, match=message):
        as_access(layers).check(LAYOUT, 0, 8)


def test_wrong_order_of_axes() -> None:
    with pytest.raises(LayoutMismatchError, match="in order NHD"):
        DenseKV(layers_of(), order="NHD").check(LAYOUT, 0, 8)
    for order in ("hnd", "NDH", ""):
        with pytest.raises(ArgumentError, match="'HND'"):
            DenseKV(layers_of(), order=order)
        with pytest.raises(ArgumentError, match="'HND'"):
            PagedKV(layers_of(), [0], order=order)


def test_tensors_elsewhere() -> None:
    torch = pytest.importorskip("torch")
    layers = [[torch.zeros(SHAPE, device="meta") for _ in range(2)] for _ in range(3)]
    with pytest.raises(
        LayoutMismatchError,
        match=r"layer 0 K: expected a tensor in host memory or on a CUDA device; got device meta: .*\.cpu\(\)",
    ):
        DenseKV(layers).check(LAYOUT, 0, 8)
    wrong = [[torch.zeros(SHAPE, dtype=torch.bfloat16) for _ in range(2)] for _ in range(3)]
    with pytest.raises(LayoutMismatchError, match="expected dtype float32; got bfloat16"):
        DenseKV(wrong).check(LAYOUT, 0, 8)


def test_wrong_positions() -> None:
    access = DenseKV(layers_of())
    for start, stop in ((0, 30), (29, 30), (-1, 3)):
        with pytest.raises(ArgumentError, match="holds 0 to 29"):
            access.check(LAYOUT, start, stop)
    with pytest.raises(ArgumentError, match="first_token"):
        DenseKV(layers_of(), first_token=-1)
    uneven = layers_of()
    uneven[2][1] = np.zeros((2, 28, 5), "float32")
    with pytest.raises(ArgumentError, match="0 to 28"):
        DenseKV(uneven).check(LAYOUT, 0, 29)


def test_wrong_blocks() -> None:
    pages = layers_of((6, 8, 2, 5))
    PagedKV(pages, [5, 0, -1]).check(LAYOUT, 0, 16)
    with pytest.raises(ArgumentError, match="0 to 5; got -1"):
        PagedKV(pages, [5, 0, -1]).check(LAYOUT, 0, 17)
    with pytest.raises(ArgumentError, match="0 to 5; got 6"):
        PagedKV(pages, [6]).check(LAYOUT, 0, 1)
    with pytest.raises(ArgumentError, match="got 1 of 8 tokens"):
        PagedKV(pages, [1]).check(LAYOUT, 0, 9)
    with pytest.raises(ArgumentError):
        PagedKV(pages, [1]).check(LAYOUT, -1, 2)
    uneven = [*layers_of((6, 8, 2, 5), count=2), *layers_of((7, 8, 2, 5), count=1)]
    with pytest.raises(LayoutMismatchError, match="blocks"):
        PagedKV(uneven, [1]).check(LAYOUT, 0, 8)
    with pytest.raises(LayoutMismatchError, match="4 dimensions"):
        PagedKV(layers_of(), [1]).check(LAYOUT, 0, 8)


def test_read_only_sinks() -> None:
    layers = layers_of()
    layers[1][1].flags.writeable = False
    sink = DenseKV(layers)
    sink.check(LAYOUT, 0, 8)
    with pytest.raises(ArgumentError, match="read-only"):
        scatter(sink, [Part(memoryview(bytes(LAYOUT.chunk_bytes)), 0, 8, 0, 8)], LAYOUT)
    assert not any(part.any() for parts in layers for part in parts)
    access = DenseKV(layers)  # as a source it will do
    assert gathered(access, LAYOUT, 0, 8) == bytes(LAYOUT.chunk_bytes)


def test_signed_and_unsigned_bytes_are_not_mixed_up() -> None:
    layout = LAYOUTS["bytes"]
    with pytest.raises(LayoutMismatchError, match="int8"):
        DenseKV(layers_of((1, 29, 7), "uint8", count=2)).check(layout, 0, 8)


@given(layers=st.integers(1, 200))
def test_groups_of_layers_are_small_where_they_are_waited_for(layers: int) -> None:
    early, late = _early_groups(layers).tolist(), _late_groups(layers).tolist()
    for ends in (early, late):
        assert ends[-1] == layers
        assert all(a < b for a, b in itertools.pairwise([0, *ends]))
    assert early[0] == 1
    sizes = [b - a for a, b in itertools.pairwise([0, *late])]
    assert sizes[-1] == 1
    assert all(size <= 5 * after for size, after in itertools.pairwise(sizes))


def test_a_table_of_parts() -> None:
    payload = bytearray(64)
    spans = [(0, 8, 0, 8), (8, 16, 8, 12), (16, 20, 17, 20), (20, 24, 20, 24)]
    table = PartTable.of([Part(memoryview(payload), *span) for span in spans])
    assert table.tokens == 19
    assert table.runs() == [(0, 12), (17, 24)]
    assert table.rows[:, 1:].tolist() == [[8, 0, 8, 0], [8, 0, 4, 8], [4, 1, 3, 12], [4, 0, 4, 15]]  # held, first, tokens, at
    assert PartTable.of([]).runs() == []
    layers = [(np.zeros((4, 8, 1, 8), np.float16), np.zeros((4, 8, 1, 8), np.float16))]
    engine = CopyEngine(layers, KVLayout.dense(layers=1, heads=1, head_size=8, dtype="float16", chunk_tokens=8))
    with pytest.raises(ArgumentError, match="expected a sequence of parts"):
        engine.scatter(table, [[0, 1, 2]])


def test_what_an_access_is() -> None:
    assert isinstance(DenseKV(layers_of()), KVAccess)
    assert isinstance(PagedKV(layers_of(), [0]), KVAccess)
    access = DenseKV(layers_of())
    assert as_access(access) is access
    assert lmkv.DenseKV is DenseKV
    assert set(DTYPES) >= {g.dtype for layout in LAYOUTS.values() for g in layout.groups}
    assert dataclasses.is_dataclass(Part)
