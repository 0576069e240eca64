"""A reset of the cache, as after new weights: nothing of what was computed before is used, or kept, any more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Engine, assert_same, greedy, text

from lmkv.adapters.vllm.copies import Running


def change_weights(engine: Engine) -> None:
    """Have the model compute other KV from now on."""
    model = engine.core.model_executor.driver_worker.worker.model_runner.model
    with torch.inference_mode():
        for layer in model.model.layers:
            layer.input_layernorm.weight[::2] *= -1.5


def run(engine: Engine) -> dict[str, tuple[int, ...]]:
    """Answers to all that was asked."""
    answers = {}
    while engine.llm.llm_engine.has_unfinished_requests():
        for output in engine.llm.llm_engine.step():
            if output.finished:
                answers[output.request_id] = tuple(output.outputs[0].token_ids)
    return answers


def test_what_was_found_before_new_weights_is_not_loaded(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(num_gpu_blocks_override=14, max_model_len=256)
    long, known = text(230, seed=1), text(200, seed=2)
    engine.ask([known])
    vllm = engine.llm.llm_engine
    vllm.add_request("long", {"prompt_token_ids": long}, greedy(20))
    vllm.step()
    vllm.add_request("known", {"prompt_token_ids": known}, greedy(6))
    vllm.step()
    assert len(engine.core.scheduler.running) == 1  # there is no room for the other one, which was found
    assert engine.store.stats().leases == 1
    change_weights(engine)
    assert engine.llm.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    found = run(engine)
    again = engine.one_by_one([known, known])
    wanted = engine.computed([known])
    assert found["known"] == wanted[0].tokens
    assert_same(again, wanted * 2)
    assert again[1].cached == 199


def test_what_new_weights_computed_is_not_kept_as_the_old_ones(engine_of: Callable[..., Engine], tmp_path: Path) -> None:
    disk: dict[str, Any] = {"lmkv.disk_path": str(tmp_path), "lmkv.disk_capacity": "1GiB"}
    known = text(300, seed=3)
    engine = engine_of(connector=disk)
    change_weights(engine)
    assert engine.llm.reset_prefix_cache(reset_connector=True)
    engine.ask([known])
    assert engine.ask([known])[0].cached == 299
    assert engine.store.flush(30)
    engine.close()
    engine = engine_of(connector=disk)  # the model as it was saved
    found = engine.ask([known])
    assert_same(found, engine.computed([known]))


def test_what_was_being_stored_before_new_weights_is_not_kept(
    engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of()
    known = text(200, seed=4)
    vllm = engine.llm.llm_engine
    with monkeypatch.context() as patch:
        patch.setattr(Running, "done", lambda running: running.order.load)  # the store takes its time
        vllm.add_request("running", {"prompt_token_ids": known}, greedy(6))
        for _ in range(2):  # in the first one the workers look for the slots
            vllm.step()
        assert engine.store.stats().reservations == 1
        change_weights(engine)
        assert engine.llm.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    run(engine)
    found = engine.one_by_one([known, known])
    assert_same(found, engine.computed([known]) * 2)


def test_a_request_that_goes_on_over_a_reset_is_neither_loaded_nor_kept(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(max_num_batched_tokens=96)
    known = text(300, seed=5)
    engine.llm.llm_engine.add_request("running", {"prompt_token_ids": known}, greedy(6))
    for _ in range(2):
        engine.llm.llm_engine.step()
    change_weights(engine)
    engine.llm.reset_prefix_cache(reset_connector=True)  # of vLLM's own, where blocks are in use, nothing
    run(engine)
    engine.settle()
    assert engine.store.stats().tiers[0].chunks == 0
    found = engine.one_by_one([known, known])
    assert_same(found, engine.computed([known]) * 2)
