"""Failed loads where vLLM would go on from the first block that was not filled and must not: their requests begin again.

That is right where every token attends to all before it, there is one block table and no further step is under way. A window's
earlier blocks were never loaded; for several groups vLLM raises an error; with asynchronous scheduling the answer of the step
that was begun meanwhile, on blocks that were not filled, would be taken. Such requests give their blocks back, as preempted
ones do.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Iterable
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from .requests import CopyRecord, RequestState

__all__ = ["restart_after_failed_loads", "spoilt_requests"]

logger = init_logger("vllm.lmkv.failures")


def restart_after_failed_loads(connector: type) -> None:
    """Have this process's schedulers begin requests again whose KV a connector of that class could not load.

    Connectors say by ``_spoilt(blocks)`` which these are; ``None`` leaves them to vLLM.
    """
    original = getattr(Scheduler, "_handle_invalid_blocks", None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def _handle_invalid_blocks(scheduler: Any, invalid: set[int], num_scheduled_tokens: dict[str, int]) -> set[str]:
        used = scheduler.connector
        mine = next((one for one in getattr(used, "_connectors", (used,)) if isinstance(one, connector)), None)
        found = mine._spoilt(invalid) if mine is not None else None  # type: ignore[attr-defined]
        if not found or not found[0]:
            return original(scheduler, invalid, num_scheduled_tokens)  # type: ignore[no-any-return]
        names, blocks = found
        rest = invalid - blocks  # another connector's
        return _restart(scheduler, names) | (original(scheduler, rest, num_scheduled_tokens) if rest else set())

    Scheduler._handle_invalid_blocks = _handle_invalid_blocks  # type: ignore[method-assign]


def spoilt_requests(
    invalid: set[int], copies: Iterable[CopyRecord], requests: Iterable[RequestState], *, caching: bool
) -> tuple[set[str], set[int]]:
    """Ids of requests whose KV is not what it should be, and the blocks that their loads were to fill.

    Args:
        invalid: blocks that could not be filled.
        copies: that are under way, those that failed among them.
        requests: all.
        caching: whether vLLM gives blocks that one request fills to others, too.
    """
    failed: list[CopyRecord] = []
    blocks: set[int] = set()
    for record in copies:
        filled = {block for ids in record.order.blocks for block in ids.tolist() if block > 0}
        if record.order.load and filled & invalid:
            failed.append(record)
            blocks |= filled
    spoilt = {record.state.id for record in failed}
    steps = [record.state.since for record in failed if record.order.waits]
    if caching and steps:  # who came in that step or later may have been given the same blocks
        later = [state for state in requests if state.blocks and state.since >= min(steps)]
        spoilt |= {one.id for one in later if not getattr(one.request, "skip_reading_prefix_cache", False)}
    return spoilt, blocks


def _restart(scheduler: Any, names: set[str]) -> set[str]:
    """Begin requests again, or end them with an error if vLLM is to do so; returns those whose output is to be skipped."""
    manager = scheduler.kv_cache_manager
    if manager.enable_caching:  # a window may have passed spoilt blocks, a preemption given them back: nobody knows which
        manager.evict_blocks(set(range(1, len(manager.block_pool.blocks))))
    requests = [request for name in names if (request := scheduler.requests.get(name)) is not None]
    waiting = [request for request in requests if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS]
    running = [request for request in scheduler.running if request.request_id in names]
    if not scheduler.recompute_kv_load_failures:
        logger.error("LMKV: a load failed; ending %d requests, since kv_load_failure_policy is fail", len(waiting + running))
        return {request.request_id for request in waiting + running}
    logger.warning("LMKV: a load failed; %d requests begin again", len(waiting + running))
    for request in waiting:  # vLLM frees its blocks once all workers have ended the load
        request.num_computed_tokens = 0
        scheduler.failed_recving_kv_req_ids.add(request.request_id)
    skipped = [_preempt(scheduler, request) for request in reversed(running)]  # the first one is put in front last
    return {name for name in skipped if name}


def _preempt(scheduler: Any, request: Any) -> str:
    """Preempt a request, so that nothing computed for it so far is used; returns its name if its output is to be skipped."""
    scheduler.running.remove(request)
    scheduler.prev_step_scheduled_req_ids.discard(request.request_id)  # it may be resumed in the very next step
    now, name = time.monotonic(), str(request.request_id)
    if "drop_stale_output" in inspect.signature(scheduler._preempt_request).parameters:
        scheduler._preempt_request(request, now, drop_stale_output=True)
        return name
    scheduler._preempt_request(request, now)
    steps = getattr(scheduler.vllm_config, "max_concurrent_batches", 2)
    if steps == 1:
        return name
    if not scheduler.scheduler_config.async_scheduling or not hasattr(request, "async_tokens_to_discard"):
        raise RuntimeError(f"expected a vLLM that can drop an answer under way: a load of request {name} failed; restart it")
    # an older vLLM drops as many outputs as it is told, that of this step among them; drafts count as place-holders, too
    request.async_tokens_to_discard = min(request.num_output_placeholders, steps)
    request.num_output_placeholders = 0
    return ""
