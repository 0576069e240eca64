"""A vLLM engine in this process, with or without LMKV, and what tests ask of it."""

from __future__ import annotations

import functools
import gc
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vllm.model_executor.models.registry as registry
from models import VOCABULARY
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.platforms import current_platform

# What vLLM does whenever an engine starts or ends, and once is enough for in a process of many engines.
# One that ends has the collector look through all that was ever imported, several times; here that stays out of its sight.
_freeze = gc.freeze
gc.freeze = gc.unfreeze = lambda: None
# It looks through all modules for kernels that the CPU has in C++, and puts these in their place.
_Platform: Any = type(current_platform)
if hasattr(_Platform, "register_triton_kernel_overrides"):  # not in older versions
    _Platform.register_triton_kernel_overrides = staticmethod(functools.cache(_Platform.register_triton_kernel_overrides))
# It asks a process of its own what a model can do, lest this one touches a GPU.
registry._run_in_subprocess = lambda asked: asked()

#: Tokens of a block and of a chunk; they differ, so that neither hides the other's edges.
BLOCK, CHUNK = 32, 48


@dataclass(frozen=True)
class Answer:
    """What became of one prompt."""

    tokens: tuple[int, ...]
    logprobs: tuple[dict[int, float], ...]
    cached: int
    reason: str | None


def text(length: int, seed: int) -> list[int]:
    """Random token ids."""
    numbers = random.Random(seed)
    return [numbers.randrange(VOCABULARY) for _ in range(length)]


def greedy(tokens: int) -> SamplingParams:
    """Greedy, of so many tokens."""
    return SamplingParams(max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True)


def difference(a: Answer, b: Answer) -> float:
    """Largest difference of log-probabilities, over tokens that both list; tokens must be equal."""
    assert a.tokens == b.tokens, f"greedy tokens differ: {a.tokens} and {b.tokens}"
    return max(
        abs(one[token] - other[token])
        for one, other in zip(a.logprobs, b.logprobs, strict=True)
        for token in one.keys() & other.keys()
    )


def assert_same(found: list[Answer], wanted: list[Answer]) -> None:
    """Equal greedy tokens, and log-probabilities within 1e-4."""
    for answer, reference in zip(found, wanted, strict=True):
        assert difference(answer, reference) < 1e-4


class Engine:
    """An ``LLM`` in float32.

    Args:
        model: folder.
        connector: ``kv_connector_extra_config``, or ``None`` for no connector.
        policy: ``kv_load_failure_policy``.
        settings: of ``LLM``.
    """

    _open = 0

    def __init__(
        self,
        model: Path,
        *,
        connector: dict[str, Any] | None = {},  # noqa: B006  only read
        policy: str = "recompute",
        role: str = "kv_both",
        **settings: Any,
    ) -> None:
        if connector is not None:
            extra = {"lmkv.chunk_size": CHUNK, "lmkv.ram_capacity": "64MiB", "lmkv.ram_extent": "4MiB", **connector}
            settings["kv_transfer_config"] = KVTransferConfig(
                kv_connector="LMKVConnector", kv_role=role, kv_load_failure_policy=policy, kv_connector_extra_config=extra
            )
        defaults: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 1024,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 1024,
            "enable_prefix_caching": False,
            "block_size": BLOCK,
            "num_gpu_blocks_override": 512,
            "skip_tokenizer_init": True,
            "disable_log_stats": False,
            "seed": 0,
        }
        if not Engine._open:
            gc.collect()
            _freeze()
        self.llm = LLM(model=str(model), **(defaults | settings))
        Engine._open += 1
        self._connected = connector is not None

    def ask(
        self, prompts: list[list[int]], *, tokens: int = 6, params: Any = None, lora: Any = None, **more: Any
    ) -> list[Answer]:
        """Greedy answers to prompts that come together, by the LoRA adapter or adapters that are named."""
        sampling = [
            SamplingParams(
                max_tokens=tokens,
                temperature=0,
                logprobs=5,
                detokenize=False,
                ignore_eos=True,
                extra_args={"kv_transfer_params": params} if params else None,
                **more,
            )
            for _ in prompts
        ]
        asked = [prompt if isinstance(prompt, dict) else {"prompt_token_ids": prompt} for prompt in prompts]
        return [_answer(output) for output in self.llm.generate(asked, sampling, use_tqdm=False, lora_request=lora)]

    def computed(self, prompts: list[list[int]]) -> list[Answer]:
        """Answers for which nothing is loaded or kept; ``test_reuse.py`` proves them to be those without a connector."""
        found = []
        for prompt in prompts:
            self.settle()
            self.forget_local()
            found += self.ask([prompt], params={"lmkv.skip_load": True, "lmkv.skip_save": True})
        assert not any(answer.cached for answer in found)
        self.settle()
        self.forget_local()
        return found

    def one_by_one(self, prompts: list[list[int]], **more: Any) -> list[Answer]:
        """Greedy answers to prompts that come after one another."""
        return [self.ask([prompt], **more)[0] for prompt in prompts]

    @property
    def core(self) -> Any:
        """vLLM's engine core."""
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def connector(self) -> Any:
        """The scheduler's connector."""
        return self.core.scheduler.connector

    @property
    def half(self) -> Any:
        """The connector's scheduler half."""
        return self.connector._scheduler

    @property
    def store(self) -> Any:
        """The store."""
        return self.half.store

    @property
    def worker(self) -> Any:
        """The connector's worker half."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()._worker

    @staticmethod
    def metric(name: str) -> float:
        """A value of ``lmkv:…`` as Prometheus would read it."""
        from prometheus_client import REGISTRY

        found = [sample.value for metric in REGISTRY.collect() for sample in metric.samples if sample.name == f"lmkv:{name}"]
        return found[0] if found else 0.0

    def forget_local(self) -> None:
        """Empty vLLM's own prefix cache."""
        assert self.llm.reset_prefix_cache()

    def settle(self, seconds: float = 10.0) -> None:
        """Step until nothing is under way."""
        until = time.monotonic() + seconds
        while self.core.scheduler.has_requests() and time.monotonic() < until:
            self.core.step()

    def check_clean(self) -> None:
        """Nothing is left behind: no request, copy, lease, reservation or block."""
        self.settle()
        scheduler = self.core.scheduler
        assert not scheduler.requests
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # the null block
        half = self.half
        assert not half._requests
        assert not half._copies
        assert not half._lookups.filling
        assert not self.worker._running
        assert not self.worker._held
        if half.store is not None:
            stats = half.store.stats()
            assert (stats.leases, stats.reservations) == (0, 0)
            half.store._check()
            half.store.flush(10)  # what waits to be written is pinned
            assert all(node.pins == 0 for node in half.store._ram.index)

    def close(self) -> None:
        """End the engine; what was left behind is an error."""
        if self.llm is None:
            return
        try:
            if self._connected:
                self.check_clean()
        finally:
            from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

            self.core.shutdown()
            ensure_kv_transfer_shutdown()
            self.llm = None
            Engine._open -= 1
            gc.collect()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _answer(output: Any) -> Answer:
    first = output.outputs[0]
    logprobs = tuple({token: entry.logprob for token, entry in step.items()} for step in first.logprobs or ())
    return Answer(tuple(first.token_ids), logprobs, output.num_cached_tokens or 0, first.finish_reason)
