"""``RoomyLayer`` does what ``DynamicLayer`` does, in place where it can."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hypothesis.strategies as st  # noqa: E402 (what it needs is skipped first)
from hypothesis import given  # noqa: E402
from transformers.cache_utils import DynamicLayer  # noqa: E402

from lmkv.adapters.transformers.room import RoomyLayer, cache_over, empty_buffers  # noqa: E402
from lmkv.errors import LayoutMismatchError  # noqa: E402

CPU = torch.device("cpu")


def roomy(batch: int, capacity: int) -> RoomyLayer:
    (buffers,) = empty_buffers([(CPU, torch.float32)], (batch, 2, capacity, 3))
    return RoomyLayer(*buffers, 0)


def states(batch: int, tokens: int, seed: int) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 2, tokens, 3, generator=generator), torch.rand(batch, 2, tokens, 3, generator=generator)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 9)),
        st.tuples(st.just("crop"), st.integers(0, 5)),
        st.tuples(st.just("reorder"), st.integers(0, 9)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("select"), st.integers(0, 9)),
        st.tuples(st.just("copy"), st.just(0)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    max_size=12,
)


@given(capacity=st.integers(0, 20), steps=STEPS)
def test_same_as_a_dynamic_layer(capacity: int, steps: list[tuple[str, int]]) -> None:
    batch = 2
    mine, theirs = roomy(batch, capacity), DynamicLayer()
    for i, (step, n) in enumerate(steps):
        held = theirs.get_seq_length()
        if step == "update":
            given_states = states(batch, n, i)
            for a, b in zip(mine.update(*given_states), theirs.update(*given_states), strict=True):
                assert torch.equal(a, b)
        elif step == "crop" and held > n:
            mine.crop(-n)
            theirs.crop(-n)
        elif step == "reorder" and held:
            order = torch.randint(batch, (batch,), generator=torch.Generator().manual_seed(n))
            mine.reorder_cache(order)
            theirs.reorder_cache(order)
        elif step == "repeat" and held and batch < 16:
            mine.batch_repeat_interleave(n)
            theirs.batch_repeat_interleave(n)
            batch *= n
        elif step == "select" and held:
            chosen = torch.tensor([n % batch, 0])
            mine.batch_select_indices(chosen)
            theirs.batch_select_indices(chosen)
            batch = 2
        elif step == "copy":
            before = mine
            mine = copy.deepcopy(mine)
            if held:
                before.keys.fill_(-1)  # the copy shares nothing
        elif step == "reset":
            mine.reset()
            theirs.reset()
        assert mine.get_seq_length() == theirs.get_seq_length()
        assert mine.get_mask_sizes(3) == theirs.get_mask_sizes(3)
        if theirs.get_seq_length():
            assert torch.equal(mine.keys, theirs.keys)
            assert torch.equal(mine.values, theirs.values)


def test_updates_stay_in_the_buffers_while_there_is_room() -> None:
    layer = roomy(1, 10)
    first, _ = layer.update(*states(1, 4, 0))
    place = first.data_ptr()
    assert layer.update(*states(1, 6, 1))[0].data_ptr() == place
    grown, _ = layer.update(*states(1, 1, 2))
    assert grown.data_ptr() != place
    assert layer.update(*states(1, 200, 3))[0].data_ptr() == grown.data_ptr()


def test_gradients_flow() -> None:
    layer = roomy(1, 10)
    layer.update(*states(1, 4, 0))
    keys, values = (part.requires_grad_() for part in states(1, 2, 1))
    sum(part.sum() for part in layer.update(keys, values)).backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))
    assert torch.equal(values.grad, torch.ones_like(values))


def test_another_dtype_is_refused() -> None:
    layer = roomy(1, 10)
    with pytest.raises(LayoutMismatchError, match=r"torch\.float32.*torch\.bfloat16.*autocast"):
        layer.update(*(part.bfloat16() for part in states(1, 2, 0)))


def test_a_cache_over_filled_buffers_reads_them() -> None:
    buffers = empty_buffers([(CPU, torch.float32)] * 2, (1, 2, 8, 3))
    for keys, values in buffers:
        keys.fill_(1.0)
        values.fill_(2.0)
    cache = cache_over(buffers, 5)
    assert isinstance(cache, transformers.DynamicCache)
    assert cache.get_seq_length() == 5
    keys, _ = cache.update(*states(1, 1, 0), 1)
    assert torch.equal(keys[:, :, :5], torch.ones(1, 2, 5, 3))
    assert keys.shape[2] == 6
