"""Reuse through a real Redis that is killed, stalled and started again under the engine: nothing fails, and hits come back."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
from engines import Engine, assert_same, text

from lmkv import Store

#: A tier's answer, be it that it has nothing, is believed for a second.
BELIEVED = 1.1


@pytest.fixture
def server(tmp_path: Path) -> Iterator[servers.RedisServer]:
    with servers.RedisServer(tmp_path) as running:
        yield running


def settings(server: servers.RedisServer) -> dict[str, Any]:
    """As users of LMCache write it, with a short deadline and rest."""
    return {"lmcache.remote_url": server.url, "lmcache.blocking_timeout_secs": 1, "lmkv.breaker_seconds": 2.0}


def forget(engine: Engine) -> None:
    """Have what was asked written to Redis, and nothing left in RAM."""
    engine.settle()
    engine.store.flush(20)  # False where a Redis that is gone made it give something up
    engine.forget_local()
    with engine.store._lock:
        engine.store._ram.clear()


def test_texts_come_from_redis_after_a_restart(engine_of: Callable[..., Any], server: servers.RedisServer) -> None:
    prompts = [text(length, seed=length) for length in (150, 333, 400)]
    first = engine_of(connector=settings(server))
    wanted = first.ask(prompts)
    first.close()
    second = engine_of(connector=settings(server))
    found = second.one_by_one(prompts)
    assert_same(found, wanted)
    assert [answer.cached for answer in found] == [len(prompt) - 1 for prompt in prompts], "their short last chunks included"
    assert second.store.stats().tiers[1].read_chunks > 0


@pytest.mark.parametrize("fault", ["killed", "stalled"])
def test_a_redis_lost_in_the_middle(
    engine_of: Callable[..., Any], server: servers.RedisServer, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "worthwhile", lambda self, match, speed: match)  # Redis is read however quick the model is
    engine = engine_of(connector=settings(server))
    prompts = [text(300, seed=300 + number) for number in range(12)]
    wanted = engine.computed(prompts)
    engine.one_by_one(prompts)
    forget(engine)
    time.sleep(BELIEVED)
    found = engine.one_by_one(prompts[:4])
    assert [answer.cached for answer in found] == [299] * 4
    server.kill() if fault == "killed" else server.signal(signal.SIGSTOP)
    lost = engine.one_by_one(prompts[4:])
    assert_same(found + lost, wanted)
    assert not any(answer.cached for answer in lost)
    assert not any(answer.reason == "error" for answer in lost)
    tier = engine.store.stats().tiers[1]
    assert (tier.enabled, tier.failures > 0) == (False, True), "after a few requests nobody waits for it any more"
    server.start() if fault == "killed" else server.signal(signal.SIGCONT)

    def served_again() -> bool:
        engine.ask(prompts[:1])
        forget(engine)
        time.sleep(BELIEVED)
        answer = engine.ask(prompts[:1])
        assert_same(answer, wanted[:1])
        return answer[0].cached == 299

    servers.until(served_again, 60)
    assert engine.store.stats().tiers[1].enabled
