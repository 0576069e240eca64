"""What people and other programs are told: log lines, vLLM's statistics, Prometheus, KV events, reasons for no reuse."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import text
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored

from lmkv import Store
from lmkv.adapters.vllm.metrics import LMKVStats


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def test_what_is_told_of_reuse(engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    events = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    engine = engine_of(kv_events_config=events, connector={"lmkv.ram_capacity": "1MiB", "lmkv.ram_extent": "1MiB"})
    logger, heard = logging.getLogger("vllm.lmkv.scheduler"), Lines()
    logger.addHandler(heard)
    level = logger.level
    logger.setLevel(logging.INFO)
    seen: list[Any] = []
    real = type(engine.connector).take_events

    def take(self: Any) -> list[Any]:
        taken = list(real(self))
        seen.extend(taken)
        return taken

    monkeypatch.setattr(type(engine.connector), "take_events", take)
    prompt = text(100, seed=1)
    try:
        engine.ask([prompt])
        engine.ask([prompt])
        engine.ask([[*prompt, *text(20, seed=2)]])
    finally:
        logger.setLevel(level)
        logger.removeHandler(heard)
    said = "\n".join(heard.lines)
    for line in (
        r"LMKV: Storing KV cache for 100 out of 100 tokens \(skip_leading_tokens=0\) for request \S+",
        r"LMKV: Stored 100 out of total 100 tokens\. size: 0\.0002 gb, cost [\d.]+ ms, throughput: [\d.]+ GB/s",
        r"LMKV: Reqid: \S+, Total tokens 100, LMKV hit tokens: 100, need to load: 99",
        r"LMKV: Retrieved 99 out of 99 required tokens \(from 100 total tokens\)\. size: [\d.]+ gb, cost [\d.]+ ms",
        r"LMKV: Reqid: \S+, Total tokens 120, LMKV hit tokens: 100, need to load: 100",
        r"LMKV: Storing KV cache for 24 out of 120 tokens \(skip_leading_tokens=96\)",
    ):
        assert re.search(line, said), f"{line} not in:\n{said}"
    assert engine.metric("loaded_tokens_total") == 199
    assert engine.metric("hit_tokens_total") == 199
    assert engine.metric("stored_tokens_total") == 124
    assert engine.metric("lookup_tokens_total") == 99 + 99 + 119
    assert engine.metric("load_seconds_count") == 2
    assert engine.metric("ram_chunks") == 3  # the longer last chunk made the shorter one redundant
    stored = [event for event in seen if isinstance(event, BlockStored)]
    assert [len(event.token_ids) for event in stored] == [48, 48, 4, 24]
    assert stored[0].token_ids + stored[1].token_ids == prompt[:96]
    assert stored[1].parent_block_hash == stored[0].block_hashes[0]
    assert {event.medium for event in stored} == {"CPU"}
    for seed in range(10, 20):  # more than there is room for
        engine.ask([text(200, seed=seed)])
    removed = [key for event in seen if isinstance(event, BlockRemoved) for key in event.block_hashes]
    assert stored[0].block_hashes[0] in removed
    engine.settle()
    assert engine.llm.reset_prefix_cache(reset_connector=True)
    engine.ask([text(10, seed=3)])
    assert any(isinstance(event, AllBlocksCleared) for event in seen)


@pytest.mark.parametrize("kept", [True, False])
def test_whoever_follows_the_kv_events_knows_what_is_in_ram(
    kept: bool, tmp_path: Path, engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "worthwhile", lambda self, match, speed: match)
    settings = {
        "ram_capacity": "1MiB",
        "ram_extent": "1MiB",
        "ram_cache": kept,
        "disk_path": str(tmp_path),
        "disk_capacity": "64MiB",
    }
    engine = engine_of(
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
        connector={f"lmkv.{name}": value for name, value in settings.items()},
    )
    known: dict[bytes, BlockStored] = {}
    real = type(engine.connector).take_events

    def take(self: Any) -> list[Any]:
        taken = list(real(self))
        for event in taken:
            if isinstance(event, BlockStored):
                known[event.block_hashes[0]] = event
            for key in event.block_hashes if isinstance(event, BlockRemoved) else ():
                known.pop(key, None)
        return taken

    monkeypatch.setattr(type(engine.connector), "take_events", take)
    prompts = [text(200, seed=seed) for seed in range(10, 20)]  # more than there is room for
    for prompt in (*prompts, *prompts, [*prompts[-1], *text(20, seed=2)]):
        engine.ask([prompt])
        engine.settle()
        assert engine.store.flush(60)
        engine.connector.take_events()
        index = engine.store._ram.index
        assert set(known) == {node.key for node in index}
        for key, event in known.items():
            node = index.get(key)
            assert event.token_ids == memoryview(node.tokens).cast("I").tolist()
            assert event.parent_block_hash == (node.parent.key if len(index.chain(node)) > 1 else None)
    assert engine.metric("hit_tokens_total") >= 1800, "most came back from the disk"
    assert bool(known) == kept


def test_intervals_add_up() -> None:
    one = LMKVStats(data={"lookup_tokens": 10, "hit_tokens": 5, "loaded_tokens": 5, "ram_chunks": 3, "load_seconds": [0.1]})
    two = LMKVStats(data={"lookup_tokens": 10, "load_failures": 1, "ram_chunks": 2, "loaded_bytes": 10**8})
    both = one.aggregate(two)
    assert both.data["lookup_tokens"] == 20
    assert both.data["ram_chunks"] == 2
    said = both.reduce()
    assert (said["LMKV hit rate (%)"], said["load GB/s"], said["load failures"]) == (25.0, 1.0, 1)
    assert LMKVStats(data={"ram_chunks": 1}).is_empty()
    both.reset()
    assert both.is_empty()


def test_a_model_that_is_not_served_is_computed(engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import lmkv.adapters.vllm.geometry as geometry

    monkeypatch.setattr(geometry, "_UNDERSTOOD", ("NothingSpec",))
    engine = engine_of()
    prompt = text(100, seed=1)
    first, second = engine.ask([prompt]), engine.ask([prompt])
    assert first == second
    assert engine.store is None
    assert "FullAttentionSpec, which is not served" in engine.half.refusal
    assert engine.metric("bypassed_requests_total") == 2
