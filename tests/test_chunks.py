"""Keys: equal everywhere, different for every difference, and the tokens they are made of."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_keys
from hypothesis import given
from hypothesis import strategies as st

from lmkv.chunks import KEY_BYTES, Namespace, TokenChunker, shared_tokens, token_bytes
from lmkv.errors import ArgumentError
from lmkv.layout import KVLayout, LayerGroup

FIXTURE = Path(__file__).parent / "fixtures" / "key_vectors.json"
VECTORS: list[dict[str, Any]] = json.loads(FIXTURE.read_text(encoding="utf-8"))
LAYOUT = KVLayout.dense(layers=2, heads=3, head_size=8, dtype="float16", chunk_tokens=4)
TOKENS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40)


def chunker_of(vector: dict[str, Any]) -> TokenChunker:
    groups = []
    for text in vector["groups"].split(";"):
        shape, dtype = text.split(":")
        groups.append(LayerGroup(*map(int, shape.split("x")), dtype))
    layout = KVLayout(tuple(groups), vector["chunk_tokens"])
    return TokenChunker(Namespace.of(layout, **vector["settings"]), layout.chunk_tokens)


# -- the same everywhere -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_vectors(vector: dict[str, Any]) -> None:
    chunker = chunker_of(vector)
    tokens = reference_keys.expand(vector["tokens"])
    assert chunker.namespace.layout.hex() == vector["layout"]
    assert chunker.namespace.root.hex() == vector["root"]
    assert chunker.namespace.content_root.hex() == vector["content_root"]
    assert [key.hex() for key in chunker.prefix_keys(tokens)] == vector["prefix_keys"]
    assert [key.hex() for key in chunker.content_keys(tokens)] == vector["content_keys"]


def test_the_vectors_are_those_of_the_letter_of_the_format() -> None:
    assert [reference_keys.vector(*case) for case in reference_keys.CASES] == VECTORS


@given(
    tokens=TOKENS,
    width=st.integers(1, 9),
    settings=st.dictionaries(
        st.sampled_from(["model", "revision", "rope", "lora", "shard", "salt", "extra"]), st.text(max_size=8)
    ),
    key_hash=st.sampled_from(["sha256", "xxh3"]),
)
def test_keys_follow_the_letter_of_the_format(tokens: list[int], width: int, settings: dict[str, str], key_hash: str) -> None:
    vector = reference_keys.vector("any", "1x2x3x4:int8", settings | {"key_hash": key_hash}, width, tokens)
    chunker = chunker_of(vector)
    assert [key.hex() for key in chunker.prefix_keys(tokens)] == vector["prefix_keys"]
    assert [key.hex() for key in chunker.content_keys(tokens)] == vector["content_keys"]


_PRINT_KEYS = """
import lmkv, sys
layout = lmkv.KVLayout.dense(layers=2, heads=3, head_size=8, dtype="float16", chunk_tokens=4)
for key_hash in ("sha256", "xxh3"):
    chunker = lmkv.TokenChunker(lmkv.Namespace.of(layout, model="m", salt="s", key_hash=key_hash), 4)
    print(*[key.hex() for key in chunker.prefix_keys(range(11)) + chunker.content_keys(range(11))])
