"""Failed loads while the next step is under way already, as asynchronous scheduling has it on GPUs.

vLLM's CPU workers can't do that, so here its scheduler runs by itself, with the connector of a real engine, and the test says
what the workers answer.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engines import Engine, text
from vllm import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request

from lmkv.adapters.vllm.failures import spoilt_requests
from lmkv.adapters.vllm.plans import CopyOrder, Report
from lmkv.adapters.vllm.requests import CopyRecord


def scheduler_of(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A scheduler that schedules ahead, with the engine's connector."""
    own, config = engine.core.scheduler, engine.core.vllm_config
    monkeypatch.setattr(config.scheduler_config, "async_scheduling", True)
    scheduler = AsyncScheduler(
        vllm_config=config,
        kv_cache_config=own.kv_cache_config,
        structured_output_manager=own.structured_output_manager,
        block_size=own.block_size,
        hash_block_size=getattr(own, "hash_block_size", own.block_size),
        log_stats=False,
    )
    scheduler.connector = own.connector
    return scheduler


def answer(scheduler: Any, output: Any, token: int, *, failed: bool = False) -> list[int]:
    """Workers say ``token`` to each request of a step, and that its loads failed or not; what comes out."""
    orders = output.kv_connector_metadata
    report = Report(done={order.id: 1 for order in [*orders.loads, *orders.stores]})
    report.failed = {order.id for order in orders.stores}  # nobody has filled a slot here
    invalid: set[int] = set()
    if failed:
        report.failed |= {order.id for order in orders.loads}
        invalid = {block for order in orders.loads for ids in order.blocks for block in ids.tolist() if block > 0}
    names = list(output.num_scheduled_tokens)
    said = ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: i for i, name in enumerate(names)},
        sampled_token_ids=[[token] for _ in names],
        kv_connector_output=KVConnectorOutput(invalid_block_ids=invalid, kv_connector_worker_meta=report),
    )
    found = scheduler.update_from_output(output, said).values()
    return [token for outputs in found for one in outputs.outputs for token in one.new_token_ids]


@pytest.mark.parametrize(("kind", "caching"), [("llama", False), ("hybrid", True)])
def test_answers_on_unfilled_blocks_are_dropped(
    kind: str, caching: bool, engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(kind, enable_prefix_caching=caching)
    known = text(300, seed=1)
    engine.ask([known])
    engine.settle()
    engine.forget_local()
    scheduler = scheduler_of(engine, monkeypatch)
    sampling = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    request = Request("one", known, sampling, None, block_hasher=engine.core.request_block_hasher)
    scheduler.add_request(request)
    step = scheduler.schedule()
    assert (len(step.kv_connector_metadata.loads), step.num_scheduled_tokens) == (1, {"one": 1})
    ahead = scheduler.schedule()  # of the same request, on blocks that are not filled either
    assert ahead.num_scheduled_tokens == {"one": 1}
    found = answer(scheduler, step, 401, failed=True)
    again = scheduler.schedule()
    assert again.num_scheduled_tokens == {"one": 300}  # from the first token on, nothing of it loaded
    assert not again.kv_connector_metadata.loads
    assert again.kv_connector_metadata.preempted == {"one"}  # its blocks came free while the step ahead still writes to them
    assert again.kv_connector_metadata.behind
    found += answer(scheduler, ahead, 402)
    queue, token = [again], 1
    while queue:
        following = scheduler.schedule()
        if following.total_num_scheduled_tokens:
            queue.append(following)
        found += answer(scheduler, queue.pop(0), token)
        token += 1
    assert found == [1, 2, 3, 4]
    assert request.is_finished()
    answer(scheduler, scheduler.schedule(), 0)


def test_requests_that_may_share_unfilled_blocks_begin_again_too() -> None:
    def state(name: str, since: int, **more: Any) -> Any:
        return SimpleNamespace(id=name, since=since, blocks=[[1]], request=SimpleNamespace(**more))

    early, failing, beside, alone = state("early", 3), state("failing", 5), state("beside", 6), state("alone", 6)
    alone.request.skip_reading_prefix_cache = True
    unscheduled = state("unscheduled", 6)
    unscheduled.blocks = []
    requests = [early, failing, beside, alone, unscheduled]
    part = np.array([(0, 0, 64, 0, 64)])
    copies = [
        CopyRecord(CopyOrder(1, "early", part, (np.array([8, 9]), np.array([-1, 3])), 0, load=False), early, None),  # type: ignore[arg-type]
        CopyRecord(CopyOrder(2, "failing", part, (np.array([4, 5]), np.array([-1, 6])), 0, load=True), failing, None),  # type: ignore[arg-type]
    ]
    assert spoilt_requests({6}, copies, requests, caching=False) == ({"failing"}, {4, 5, 6})
    assert spoilt_requests({6}, copies, requests, caching=True) == ({"failing", "beside"}, {4, 5, 6})
    assert spoilt_requests({3, 8}, copies, requests, caching=True) == (set(), set())  # a store's blocks are filled
