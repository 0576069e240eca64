"""What the scheduler's half says about a step: what its loads must wait for, and how they are brought."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engines import CHUNK, assert_same, greedy, text

from lmkv.adapters.vllm import scheduler
from lmkv.adapters.vllm.copies import Copier, Running
from lmkv.adapters.vllm.hashing import _unread


def recorded(engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The orders of all steps from now on."""
    given: list[Any] = []
    original = engine.half.orders

    def orders(output: Any) -> Any:
        given.append(original(output))
        return given[-1]

    monkeypatch.setattr(engine.half, "orders", orders)
    return given


def loads(given: list[Any]) -> list[Any]:
    """Orders with loads."""
    return [orders for orders in given if orders.loads]


def test_a_load_waits_for_running_steps_only_where_blocks_came_free(
    engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of()
    known = text(4 * CHUNK, seed=1)
    wanted = engine.computed([known])
    engine.ask([known])
    given, vllm = recorded(engine, monkeypatch), engine.llm.llm_engine
    assert engine.half._steps_in_flight == engine.core.batch_queue_size

    vllm.add_request("long", {"prompt_token_ids": text(40, seed=2)}, greedy(40))
    for _ in range(6):
        vllm.step()
    vllm.add_request("known", {"prompt_token_ids": known}, greedy(2))
    for _ in range(2):
        vllm.step()
    assert [orders.behind for orders in loads(given)] == [False]  # for seven steps nobody has ended

    given.clear()
    while vllm.has_unfinished_requests():
        vllm.step()
        if "known" not in engine.half._requests:
            break
    vllm.add_request("again", {"prompt_token_ids": known}, greedy(2))
    vllm.step()
    assert [orders.behind for orders in loads(given)] == [engine.half._steps_in_flight > 1]
    while vllm.has_unfinished_requests():
        vllm.step()

    given.clear()
    half = engine.half
    monkeypatch.setattr(half, "_steps_in_flight", 2)  # as with asynchronous scheduling
    half._freed_step = half._step  # a request that ran in the last step has ended
    answer = engine.ask([known])
    assert [orders.behind for orders in loads(given)] == [True]
    assert_same(answer, wanted)


def test_what_is_held_is_not_asked_for_again(engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    known, more = text(4 * CHUNK + 20, seed=17), text(CHUNK, seed=18)
    wanted, longer = engine.computed([known]), engine.computed([known + more])
    engine.ask([known])
    reserve, asked = engine.store.reserve, []

    def reserved(tokens: Any, **how: Any) -> Any:
        asked.append((len(tokens), how["start"]))
        return reserve(tokens, **how)

    monkeypatch.setattr(engine.store, "reserve", reserved)
    assert_same(engine.ask([known]), wanted)
    assert asked == [], "the short last chunk is held, too"
    assert_same(engine.ask([known + more]), longer)
    assert asked == [(5 * CHUNK + 20, 4 * CHUNK)]


def test_what_was_lost_while_it_was_loaded_is_kept_anew(engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    known = text(4 * CHUNK + 20, seed=19)
    wanted = engine.computed([known])
    engine.ask([known])

    def lost(copier: Any, order: Any, **how: Any) -> Any:
        for state in engine.half._requests.values():
            for number in state.copies:
                engine.half._copies[number].hold.release()
        engine.store.clear()
        return Running(order, error="injected")

    with monkeypatch.context() as patch:
        patch.setattr(Copier, "load", lost)
        assert_same(engine.ask([known]), wanted)
    assert engine.metric("load_failures_total") == 1
    engine.settle()
    found = engine.ask([known])
    assert_same(found, wanted)
    assert found[0].cached == len(known) - 1


def test_a_preempted_requests_blocks_are_waited_for(engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(num_gpu_blocks_override=14, max_model_len=256)
    given = recorded(engine, monkeypatch)
    engine.ask([text(120 + i, seed=31 + i) for i in range(4)], tokens=40)
    preempted = [orders for orders in given if orders.preempted]
    assert preempted
    assert all(orders.behind for orders in preempted)


def test_windows_free_blocks_at_any_time(engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of("window")
    known = text(200, seed=4)
    engine.ask([known])
    given = recorded(engine, monkeypatch)
    for _ in range(5):
        engine.core.step()
    engine.ask([known])
    assert [orders.behind for orders in loads(given)] == [True]


def test_a_load_comes_behind_the_clearing_of_its_blocks(engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    known = text(4 * CHUNK, seed=21)
    wanted = engine.computed([known])
    engine.ask([known])
    for _ in range(5):
        engine.core.step()
    given, of_half = recorded(engine, monkeypatch), engine.half.orders

    def orders(output: Any) -> Any:  # as vLLM says it where layers keep KV in different precisions
        output.new_block_ids_to_zero = [block for new in output.scheduled_new_reqs for block in new.block_ids[0]] or None
        return of_half(output)

    monkeypatch.setattr(engine.half, "orders", orders)
    assert_same(engine.ask([known]), wanted)
    assert [(orders.early, orders.behind) for orders in loads(given)] == [(False, True)]


def test_a_pass_of_few_tokens_is_quick(engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    known = text(400, seed=5)
    engine.ask([known])
    given = recorded(engine, monkeypatch)
    engine.ask([known])
    engine.ask([known + text(100, seed=6)])
    assert [orders.quick_pass for orders in loads(given)] == [True, False]


def test_in_a_quick_pass_only_the_largest_load_comes_by_layers(
    engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(connector={"lmkv.layerwise": True})
    known = [text(6 * CHUNK, seed=13), text(2 * CHUNK, seed=14)]
    wanted = engine.computed(known)
    engine.ask(known)
    original, made = Copier.load, []

    def load(copier: Any, order: Any, **how: Any) -> Any:
        made.append((order.tokens, how["layerwise"], order.request))
        return original(copier, order, **how)

    monkeypatch.setattr(Copier, "load", load)
    for request, prompt in zip("ab", known, strict=True):
        engine.llm.llm_engine.add_request(request, {"prompt_token_ids": prompt}, greedy(6))
    answers = {}
    while engine.llm.llm_engine.has_unfinished_requests():
        answers |= {output.request_id: output for output in engine.llm.llm_engine.step()}
    assert [(tokens, layerwise) for tokens, layerwise, _ in made] == [(2 * CHUNK - 1, False), (6 * CHUNK - 1, True)]
    assert [tuple(answers[request].outputs[0].token_ids) for request in "ab"] == [answer.tokens for answer in wanted]


def test_no_load_begins_while_others_copy_from_its_blocks(
    engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(num_gpu_blocks_override=14, max_model_len=384)
    known, other = text(3 * CHUNK, seed=24), text(5 * CHUNK, seed=25)
    wanted = engine.computed([known, other])
    engine.ask([known])
    happened: list[str] = []
    load, orders, wait = Copier.load, engine.half.orders, Running.wait

    def recorded(name: str, original: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            happened.append(name)
            return original(*arguments, **named)

        return call

    vllm = engine.llm.llm_engine
    with monkeypatch.context() as patch:
        patch.setattr(Copier, "load", recorded("load", load))
        patch.setattr(engine.half, "orders", recorded("orders", orders))
        patch.setattr(Running, "wait", recorded("wait", wait))
        patch.setattr(Running, "done", lambda running: running.order.load)  # stores take their time
        vllm.add_request("other", {"prompt_token_ids": other}, greedy(6))
        vllm.step()
        assert engine.llm.reset_prefix_cache(reset_running_requests=True)
        vllm.add_request("known", {"prompt_token_ids": known}, greedy(6))
        happened.clear()
        vllm.step()
    assert happened == ["orders", "wait", "load"]
    answers = {}
    while vllm.has_unfinished_requests():
        answers |= {output.request_id: output for output in vllm.step()}
    assert [tuple(answers[name].outputs[0].token_ids) for name in ("known", "other")] == [one.tokens for one in wanted]
    assert engine.metric("load_failures_total") == 0


def test_a_large_load_does_not_keep_others_waiting(engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    known = text(4 * CHUNK, seed=11)
    wanted = engine.computed([known])
    engine.ask([known])
    given, vllm = recorded(engine, monkeypatch), engine.llm.llm_engine
    monkeypatch.setattr(engine.half, "_on_gpu", True)  # what a load holds up there is the wire, here the same processors

    def waits(*, beside: bool, most: int) -> list[bool]:
        given.clear()
        monkeypatch.setattr(scheduler, "_MOST_BEFORE_A_STEP", most)
        if beside:
            vllm.add_request("long", {"prompt_token_ids": text(40, seed=12)}, greedy(60))
            for _ in range(6):
                vllm.step()
        vllm.add_request("known", {"prompt_token_ids": known}, greedy(2))
        answered = []
        while vllm.has_unfinished_requests():
            answered += [output for output in vllm.step() if output.request_id == "known" and output.finished]
        assert answered[0].num_cached_tokens == len(known) - 1
        assert tuple(answered[0].outputs[0].token_ids) == wanted[0].tokens[:2]
        return [order.waits for orders in given for order in orders.loads if order.tokens == len(known) - 1]

    assert waits(beside=True, most=1000) == [False]
    assert waits(beside=True, most=1 << 40) == [True]
    assert waits(beside=False, most=1000) == [True]
    monkeypatch.setattr(engine.half, "_on_gpu", False)
    assert waits(beside=True, most=1000) == [True]


def test_blocks_are_hashed_only_for_a_reader(engine_of: Callable[..., Any]) -> None:
    engine = engine_of()
    assert engine.core.request_block_hasher is not None
    engine.ask([text(50, seed=7)])
    assert engine.core.request_block_hasher is None
    assert not _unread(engine.core, int)  # another connector may read them


def test_prefix_caching_keeps_its_hashes(engine_of: Callable[..., Any]) -> None:
    engine = engine_of(enable_prefix_caching=True)
    prompt = text(100, seed=8)
    first, again = engine.ask([prompt])[0], engine.ask([prompt])[0]
    assert engine.core.request_block_hasher is not None
    assert engine.core.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block
    assert again.tokens == first.tokens