"""


def test_equal_in_every_process_whatever_pythonhashseed_says() -> None:
    outputs = set()
    for seed in ("0", "1", "4294967295", "random"):
        done = subprocess.run(
            [sys.executable, "-c", _PRINT_KEYS],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.add(done.stdout)
    assert len(outputs) == 1
    mine = []
    for key_hash in ("sha256", "xxh3"):
        chunker = TokenChunker(Namespace.of(LAYOUT, model="m", salt="s", key_hash=key_hash), 4)
        mine.append(" ".join(key.hex() for key in chunker.prefix_keys(range(11)) + chunker.content_keys(range(11))))
    assert outputs.pop().split("\n")[:-1] == mine


# -- different for every difference ------------------------------------------------------------------------------------------


def all_keys(namespace: Namespace, width: int = 4) -> set[bytes]:
    chunker = TokenChunker(namespace, width)
    return {*chunker.prefix_keys(range(12)), *chunker.content_keys(range(12)), namespace.root, namespace.content_root}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Namespace) if f.name not in ("layout", "key_hash")])
@pytest.mark.parametrize("key_hash", ["sha256", "xxh3"])
def test_every_setting_changes_every_key(field: str, key_hash: str) -> None:
    plain = Namespace.of(LAYOUT, key_hash=key_hash)
    values = ["", "a", "b", "aa", "a\0", "sha256"]
    seen: set[bytes] = set()
    for value in values:
        keys = all_keys(plain.replace(**{field: value}))
        assert len(keys) == 8
        assert not keys & seen, f"{field}={value!r} has a key of another value"
        seen |= keys


def test_the_hash_function_changes_every_key() -> None:
    assert not all_keys(Namespace.of(LAYOUT)) & all_keys(Namespace.of(LAYOUT, key_hash="xxh3"))


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 3},
        {"heads": 4},
        {"head_size": 16},
        {"dtype": "bfloat16"},
        {"dtype": "float32"},
        {"chunk_tokens": 8},
        {"mla": True},
    ],
    ids=str,
)
def test_every_part_of_the_layout_changes_every_key(change: dict[str, Any]) -> None:
    shape: dict[str, Any] = {"layers": 2, "heads": 3, "head_size": 8, "dtype": "float16", "chunk_tokens": 4}
    other = Namespace.of(KVLayout.dense(**(shape | change)))
    assert not all_keys(Namespace.of(LAYOUT)) & all_keys(other)  # chunked alike: the layout alone makes the difference


def test_the_order_of_layer_groups_changes_every_key() -> None:
    a, b = LayerGroup(1, 2, 3, 8, "float16"), LayerGroup(1, 2, 3, 8, "float32")
    assert not all_keys(Namespace.of(KVLayout((a, b), 4))) & all_keys(Namespace.of(KVLayout((b, a), 4)))


SETTINGS = st.dictionaries(
    st.sampled_from(["model", "revision", "rope", "lora", "shard", "salt", "extra"]), st.text("ab\0", max_size=3)
)


@given(one=SETTINGS, two=SETTINGS)
def test_other_settings_never_share_a_key(one: dict[str, str], two: dict[str, str]) -> None:
    same = {k: v for k, v in one.items() if v} == {k: v for k, v in two.items() if v}
    keys = all_keys(Namespace.of(LAYOUT, **one)), all_keys(Namespace.of(LAYOUT, **two))
    assert (keys[0] == keys[1]) if same else not keys[0] & keys[1]


def test_a_namespace_refuses_what_it_can_not_hash() -> None:
    with pytest.raises(ArgumentError, match="sha256 or xxh3"):
        Namespace.of(LAYOUT, key_hash="md5")
    with pytest.raises(ArgumentError, match="model"):
        Namespace.of(LAYOUT, model=3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="layout"):
        Namespace("a layout")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="chunk_tokens"):
        TokenChunker(Namespace.of(LAYOUT), 0)


# -- chains ------------------------------------------------------------------------------------------------------------------


@given(tokens=TOKENS, width=st.integers(1, 9), cut=st.integers(0, 40))
def test_a_longer_text_begins_with_the_keys_of_a_shorter_one(tokens: list[int], width: int, cut: int) -> None:
    chunker = TokenChunker(Namespace.of(LAYOUT), width)
    keys = chunker.prefix_keys(tokens)
    assert len(keys) == -(-len(tokens) // width)
    assert all(len(key) == KEY_BYTES for key in keys)
    assert len(set(keys)) == len(keys)
    whole = min(cut, len(tokens)) // width
    if whole:
        assert chunker.prefix_keys(tokens[: whole * width]) == keys[:whole]
    pieces = chunker.pieces(token_bytes(tokens))
    parent = keys[whole - 1] if whole else None
    assert chunker.chain(pieces[whole:], parent) == keys[whole:], "a chain can be taken up in the middle"


@given(tokens=TOKENS, width=st.integers(1, 9), data=st.data())
def test_a_changed_token_changes_its_key_and_all_later_ones(tokens: list[int], width: int, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(tokens) - 1))
    other = tokens.copy()
    other[at] = data.draw(st.integers(0, 2**32 - 1).filter(lambda token: token != tokens[at]))
    chunker = TokenChunker(Namespace.of(LAYOUT), width)
    same = [a == b for a, b in zip(chunker.prefix_keys(tokens), chunker.prefix_keys(other), strict=True)]
    assert same == [i < at // width for i in range(len(same))]
    same = [a == b for a, b in zip(chunker.content_keys(tokens), chunker.content_keys(other), strict=True)]
    assert same == [i != at // width for i in range(len(same))]


def test_content_keys_do_not_know_what_came_before() -> None:
    chunker = TokenChunker(Namespace.of(LAYOUT), 4)
    a, b = [1, 2, 3, 4], [5, 6, 7, 8]
    assert chunker.content_keys(a + b)[1] == chunker.content_keys(b + a)[0] == chunker.content_keys(b)[0]
    assert chunker.prefix_keys(a + b)[1] != chunker.prefix_keys(b)[0]
    assert chunker.content_keys(b) != chunker.prefix_keys(b)


# -- tokens ------------------------------------------------------------------------------------------------------------------

IDS = [0, 1, 127, 5, 100]
LITTLE = b"".join(i.to_bytes(4, "little") for i in IDS)


@pytest.mark.parametrize(
    "make", [list, tuple, lambda ids: range(5, 8), lambda ids: array("i", ids), lambda ids: array("Q", ids)]
)
def test_sequences(make: Any) -> None:
    tokens = make(IDS)
    assert token_bytes(tokens) == b"".join(int(i).to_bytes(4, "little") for i in tokens)


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", ">u4", ">i8", "<u2"])
def test_numpy_arrays(dtype: str) -> None:
    ids = np.array(IDS, dtype=dtype)
    assert token_bytes(ids) == LITTLE
    assert token_bytes(list(ids)) == LITTLE
    assert token_bytes(np.repeat(ids, 3)[::3]) == LITTLE, "strided"
    assert token_bytes(memoryview(ids.astype(ids.dtype.newbyteorder("=")))) == LITTLE


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64):
        assert token_bytes(torch.tensor(IDS, dtype=dtype)) == LITTLE, dtype
    assert token_bytes(torch.tensor([IDS, IDS]).T[:, 0]) == LITTLE, "strided"
    assert token_bytes([torch.tensor(i) for i in IDS]) == LITTLE
    with pytest.raises(ArgumentError, match="one dimension"):
        token_bytes(torch.tensor([IDS]))
    with pytest.raises(ArgumentError, match="whole numbers"):
        token_bytes(torch.tensor([1.0]))
    with pytest.raises(ArgumentError, match="-1"):
        token_bytes(torch.tensor([4, -1]))


def test_the_largest_ids() -> None:
    big = [2**32 - 1, 2**31, 0]
    wanted = b"\xff\xff\xff\xff\x00\x00\x00\x80\x00\x00\x00\x00"
    for tokens in (big, np.array(big, "u4"), np.array(big, "i8"), np.array(big, "u8"), array("L", big)):
        assert token_bytes(tokens) == wanted


@pytest.mark.parametrize(
    "tokens",
    [[3, -1], (-1,), [-(2**40)], np.array([3, -1]), np.array([-1], "i1"), array("h", [-1])],
    ids=repr,
)
def test_negative_ids(tokens: Any) -> None:
    with pytest.raises(ArgumentError, match=r"0 to 4294967295; got -\d+"):
        token_bytes(tokens)


@pytest.mark.parametrize(
    "tokens",
    [[2**32], [1, 2**80], np.array([2**32]), np.array([2**64 - 1], "u8"), array("Q", [2**40])],
    ids=repr,
)
def test_ids_beyond_32_bits(tokens: Any) -> None:
    with pytest.raises(ArgumentError, match=r"0 to 4294967295; got \d+"):
        token_bytes(tokens)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "empty text"),
        ((), "empty text"),
        (np.array([], "u4"), "empty text"),
        (range(0), "empty text"),
        ("hello", "tokenizer"),
        (b"hello", "tokenizer"),
        (bytearray(b"hello"), "tokenizer"),
        ([1.0, 2.0], "whole numbers"),
        ([1, "2"], "whole numbers"),
        ([None], "whole numbers"),
        ([[1, 2]], "whole numbers"),
        ([float("nan")], "whole numbers"),
        (np.array([1.0]), "whole numbers"),
        (np.array([True]), "whole numbers"),
        (np.array(["1"]), "whole numbers"),
        (np.array([1, None]), "whole numbers"),
        (np.zeros((2, 3), int), "one dimension"),
        (np.array(5), "one dimension"),
        (5, "sequence"),
        (None, "sequence"),
        ({1, 2}, "sequence"),
        ({1: 2}, "sequence"),
        ((i for i in range(3)), "sequence"),
    ],
    ids=repr,
)
def test_what_is_no_text(tokens: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        token_bytes(tokens)


@given(a=TOKENS, b=TOKENS, same=st.integers(0, 40))
def test_shared_tokens(a: list[int], b: list[int], same: int) -> None:
    b = a[:same] + b
    slow = 0
    while slow < min(len(a), len(b)) and a[slow] == b[slow]:
        slow += 1
    assert shared_tokens(token_bytes(a), token_bytes(b)) == shared_tokens(token_bytes(b), token_bytes(a)) == slow
    assert shared_tokens(b"", token_bytes(a)) == 0


def test_a_text_without_utf8_form_is_no_name() -> None:
    """Such as a path of other bytes; said when the namespace is made, not when it is used first."""
    with pytest.raises(ArgumentError, match="expected namespace salt as a text that has a UTF-8 form"):
        Namespace(bytes(16), salt="tenant-\udcff")
