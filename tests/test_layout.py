"""Layouts: sizes, names of element types, what LMCache writes, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lmkv
from lmkv.errors import LayoutMismatchError
from lmkv.layout import DTYPES, KVLayout, LayerGroup, dtype_name

GROUPS = st.builds(
    lambda layers, kv, heads, size, dtype: LayerGroup(layers, kv, heads if kv == 2 else 1, size, dtype),
    st.integers(1, 99),
    st.sampled_from([1, 2]),
    st.integers(1, 64),
    st.integers(1, 600),
    st.sampled_from(list(DTYPES)),
)
LAYOUTS = st.builds(KVLayout, st.lists(GROUPS, min_size=1, max_size=4).map(tuple), st.integers(1, 65536))


def test_sizes() -> None:
    layout = KVLayout((LayerGroup(30, 2, 3, 64, "float16"), LayerGroup(2, 1, 1, 576, "bfloat16")), 256)
    assert layout.token_bytes == 30 * 2 * 3 * 64 * 2 + 2 * 576 * 2
    assert layout.chunk_bytes == layout.token_bytes * 256


def test_dense() -> None:
    assert KVLayout.dense(layers=4, heads=2, head_size=64, dtype="half") == KVLayout((LayerGroup(4, 2, 2, 64, "float16"),), 256)
    mla = KVLayout.dense(layers=4, heads=16, head_size=576, dtype="bf16", chunk_tokens=64, mla=True)
    assert mla == KVLayout((LayerGroup(4, 1, 1, 576, "bfloat16"),), 64)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("bf16", "bfloat16"),
        ("fp8_e4m3", "float8_e4m3fn"),
        ("float", "float32"),
        (np.dtype("float16"), "float16"),
        ("int8", "int8"),
    ],
)
def test_names_of_element_types(dtype: object, name: str) -> None:
    assert dtype_name(dtype) == name


def test_torch_names_of_element_types() -> None:
    torch = pytest.importorskip("torch")
    for name in DTYPES:
        assert dtype_name(getattr(torch, name)) == name
        assert getattr(torch, name).itemsize == DTYPES[name]
    assert KVLayout.dense(layers=1, heads=1, head_size=1, dtype=torch.bfloat16).groups[0].itemsize == 2


@pytest.mark.parametrize("dtype", ["int64", "complex64", "", "float8", None, 4, np.dtype("bool"), np.dtype(">f4")])
def test_other_element_types(dtype: object) -> None:
    with pytest.raises(LayoutMismatchError, match="bfloat16"):
        dtype_name(dtype)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ((0, 2, 3, 64, "float16"), "layers"),
        ((1, 3, 3, 64, "float16"), "kv"),
        ((1, 2, -1, 64, "float16"), "heads"),
        ((1, 2, 3, 64.0, "float16"), "head_size"),
        ((True, 2, 3, 64, "float16"), "layers"),
        ((1, 1, 3, 64, "float16"), "heads = 1"),
        ((1, 2, 3, 64, "float17"), "float17"),
    ],
)
def test_wrong_groups(group: tuple[Any, ...], message: str) -> None:
    with pytest.raises(LayoutMismatchError, match=message):
        LayerGroup(*group)


@pytest.mark.parametrize("chunk_tokens", [0, -1, 65537, 1.0, True, None])
def test_wrong_chunk_tokens(chunk_tokens: Any) -> None:
    with pytest.raises(LayoutMismatchError, match="chunk_tokens"):
        KVLayout.dense(layers=1, heads=1, head_size=1, dtype="int8", chunk_tokens=chunk_tokens)


def test_no_groups() -> None:
    with pytest.raises(LayoutMismatchError, match="at least one"):
        KVLayout(())


@given(layout=LAYOUTS)
def test_plain_data_and_back(layout: KVLayout) -> None:
    again = KVLayout.from_dict(layout.to_dict())
    assert again == layout
    assert again.fingerprint == layout.fingerprint
    assert len(layout.fingerprint) == 16


@given(one=LAYOUTS, two=LAYOUTS)
def test_fingerprints_tell_layouts_apart(one: KVLayout, two: KVLayout) -> None:
    assert (one == two) == (one.fingerprint == two.fingerprint)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"groups": []},
        {"groups": [{}], "chunk_tokens": 4},
        {"groups": [{"layer": 1}], "chunk_tokens": 4},
        {"chunk_tokens": 4},
        7,
    ],
)
def test_plain_data_that_is_no_layout(data: Any) -> None:
    with pytest.raises(LayoutMismatchError):
        KVLayout.from_dict(data)


# -- as LMCache writes them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "layout"),
    [
        ("(2,2,256,4,16):float16:2", KVLayout((LayerGroup(2, 2, 4, 16, "float16"),), 256)),
        ("(2,30,64,3,64):bfloat16:30", KVLayout((LayerGroup(30, 2, 3, 64, "bfloat16"),), 64)),
        ("(30,2,64,3,64):bfloat16:30", KVLayout((LayerGroup(30, 2, 3, 64, "bfloat16"),), 64)),
        (" ( 1 , 27,256,1,576 ) : bf16 : 27 ; ", KVLayout((LayerGroup(27, 1, 1, 576, "bfloat16"),), 256)),
        (
            "(2,2,256,4,16):float16:2;(1,3,256,1,64):uint8:3",
            KVLayout((LayerGroup(2, 2, 4, 16, "float16"), LayerGroup(3, 1, 1, 64, "uint8")), 256),
        ),
    ],
)
def test_parse(spec: str, layout: KVLayout) -> None:
    assert KVLayout.parse(spec) == layout


@pytest.mark.parametrize(
    "spec",
    ["", "nonsense", "(2,2,256,4):float16:2", "(2,3,256,4,16):float16:2", "(2,2,256,4,16):float17:2", "(2,2,0,4,16):float16:2",
     "(2,2,256,4,16):float16", "(2,2,256,4,16):float16:2;(2,2,128,4,16):float16:2",
     "(2,2,256,4,16):float16:2,(2,2,256,4,16):half:2"],
)  # fmt: skip
def test_parse_refuses(spec: str) -> None:
    with pytest.raises(LayoutMismatchError, match="expected"):
        KVLayout.parse(spec)


def test_is_public() -> None:
    assert lmkv.KVLayout is KVLayout
    assert lmkv.LayerGroup is LayerGroup
