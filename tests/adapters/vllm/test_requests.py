"""Requests out of the ordinary: the shortest ones, embeddings, pooling, aborted ones; and models that are not served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import assert_same, difference, greedy, text

from lmkv.adapters.vllm.copies import Running


def test_short_requests_embeddings_and_resets(engine_of: Callable[..., Any]) -> None:
    engine = engine_of(enable_prompt_embeds=True, enable_prefix_caching=True)
    prompt = text(150, seed=1)
    wanted = engine.computed([prompt])
    engine.ask([prompt])
    engine.settle()
    engine.forget_local()

    shortest = engine.ask([prompt], tokens=1)[0]
    assert (shortest.cached, shortest.tokens) == (149, wanted[0].tokens[:1])
    tiny = engine.one_by_one([[5], [5], [5, 6], [5, 6]])
    assert [answer.cached for answer in tiny] == [0, 0, 1, 1]
    assert difference(tiny[0], tiny[1]) < 1e-4
    assert difference(tiny[2], tiny[3]) < 1e-4
    every = engine.one_by_one([prompt, prompt], prompt_logprobs=2)
    assert_same(every, wanted * 2)
    assert [answer.cached for answer in every] == [0, 0]

    generator = torch.Generator().manual_seed(1)
    embeddings = [torch.randn(40, 128, generator=generator) for _ in range(2)]
    bypassed = engine.metric("bypassed_requests_total")
    answers = []
    for one in (embeddings[0], embeddings[0], embeddings[1]):
        engine.forget_local()
        output = engine.llm.generate([{"prompt_embeds": one}], greedy(4), use_tqdm=False)[0]
        assert output.num_cached_tokens == 0
        answers.append(output.outputs[0].token_ids)
    assert answers[0] == answers[1] != answers[2]
    assert engine.metric("bypassed_requests_total") == bypassed + 3

    engine.forget_local()
    assert engine.ask([prompt])[0].cached == 149
    assert engine.llm.reset_prefix_cache(reset_connector=True)
    assert [answer.cached for answer in engine.one_by_one([prompt])] == [0]
    engine.settle()
    engine.llm.sleep(level=1)  # vLLM has its connector forget everything, too
    engine.llm.wake_up()
    found = engine.one_by_one([prompt, prompt])
    assert_same(found, wanted * 2)
    assert found[0].cached == 0


@pytest.mark.parametrize("load", ["sync", "async"])
def test_aborted_requests_leave_nothing(load: str, engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(connector={"lmkv.load": load})
    known, others = text(300, seed=2), [text(290 + i, seed=3 + i) for i in range(3)]
    wanted = engine.computed([known, *others])
    engine.ask([known])
    vllm = engine.llm.llm_engine
    for steps in range(5):
        for held in (False, True):
            with monkeypatch.context() as patch:
                if held:  # the load takes its time
                    patch.setattr(Running, "done", lambda running: not running.order.load)
                name = f"{steps}-{held}"
                vllm.add_request(name, {"prompt_token_ids": known}, greedy(8))
                for _ in range(steps):
                    vllm.step()
                vllm.abort_request([name])
                vllm.step()
            # its blocks are others' now, or will be
            assert_same(engine.ask(others), wanted[1:])
            engine.check_clean()
    assert_same(engine.ask([known]), wanted[:1])
    # preempted for a reset while they run, requests go on with the same answer
    vllm.add_request("running", {"prompt_token_ids": known}, greedy(6))
    said: list[int] = []
    for step in range(60):
        for output in vllm.step():
            said = list(output.outputs[0].token_ids)
        if step == 3:
            assert engine.llm.reset_prefix_cache(reset_running_requests=True)
        if not vllm.has_unfinished_requests():
            break
    assert tuple(said) == wanted[0].tokens


def test_a_name_that_comes_again_is_another_request(engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1")
    engine = engine_of()
    known, other = text(300, seed=11), text(300, seed=12)
    wanted = engine.computed([other])
    engine.ask([known])
    vllm = engine.llm.llm_engine
    with monkeypatch.context() as patch:
        patch.setattr(Running, "done", lambda running: not running.order.load)  # the load takes its time
        vllm.add_request("name", {"prompt_token_ids": known}, greedy(8))
        vllm.step()
        vllm.abort_request(["name"])
        vllm.step()
        assert [state.ended for state in engine.half._requests.values()] == [True]
        vllm.add_request("name", {"prompt_token_ids": other}, greedy(6))
        vllm.step()
    said: tuple[int, ...] = ()
    while vllm.has_unfinished_requests():
        for output in vllm.step():
            said = tuple(output.outputs[0].token_ids)
    assert said == wanted[0].tokens
    assert_same(engine.ask([other]), wanted)


def test_state_layers_are_computed_with_a_word_of_why(engine_of: Callable[..., Any]) -> None:
    engine = engine_of("mamba")
    assert "MambaSpec, which is not served" in engine.half.refusal
    prompts = [text(60, seed=8), text(100, seed=9)]
    before = engine.metric("bypassed_requests_total")
    first, again = engine.one_by_one(prompts, tokens=3), engine.ask(prompts, tokens=3)
    assert_same(again, first)
    assert [answer.cached for answer in first + again] == [0] * 4
    assert engine.metric("bypassed_requests_total") == before + 4
    assert engine.store is None


def test_pooling_is_computed(engine_of: Callable[..., Any], models: Callable[[str], Path]) -> None:
    engine = engine_of(runner="pooling", convert="embed", skip_tokenizer_init=False, tokenizer=str(models("images")))
    prompt = {"prompt_token_ids": text(100, seed=10)}
    vectors = [torch.tensor(engine.llm.embed([prompt], use_tqdm=False)[0].outputs.embedding) for _ in range(2)]
    assert torch.allclose(vectors[0], vectors[1])
    assert engine.store.stats().stored_tokens == 0
    assert engine.metric("bypassed_requests_total") >= 2
