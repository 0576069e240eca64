"""Loaded KV gives the same answers as computed KV, in every setting that a CPU runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from engines import BLOCK, CHUNK, assert_same, difference, text

#: Lengths around the edges of blocks and chunks.
LENGTHS = (2, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK, CHUNK + 1, 96, 97, 250, 500)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("llama", {"enable_prefix_caching": True, "max_num_batched_tokens": 96}),
        ("qwen3", {"max_num_batched_tokens": 80, "connector": {"lmkv.load": "async"}}),
        ("qwen3", {"enable_prefix_caching": True, "connector": {"lmkv.load": "async", "lmkv.save_decode_cache": True}}),
        ("window", {}),
        ("window", {"enable_prefix_caching": True, "max_num_batched_tokens": 96}),
        ("hybrid", {"enable_prefix_caching": True, "max_num_batched_tokens": 96}),
        ("mla", {}),  # vLLM turns prefix caching and chunked prefill off for it on a CPU without AMX
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value,
)
def test_loaded_is_computed(
    kind: str, settings: dict[str, Any], engine_of: Callable[..., Any], references: Callable[..., Any]
) -> None:
    prompts = [text(length, seed=length) for length in LENGTHS]
    shared = prompts[-1][:300]
    behind = [shared + text(40, seed) for seed in (1, 2, 3)]
    wanted = references(kind, prompts + behind)
    engine = engine_of(kind, **settings)
    assert_same(engine.one_by_one(prompts), wanted[: len(prompts)])
    engine.forget_local()
    again = engine.one_by_one(prompts)
    assert_same(again, wanted[: len(prompts)])
    # all but one token of each prompt, whatever its length
    assert [answer.cached for answer in again] == [length - 1 for length in LENGTHS]
    engine.forget_local()
    together = engine.ask(behind)
    assert_same(together, wanted[len(prompts) :])
    assert [answer.cached for answer in together] == [300] * 3
    engine.check_clean()


def test_new_texts_with_one_prefix_in_one_step(engine_of: Callable[..., Any]) -> None:
    shared = text(200, seed=11)
    prompts = [shared + text(30 + i, seed=100 + i) for i in range(4)]
    engine = engine_of()
    wanted = engine.computed(prompts)
    assert_same(engine.ask(prompts), wanted)
    engine.settle()
    # whole chunks of the prefix are kept once, what is behind them by each
    assert engine.store.stats().stored_tokens == 192 + sum(len(prompt) - 192 for prompt in prompts)
    assert_same(engine.ask(prompts), wanted)


def test_a_wrong_number_at_any_position_is_seen(engine_of: Callable[..., Any]) -> None:
    engine = engine_of()
    prompt = text(150, seed=21)
    engine.ask([prompt])
    right = engine.ask([prompt])[0]
    store = engine.store
    for position in (0, 1, 47, 48, 100, 148):
        with store.lease(store.lookup(prompt, namespace=None)) as lease:
            slot = next(slot for slot in lease.slots if slot.start <= position < slot.start + slot.tokens)
            group = store.layout.groups[0]
            view = store._ram.payload(slot.id, slot.tokens)
            values = np.frombuffer(view, np.float32).reshape(group.layers, 2, group.heads, slot.tokens, group.head_size)
            kept = values[:, :, :, position - slot.start].copy()
            values[:, :, :, position - slot.start] = kept[:, :, :, ::-1]
        wrong = engine.ask([prompt])[0]
        assert wrong.tokens != right.tokens or difference(wrong, right) > 1e-3, f"position {position} is not seen"
        values[:, :, :, position - slot.start] = kept
    assert_same(engine.ask([prompt]), [right])


@pytest.mark.parametrize("caching", [False, True])
def test_preempted_requests(caching: bool, engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [text(120 + i, seed=31 + i) for i in range(4)]
    engine = engine_of(num_gpu_blocks_override=14, max_model_len=256, enable_prefix_caching=caching)
    wanted = engine.computed(prompts)
    preempted = []
    scheduler = engine.core.scheduler
    real = scheduler._preempt_request

    def preempt(request: Any, *more: Any, **named: Any) -> Any:
        preempted.append(request.request_id)
        return real(request, *more, **named)

    monkeypatch.setattr(scheduler, "_preempt_request", preempt)
    first, second = engine.ask(prompts, tokens=40), engine.ask(prompts, tokens=40)
    assert preempted
    for found in (first, second):
        for answer, reference in zip(found, wanted, strict=True):
            assert answer.tokens[:6] == reference.tokens
    assert [a.tokens for a in first] == [a.tokens for a in second]


def test_what_a_request_may_ask_for(engine_of: Callable[..., Any]) -> None:
    prompt, other = text(130, seed=41), text(131, seed=42)
    engine = engine_of()
    wanted = engine.computed([prompt])
    ask = lambda **more: engine.ask([prompt], **more)[0]  # noqa: E731
    assert ask(params={"lmkv.skip_save": True}).cached == 0
    assert ask().cached == 0  # nothing was kept
    assert ask(params={"lmkv.skip_load": True}).cached == 0
    assert ask(params={"lmcache.skip_save": "true"}).cached == 129
    assert ask(params={"lmkv.salt": "a"}).cached == 0
    assert ask(params={"lmkv.salt": "a"}).cached == 129
    assert ask(params={"lmkv.tag.user": "x"}).cached == 0
    assert ask(params={"lmcache.tag.user": "x"}).cached == 129
    salted = [{"prompt_token_ids": prompt, "cache_salt": salt} for salt in ("one", "one", "two")]
    assert [engine.ask([one])[0].cached for one in salted] == [0, 129, 0]
    assert ask(prompt_logprobs=1).cached == 0  # every position has to be computed
    loaded = ask()
    assert loaded.cached == 129
    assert_same([loaded], wanted)
    assert engine.ask([other])[0].cached == 0


@pytest.mark.skipif(
    not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()),
    reason="vLLM keeps KV of eight bits only on a processor with AVX-512 or AMX",
)
def test_a_cache_of_eight_bit_numbers(engine_of: Callable[..., Any]) -> None:
    engine = engine_of(kv_cache_dtype="fp8")
    prompts = [text(100, seed=71), text(333, seed=72)]
    wanted = engine.computed(prompts)
    assert_same(engine.one_by_one(prompts), wanted)
    found = engine.one_by_one(prompts)
    assert_same(found, wanted)
    assert [answer.cached for answer in found] == [99, 332]
